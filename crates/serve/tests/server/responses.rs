//! `/v1/responses`: exact frames, and what Codex sends.

use crate::client::{TestServer, options};
use moellon_serve::scripted::ScriptedAnswer;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

const PATH: &str = "/v1/responses";
const CALL: &str = "<tool_call>shell<arg_key>command</arg_key><arg_value>ls</arg_value></tool_call>";

fn shell() -> Value {
    let parameters = json!({"type": "object", "properties": {"command": {"type": "string"}}});
    json!({"type": "function", "name": "shell", "parameters": parameters, "strict": false})
}

#[tokio::test]
async fn a_stream_has_exactly_the_events_that_clients_expect() {
    let server = TestServer::start(options(), |_, _| ScriptedAnswer::text(format!("why</think>I look.{CALL}"))).await;
    let reply = server.post(PATH, &json!({"input": "hi", "stream": true, "tools": [shell()]})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let events = reply.data();
    let mut types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    types.dedup();
    let expected = [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(types, expected.map(|name| format!("response.{name}")));
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let response = &events.last().unwrap()["response"];
    assert_eq!(response["status"], "completed");
    assert_eq!(response["output"][0]["content"][0]["text"], "why");
    assert_eq!(response["output"][1]["content"][0]["text"], "I look.");
    assert_eq!(response["output"][2]["arguments"], "{\"command\":\"ls\"}");
    let usage = &response["usage"];
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 0);
    assert!(usage["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() >= 2);
    // Items keep their ids and places.
    let added: Vec<&Value> = events.iter().filter(|event| event["type"] == "response.output_item.added").collect();
    for (index, event) in added.iter().enumerate() {
        assert_eq!(event["output_index"], index);
        assert_eq!(event["item"]["id"], response["output"][index]["id"]);
    }
}

#[tokio::test]
async fn a_cut_answer_is_incomplete() {
    let server = TestServer::saying("</think>one two three four five").await;
    let response = server.post(PATH, &json!({"input": "hi", "max_output_tokens": 3})).await.json();
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
    let reply = server.post(PATH, &json!({"input": "hi", "max_output_tokens": 3, "stream": true})).await;
    assert_eq!(reply.data().last().unwrap()["type"], "response.incomplete");
}

#[tokio::test]
async fn codexs_request_is_understood() {
    let seen: Arc<Mutex<String>> = Arc::default();
    let in_script = Arc::clone(&seen);
    let server = TestServer::start(options(), move |prompt, _| {
        *in_script.lock().unwrap() = prompt.to_owned();
        ScriptedAnswer::text("</think>done")
    })
    .await;
    let body = json!({
        "model": "tiny",
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list files"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "zzz"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": "{\"command\": \"ls\"}"},
            {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
        ],
        "tools": [shell(), {"type": "namespace", "name": "n", "tools": []}, {"type": "web_search"}],
        "tool_choice": "auto", "parallel_tool_calls": true, "store": false, "stream": false,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "thread", "client_metadata": {"a": "b"},
        "reasoning": {"effort": "high", "summary": "auto"},
    });
    let reply = server.post(PATH, &body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.head.matches("warning: 199").count(), 2);
    assert_eq!(reply.json()["output"][0]["content"][0]["text"], "done");
    let prompt = seen.lock().unwrap().clone();
    let call = "I look.<tool_call>shell<arg_key>command</arg_key><arg_value>ls</arg_value></tool_call>";
    for part in ["Be brief.", "<|system|>rules<|user|>list files", call, "<tool_response>a.txt</tool_response>"] {
        assert!(prompt.contains(part), "{part} is not in {prompt}");
    }
}

#[tokio::test]
async fn what_needs_storage_is_refused() {
    let server = TestServer::saying("</think>ok").await;
    let cases = [
        (json!({"input": "a", "previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"input": "a", "background": true}), "background"),
        (json!({"input": "a", "truncation": "auto"}), "truncation"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
        (json!({"input": []}), "input"),
        (json!({}), "input"),
        (json!({"input": [3]}), "input[0]"),
        (json!({"input": "a", "max_output_tokens": 0}), "max_output_tokens"),
        (json!({"input": "a", "text": {"format": {"type": "json_schema"}}}), "text.format.json_schema.schema"),
    ];
    for (body, param) in cases {
        let reply = server.post(PATH, &body).await;
        assert_eq!(reply.status, 400, "{body}: {reply:?}");
        assert_eq!(reply.json()["error"]["param"], param);
    }
}
