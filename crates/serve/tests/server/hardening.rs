//! Bad input, strangers, and clients that leave: nothing is a 5xx, and the next request works.

use crate::client::{TestServer, options};
use moellon_serve::ServeOptions;
use moellon_serve::scripted::ScriptedAnswer;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATH: &str = "/v1/chat/completions";

/// All that take a body.
const POSTS: [&str; 7] =
    [PATH, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"];

fn hello() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

async fn assert_alive(server: &TestServer) {
    let reply = server.post(PATH, &hello()).await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[tokio::test]
async fn bodies_that_are_no_objects_get_400() {
    let server = TestServer::saying("</think>ok").await;
    let deep = format!("{{\"messages\":{}", "[".repeat(10_000));
    let bodies: [&[u8]; 12] = [
        b"",
        b"not json",
        b"[]",
        b"1",
        b"null",
        b"{\"temperature\": NaN}",
        b"{\"temperature\": Infinity}",
        b"\xef\xbb\xbf{\"messages\": []}",
        b"{\"messages\": \"\xff\xfe\"}",
        b"{\"messages\": \"\\ud800\"}",
        b"{\"messages\": []",
        deep.as_bytes(),
    ];
    for body in bodies {
        for path in POSTS {
            let reply = server.request("POST", path, &[], body).await;
            assert_eq!(reply.status, 400, "{path}: {:?}", String::from_utf8_lossy(&body[..body.len().min(60)]));
            let error = &reply.json()["error"];
            assert_eq!(error["type"], "invalid_request_error");
            assert!(error["message"].is_string());
        }
    }
    // The last of two keys counts; NUL is a character like others.
    let doubled = br#"{"messages": 1, "messages": [{"role": "user", "content": "a\u0000b"}]}"#;
    assert_eq!(server.request("POST", PATH, &[], doubled).await.status, 200);
    assert_alive(&server).await;
}

#[tokio::test]
async fn http_itself_has_limits() {
    let mut options = options();
    options.http.max_body_bytes = 1 << 20;
    options.http.body_timeout = Duration::from_millis(200);
    options.http.header_timeout = Duration::from_millis(200);
    let server = TestServer::start(options, |_, _| ScriptedAnswer::text("</think>ok")).await;
    let big =
        format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 104857600\r\n\r\n");
    assert_eq!(server.raw(big.as_bytes()).await.status, 413);
    let chunk = format!("{:x}\r\n{}\r\n", 64 << 10, "a".repeat(64 << 10)).repeat(20);
    let chunked = format!(
        "POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{chunk}"
    );
    let status = server.raw(chunked.as_bytes()).await.status;
    assert!(status == 413 || status == 0, "{status}"); // closing with unread input may lose the answer
    let long = "a".repeat(40 << 10);
    assert_eq!(server.request("GET", "/health", &[("x-long", &long)], b"").await.status, 431);
    let many: Vec<(String, String)> = (0..200).map(|n| (format!("x-{n}"), "1".to_owned())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(server.request("GET", "/health", &many, b"").await.status, 431);
    assert_eq!(server.request("POST", PATH, &[("content-encoding", "gzip")], b"{}").await.status, 415);
    assert_eq!(server.request("GET", PATH, &[], b"").await.status, 405);
    assert_eq!(server.request("DELETE", "/health", &[], b"").await.status, 405);
    let missing = server.get("/v2/nothing").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.json()["error"]["code"], "not_found");
    // Half a body, half a head.
    let slow =
        format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{{\"a");
    assert_eq!(server.raw(slow.as_bytes()).await.status, 408);
    let status = server.raw(b"POST /v1/chat/comple").await.status;
    assert!(status == 0 || status == 408, "{status}");
    // Old and chunked and in a row.
    let body = hello().to_string();
    let old = format!("POST {PATH} HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    assert_eq!(server.raw(old.as_bytes()).await.status, 200);
    let chunked = format!(
        "POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    assert_eq!(server.raw(chunked.as_bytes()).await.status, 200);
    let pipelined = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let reply = server.raw(pipelined.as_bytes()).await;
    assert!(reply.body.contains("HTTP/1.1 200"), "{reply:?}");
    assert_alive(&server).await;
}

#[tokio::test]
async fn bad_fields_get_400_with_their_name() {
    let server = TestServer::saying("</think>ok").await;
    let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
    let many_tools: Vec<Value> = (0..5000).map(|n| tool(&format!("t{n}"))).collect();
    let many_biases: Value =
        (0..1_000_000).map(|n| (n.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let many_stops: Vec<String> = (0..10_000).map(|n| n.to_string()).collect();
    let cases = [
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1e308}), "max_tokens"),
        (json!({"max_tokens": "10"}), "max_tokens"),
        (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
        (json!({"n": 0}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"n": 1_000_000_000}), "n"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 1e308}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"min_p": -0.5}), "min_p"),
        (json!({"frequency_penalty": 100}), "frequency_penalty"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 1_000_000}), "top_logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"seed": 1e30}), "seed"),
        (json!({"seed": "x"}), "seed"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logit_bias": {"1": "x"}}), "logit_bias"),
        (json!({"logit_bias": many_biases}), "logit_bias"),
        (json!({"stop": many_stops}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": "a".repeat(1 << 20)}), "stop"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{}]}), "messages[0].role"),
        (json!({"messages": [123]}), "messages[0]"),
        (json!({"messages": [{"role": 123, "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "critic", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 123}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"tools": many_tools}), "tools"),
        (json!({"tools": [tool("a(b")]}), "tools[0].function.name"),
        (json!({"tools": [tool("a\u{7}b")]}), "tools[0].function.name"),
        (json!({"tools": [tool("")]}), "tools[0].function.name"),
        (json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": "sometimes"}), "tool_choice"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"reasoning_effort": "extreme"}), "reasoning_effort"),
        (json!({"chat_template_kwargs": {"tokenize": true}}), "chat_template_kwargs.tokenize"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages"),
        (
            json!({"chat_template_kwargs": {"add_generation_prompt": false}}),
            "chat_template_kwargs.add_generation_prompt",
        ),
        (json!({"chat_template_kwargs": 3}), "chat_template_kwargs"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema.schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 123}}}),
            "response_format.json_schema.schema",
        ),
        // No compiler in this build: never an unconstrained 200.
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"structured_outputs": {"regex": "a*"}}), "response_format"),
        (json!({"structured_outputs": {"regex": "(".repeat(1 << 20)}}), "structured_outputs.regex"),
        (json!({"grammar": "root ::= x"}), "grammar"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"adapter": "../../adapters/mine"}), "adapter"),
        (json!({"draft_model": "/etc/passwd"}), "draft_model"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"best_of": 0}), "best_of"),
        (json!({"best_of": 9}), "best_of"),
        (json!({"n": 3, "best_of": 2}), "best_of"),
        (json!({"best_of": 2, "stream": true}), "best_of"),
        (json!({"messages": [{"role": "user", "content": "word ".repeat(20_000)}]}), "messages"),
    ];
    for (extra, param) in cases {
        let mut body = hello();
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let reply = server.post(PATH, &body).await;
        let shown: String = extra.to_string().chars().take(100).collect();
        assert_eq!(reply.status, 400, "{shown}: {reply:?}");
        assert_eq!(reply.json()["error"]["param"], param, "{shown}: {reply:?}");
    }
    assert_alive(&server).await;
}

#[tokio::test]
async fn odd_but_harmless_requests_are_answered() {
    let server = TestServer::saying("</think>ok").await;
    let cases = [
        json!({"max_tokens": 1u64 << 31}),
        json!({"max_tokens": 1u64 << 63}),
        json!({"seed": i64::MIN}),
        json!({"seed": u64::MAX}),
        json!({"top_k": -1}),
        json!({"n": 1.0, "max_tokens": 5.0}),
        json!({"temperature": null, "stop": null, "tools": null}),
        json!({"metadata": {"a": 1}, "store": false, "user": "x", "prompt_cache_key": "y", "unknown": [1]}),
        json!({"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        json!({"messages": [{"role": "tool", "content": "result", "tool_call_id": "never"}]}),
        json!({"model": "claude-sonnet-4"}),
    ];
    for extra in cases {
        let mut body = hello();
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let reply = server.post(PATH, &body).await;
        assert_eq!(reply.status, 200, "{extra}: {reply:?}");
    }
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_refused_with_numbers() {
    let server = TestServer::saying("</think>ok").await;
    let body = json!({"messages": [{"role": "user", "content": "word ".repeat(20_000)}]});
    let error = server.post(PATH, &body).await.json()["error"].clone();
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(error["message"].as_str().unwrap().contains("expected at most 4095"), "{error}");
}

#[tokio::test]
async fn only_known_models_are_served() {
    let server = TestServer::saying("</think>ok").await;
    let long = "a".repeat(4096);
    for name in [
        "../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "https://example.com/x",
        "tiny/../tiny",
        "a\u{0}b",
        long.as_str(),
        "",
    ] {
        let mut body = hello();
        body["model"] = json!(name);
        let reply = server.post(PATH, &body).await;
        assert_eq!(reply.status, 404, "{reply:?}");
        assert_eq!(reply.json()["error"]["code"], "model_not_found");
    }
    for path in ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fetc", "/v1/models/other"] {
        assert_eq!(server.get(path).await.status, 404, "{path}");
    }
    assert_eq!(server.get("/v1/models/tiny").await.status, 200);
}

#[tokio::test]
async fn keys_are_asked_for_everywhere_but_health() {
    let options = ServeOptions { api_keys: vec!["secret".to_owned()], ..options() };
    let server = TestServer::start(options, |_, _| ScriptedAnswer::text("</think>ok")).await;
    let paths = [
        ("POST", PATH),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/server_info"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/models/unload"),
        ("DELETE", "/moellon/requests/mine"),
        ("GET", "/moellon/status"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
        ("GET", "/nothing"),
    ];
    for (method, path) in paths {
        for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("x-api-key", "secre")]] {
            let reply = server.request(method, path, headers, b"{}").await;
            assert_eq!(reply.status, 401, "{path}");
            assert_eq!(reply.json()["error"]["type"], "authentication_error");
            assert!(!reply.body.contains("secret"));
        }
    }
    let body = hello().to_string();
    for header in [("authorization", "Bearer secret"), ("x-api-key", "secret")] {
        assert_eq!(server.request("POST", PATH, &[header], body.as_bytes()).await.status, 200);
    }
    assert_eq!(server.get("/health").await.status, 200);
    assert!(server.get("/").await.head.contains("www-authenticate: basic"));
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused() {
    let server = TestServer::saying("</think>ok").await;
    let body = hello().to_string();
    for header in [("host", "evil.example"), ("origin", "https://evil.example"), ("origin", "null")] {
        let reply = server.request("POST", PATH, &[header], body.as_bytes()).await;
        assert_eq!(reply.status, 403, "{header:?}");
        assert!(!reply.head.contains("access-control"));
    }
    let own = [("host", "127.0.0.1:80"), ("origin", "http://127.0.0.1:80")];
    assert_eq!(server.request("POST", PATH, &own, body.as_bytes()).await.status, 200);
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen within 5 s");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let server = TestServer::start(options(), |prompt, _| {
        let begin = if prompt.contains("call") { "<tool_call>look<arg_key>at</arg_key><arg_value>" } else { "" };
        ScriptedAnswer {
            prefill: Duration::from_secs(if prompt.contains("prefill") { 3600 } else { 0 }),
            token_time: Duration::from_millis(5),
            ..ScriptedAnswer::text(format!("</think>{begin}{}", "word ".repeat(2000)))
        }
    })
    .await;
    let tool = json!({"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}});
    let cases =
        [("prefill", true), ("prefill", false), ("decode", true), ("decode", false), ("call", true), ("call", false)];
    for (cancelled, (content, stream)) in (1..).zip(cases) {
        let body =
            json!({"messages": [{"role": "user", "content": content}], "stream": stream, "tools": [tool]}).to_string();
        let head = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(socket);
        wait_until(&format!("cancelling {content}, stream {stream}"), || server.generator.num_cancelled() == cancelled)
            .await;
    }
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.contains("finished_reason=\"abort\"} 6"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cancelled() {
    let mut options = options();
    options.http.write_timeout = Duration::from_millis(300);
    // More than the sockets' buffers hold: about 200 bytes of frame a token.
    let server =
        TestServer::start(options, |_, _| ScriptedAnswer::text("</think>".to_owned() + &"word ".repeat(60_000))).await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "stream": true, "n": 8, "logprobs": true, "top_logprobs": 20}).to_string();
    let head = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = server.get("/v1/loads").await.json();
    assert!(before["loads"].is_array());
    wait_until("giving up on the reader", || {
        let metrics = server.generator.num_tokens();
        metrics > 0
    })
    .await;
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = socket.read_to_end(&mut rest).await;
    });
    ended.await.expect("the server closes the connection");
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    assert_alive_after_flood(&server).await;
}

async fn assert_alive_after_flood(server: &TestServer) {
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_clients_at_once() {
    let server = std::sync::Arc::new(
        TestServer::start(options(), |prompt, _| {
            let number: String = prompt.chars().filter(char::is_ascii_digit).collect();
            ScriptedAnswer {
                token_time: Duration::from_millis(1),
                ..ScriptedAnswer::text(format!("</think>answer {number}"))
            }
        })
        .await,
    );
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..200 {
        let server = std::sync::Arc::clone(&server);
        tasks.spawn(async move {
            let body = json!({"messages": [{"role": "user", "content": format!("number {number}")}], "stream": number % 2 == 0});
            match number % 5 {
                // One in five leaves, one in five sends nonsense.
                3 => {
                    let text = body.to_string();
                    let head = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{text}", text.len());
                    let mut socket = TcpStream::connect(server.address).await.unwrap();
                    socket.write_all(head.as_bytes()).await.unwrap();
                }
                4 => assert_eq!(server.request("POST", PATH, &[], b"{").await.status, 400),
                _ => {
                    let reply = server.post(PATH, &body).await;
                    assert_eq!(reply.status, 200, "{reply:?}");
                    let text: String = match number % 2 {
                        0 => reply.data().iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect(),
                        _ => reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
                    };
                    assert_eq!(text, format!("answer {number}"));
                }
            }
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
    assert_alive(&server).await;
}

#[tokio::test]
async fn a_stop_signal_lets_requests_finish() {
    let mut server = TestServer::start(ServeOptions { drain: Duration::from_secs(5), ..options() }, |_, _| {
        ScriptedAnswer { token_time: Duration::from_millis(20), ..ScriptedAnswer::text("</think>one two three four") }
    })
    .await;
    let address = server.address;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "stream": true}).to_string();
    let head = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("[DONE]"), "{answer}");
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_with_the_address() {
    let server = TestServer::saying("</think>ok").await;
    let options = ServeOptions { address: server.address, ..options() };
    let generator = std::sync::Arc::clone(&server.generator);
    let error = moellon_serve::Server::bind(options, crate::client::served_model(), generator).await.err().unwrap();
    assert!(error.to_string().starts_with(&format!("cannot listen on {}", server.address)), "{error}");
    assert_alive(&server).await;
}
