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

/// A request with these fields.
fn asking(extra: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
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
        let reply = server.post(PATH, &asking(&extra)).await;
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
        schema(json!({"enum": (0..100_000).map(|i| i.to_string()).collect::<Vec<_>>()})),
        schema(json!({"allOf": [{"type": "string"}, {"type": "integer"}]})),
        schema(json!({"type": "string", "pattern": nested})),
        json!({"structured_outputs": {"grammar": format!("start: {nested}")}}),
    ];
    for extra in cases {
        let (body, harmless) = (asking(&extra), asking(&json!({"response_format": {"type": "json_object"}})));
        let (reply, beside) = tokio::join!(server.post(PATH, &body), server.post(PATH, &harmless));
        assert_eq!(beside.status, 200, "beside {extra:.100}: {beside:?}");
        let shown: String = extra.to_string().chars().take(120).collect();
        assert_eq!(reply.status, 400, "{shown}: {reply:?}");
        assert_eq!(reply.json()["error"]["code"], "invalid_schema", "{shown}");
    }
}

/// Grammars that brought other servers down: accepted as a constraint or refused, never a failure and never ignored (this
/// server refuses requests without a constraint with another code).
#[tokio::test]
async fn odd_grammars_are_answered() {
    let server = strict_server().await;
    let all_of: Vec<Value> = (0..1000).map(|i| json!({"type": "integer", "minimum": i})).collect();
    let regex = |regex: &str| json!({"structured_outputs": {"regex": regex}});
    let schema = |schema: Value| json!({"structured_outputs": {"json": schema}});
    let cases = [
        regex("^{2}x$"),
        regex("^+[a-z]$"),
        regex("(a*)*b"),
        regex("a{1,1000000}"),
        schema(json!({"$ref": "#"})),
        schema(json!({"type": "object", "properties": {"next": {"$ref": "#"}}})),
        schema(json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        schema(json!({"allOf": all_of})),
    ];
    for extra in cases {
        let reply = server.post(PATH, &asking(&extra)).await;
        match reply.status {
            200 => {}
            status => {
                assert_eq!((status, &reply.json()["error"]["param"]), (400, &json!("response_format")), "{extra:.100}")
            }
        }
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
