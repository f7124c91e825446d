//! What can go wrong with a request, and how each protocol says it.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use moellon_engine::RequestError;
use serde_json::{Value, json};

/// Whose error format a client expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// OpenAI: `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// Anthropic: `{"type": "error", "error": {"type", "message"}, "request_id"}`.
    Anthropic,
}

impl Protocol {
    /// The protocol of a path.
    pub(crate) fn of_path(path: &str) -> Protocol {
        if path == "/v1/messages" || path.starts_with("/v1/messages/") { Protocol::Anthropic } else { Protocol::OpenAi }
    }
}

/// The kinds of errors that clients tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    InvalidRequest,
    Authentication,
    Permission,
    NotFound,
    MethodNotAllowed,
    Timeout,
    TooLarge,
    HeadersTooLarge,
    UnsupportedMediaType,
    RateLimit,
    Unavailable,
    Internal,
}

impl ErrorKind {
    fn status(self, protocol: Protocol) -> StatusCode {
        match self {
            ErrorKind::InvalidRequest => StatusCode::BAD_REQUEST,
            ErrorKind::Authentication => StatusCode::UNAUTHORIZED,
            ErrorKind::Permission => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorKind::Timeout => StatusCode::REQUEST_TIMEOUT,
            ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorKind::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ErrorKind::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ErrorKind::RateLimit => StatusCode::TOO_MANY_REQUESTS,
            ErrorKind::Unavailable => match protocol {
                Protocol::OpenAi => StatusCode::SERVICE_UNAVAILABLE,
                // Anthropic's SDK knows 529 as OverloadedError.
                Protocol::Anthropic => StatusCode::from_u16(529).unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
            },
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn type_name(self, protocol: Protocol) -> &'static str {
        match (self, protocol) {
            (ErrorKind::Authentication, _) => "authentication_error",
            (ErrorKind::Permission, _) => "permission_error",
            (ErrorKind::NotFound, _) => "not_found_error",
            (ErrorKind::RateLimit, _) => "rate_limit_error",
            (ErrorKind::TooLarge, Protocol::Anthropic) => "request_too_large",
            (ErrorKind::Unavailable, Protocol::OpenAi) => "unavailable_error",
            (ErrorKind::Unavailable, Protocol::Anthropic) => "overloaded_error",
            (ErrorKind::Internal, Protocol::OpenAi) => "server_error",
            (ErrorKind::Internal, Protocol::Anthropic) => "api_error",
            (
                ErrorKind::InvalidRequest
                | ErrorKind::MethodNotAllowed
                | ErrorKind::Timeout
                | ErrorKind::TooLarge
                | ErrorKind::HeadersTooLarge
                | ErrorKind::UnsupportedMediaType,
                _,
            ) => "invalid_request_error",
        }
    }
}

/// An error on its way to a client.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
    /// The field at fault.
    pub(crate) param: Option<String>,
    /// A word for programs, such as `context_length_exceeded`.
    pub(crate) code: Option<&'static str>,
    /// When to try again, in seconds.
    pub(crate) retry_after_s: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> ApiError {
        ApiError { kind, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A field has a value that cannot be used: `found` is JSON or a description of it.
    pub(crate) fn field(param: impl Into<String>, found: impl std::fmt::Display, expected: &str) -> ApiError {
        let param = param.into();
        let message = format!("{param}: found {found}, expected {expected}");
        ApiError {
            param: Some(param),
            code: Some("invalid_value"),
            ..ApiError::new(ErrorKind::InvalidRequest, message)
        }
    }

    /// A field asks for something that this server does not do, and ignoring it would change the answer.
    pub(crate) fn unsupported(param: impl Into<String>, what: &str) -> ApiError {
        let param = param.into();
        let message = format!("{param}: {what} is not supported");
        let error = ApiError::new(ErrorKind::InvalidRequest, message);
        ApiError { param: Some(param), code: Some("unsupported_parameter"), ..error }
    }

    pub(crate) fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    pub(crate) fn with_param(self, param: &str) -> ApiError {
        ApiError { param: Some(param.to_owned()), ..self }
    }

    pub(crate) fn retry_after(self, seconds: u32) -> ApiError {
        ApiError { retry_after_s: Some(seconds), ..self }
    }

    /// An engine's refusal; `prompt_param` is the field that the prompt came from.
    pub(crate) fn from_engine(error: &RequestError, prompt_param: &str) -> ApiError {
        let message = error.to_string();
        match error {
            RequestError::PromptTooLong { .. } => ApiError::new(ErrorKind::InvalidRequest, message)
                .with_param(prompt_param)
                .with_code("context_length_exceeded"),
            RequestError::Setting(setting) => {
                ApiError::new(ErrorKind::InvalidRequest, message).with_param(setting.name).with_code("invalid_value")
            }
            // It would not fit an empty cache either: trying again is of no use.
            RequestError::CacheTooSmall { .. } => {
                ApiError::new(ErrorKind::InvalidRequest, message).with_param(prompt_param).with_code("cache_too_small")
            }
            RequestError::UnknownToken { .. } | RequestError::EmptyPrompt => {
                ApiError::new(ErrorKind::InvalidRequest, message).with_param(prompt_param).with_code("invalid_value")
            }
            RequestError::QueueFull { .. } => {
                ApiError::new(ErrorKind::RateLimit, message).with_code("queue_full").retry_after(1)
            }
            RequestError::Constraint(_) => {
                ApiError::new(ErrorKind::InvalidRequest, message).with_code("invalid_schema")
            }
            RequestError::Engine(_) | RequestError::Logits { .. } => {
                ApiError::new(ErrorKind::Internal, message).with_code("engine_failed")
            }
            RequestError::ShuttingDown => {
                ApiError::new(ErrorKind::Unavailable, message).with_code("shutting_down").retry_after(5)
            }
        }
    }

    pub(crate) fn status(&self, protocol: Protocol) -> StatusCode {
        self.kind.status(protocol)
    }

    /// The body of the answer, and of an error within a stream.
    pub(crate) fn body(&self, protocol: Protocol, request_id: &str) -> Value {
        let kind = self.kind.type_name(protocol);
        match protocol {
            Protocol::OpenAi => {
                json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
            }
            Protocol::Anthropic => {
                json!({"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id})
            }
        }
    }

    /// The whole answer.
    pub(crate) fn response(&self, protocol: Protocol, request_id: &str) -> Response<Body> {
        let mut response = json_response(self.status(protocol), &self.body(protocol, request_id));
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// An answer with a JSON body.
pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
