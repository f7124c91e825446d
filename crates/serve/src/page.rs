//! The page at `/`: chat, speed, queue and memory. One file, no external assets; what it polls is here as well.

use crate::app::App;
use crate::error::{ApiError, ErrorKind, Protocol, json_response};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::routing::{delete, get};
use serde_json::json;
use std::sync::Arc;

/// Nothing from elsewhere, and nobody frames it.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Routes of this file.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(page))
        .route("/openapi.json", get(openapi))
        .route("/moellon/status", get(status))
        .route("/moellon/requests/{id}", delete(cancel))
}

async fn page() -> Response<Body> {
    let mut response = Response::new(Body::from(include_str!("page.html")));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

async fn openapi(State(app): State<Arc<App>>) -> Response<Body> {
    json_response(StatusCode::OK, &crate::openapi::document(&app.workshop.model, &app.options.request))
}

/// What the page shows, once a second.
async fn status(State(app): State<Arc<App>>) -> Response<Body> {
    let stats = app.workshop.generator.stats();
    let model = &app.workshop.model;
    let body = json!({
        "model": model.name,
        "device": model.device,
        "context_length": model.context_length,
        "uptime_s": app.started.elapsed().as_secs_f64(),
        "draining": app.is_draining(),
        "failed": stats.failed,
        "loaded": !stats.unloaded,
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.steps,
        // Of finished requests; the page adds those of the running ones.
        "generated_tokens": app.workshop.metrics.generated_tokens(),
        "cache_used_bytes": stats.cache_used_bytes,
        "cache_reusable_bytes": stats.cache_reusable_bytes,
        "cache_total_bytes": stats.cache_total_bytes,
        "weights_bytes": stats.weights_bytes,
        "prefix_queried_tokens": stats.prefix_queried_tokens,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "bandwidth_fraction": stats.bandwidth_fraction,
        "bytes_read_per_token": stats.bytes_read_per_token,
        "requests": app.workshop.registry.list(),
    });
    json_response(StatusCode::OK, &body)
}

/// Ends a request of the queue.
async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    match app.workshop.registry.cancel(&id) {
        true => json_response(StatusCode::OK, &json!({"cancelled": id})),
        false => ApiError::new(ErrorKind::NotFound, "no request of this id is in work").response(Protocol::OpenAi, ""),
    }
}
