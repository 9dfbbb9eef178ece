//! The documented plain routes beside the RPCs: state, log, list, figures, health.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, FromRequestParts, Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::auth::{Caller, Claim};
use super::error::Answer;
use super::limits::Look;
use super::server::Peer;
use super::{Answered, ApiState, convert, spelling};
use crate::build::record::Build;
use crate::build::service::LOG_LINES_MAX;
use crate::store::Filter;
use crate::tenant::Principal;

/// Lines of a log, unless the caller says how many.
const LOG_LINES: u32 = 100;

/// What names the tenant where no header does.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TenantQuery {
    #[serde(default)]
    pub(super) tenant_id: String,
}

/// Query of `ListBuilds`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ListQuery {
    #[serde(default)]
    tenant_id: String,
    #[serde(default)]
    status: String,
    #[serde(default, alias = "page_size")]
    limit: i64,
    #[serde(default)]
    offset: u64,
    /// The RPC's own, which would be missed if they were ignored.
    #[serde(default)]
    page_token: Option<String>,
    #[serde(default)]
    state_filter: Option<String>,
}

/// Query of `GetBuildLogs`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct LogQuery {
    #[serde(default)]
    tenant_id: String,
    #[serde(default)]
    offset: u64,
    limit: Option<u32>,
}

/// A query that may not be readable.
pub(super) type Asked<Q> = Result<Query<Q>, QueryRejection>;

pub(super) fn asked<Q>(query: Asked<Q>) -> Answered<Q> {
    match query {
        Ok(Query(query)) => Ok(query),
        Err(error) => Err(Answer::invalid(error.body_text())),
    }
}

/// The build that a path names.
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Answer;

    async fn from_request_parts(head: &mut Parts, state: &S) -> Answered<Self> {
        match Path::from_request_parts(head, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(error) => {
                let problem = error.body_text();
                Err(Answer::invalid(format!("the id of a build cannot be read: {problem}")))
            }
        }
    }
}

/// Lets a caller in, or says why not; errors name the tenant.
pub(super) async fn admitted<T, F: Future<Output = Answered<T>>>(
    state: &ApiState,
    caller: &Caller,
    tenant: &str,
    handler: impl FnOnce(Principal) -> F,
) -> Answered<T> {
    let principal = match state.auth.admit(caller, &Claim::tenant(tenant)).await {
        Ok(principal) => principal,
        Err(answer) => {
            state.refused(caller, None, "", &answer);
            return Err(answer);
        }
    };
    let who = principal.clone();
    handler(principal).await.map_err(|answer| {
        state.refused(caller, Some(&who), "", &answer);
        answer.for_tenant(who.tenant().as_str())
    })
}

/// `GET …/GetBuildStatus/{id}`
pub(super) async fn status(
    State(state): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    Named(id): Named,
    query: Asked<TenantQuery>,
) -> Answered<Json<Value>> {
    let tenant = asked(query)?.tenant_id;
    let state = &*state;
    admitted(state, &caller, &tenant, |who| async move {
        let build = state.service.get(&who, &id).await?;
        Ok(Json(job(state, &build)))
    })
    .await
}

/// A build in the documentation's spelling.
fn job(state: &ApiState, build: &Build) -> Value {
    let job = convert::job(&state.service, build, Vec::new(), state.clock.now());
    let canonical = serde_json::to_value(&job).unwrap_or_default();
    spelling::documented("builder.v1.BuildJob", canonical)
}

/// `GET …/ListBuilds?tenant_id&status&limit&offset`
pub(super) async fn list(
    State(state): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    query: Asked<ListQuery>,
) -> Answered<Json<Value>> {
    let query = asked(query)?;
    let tenant = query.tenant_id.clone();
    let state = &*state;
    admitted(state, &caller, &tenant, |who| async move {
        if query.page_token.is_some() || query.state_filter.is_some() {
            return Err(Answer::invalid(
                "page_token and state_filter are the RPC's: here, ask with offset and status",
            ));
        }
        let limit = convert::page_limit("limit", query.limit)?;
        let mut filter = Filter { offset: query.offset, limit, ..Filter::default() };
        if !query.status.is_empty() {
            filter.states = convert::states_of_status(&query.status)?;
            if filter.states.is_empty() {
                return Ok(Json(json!({"builds": [], "total_count": 0, "has_more": false})));
            }
        }
        let page = state.service.list(&who, &filter).await?;
        let builds: Vec<Value> = page.builds.iter().map(|build| job(state, build)).collect();
        Ok(Json(json!({
            "builds": builds,
            "total_count": page.total,
            "has_more": page.has_more,
        })))
    })
    .await
}

/// `GET …/GetBuildLogs/{id}?offset&limit`
pub(super) async fn logs(
    State(state): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    Named(id): Named,
    query: Asked<LogQuery>,
) -> Answered<Json<Value>> {
    let query = asked(query)?;
    let tenant = query.tenant_id.clone();
    let state = &*state;
    admitted(state, &caller, &tenant, |who| async move {
        let limit = match query.limit {
            None | Some(0) => LOG_LINES,
            Some(limit) => limit.min(LOG_LINES_MAX),
        };
        let page = state.service.log(&who, &id, query.offset, limit).await?;
        let lines: Vec<Value> = page.lines.iter().map(convert::log_value).collect();
        Ok(Json(json!({
            "build_id": id,
            "logs": lines,
            "offset": query.offset,
            "limit": limit,
            "next_offset": page.next_offset,
            "is_end": page.is_end,
        })))
    })
    .await
}

/// `GET /health`
pub(super) async fn health(
    State(state): State<Arc<ApiState>>,
    peer: Option<Extension<Peer>>,
) -> Response {
    if let Err(rate) = state.auth.limits().look(Look::Health, address(peer)) {
        return too_often(rate);
    }
    let (status, word, reason) = match state.heart.state().await {
        Ok(()) => (StatusCode::OK, "ok", None),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", Some(reason)),
    };
    let mut body = json!({
        "status": word,
        "service": "builderd",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": state.uptime_secs(),
    });
    if let Some(reason) = reason {
        body["reason"] = json!(reason);
    }
    (status, Json(body)).into_response()
}

/// Where a request came from; those of whom that is not known are one.
fn address(peer: Option<Extension<Peer>>) -> IpAddr {
    peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |Extension(peer)| peer.0.ip())
}

/// As the original said it.
fn too_often(rate: u32) -> Response {
    let body = json!({"error": "rate limit exceeded", "status": 429});
    let mut response = (StatusCode::TOO_MANY_REQUESTS, Json(body)).into_response();
    let limit = HeaderName::from_static("x-ratelimit-limit");
    response.headers_mut().insert(limit, HeaderValue::from(rate));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(1));
    response
}

/// `GET /stats`: how the service as a whole does; says nothing of single tenants.
pub(super) async fn stats(
    State(state): State<Arc<ApiState>>,
    peer: Option<Extension<Peer>>,
) -> Answered<Response> {
    if let Err(rate) = state.auth.limits().look(Look::Stats, address(peer)) {
        return Ok(too_often(rate));
    }
    let overview = state.service.overview().await?;
    Ok(Json(json!({
        "service": "builderd",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": state.uptime_secs(),
        "builds": {"queued": overview.depth.queued, "running": overview.depth.running},
        "storage": {"artifact_bytes": overview.storage_bytes},
        "walls": state.meters.walls,
    }))
    .into_response())
}

/// `GET /metrics`
pub(super) async fn metrics(State(state): State<Arc<ApiState>>) -> Response {
    const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
    ([(CONTENT_TYPE, PROMETHEUS)], (state.meters.render)()).into_response()
}
