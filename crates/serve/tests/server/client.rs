//! A server in this process and a client that shows every byte.

use moellon_engine::{Request, SamplingParams};
use moellon_serve::scripted::{ScriptedAnswer, ScriptedGenerator};
use moellon_serve::{Generator, ServeOptions, ServedModel, Server, detect_tool_call_format};
use moellon_text::{ChatTemplate, ThinkingFormat, Tokenizer};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// Longest that any test waits for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn served_model() -> ServedModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/moellon-tiny");
    let tokenizer = Arc::new(Tokenizer::from_folder(&folder).unwrap());
    let source = std::fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    let template = ChatTemplate::new(&source, tokenizer.config().special_tokens()).unwrap();
    let stop = tokenizer.id_of("<|user|>").or(tokenizer.eos_id()).unwrap();
    ServedModel {
        name: "tiny".to_owned(),
        aliases: vec!["claude-*".to_owned()],
        tool_call_format: detect_tool_call_format(&source),
        thinking_format: ThinkingFormat::default(),
        stop_token_ids: vec![stop],
        context_length: 4096,
        vocab_size: tokenizer.vocab_size(),
        default_sampling: SamplingParams { temperature: 0.7, ..SamplingParams::default() },
        default_seed: None,
        default_max_tokens: None,
        constraints: None,
        source: "models/moellon-tiny".to_owned(),
        device: "script".to_owned(),
        template: Some(Arc::new(template)),
        tokenizer,
    }
}

/// Options for tests: any port, no waiting.
pub(crate) fn options() -> ServeOptions {
    ServeOptions {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        drain: Duration::from_millis(200),
        ..ServeOptions::default()
    }
}

pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) generator: Arc<ScriptedGenerator>,
    stop: Option<oneshot::Sender<()>>,
}

impl TestServer {
    /// A server whose script gives one text, whatever is asked.
    pub(crate) async fn saying(text: &'static str) -> TestServer {
        TestServer::start(options(), move |_, _| ScriptedAnswer::text(text)).await
    }

    pub(crate) async fn start(
        options: ServeOptions,
        script: impl Fn(&str, &Request) -> ScriptedAnswer + Send + Sync + 'static,
    ) -> TestServer {
        TestServer::start_with(served_model(), options, script).await
    }

    pub(crate) async fn start_with(
        model: ServedModel,
        options: ServeOptions,
        script: impl Fn(&str, &Request) -> ScriptedAnswer + Send + Sync + 'static,
    ) -> TestServer {
        let scripted = Arc::new(ScriptedGenerator::new(Arc::clone(&model.tokenizer), script));
        let generator = Arc::clone(&scripted) as Arc<dyn Generator>;
        TestServer::start_generator(model, options, scripted, generator).await
    }

    /// A server of a generator, `scripted` or around it.
    pub(crate) async fn start_generator(
        model: ServedModel,
        options: ServeOptions,
        scripted: Arc<ScriptedGenerator>,
        generator: Arc<dyn Generator>,
    ) -> TestServer {
        let server = Server::bind(options, model, generator).await.unwrap();
        let address = server.address().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.serve(async move {
            let _ = stopped.await;
        }));
        TestServer { address, generator: scripted, stop: Some(stop) }
    }

    pub(crate) fn stop(&mut self) {
        self.stop.take();
    }

    /// Sends raw bytes and reads until the server closes or the answer is complete.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> Reply {
        let exchange = async {
            let mut socket = TcpStream::connect(self.address).await.unwrap();
            // The server may answer and close before it has read everything.
            let _ = socket.write_all(bytes).await;
            let mut answer = Vec::new();
            let _ = socket.read_to_end(&mut answer).await;
            Reply::parse(&answer)
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("an answer in time")
    }

    pub(crate) async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head.push_str("host: localhost\r\n");
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        self.raw(&[head.as_bytes(), body].concat()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], b"").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes()).await
    }
}

/// An answer, its body without chunks.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Reply {
        let text = String::from_utf8_lossy(bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            return Reply { status: 0, head: text.into_owned(), body: String::new() };
        };
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if is_chunked { unchunk(body) } else { body.to_owned() };
        Reply { status, head: head.to_ascii_lowercase(), body }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The frames of an event stream.
    pub(crate) fn frames(&self) -> Vec<&str> {
        self.body.split("\n\n").filter(|frame| !frame.is_empty()).collect()
    }

    /// The JSON of the frames that have data, without comments and `[DONE]`.
    pub(crate) fn data(&self) -> Vec<Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

fn unchunk(body: &str) -> String {
    let (mut rest, mut text) = (body.as_bytes(), Vec::new());
    while let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") {
        let size = std::str::from_utf8(&rest[..end]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let Some(size) = size.filter(|size| *size > 0 && rest.len() >= end + 2 + size) else { break };
        text.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = rest.get(end + 4 + size..).unwrap_or_default();
    }
    String::from_utf8(text).unwrap()
}
