//! Structured output and forced tool calls: a constraint reaches the engine, or the request gets 400.

use crate::client::{TestServer, options, served_model};
use moellon_engine::RequestError;
use moellon_serve::scripted::ScriptedAnswer;
use moellon_serve::{ConstraintCompiler, Grammar, GrammarConstraints, ServedModel};
use moellon_text::constraint::{Constraint, ConstraintError};
use serde_json::{Value, json};
use std::sync::Arc;

const PATH: &str = "/v1/chat/completions";

fn model() -> ServedModel {
    let model = served_model();
    let compiler = GrammarConstraints::new(Arc::clone(&model.tokenizer), model.vocab_size).unwrap();
    ServedModel { constraints: Some(Arc::new(compiler)), ..model }
}

/// A server that refuses requests without a constraint.
async fn strict_server() -> TestServer {
    TestServer::start_with(model(), options(), move |_, request| match &request.constraint {
        None => {
            let refuse = Some(RequestError::Constraint("found none".to_owned()));
            ScriptedAnswer { refuse, ..ScriptedAnswer::default() }
        }
        Some(_) => ScriptedAnswer::text("</think>ok"),
    })
    .await
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "where": {"$ref": "#/$defs/point"},
        },
        "required": ["city"],
        "$defs": {"point": {"type": "array", "items": {"type": "number"}}},
    });
    json!([{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}])
}

#[tokio::test]
async fn constraints_reach_the_engine() {
    let server = strict_server().await;
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    let mut strict = tools();
    strict[0]["function"]["strict"] = json!(true);
    let cases = [
        json!({"response_format": {"type": "json_object"}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}}),
        json!({"structured_outputs": {"regex": "[a-z]+"}}),
        json!({"structured_outputs": {"choice": ["yes", "no"]}}),
        json!({"guided_choice": ["yes", "no"]}),
        json!({"tools": tools(), "tool_choice": "required"}),
        json!({"tools": tools(), "tool_choice": named, "parallel_tool_calls": false}),
        json!({"tools": strict}),
    ];
    for extra in cases {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let reply = server.post(PATH, &body).await;
        assert_eq!(reply.status, 200, "{extra}: {reply:?}");
    }
}

#[tokio::test]
async fn grammars_that_cannot_be_used_get_400() {
    let server = strict_server().await;
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}});
    let regex = |regex: &str| json!({"structured_outputs": {"regex": regex}});
    let nested = format!("{}a{}", "(".repeat(60_000), ")".repeat(60_000));
    let cases = [
        schema(json!({"type": 123})),
        schema(json!({"type": "hiccup"})),
        schema(json!({"properties": {"foo": "bar"}})),
        schema(json!({"$ref": "https://example.com/schema.json"})),
        schema(json!({"$ref": "#/$defs/missing"})),
        regex(&nested),
        regex("("),
        regex("(?<=a)b"),
    ];
    for extra in cases {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let reply = server.post(PATH, &body).await;
        let shown: String = extra.to_string().chars().take(120).collect();
        assert_eq!(reply.status, 400, "{shown}: {reply:?}");
        assert_eq!(reply.json()["error"]["code"], "invalid_schema", "{shown}");
    }
}

/// Regular expressions that brought other servers down: accepted as a constraint or refused, never a failure.
#[tokio::test]
async fn odd_regular_expressions_are_answered() {
    let server = strict_server().await;
    for regex in ["^{2}x$", "^+[a-z]$", "(a*)*b", "a{1,1000000}"] {
        let body = json!({"messages": [{"role": "user", "content": "hi"}], "structured_outputs": {"regex": regex}});
        let reply = server.post(PATH, &body).await;
        assert!(matches!(reply.status, 200 | 400), "{regex}: {reply:?}");
    }
}

/// A compiler that others keep from working.
struct Overrun;

impl ConstraintCompiler for Overrun {
    fn compile(&self, _: &Grammar) -> Result<Box<dyn Constraint>, ConstraintError> {
        Err(ConstraintError::Busy { kind: "json_schema" })
    }
}

/// A legal schema that gets no turn is not the client's fault: it is told to come back, in each protocol's way.
#[tokio::test]
async fn a_grammar_that_gets_no_turn_gets_503_and_when_to_come_back() {
    let model = ServedModel { constraints: Some(Arc::new(Overrun)), ..served_model() };
    let server = TestServer::start_with(model, options(), |_, _| ScriptedAnswer::text("</think>ok")).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let reply = server.post(PATH, &json!({"messages": messages, "response_format": {"type": "json_object"}})).await;
    assert_eq!(reply.status, 503, "{reply:?}");
    assert!(reply.head.contains("retry-after: 1"), "{reply:?}");
    assert_eq!(reply.json()["error"]["code"], "grammar_compiler_busy");
    let tool = json!({"name": "look", "input_schema": {"type": "object"}});
    let body = json!({"messages": messages, "max_tokens": 9, "tools": [tool], "tool_choice": {"type": "tool", "name": "look"}});
    let reply = server.post("/v1/messages", &body).await;
    assert_eq!(reply.status, 529, "{reply:?}");
    assert!(reply.head.contains("retry-after: 1"), "{reply:?}");
    assert_eq!(reply.json()["error"]["type"], "overloaded_error");
}
