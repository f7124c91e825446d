//! Health, metrics, models, and what routers of several servers ask their workers.

use crate::app::App;
use crate::error::{ApiError, ErrorKind, Protocol, json_response};
use crate::generator::UnloadError;
use crate::openai_chat::unix_seconds;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::sync::Arc;

/// Routes of this file.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/server_info", get(server_info))
        .route("/get_server_info", get(server_info))
        .route("/model_info", get(model_info))
        .route("/get_model_info", get(model_info))
        .route("/version", get(version))
        .route("/v1/loads", get(loads))
        .route("/loads", get(loads))
        .route("/models/unload", post(unload))
}

/// Whether tokens come: a process that lives and a model that answers are two things.
async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    let stats = app.workshop.generator.stats();
    let status = match (stats.failed, app.is_stuck()) {
        (true, _) => "engine failed",
        (false, true) => "stuck",
        (false, false) => "ok",
    };
    let code = if status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "status": status,
        "loaded": !stats.unloaded,
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.steps,
        "seconds_since_last_step": stats.since_last_step.as_secs_f64(),
        "restarts": stats.restarts,
    });
    json_response(code, &body)
}

/// Whether new requests are welcome.
async fn ready(State(app): State<Arc<App>>) -> Response<Body> {
    let stats = app.workshop.generator.stats();
    if app.is_draining() || stats.failed {
        let error = ApiError::new(ErrorKind::Unavailable, if stats.failed { "the engine failed" } else { "draining" });
        return error.retry_after(5).response(Protocol::OpenAi, "");
    }
    json_response(StatusCode::OK, &json!({"status": "ready"}))
}

async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    let text = app.workshop.metrics.render(&app.workshop.model.name, &app.workshop.generator.stats());
    let mut response = Response::new(Body::from(text));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn model_json(app: &App) -> Value {
    json!({
        "id": app.workshop.model.name,
        "object": "model",
        "created": unix_seconds().saturating_sub(app.started.elapsed().as_secs()),
        // Routers choose their dialect by this; our metrics carry vLLM's names.
        "owned_by": "vllm",
        "max_model_len": app.workshop.model.context_length,
        // Anthropic's SDK reads these.
        "type": "model",
        "display_name": app.workshop.model.name,
    })
}

async fn models(State(app): State<Arc<App>>) -> Response<Body> {
    let model = model_json(&app);
    let id = &app.workshop.model.name;
    let body = json!({"object": "list", "data": [model], "has_more": false, "first_id": id, "last_id": id});
    json_response(StatusCode::OK, &body)
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    if app.workshop.model.is_called(&id) {
        return json_response(StatusCode::OK, &model_json(&app));
    }
    let shown: String = id.chars().take(80).collect();
    let message = format!("model: found {shown:?}, expected {:?}", app.workshop.model.name);
    let error = ApiError::new(ErrorKind::NotFound, message).with_param("model").with_code("model_not_found");
    error.response(Protocol::OpenAi, "")
}

async fn server_info(State(app): State<Arc<App>>) -> Response<Body> {
    let model = &app.workshop.model;
    let stats = app.workshop.generator.stats();
    let body = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model_path": model.source,
        "served_model_name": model.name,
        "context_length": model.context_length,
        "max_total_num_tokens": model.context_length,
        "max_running_requests": app.options.http.max_requests,
        "device": model.device,
        "status": if app.is_draining() { "draining" } else { "ready" },
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "tp_size": 1,
        "dp_size": 1,
    });
    json_response(StatusCode::OK, &body)
}

async fn model_info(State(app): State<Arc<App>>) -> Response<Body> {
    let model = &app.workshop.model;
    let body = json!({
        "model_path": model.source,
        "tokenizer_path": model.source,
        "served_model_name": model.name,
        "is_generation": true,
        "max_context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "eos_token_ids": model.stop_token_ids,
        "has_chat_template": model.template.is_some(),
        "preferred_sampling_params": null,
    });
    json_response(StatusCode::OK, &body)
}

async fn version() -> Response<Body> {
    json_response(StatusCode::OK, &json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// What smg polls: running and waiting requests and how full the cache is.
async fn loads(State(app): State<Arc<App>>) -> Response<Body> {
    let stats = app.workshop.generator.stats();
    let usage = match stats.cache_total_bytes {
        0 => 0.0,
        total => stats.cache_used_bytes as f64 / total as f64,
    };
    let load = json!({
        "dp_rank": 0,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_total_reqs": stats.running + stats.waiting,
        "token_usage": usage,
        "max_running_requests": app.options.http.max_requests,
        "memory": {"kv_cache_bytes": stats.cache_used_bytes, "weights_bytes": stats.weights_bytes},
        "queues": {"waiting": stats.waiting},
    });
    json_response(StatusCode::OK, &json!({"timestamp": unix_seconds(), "dp_rank_count": 1, "loads": [load]}))
}

/// Gives the model's memory back until the next request.
async fn unload(State(app): State<Arc<App>>) -> Response<Body> {
    let generator = Arc::clone(&app.workshop.generator);
    // What is cached may be written to disk first.
    let unloaded = tokio::task::spawn_blocking(move || generator.unload()).await;
    let error = match unloaded {
        Ok(Ok(())) => return json_response(StatusCode::OK, &json!({"success": true})),
        Ok(Err(error @ UnloadError::Busy { .. })) => {
            ApiError::new(ErrorKind::Unavailable, error.to_string()).with_code("busy").retry_after(1)
        }
        Ok(Err(error @ UnloadError::Unsupported)) => {
            ApiError::new(ErrorKind::InvalidRequest, error.to_string()).with_code("unsupported")
        }
        Err(_) => ApiError::new(ErrorKind::Internal, "the model could not be unloaded"),
    };
    error.response(Protocol::OpenAi, "")
}
