//! What every request passes before its handler: request id, drain, `Host`, `Origin`, keys and the request limit.

use crate::app::App;
use crate::error::{ApiError, ErrorKind, Protocol};
use crate::options::ServeOptions;
use crate::settings::random_number;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use axum::middleware::Next;
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use subtle::{Choice, ConstantTimeEq};

/// Longest request id that is taken over from a client, in bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// The id of a request, in answers and logs.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// API keys, as digests: comparing them takes the same time whatever their lengths.
pub(crate) struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub(crate) fn new(keys: &[String]) -> Keys {
        Keys(keys.iter().map(|key| Sha256::digest(key.as_bytes()).into()).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the keys is this one. Looks at all of them in any case.
    fn contains(&self, key: &[u8]) -> bool {
        let digest: [u8; 32] = Sha256::digest(key).into();
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&digest));
        found.into()
    }

    fn allows(&self, headers: &HeaderMap) -> bool {
        if let Some(key) = headers.get("x-api-key") {
            return self.contains(key.as_bytes());
        }
        let Some(authorization) = headers.get(header::AUTHORIZATION) else { return false };
        let Some((scheme, credentials)) = authorization.to_str().ok().and_then(|text| text.split_once(' ')) else {
            return false;
        };
        match scheme.to_ascii_lowercase().as_str() {
            "bearer" => self.contains(credentials.trim().as_bytes()),
            // What a browser sends for the page: any name, the key as the password.
            "basic" => decode_base64(credentials.trim()).is_some_and(|pair| {
                let colon = pair.iter().position(|byte| *byte == b':');
                colon.is_some_and(|colon| self.contains(&pair[colon + 1..]))
            }),
            _ => false,
        }
    }
}

/// Standard base64; `None` for anything else.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut num_bits) = (0u32, 0);
    for character in text.trim_end_matches('=').bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        num_bits += 6;
        if num_bits >= 8 {
            num_bits -= 8;
            bytes.push((bits >> num_bits) as u8);
        }
    }
    Some(bytes)
}

/// Whether a `Host` may ask a server that listens on loopback: a page whose name was rebound to 127.0.0.1 may not.
fn is_local_host(host: &str, options: &ServeOptions) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let is_loopback = name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let is_localhost = name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
    let is_allowed = options.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name));
    is_loopback || is_localhost || is_allowed
}

/// Whether a page of this origin may use the server: our own, and those the operator named.
fn is_allowed_origin(origin: &str, host: Option<&str>, options: &ServeOptions) -> bool {
    let is_own = host.is_some_and(|host| {
        origin.split_once("://").is_some_and(|(scheme, rest)| scheme.starts_with("http") && rest == host)
    });
    is_own || options.allowed_origins.iter().any(|allowed| allowed == origin)
}

fn check(request: &Request<Body>, app: &App) -> Result<(), ApiError> {
    let headers = request.headers();
    let path = request.uri().path();
    // hyper's own limit is that of its buffer, which may hold a head somewhat larger.
    let head_bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let limits = &app.options.http;
    if head_bytes + path.len() > limits.max_header_bytes || headers.len() > limits.max_headers {
        let (bytes, count) = (limits.max_header_bytes, limits.max_headers);
        let message = format!("headers: found more than {bytes} bytes or {count} headers");
        return Err(ApiError::new(ErrorKind::HeadersTooLarge, message).with_code("headers_too_large"));
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    if app.options.address.ip().is_loopback() && host.is_some_and(|host| !is_local_host(host, &app.options)) {
        let message = format!("host: found {:?}, expected localhost or a loopback address", host.unwrap_or_default());
        return Err(ApiError::new(ErrorKind::Permission, message).with_code("host_not_allowed"));
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let origin = origin.to_str().unwrap_or_default();
        if !is_allowed_origin(origin, host, &app.options) {
            let message = format!("origin: found {origin:?}, which is not allowed");
            return Err(ApiError::new(ErrorKind::Permission, message).with_code("origin_not_allowed"));
        }
    }
    // A browser asks before it sends keys.
    let is_preflight = request.method() == Method::OPTIONS && headers.contains_key(header::ORIGIN);
    if path != "/health" && !is_preflight && !app.keys.is_empty() && !app.keys.allows(headers) {
        let message = "found no valid API key, expected one as Authorization: Bearer or x-api-key";
        return Err(ApiError::new(ErrorKind::Authentication, message).with_code("invalid_api_key"));
    }
    if app.is_draining() && request.method() == Method::POST {
        let error = ApiError::new(ErrorKind::Unavailable, "the server is shutting down");
        return Err(error.with_code("shutting_down").retry_after(5));
    }
    Ok(())
}

/// Counts a request until it is dropped.
struct Slot<'a>(&'a AtomicUsize);

impl<'a> Slot<'a> {
    fn take(counter: &'a AtomicUsize, most: usize) -> Option<Slot<'a>> {
        if counter.fetch_add(1, Ordering::Relaxed) < most {
            return Some(Slot(counter));
        }
        counter.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The client's own id if it is short and plain, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|id| id.to_str().ok());
    let is_plain =
        |id: &&str| (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    given.filter(is_plain).map_or_else(|| format!("req_{:016x}", random_number()), str::to_owned)
}

/// The middleware.
pub(crate) async fn guard(State(app): State<Arc<App>>, mut request: Request<Body>, next: Next) -> Response<Body> {
    let id = request_id(request.headers());
    let path = request.uri().path().to_owned();
    let protocol = Protocol::of_path(&path);
    let origin = request.headers().get(header::ORIGIN).cloned();
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = request.method().clone();
    let mut response = match check(&request, &app) {
        Err(error) => {
            let mut response = error.response(protocol, &id);
            if error.kind == ErrorKind::Authentication && path == "/" {
                let challenge = HeaderValue::from_static("Basic realm=\"moellon: the API key as password\"");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            }
            response
        }
        Ok(()) if method == Method::OPTIONS => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        Ok(()) => {
            // The count covers the handler; streams are counted by the registry.
            let most = app.options.http.max_requests;
            let slot = Slot::take(&app.num_requests, most);
            match slot.filter(|_| app.workshop.registry.len() < most) {
                Some(_slot) => next.run(request).await,
                None => {
                    let error = ApiError::new(ErrorKind::RateLimit, format!("{most} requests are in work already"));
                    error.with_code("too_many_requests").retry_after(1).response(protocol, &id)
                }
            }
        }
    };
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert("x-request-id", id.clone());
        // The name in Anthropic's SDK.
        headers.insert("request-id", id);
    }
    if let Some(origin) =
        origin.filter(|origin| app.options.allowed_origins.iter().any(|o| o.as_bytes() == origin.as_bytes()))
    {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static(
                "authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta",
            ),
        );
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    }
    tracing::debug!(request = %id, %method, %path, status = response.status().as_u16(), "http");
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("dTprZXk=", "u:key")] {
            assert_eq!(decode_base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!(decode_base64("Zm9v!"), None);
    }

    #[test]
    fn hosts_are_local() {
        let options = ServeOptions { allowed_hosts: vec!["box.lan".to_owned()], ..ServeOptions::default() };
        for host in
            ["localhost", "localhost:8080", "127.0.0.1:1", "127.1.2.3", "[::1]:8080", "a.localhost", "BOX.lan:80"]
        {
            assert!(is_local_host(host, &options), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "10.0.0.1", ""] {
            assert!(!is_local_host(host, &options), "{host}");
        }
    }

    #[test]
    fn keys_are_found_in_every_header() {
        let keys = Keys::new(&["one".to_owned(), "two".to_owned()]);
        let allows = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            keys.allows(&headers)
        };
        assert!(allows("authorization", "Bearer two"));
        assert!(allows("authorization", "bearer one"));
        assert!(allows("x-api-key", "one"));
        assert!(allows("authorization", "Basic dTp0d28=")); // u:two
        assert!(!allows("authorization", "Bearer three"));
        assert!(!allows("authorization", "two"));
        assert!(!allows("x-api-key", ""));
        assert!(!keys.allows(&HeaderMap::new()));
    }
}
