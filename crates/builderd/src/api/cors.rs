//! What browsers are told, so that pages of the origins that the settings name may call the API
//! (the CORS protocol of fetch.spec.whatwg.org). Pages of other origins are told nothing, and
//! their browsers keep them out.
//!
//! A page sends its token itself: there are no cookies, so credentials in the sense of CORS are
//! never allowed. Who may do what is the gate's business: a browser that asks beforehand
//! (a preflight) gets an answer, and never gets as far as the gate.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use http::header::{ORIGIN, VARY};
use http::{HeaderName, HeaderValue, Method};
use tower::{Layer as _, ServiceExt as _};
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::config::Origins;

/// How long a browser need not ask again; Chromium's longest.
const MAX_AGE: Duration = Duration::from_secs(7200);

/// What a page may send.
const METHODS: [Method; 4] = [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS];

/// Headers that are read, by the gate, the RPC protocols and the downloads.
const REQUEST_HEADERS: &[&str] = &[
    "authorization",
    "x-tenant-id",
    "x-customer-id",
    "idempotency-key",
    "traceparent",
    "content-type",
    "content-encoding",
    "connect-protocol-version",
    "connect-timeout-ms",
    "connect-accept-encoding",
    "connect-content-encoding",
    "grpc-timeout",
    "grpc-accept-encoding",
    "grpc-encoding",
    "x-grpc-web",
    "x-user-agent",
    "range",
    "if-range",
    "if-none-match",
];

/// Headers of answers that a page could not read otherwise.
const RESPONSE_HEADERS: &[&str] = &[
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "retry-after",
    "content-encoding",
    "connect-content-encoding",
    "grpc-status",
    "grpc-message",
    "grpc-status-details-bin",
    "grpc-encoding",
    "accept-ranges",
    "content-disposition",
    "content-range",
    "etag",
    "x-checksum-sha256",
];

/// Who is told what.
struct Cors {
    origins: Origins,
    layer: CorsLayer,
}

/// Lets pages of `origins` call what `router` has.
pub(super) fn open_to(origins: Origins, router: axum::Router) -> axum::Router {
    if origins == Origins::NONE {
        return router;
    }
    let layer = CorsLayer::new()
        .allow_methods(METHODS)
        .allow_headers(names(REQUEST_HEADERS))
        .expose_headers(names(RESPONSE_HEADERS))
        .max_age(MAX_AGE)
        .vary([ORIGIN]);
    router.layer(from_fn_with_state(Arc::new(Cors { origins, layer }), tell))
}

fn names(texts: &[&'static str]) -> Vec<HeaderName> {
    texts.iter().copied().map(HeaderName::from_static).collect()
}

async fn tell(State(cors): State<Arc<Cors>>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(ORIGIN);
    let Some(allowed) = origin.and_then(|origin| cors.allowed(origin)) else {
        let mut response = next.run(request).await;
        // A cache must not give this answer to a page of an origin that is named.
        response.headers_mut().append(VARY, HeaderValue::from_name(ORIGIN));
        return response;
    };
    let layer = cors.layer.clone().allow_origin(AllowOrigin::exact(allowed));
    match layer.layer(next).oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

impl Cors {
    /// What a browser is told of a page's origin; nothing if it may not call.
    fn allowed(&self, origin: &HeaderValue) -> Option<HeaderValue> {
        match &self.origins {
            Origins::Any => Some(HeaderValue::from_static("*")),
            Origins::Named(named) => named.iter().find(|named| *named == origin).cloned(),
        }
    }
}
