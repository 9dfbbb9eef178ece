//! Development mode believes everybody, so that only who means this machine may be answered: a
//! page of the internet whose name suddenly means 127.0.0.1 (DNS rebinding) gets here too, and
//! its browser thinks that it talks to the page's own server. What it cannot hide is the name:
//! `Host` must be this machine's, and so must `Origin`, unless the settings name it.
//!
//! It does not know who asks, and has no part in serving with tokens.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue};

use super::ApiState;
use super::audit::Asked;
use super::error::Answer;
use super::spelling::{self, Form};
use crate::config::Origins;

/// What to do about it.
const REMEDY: &str = "development mode (--dev) asks for no credential and so answers \
                      localhost, 127.0.0.0/8 and [::1] alone";

/// Lets in what was sent to this machine by its own name, and pages of it or of `origins`.
pub(super) fn only(state: Arc<ApiState>, origins: Origins, router: axum::Router) -> axum::Router {
    router.layer(from_fn_with_state((state, Arc::new(origins)), check))
}

async fn check(
    State((state, origins)): State<(Arc<ApiState>, Arc<Origins>)>,
    request: Request,
    next: Next,
) -> Response {
    let (head, body) = request.into_parts();
    let Some(problem) = problem(&head, &origins) else {
        return next.run(Request::from_parts(head, body)).await;
    };
    let answer = Answer::not_from_here(problem);
    state.refusals.note(&Asked::of(&head), None, None, &answer);
    (state.meters.observe)("refused", answer.code().as_str(), Duration::ZERO);
    state.refused.swallow(body).await;
    spelling::refuse(answer, Form::of(&head), &head.headers)
}

/// Why a request is not answered, and what to do.
fn problem(head: &Parts, origins: &Origins) -> Option<String> {
    let mut hosts: Vec<&[u8]> = values(&head.headers, &HOST).collect();
    // HTTP/2's `:authority`, and what a proxy is sent.
    hosts.extend(head.uri.authority().map(|authority| authority.as_str().as_bytes()));
    if hosts.is_empty() {
        return Some(format!("the request has no `Host` header; {REMEDY}: send one of these"));
    }
    if let Some(host) = hosts.into_iter().find(|host| !is_local(host)) {
        let host = shown(host);
        return Some(format!(
            "`Host` is {host}, which may not be this machine; {REMEDY}: call it by one of these, \
             or serve with tokens, without --dev"
        ));
    }
    let is_allowed = |origin: &[u8]| is_local_origin(origin) || is_named(origins, origin);
    let origin = values(&head.headers, &ORIGIN).find(|origin| !is_allowed(origin))?;
    let origin = shown(origin);
    Some(format!(
        "the page's `Origin` is {origin}; {REMEDY}, and pages of them: open the page from one of \
         these, name its origin in UNKEY_BUILDERD_CORS_ALLOWED_ORIGINS, or serve with tokens, \
         without --dev"
    ))
}

fn values<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers.get_all(name).into_iter().map(HeaderValue::as_bytes)
}

/// A name as it was sent, but not all of a long one.
fn shown(name: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(name).chars().take(100).collect();
    format!("{text:?}")
}

/// Whether `host` or `host:port` is a name of this machine that no other can have.
fn is_local(host: &[u8]) -> bool {
    let Ok(authority) = Authority::try_from(host) else { return false };
    if authority.as_str().contains('@') {
        return false;
    }
    let host = authority.host();
    let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match inside {
        Some(inside) => inside.parse().is_ok_and(|address: Ipv6Addr| address.is_loopback()),
        None => {
            host.eq_ignore_ascii_case("localhost")
                || host.parse().is_ok_and(|address: Ipv4Addr| address.is_loopback())
        }
    }
}

fn is_local_origin(origin: &[u8]) -> bool {
    let host =
        [&b"http://"[..], b"https://"].iter().find_map(|scheme| origin.strip_prefix(*scheme));
    host.is_some_and(is_local)
}

fn is_named(origins: &Origins, origin: &[u8]) -> bool {
    match origins {
        Origins::Any => true,
        Origins::Named(named) => named.iter().any(|named| named.as_bytes() == origin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_only_this_machine_can_have_are_local() {
        let hosts =
            ["localhost", "LocalHost:8082", "127.0.0.1:80", "127.9.8.7", "[::1]:80", "[::1]"];
        for host in hosts {
            assert!(is_local(host.as_bytes()), "{host}");
            assert!(is_local_origin(format!("http://{host}").as_bytes()), "{host}");
            assert!(is_local_origin(format!("https://{host}").as_bytes()), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:8082",
            "evil.example:127",
            "localhost@evil.example",
            "evil.example@localhost",
            "localhost, evil.example",
            "192.168.0.1",
            "0.0.0.0",
            "[::2]",
            "[::1",
            "::1",
            "localhost/",
        ] {
            assert!(!is_local(host.as_bytes()), "{host}");
            assert!(!is_local_origin(format!("http://{host}").as_bytes()), "{host}");
        }
        for origin in ["null", "localhost", "file://localhost", "http://localhost/path"] {
            assert!(!is_local_origin(origin.as_bytes()), "{origin}");
        }
    }
}
