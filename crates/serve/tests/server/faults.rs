//! What happens around a request: an engine that refuses, hangs or fails, a template that raises, a server that stops - and
//! what the log says of it.

use crate::client::{TestServer, options, served_model};
use moellon_engine::{Request, RequestError};
use moellon_serve::scripted::{ScriptedAnswer, ScriptedGenerator};
use moellon_serve::{EventStream, Generator, GeneratorStats, ServeOptions, ServedModel};
use moellon_text::{ChatTemplate, TemplateLimits};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATH: &str = "/v1/chat/completions";

fn hello() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100})
}

/// A generator whose state the test sets.
struct Ailing {
    scripted: Arc<ScriptedGenerator>,
    stats: Mutex<GeneratorStats>,
}

impl Generator for Ailing {
    fn submit(&self, request: Request) -> Result<EventStream, RequestError> {
        self.scripted.submit(request)
    }

    fn stats(&self) -> GeneratorStats {
        self.stats.lock().unwrap().clone()
    }
}

async fn ailing(options: ServeOptions, stats: GeneratorStats, answer: ScriptedAnswer) -> (TestServer, Arc<Ailing>) {
    let model = served_model();
    let scripted = Arc::new(ScriptedGenerator::new(Arc::clone(&model.tokenizer), move |_, _| answer.clone()));
    let generator = Arc::new(Ailing { scripted: Arc::clone(&scripted), stats: Mutex::new(stats) });
    let server = TestServer::start_generator(model, options, scripted, Arc::clone(&generator) as _).await;
    (server, generator)
}

#[tokio::test]
async fn health_is_about_tokens_and_recovers() {
    let stuck = GeneratorStats { running: 1, since_last_step: Duration::from_secs(999), ..GeneratorStats::default() };
    let (server, generator) = ailing(options(), stuck, ScriptedAnswer::text("</think>ok")).await;
    let health = server.get("/health").await;
    assert_eq!((health.status, health.json()["status"].as_str()), (503, Some("stuck")));
    // Nobody waits: no step is due.
    let idle = GeneratorStats { since_last_step: Duration::from_secs(999), ..GeneratorStats::default() };
    *generator.stats.lock().unwrap() = idle.clone();
    assert_eq!(server.get("/health").await.status, 200);
    *generator.stats.lock().unwrap() = GeneratorStats { failed: true, restarts: 1, ..idle.clone() };
    let health = server.get("/health").await;
    assert_eq!((health.status, health.json()["status"].as_str()), (503, Some("engine failed")));
    assert_eq!(server.get("/ready").await.status, 503);
    *generator.stats.lock().unwrap() = GeneratorStats { restarts: 1, ..idle };
    assert_eq!(server.get("/health").await.json()["restarts"], 1);
    assert_eq!(server.get("/ready").await.status, 200);
    assert_eq!(server.post(PATH, &hello()).await.status, 200);
}

/// A heartbeat that goes on while nothing moves hides a wedged engine from everybody who watches the stream.
#[tokio::test]
async fn heartbeats_stop_when_steps_do() {
    let options = || ServeOptions { heartbeat: Duration::from_millis(20), ..options() };
    let answer = ScriptedAnswer { prefill: Duration::from_millis(300), ..ScriptedAnswer::text("</think>ok") };
    let busy = GeneratorStats { running: 1, ..GeneratorStats::default() };
    let stuck = GeneratorStats { since_last_step: Duration::from_secs(999), ..busy.clone() };
    for (stats, has_heartbeats) in [(busy, true), (stuck, false)] {
        let (server, _) = ailing(options(), stats, answer.clone()).await;
        let mut body = hello();
        body["stream"] = json!(true);
        let reply = server.post(PATH, &body).await;
        assert_eq!(reply.body.contains(": keepalive"), has_heartbeats, "{reply:?}");
        assert!(reply.body.contains("[DONE]"));
    }
}

#[tokio::test]
async fn refusals_of_the_engine_have_a_status_numbers_and_a_time_to_come_back() {
    let cases = [
        (
            RequestError::CacheTooSmall { needed_bytes: 7_000, total_bytes: 6_000 },
            400,
            "cache_too_small",
            Some("messages"),
            "the prompt needs 7000 bytes of cache, the cache has 6000",
        ),
        (
            RequestError::PromptTooLong { prompt_tokens: 9000, max_prompt_tokens: 4095 },
            400,
            "context_length_exceeded",
            Some("messages"),
            "9000 tokens, expected at most 4095",
        ),
        (RequestError::QueueFull { waiting: 256, limit: 256 }, 429, "queue_full", None, "256 requests are waiting"),
        (RequestError::ShuttingDown, 503, "shutting_down", None, "shutting down"),
        (RequestError::Engine("device lost".to_owned()), 500, "engine_failed", None, "device lost"),
        (
            RequestError::Logits { position: 17, reason: "the logit of token 3 is NaN".to_owned() },
            500,
            "engine_failed",
            None,
            "after 17 tokens are unusable",
        ),
    ];
    for (error, status, code, param, text) in cases {
        let refuse = Some(error.clone());
        let server = TestServer::start(options(), move |_, _| ScriptedAnswer {
            refuse: refuse.clone(),
            ..ScriptedAnswer::default()
        })
        .await;
        let reply = server.post(PATH, &hello()).await;
        let body = reply.json()["error"].clone();
        assert_eq!((reply.status, body["code"].as_str()), (status, Some(code)), "{error}: {reply:?}");
        assert_eq!(body["param"].as_str(), param, "{error}");
        assert!(body["message"].as_str().unwrap().contains(text), "{body}");
        assert_eq!(reply.head.contains("retry-after"), matches!(status, 429 | 503), "{reply:?}");
        // Overloaded is a status of its own there.
        let expected = if status == 503 { 529 } else { status };
        assert_eq!(server.post("/v1/messages", &hello()).await.status, expected, "{error}");
    }
}

#[tokio::test]
async fn a_template_that_fails_is_the_requests_error_with_its_line() {
    let render = |source: &str| {
        let limits = TemplateLimits { max_instructions: 100_000, ..TemplateLimits::default() };
        ChatTemplate::with_settings(source, &[], limits, moellon_text::Clock::Fixed(0)).map(Arc::new)
    };
    let cases = [
        ("a\n{{ raise_exception('no system messages') }}", "line 2"),
        ("{{ messages[0].content | nosuch }}", ""),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "limit"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
        ("{{ 'x' * 90000000 }}", ""),
        ("\n\n{{ missing.field }}", "line 3"),
    ];
    for (source, part) in cases {
        // What does not compile is refused at the start.
        let Ok(template) = render(source) else { continue };
        let model = ServedModel { template: Some(template), ..served_model() };
        let server = TestServer::start_with(model, options(), |_, _| ScriptedAnswer::text("</think>ok")).await;
        for path in [PATH, "/v1/messages", "/v1/responses", "/v1/messages/count_tokens"] {
            let mut body = hello();
            body["input"] = json!("hi");
            let reply = server.post(path, &body).await;
            assert_eq!(reply.status, 400, "{source} at {path}: {reply:?}");
            let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains(part) && !message.contains('\n'), "{source}: {message}");
        }
        assert_eq!(server.get("/health").await.status, 200);
        // Other work goes on.
        assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).await.status, 200);
    }
}

/// Reads an answer's head and as much of its body as its length says.
async fn read_answer(socket: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let count = socket.read(&mut piece).await.unwrap();
        bytes.extend_from_slice(&piece[..count]);
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        if let (Some((head, body)), Some(length)) = (text.split_once("\r\n\r\n"), length)
            && body.len() >= length.parse().unwrap()
        {
            return format!("{head}\r\n\r\n{body}");
        }
        assert!(count > 0, "the server closed after {text:?}");
    }
}

#[tokio::test]
async fn a_stopping_server_refuses_new_work_and_ends_what_does_not_finish_in_words() {
    let options = ServeOptions { drain: Duration::from_millis(400), ..options() };
    let mut server = TestServer::start(options, |prompt, _| ScriptedAnswer {
        token_time: Duration::from_millis(if prompt.contains("long") { 20 } else { 0 }),
        ..ScriptedAnswer::text("</think>".to_owned() + &"word ".repeat(2000))
    })
    .await;
    let request = |content: &str, stream: bool| {
        let body = json!({"messages": [{"role": "user", "content": content}], "stream": stream, "max_tokens": 1500});
        let body = body.to_string();
        format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let mut long = TcpStream::connect(server.address).await.unwrap();
    long.write_all(request("long", true).as_bytes()).await.unwrap();
    // A connection with a request on its way: it is not closed before that has its answer.
    let mut late = TcpStream::connect(server.address).await.unwrap();
    let late_request = request("late", false);
    let (first, second) = late_request.split_at(late_request.len() - 5);
    late.write_all(first.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    late.write_all(second.as_bytes()).await.unwrap();
    let answer = read_answer(&mut late).await;
    // Its head came before the stop: it is still served, or told that the server stops.
    assert!(answer.starts_with("http/1.1 200") || answer.starts_with("http/1.1 503"), "{answer}");
    let mut cut = String::new();
    long.read_to_string(&mut cut).await.unwrap();
    assert!(cut.contains("\"code\":\"cancelled\"") && !cut.contains("[DONE]"), "{cut}");
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_request_is_one_line_of_the_log_and_keys_are_in_none() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    // For the whole process: whether anybody listens is remembered by place, not by thread. Other tests' lines are told by id.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    // A place that another test reached in this moment may remember that nobody listens.
    tracing::callsite::rebuild_interest_cache();
    let options = ServeOptions { api_keys: vec!["sk-very-secret".to_owned()], ..options() };
    let tokenizer = served_model().tokenizer;
    let id = |text: &str| tokenizer.encode(text, false).unwrap()[0];
    let miss = moellon_engine::CacheMiss { position: 3, found: id("b"), cached: Some(id("a")) };
    let server = TestServer::start(options, move |prompt, _| ScriptedAnswer {
        cached_tokens: 3,
        // Not "hi": the template says "think".
        miss: prompt.contains("hello").then(|| miss.clone()),
        ..ScriptedAnswer::text("thought</think>one two")
    })
    .await;
    let ask = async |content: &str, headers: &[(&str, &str)]| {
        let body = json!({"messages": [{"role": "user", "content": content}]}).to_string();
        server.request("POST", PATH, headers, body.as_bytes()).await.status
    };
    assert_eq!(ask("hello", &[("authorization", "Bearer sk-very-secret"), ("x-request-id", "mine")]).await, 200);
    assert_eq!(ask("you", &[("x-api-key", "sk-very-secret"), ("x-request-id", "mine-too")]).await, 200);
    assert_eq!(ask("hello", &[("x-api-key", "sk-almost-secret")]).await, 401);
    // A line is written when its answer has been taken, which may be a moment later.
    let text = async || loop {
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        if text.contains("\"mine-too\"") {
            break text;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    let text = tokio::time::timeout(std::time::Duration::from_secs(30), text()).await.expect("both lines are written");
    assert!(!text.contains("very-secret") && !text.contains("almost-secret"), "{text}");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_mine = |line: &&Value| line["request"] == "mine" || line["request"] == "mine-too";
    let requests: Vec<&Value> = lines.iter().filter(|line| line["message"] == "request").filter(is_mine).collect();
    assert_eq!(requests.len(), 2, "{text}");
    let line = requests[0];
    assert_eq!((&line["request"], &line["protocol"], &line["model"]), (&json!("mine"), &json!("chat"), &json!("tiny")));
    assert_eq!((&line["cached_tokens"], &line["finish"]), (&json!(3), &json!("stop")));
    for field in ["prompt_tokens", "new_tokens", "reasoning_tokens"] {
        assert!(line[field].as_u64().is_some_and(|count| count > 0), "{field}: {line}");
    }
    for field in ["queued_ms", "ttft_ms", "total_ms", "prefill_tok_per_s", "decode_tok_per_s"] {
        assert!(line[field].is_number(), "{field}: {line}");
    }
    assert_eq!(line["cache_miss"], "token 3: found \"b\", cached \"a\"");
    assert_eq!(requests[1]["cache_miss"], "none");
}
