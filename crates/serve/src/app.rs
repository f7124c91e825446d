//! The server's state, its routes, and what all protocols do alike: read, plan, submit, answer.

use crate::anthropic::MessagesEncoder;
use crate::body::read_object;
use crate::chat_request::ChatRequest;
use crate::error::{ApiError, ErrorKind, Protocol, json_response};
use crate::fields::{Fields, shown};
use crate::guard::{Keys, RequestId, guard};
use crate::job::{Job, Plan, Workshop};
use crate::openai_chat::{ChatEncoder, Envelope, StreamOptions, stream_options};
use crate::openai_completions::CompletionEncoder;
use crate::openai_responses::{Echo, ResponsesEncoder};
use crate::options::ServeOptions;
use crate::settings::Settings;
use crate::stream::IsStuck;
use crate::{anthropic, openai_chat, openai_completions, openai_responses, prompt, stream, tokenize};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Request, Response, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::routing::post;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// The server's state.
pub(crate) struct App {
    pub(crate) workshop: Workshop,
    pub(crate) options: ServeOptions,
    pub(crate) keys: Keys,
    pub(crate) num_requests: AtomicUsize,
    pub(crate) started: Instant,
    draining: AtomicBool,
}

impl App {
    pub(crate) fn new(workshop: Workshop, options: ServeOptions) -> App {
        App {
            workshop,
            keys: Keys::new(&options.api_keys),
            options,
            num_requests: AtomicUsize::new(0),
            started: Instant::now(),
            draining: AtomicBool::new(false),
        }
    }

    /// Stops taking new work.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Checks that `model` is a name of the served model, or missing.
    pub(crate) fn check_model(&self, fields: Fields<'_>) -> Result<(), ApiError> {
        match fields.text("model")? {
            Some(name) if !self.workshop.model.is_called(name) => {
                let found = shown(&Value::String(name.to_owned()));
                let message = format!("model: found {found}, expected {:?}", self.workshop.model.name);
                Err(ApiError::new(ErrorKind::NotFound, message).with_param("model").with_code("model_not_found"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether there is work and the engine does not get on with it.
    pub(crate) fn is_stuck(&self) -> bool {
        let stats = self.workshop.generator.stats();
        stats.running + stats.waiting > 0 && stats.since_last_step > self.options.stall
    }

    /// [`Self::is_stuck`] for streams.
    pub(crate) fn stuck_check(self: &Arc<Self>) -> IsStuck {
        let app = Arc::clone(self);
        Arc::new(move || app.is_stuck())
    }
}

/// A request's body and what is known about it.
pub(crate) struct Call {
    pub(crate) body: Map<String, Value>,
    pub(crate) id: String,
}

/// Runs a handler of one protocol and makes its error an answer.
pub(crate) async fn handle<F, R>(
    app: Arc<App>,
    request: Request<Body>,
    protocol: Protocol,
    handler: F,
) -> Response<Body>
where
    F: FnOnce(Arc<App>, Call) -> R,
    R: Future<Output = Result<Response<Body>, ApiError>>,
{
    let id = request.extensions().get::<RequestId>().map_or_else(String::new, |id| id.0.clone());
    let result = match read_object(request, &app.options.http).await {
        Ok(body) => handler(Arc::clone(&app), Call { body, id: id.clone() }).await,
        Err(error) => Err(error),
    };
    result.unwrap_or_else(|error| {
        tracing::info!(request = %id, %error, "refused");
        error.response(protocol, &id)
    })
}

/// Runs work that takes milliseconds or more off the async threads; a panic in it is an error of this request alone.
pub(crate) async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::new(ErrorKind::Internal, "the request could not be prepared").with_code("internal")),
    }
}

/// Renders, tokenizes and submits a conversation.
pub(crate) async fn start_chat(
    app: &Arc<App>,
    request: ChatRequest,
    id: &str,
    protocol: &'static str,
    is_streaming: bool,
) -> Result<(Job, Vec<String>), ApiError> {
    let for_plan = Arc::clone(app);
    let mut plan = off_thread(move || prompt::plan_chat(&request, &for_plan.workshop.model, &for_plan.options)).await?;
    plan.pipeline.stream_calls = is_streaming;
    start(app, plan, id, protocol)
}

/// Submits what was planned.
pub(crate) fn start(
    app: &Arc<App>,
    plan: Plan,
    id: &str,
    protocol: &'static str,
) -> Result<(Job, Vec<String>), ApiError> {
    let warnings = plan.warnings.clone();
    Ok((Job::submit(&app.workshop, plan, id, protocol)?, warnings))
}

/// Puts warnings where clients can see them and parsers do not stumble.
pub(crate) fn with_warnings(mut response: Response<Body>, warnings: &[String]) -> Response<Body> {
    for warning in warnings.iter().take(8) {
        let text: String = warning.chars().filter(|c| c.is_ascii() && !c.is_ascii_control()).take(300).collect();
        // 199: a warning for people (RFC 7234).
        if let Ok(value) = HeaderValue::from_str(&format!("199 moellon \"{}\"", text.replace('"', "'"))) {
            response.headers_mut().append("warning", value);
        }
    }
    response
}

/// Which answers are the best is known at their end.
fn check_stream(streaming: &StreamOptions, settings: &Settings) -> Result<(), ApiError> {
    match streaming.stream && settings.chooses() {
        true => Err(ApiError::unsupported("best_of", "streaming the best of several answers")),
        false => Ok(()),
    }
}

async fn chat_completions(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::OpenAi, |app, call| async move {
        let chat = openai_chat::parse(&call.body, &app)?;
        let streaming = stream_options(Fields::of_body(&call.body))?;
        check_stream(&streaming, &chat.settings)?;
        let (num_choices, wants_logprobs) = (chat.settings.n, chat.settings.logprobs.is_some());
        let (job, warnings) = start_chat(&app, chat, &call.id, "chat", streaming.stream).await?;
        let envelope = Envelope::new("chatcmpl-", &app, &call.id);
        let response = if streaming.stream {
            let encoder = ChatEncoder::new(envelope, num_choices, streaming.include_usage);
            stream::respond(job, Box::new(encoder), &app.options, app.stuck_check())
        } else {
            openai_chat::respond_at_once(job, &envelope, num_choices, wants_logprobs).await?
        };
        Ok(with_warnings(response, &warnings))
    })
    .await
}

async fn messages(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::Anthropic, |app, call| async move {
        let chat = anthropic::parse(&call.body, &app, false)?;
        let streaming = stream_options(Fields::of_body(&call.body))?;
        let (job, warnings) = start_chat(&app, chat, &call.id, "messages", streaming.stream).await?;
        let envelope = Envelope::new("msg_", &app, &call.id);
        let response = if streaming.stream {
            let encoder = MessagesEncoder::new(envelope);
            stream::respond(job, Box::new(encoder), &app.options, app.stuck_check())
        } else {
            anthropic::respond_at_once(job, &envelope).await?
        };
        Ok(with_warnings(response, &warnings))
    })
    .await
}

async fn count_tokens(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::Anthropic, |app, call| async move {
        let chat = anthropic::parse(&call.body, &app, true)?;
        let plan = off_thread(move || prompt::plan_chat(&chat, &app.workshop.model, &app.options)).await?;
        Ok(json_response(StatusCode::OK, &json!({"input_tokens": plan.prompt.len()})))
    })
    .await
}

async fn responses(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::OpenAi, |app, call| async move {
        let chat = openai_responses::parse(&call.body, &app)?;
        let streaming = stream_options(Fields::of_body(&call.body))?;
        let (job, warnings) = start_chat(&app, chat, &call.id, "responses", streaming.stream).await?;
        let envelope = Envelope::new("resp_", &app, &call.id);
        let echo = Echo::new(&call.body);
        let response = if streaming.stream {
            let encoder = ResponsesEncoder::new(envelope, echo);
            stream::respond(job, Box::new(encoder), &app.options, app.stuck_check())
        } else {
            openai_responses::respond_at_once(job, &envelope, &echo).await?
        };
        Ok(with_warnings(response, &warnings))
    })
    .await
}

async fn completions(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::OpenAi, |app, call| async move {
        let streaming = stream_options(Fields::of_body(&call.body))?;
        let (for_parse, body) = (Arc::clone(&app), call.body);
        let completion = off_thread(move || openai_completions::parse(&body, &for_parse)).await?;
        if streaming.stream && (completion.prompts.len() > 1 || completion.settings.max_tokens == Some(0)) {
            return Err(ApiError::unsupported("stream", "streaming several prompts or no tokens"));
        }
        check_stream(&streaming, &completion.settings)?;
        let mut jobs = Vec::with_capacity(completion.prompts.len());
        for prompt in &completion.prompts {
            jobs.push(start(&app, openai_completions::plan(&completion, prompt), &call.id, "completions")?.0);
        }
        let envelope = Envelope::new("cmpl-", &app, &call.id);
        match jobs.pop() {
            Some(job) if streaming.stream => {
                let encoder = CompletionEncoder::new(envelope, &completion, streaming.include_usage);
                Ok(stream::respond(job, Box::new(encoder), &app.options, app.stuck_check()))
            }
            last => {
                jobs.extend(last);
                openai_completions::respond_at_once(jobs, &envelope, &completion).await
            }
        }
    })
    .await
}

async fn tokenize_text(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::OpenAi, tokenize::tokenize).await
}

async fn detokenize_ids(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    handle(app, request, Protocol::OpenAi, tokenize::detokenize).await
}

async fn not_found(request: Request<Body>) -> Response<Body> {
    let path = request.uri().path();
    let shown: String = path.chars().take(200).collect();
    refuse(&request, ApiError::new(ErrorKind::NotFound, format!("there is nothing at {shown}")).with_code("not_found"))
}

async fn method_not_allowed(request: Request<Body>) -> Response<Body> {
    let message = format!("{} is not a method of this path", request.method());
    refuse(&request, ApiError::new(ErrorKind::MethodNotAllowed, message).with_code("method_not_allowed"))
}

fn refuse(request: &Request<Body>, error: ApiError) -> Response<Body> {
    let id = request.extensions().get::<RequestId>().map_or("", |id| id.0.as_str());
    error.response(Protocol::of_path(request.uri().path()), id)
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/responses", post(responses))
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/tokenize", post(tokenize_text))
        .route("/detokenize", post(detokenize_ids))
        .merge(crate::page::routes())
        .merge(crate::status::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}
