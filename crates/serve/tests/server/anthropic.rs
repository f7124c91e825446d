//! `/v1/messages`: exact frames, and what Claude Code sends.

use crate::client::{TestServer, options};
use moellon_engine::RequestError;
use moellon_serve::ServeOptions;
use moellon_serve::scripted::ScriptedAnswer;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PATH: &str = "/v1/messages?beta=true";
const CALL: &str = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>";

fn body(extra: Value) -> Value {
    let mut body = json!({"model": "claude-x", "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn weather() -> Value {
    json!({"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}})
}

/// The types of the events, repeated deltas once.
fn types(events: &[Value]) -> Vec<String> {
    let mut types: Vec<String> = events
        .iter()
        .map(|event| match event["delta"]["type"].as_str() {
            Some(kind) => kind.to_owned(),
            None => event["type"].as_str().unwrap().to_owned(),
        })
        .collect();
    types.dedup();
    types
}

#[tokio::test]
async fn a_stream_has_exactly_the_events_that_clients_expect() {
    let server =
        TestServer::start(options(), |_, _| ScriptedAnswer::text(format!("why</think>Let me see.{CALL}"))).await;
    let reply = server.post(PATH, &body(json!({"stream": true, "tools": [weather()]}))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    for frame in reply.frames() {
        let (event, data) = frame.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event.strip_prefix("event: ").unwrap(), data["type"]);
    }
    let events = reply.data();
    assert_eq!(
        types(&events),
        [
            "message_start",
            "ping",
            "content_block_start",
            "thinking_delta",
            "signature_delta",
            "content_block_stop",
            "content_block_start",
            "text_delta",
            "content_block_stop",
            "content_block_start",
            "input_json_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    let message = &events[0]["message"];
    assert_eq!(message["role"], "assistant");
    assert_eq!(message["content"], json!([]));
    assert!(message["usage"]["input_tokens"].as_u64().unwrap() > 0);
    let starts: Vec<&Value> = events.iter().filter(|event| event["type"] == "content_block_start").collect();
    for (index, (start, kind)) in starts.iter().zip(["thinking", "text", "tool_use"]).enumerate() {
        assert_eq!(start["index"], index);
        assert_eq!(start["content_block"]["type"], kind);
    }
    assert_eq!(starts[2]["content_block"]["name"], "get_weather");
    assert_eq!(starts[2]["content_block"]["input"], json!({}));
    let partial: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(partial, "{\"city\":\"Paris\"}");
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
    assert!(end["usage"]["output_tokens"].as_u64().unwrap() > 5);
    assert!(!reply.body.contains("timings"));
}

#[tokio::test]
async fn a_whole_answer_has_its_blocks() {
    let server = TestServer::start(options(), |_, _| ScriptedAnswer::text(format!("why</think>See.{CALL}"))).await;
    let message = server.post(PATH, &body(json!({"tools": [weather()]}))).await.json();
    assert_eq!(message["type"], "message");
    assert_eq!(message["content"][0]["thinking"], "why");
    assert_eq!(message["content"][1], json!({"type": "text", "text": "See."}));
    assert_eq!(message["content"][2]["input"], json!({"city": "Paris"}));
    assert_eq!(message["stop_reason"], "tool_use");
}

#[tokio::test]
async fn endings_have_their_names() {
    let server = TestServer::saying("</think>one two HALT three").await;
    let message = server.post(PATH, &body(json!({"stop_sequences": ["HALT"]}))).await.json();
    assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&json!("stop_sequence"), &json!("HALT")));
    let message = server.post(PATH, &body(json!({"max_tokens": 2}))).await.json();
    assert_eq!(message["stop_reason"], "max_tokens");
    let message = server.post(PATH, &body(json!({}))).await.json();
    assert_eq!(message["stop_reason"], "end_turn");
}

#[tokio::test]
async fn claude_codes_request_is_understood() {
    let seen: Arc<Mutex<String>> = Arc::default();
    let in_script = Arc::clone(&seen);
    let server = TestServer::start(options(), move |prompt, _| {
        *in_script.lock().unwrap() = prompt.to_owned();
        ScriptedAnswer::text("</think>ok")
    })
    .await;
    let cache = json!({"type": "ephemeral"});
    let request = |billing: &str| {
        body(json!({
            "system": [
                {"type": "text", "text": format!("x-anthropic-billing-header: {billing}")},
                {"type": "text", "text": "You are an agent.", "cache_control": cache},
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "look", "cache_control": cache}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "and?"}]},
                {"role": "system", "content": "a reminder"},
            ],
            "tools": [weather(), {"type": "web_search_20250305", "name": "web_search"}],
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": "high"},
            "context_management": {"edits": []},
            "metadata": {"user_id": "u"},
        }))
    };
    let mut prompts = Vec::new();
    for billing in ["cc_version=1", "cc_version=2"] {
        let reply = server.post(PATH, &request(billing)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        prompts.push(seen.lock().unwrap().clone());
    }
    assert_eq!(prompts[0], prompts[1], "the billing line must not change the prompt");
    for part in [
        "You are an agent.",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
        "<tool_response>sunny</tool_response><|user|>and?<|system|>a reminder",
    ] {
        assert!(prompts[0].contains(part), "{part} is not in {}", prompts[0]);
    }
    let mut count = request("x");
    count.as_object_mut().unwrap().remove("max_tokens");
    let counted = server.post("/v1/messages/count_tokens", &count).await.json()["input_tokens"].as_u64().unwrap();
    let usage = server.post(PATH, &request("x")).await.json()["usage"]["input_tokens"].as_u64().unwrap();
    assert_eq!(counted, usage);
    assert_eq!(server.request("HEAD", "/", &[], b"").await.status, 200);
}

#[tokio::test]
async fn errors_have_anthropics_shape() {
    let options = ServeOptions { api_keys: vec!["k".to_owned()], ..options() };
    let server = TestServer::start(options, |prompt, _| match prompt.contains("busy") {
        true => ScriptedAnswer { refuse: Some(RequestError::ShuttingDown), ..ScriptedAnswer::default() },
        false => ScriptedAnswer {
            fail_after: Some((1, RequestError::Engine("lost".to_owned()))),
            ..ScriptedAnswer::text("</think>ab")
        },
    })
    .await;
    let key = [("x-api-key", "k")];
    let without_limit = json!({"messages": [{"role": "user", "content": "a"}]});
    let busy = body(json!({"messages": [{"role": "user", "content": "busy"}]}));
    let cases = [
        (&[][..], body(json!({})), 401, "authentication_error"),
        (&key[..], without_limit, 400, "invalid_request_error"),
        (&key[..], body(json!({"model": "other"})), 404, "not_found_error"),
        (&key[..], body(json!({"thinking": {"type": "maybe"}})), 400, "invalid_request_error"),
        (
            &key[..],
            body(json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]})),
            400,
            "invalid_request_error",
        ),
        (&key[..], busy, 529, "overloaded_error"),
    ];
    for (headers, body, status, kind) in cases {
        let reply = server.request("POST", PATH, headers, body.to_string().as_bytes()).await;
        assert_eq!(reply.status, status, "{reply:?}");
        let error = reply.json();
        assert_eq!(error["type"], "error");
        assert_eq!(error["error"]["type"], kind);
        assert!(error["request_id"].as_str().unwrap().starts_with("req_"));
    }
    let stream = body(json!({"stream": true})).to_string();
    let reply = server.request("POST", PATH, &key, stream.as_bytes()).await;
    let last = *reply.frames().last().unwrap();
    assert!(last.starts_with("event: error\ndata: "), "{last}");
}

#[tokio::test]
async fn long_waits_have_pings() {
    let options = ServeOptions { heartbeat: Duration::from_millis(20), ..options() };
    let server = TestServer::start(options, |_, _| ScriptedAnswer {
        prefill: Duration::from_millis(200),
        ..ScriptedAnswer::text("</think>ok")
    })
    .await;
    let reply = server.post(PATH, &body(json!({"stream": true}))).await;
    assert!(reply.data().iter().filter(|event| event["type"] == "ping").count() >= 3);
}
