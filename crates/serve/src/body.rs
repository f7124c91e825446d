//! Request bodies: bytes under a size and time limit, then one JSON object.

use crate::error::{ApiError, ErrorKind};
use crate::fields::shown;
use crate::options::HttpLimits;
use axum::body::Body;
use axum::http::{Request, header};
use hyper::body::Body as _;
use serde_json::{Map, Value};
use std::pin::Pin;

/// Reads the body as a JSON object.
///
/// # Errors
/// 413, 408, 415 or 400, with what was found.
pub(crate) async fn read_object(request: Request<Body>, limits: &HttpLimits) -> Result<Map<String, Value>, ApiError> {
    let encoding = request.headers().get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        let message = "content-encoding: found an encoding, expected none (identity)";
        return Err(ApiError::new(ErrorKind::UnsupportedMediaType, message));
    }
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > limits.max_body_bytes as u64) {
        return Err(too_large(limits));
    }
    let body = request.into_body();
    let bytes = match tokio::time::timeout(limits.body_timeout, read_bytes(body, limits)).await {
        Ok(bytes) => bytes?,
        Err(_) => {
            let seconds = limits.body_timeout.as_secs();
            let message = format!("the body did not arrive within {seconds} s");
            return Err(ApiError::new(ErrorKind::Timeout, message));
        }
    };
    parse_object(&bytes)
}

fn too_large(limits: &HttpLimits) -> ApiError {
    let message = format!("the body is larger than {} bytes", limits.max_body_bytes);
    ApiError::new(ErrorKind::TooLarge, message).with_code("request_too_large")
}

async fn read_bytes(mut body: Body, limits: &HttpLimits) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let broken = |error| ApiError::new(ErrorKind::InvalidRequest, format!("the body broke off: {error}"));
        if let Ok(data) = frame.map_err(broken)?.into_data() {
            if bytes.len() + data.len() > limits.max_body_bytes {
                return Err(too_large(limits));
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}

fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let invalid = |reason: String| {
        ApiError::new(ErrorKind::InvalidRequest, format!("the body is not usable JSON: {reason}"))
            .with_code("invalid_json")
    };
    // serde_json stops at a depth of 128, and knows no NaN and no lone surrogates.
    let value: Value = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    match value {
        Value::Object(object) => Ok(object),
        other => Err(invalid(format!("found {}, expected an object", shown(&other)))),
    }
}
