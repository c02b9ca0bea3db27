//! Looks at every request before anything else does: whether a web page of another site sent it, and its id.
//!
//! A browser lets any page send requests to this machine. It says in `Origin` whose page it is, and a page that got itself a name
//! which leads here (DNS rebinding) gives itself away by the name in `Host`.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::errors::{ApiError, ErrorForm};
use crate::state::State;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Where Anthropic's clients look for it.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// Characters of a client's own request id.
const REQUEST_ID_MAX: usize = 128;

/// The id that a request's answer carries.
#[derive(Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// Passes a request on, or refuses it. The answer carries the client's request id, or a new one; an error is written in the form
/// of the path's API, whoever raised it.
pub(crate) async fn guard(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    let id = request_id(&state, request.headers());
    request.extensions_mut().insert(RequestId(id.to_str().unwrap_or_default().to_string()));
    let form = ErrorForm::of_path(request.uri().path());
    let response = match check(&state, &request) {
        Ok(()) => next.run(request).await,
        Err(e) => e.into_response(),
    };
    let mut response = form.apply(response, id.to_str().unwrap_or_default());
    if form == ErrorForm::Anthropic {
        response.headers_mut().insert(ANTHROPIC_REQUEST_ID, id.clone());
    }
    state.metrics.answered(response.status());
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The id that a request brings, where it is one, or a new one.
pub(crate) fn request_id(state: &State, headers: &HeaderMap) -> HeaderValue {
    let is_sane =
        |id: &&HeaderValue| (1..=REQUEST_ID_MAX).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    headers.get(REQUEST_ID).filter(is_sane).cloned().unwrap_or_else(|| {
        let id = format!("req-{}", state.unique());
        HeaderValue::from_str(&id).expect("hexadecimal digits are a header's value")
    })
}

fn check(state: &State, request: &Request) -> Result<(), ApiError> {
    let headers = request.headers();
    let forbidden = |code, message| Err(ApiError::refused(StatusCode::FORBIDDEN, code, message));
    // In its long form the request line has the host; the header is then of no account.
    let host = match request.uri().authority() {
        Some(authority) => Some(authority.as_str()),
        None => headers.get(header::HOST).map(|v| v.to_str().unwrap_or("?")),
    };
    let is_ours = |host: &str| is_local(host, &state.host) || is_allowed(host, &state.settings.allowed_hosts);
    if let Some(host) = host.filter(|host| state.ip.is_loopback() && !is_ours(host)) {
        return forbidden(
            "foreign_host",
            format!(
                "Host is {host:?}; a server on a loopback address answers to localhost, loopback addresses and names given \
                 with --allowed-host only"
            ),
        );
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or("?");
    if state.settings.cors_origins.iter().any(|o| o == "*" || o.eq_ignore_ascii_case(origin)) {
        return Ok(());
    }
    let site = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    if site.is_none() || site != host {
        return forbidden("foreign_origin", format!("Origin is {origin:?}; pages of other sites are not answered"));
    }
    Ok(())
}

/// Whether a host with or without a port is this machine as it calls itself, or has the `own` name that is listened on.
fn is_local(host: &str, own: &str) -> bool {
    let name = without_port(host);
    let is_loopback = name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let is_named = ["localhost", own].iter().any(|n| name.eq_ignore_ascii_case(n));
    is_loopback || is_named || name.to_ascii_lowercase().ends_with(".localhost")
}

/// Whether a host with or without a port has one of the names under which a proxy is known.
fn is_allowed(host: &str, allowed: &[String]) -> bool {
    allowed.iter().any(|name| [host, without_port(host)].iter().any(|h| h.eq_ignore_ascii_case(name)))
}

fn without_port(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _port)| name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_names_are_those_that_no_stranger_can_own() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:8080",
            "[::1]",
            "a.localhost:1",
            "box:1",
        ] {
            assert!(is_local(host, "box"), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:80", "10.0.0.1", "[fe80::1]:80", "", "127.0.0.1.nip.io"] {
            assert!(!is_local(host, "box"), "{host}");
        }
    }
}
