//! Health, metrics, models, the workers' endpoints and the page.

use crate::client::{TestServer, options};
use moellon_serve::scripted::ScriptedAnswer;
use serde_json::json;
use std::time::Duration;

#[tokio::test]
async fn every_get_route_answers() {
    let server = TestServer::saying("</think>ok").await;
    for path in [
        "/health",
        "/ready",
        "/v1/models",
        "/server_info",
        "/get_server_info",
        "/model_info",
        "/get_model_info",
        "/version",
        "/v1/loads?include=core,queues",
        "/loads?model=tiny",
        "/openapi.json",
        "/moellon/status",
    ] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 200, "{path}");
        assert!(reply.json().is_object(), "{path}");
        assert!(reply.head.contains("x-request-id: req_"), "{path}");
    }
    assert_eq!(server.get("/v1/models").await.json()["data"][0]["id"], "tiny");
    assert_eq!(server.get("/server_info").await.json()["served_model_name"], "tiny");
}

#[tokio::test]
async fn metrics_have_vllms_names() {
    let server = TestServer::saying("</think>ok").await;
    server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "hi"}]})).await;
    let text = server.get("/metrics").await.body;
    for line in [
        "vllm:num_requests_running{model_name=\"tiny\"} 0",
        "vllm:num_requests_waiting{model_name=\"tiny\"} 0",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"stop\"} 1",
        "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 1",
        "vllm:e2e_request_latency_seconds_bucket{model_name=\"tiny\",le=\"+Inf\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(text.contains("vllm:kv_cache_usage_perc") && text.contains("moellon:bandwidth_fraction"));
}

#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let server = TestServer::saying("</think>ok").await;
    let page = server.get("/").await;
    assert_eq!(page.status, 200);
    assert!(page.head.contains("content-security-policy: default-src 'none'"));
    assert!(!page.body.contains("http://") && !page.body.contains("https://"));
}

#[tokio::test]
async fn a_request_of_the_queue_can_be_cancelled() {
    let server = std::sync::Arc::new(
        TestServer::start(options(), |_, _| ScriptedAnswer {
            prefill: Duration::from_secs(3600),
            ..ScriptedAnswer::text("x")
        })
        .await,
    );
    let asking = std::sync::Arc::clone(&server);
    let asked = tokio::spawn(async move {
        let body = json!({"messages": [{"role": "user", "content": "hi"}]}).to_string();
        asking.request("POST", "/v1/chat/completions", &[("x-request-id", "mine")], body.as_bytes()).await
    });
    let mut listed = json!([]);
    for _ in 0..300 {
        listed = server.get("/moellon/status").await.json()["requests"].clone();
        if listed[0]["state"] == "prefill" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(listed[0]["id"], "mine");
    assert_eq!(server.request("DELETE", "/moellon/requests/mine", &[], b"").await.status, 200);
    let reply = asked.await.unwrap();
    assert_eq!(reply.json()["error"]["code"], "cancelled");
    assert!(reply.head.contains("x-request-id: mine"));
    assert_eq!(server.request("DELETE", "/moellon/requests/mine", &[], b"").await.status, 404);
}
