//! A request enters here: `router` lists every way in.
//!
//! Each door translates between its protocol and [`BuildService`]; what may happen to a build is
//! not decided here. The gate checks who asks before anything of a body is read.

mod answers;
mod audit;
mod auth;
mod builder;
mod carried;
mod convert;
mod cors;
mod download;
mod error;
mod follow;
mod frames;
mod guard;
mod health;
mod limits;
mod local;
mod memory;
mod open;
mod parts;
mod peers;
mod rest;
mod server;
mod shape;
mod slow;
mod spelling;
mod swallow;
#[cfg(feature = "testing")]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::v1::BuilderServiceExt as _;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::handler::Handler as _;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, get};
use connectrpc::{ConnectRpcBody, ConnectRpcService, DeadlinePolicy, Limits, Protocol};
use connectrpc_health::{HealthExt as _, HealthService};
use connectrpc_reflection::Reflector;
use futures_util::FutureExt as _;
use http::Method;
use tokio::sync::watch;
use tower::ServiceExt as _;

use audit::{Asked, Refusals};
use auth::Auth;
pub(crate) use auth::{Mode, new_token};
pub(crate) use guard::{Observe, PANICKED};
pub(crate) use memory::REMEMBERED_SECS;
pub(crate) use open::{Crowd, OPEN_MAX, OpenMax};
#[cfg(test)]
pub(crate) use server::PeerId;
pub(crate) use server::{Entrance, serve, serve_late};
pub(crate) use slow::BODY_MAX;

use crate::build::record::Micros;
use crate::build::service::{BuildService, ServiceError};
use crate::clock::Clock;
use crate::config::Origins;
use crate::store::Store;
use crate::tenant::Tier;
use crate::tls::Tls;
use error::Answer;
use guard::Guard;
use health::Heart;
use open::Open;
use spelling::{Form, Reader};
use swallow::Swallow;
use tracing::Instrument as _;

/// Longest message, and longest body of an RPC.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// The same for those that anybody may call, who asks about health or reflection.
const OPEN_MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Proof that a credential was checked; only this module's `auth` can make one.
#[derive(Debug)]
pub struct Checked(());

/// What a handler of a plain route returns.
type Answered<T> = Result<T, Answer>;

/// Settings of the doors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ApiRules {
    /// How callers prove who they are.
    pub(crate) mode: Mode,
    /// The tier of tenants of which nothing is known.
    pub(crate) default_tier: Tier,
    /// How often `/health`, and `/stats`, answers an address in a second; 0 for always.
    pub(crate) looks_per_sec: u32,
    /// How long the body of a request may take.
    pub(crate) body_max: Duration,
    /// How much a tenant, or an address, may hold open.
    pub(crate) open_max: OpenMax,
}

/// What the doors tell whoever measures.
pub(crate) struct Meters {
    /// Gives the text of `/metrics`.
    pub(crate) render: Box<dyn Fn() -> String + Send + Sync>,
    /// What stands between builds and the host, as `/stats` shows it.
    pub(crate) walls: serde_json::Value,
    /// Told how many refusals the audit log leaves out.
    pub(crate) left_out: Arc<dyn Fn(u64) + Send + Sync>,
    /// Told of each call.
    pub(crate) observe: Observe,
    /// Told when a request comes; it is done when what this gives is dropped.
    pub(crate) begin: Box<dyn Fn() -> Begun + Send + Sync>,
}

/// A request that is being answered.
pub(crate) type Begun = Box<dyn std::any::Any + Send>;

/// What the doors need.
pub(crate) struct ApiState {
    service: Arc<BuildService>,
    auth: Auth,
    clock: Arc<dyn Clock>,
    started_at: Micros,
    meters: Meters,
    refused: Swallow,
    refusals: Arc<Refusals>,
    heart: Arc<Heart>,
    open: Open,
    mode: Mode,
    body_max: Duration,
    /// True once the service stops: ends streams.
    stopped: watch::Receiver<bool>,
}

impl ApiState {
    /// The doors to `service`, whose tokens and tenants are in `store`.
    pub(crate) fn new(
        service: Arc<BuildService>,
        store: Store,
        clock: Arc<dyn Clock>,
        meters: Meters,
        rules: ApiRules,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        let started_at = clock.now();
        let told = Arc::clone(&meters.left_out);
        let refusals = Refusals::new(store.clone(), Arc::clone(&clock), told);
        let auth = Auth::new(store, Arc::clone(&clock), rules);
        let heart = Heart::new(Arc::clone(&service), Arc::clone(&clock), stopped.clone());
        Self {
            service,
            auth,
            clock,
            started_at,
            meters,
            refused: Swallow::new(),
            refusals: Arc::new(refusals),
            heart: Arc::new(heart),
            open: Open::up_to(rules.open_max),
            mode: rules.mode,
            body_max: rules.body_max,
            stopped,
        }
    }

    /// Certificates of clients that `tls` knows are credentials, too; whom it refuses is written down.
    pub(crate) fn knowing(mut self, tls: &Tls) -> Self {
        self.auth.know(tls.clients());
        tls.tell(self.tell_handshakes());
        self
    }

    fn uptime_secs(&self) -> i64 {
        (self.clock.now().0 - self.started_at.0) / Micros::SECOND
    }
}

/// An RPC service as it is mounted.
type Rpc = ConnectRpcService<Guard<connectrpc::Router>>;

/// Every way in, for programs and for pages of `origins`.
pub(crate) fn router(state: &Arc<ApiState>, origins: &Origins) -> axum::Router {
    let state = Arc::clone(state);
    let at = |route: &str| format!("/{}/{route}", api::SERVICE);
    let door = Arc::new(builder::Door::new(Arc::clone(&state)));
    let rpc = rpc(&state, door.register(connectrpc::Router::new()), MESSAGE_BYTES_MAX);
    let call_any = any({
        let rpc = rpc.clone();
        move |request| call(rpc.clone(), request)
    });
    let builds = axum::Router::new()
        .route(&at("GetBuildStatus/{id}"), get(rest::status))
        .route(&at("GetBuildArtifact/{id}"), get(download::artifact))
        .route(&at("GetBuildLogs/{id}"), get(rest::logs))
        .route(&at("ListBuilds"), any(move |state, request| list_builds(state, rpc, request)))
        .route(&at("{method}"), call_any)
        .layer(from_fn_with_state(Arc::clone(&state), gate));
    let reflection = reflection_service(&state);
    let hold = from_fn_with_state(Arc::clone(&state), open::bound);
    let call_reflection = any(move |request| call(reflection.clone(), request));
    let call_reflection =
        call_reflection.layer(from_fn_with_state(Arc::clone(&state), slow::bound)).layer(hold);
    let looks = axum::Router::new()
        .route("/stats", get(rest::stats))
        .route("/metrics", get(rest::metrics))
        .layer(from_fn_with_state(Arc::clone(&state), open::bound_look));
    let router = axum::Router::new()
        .merge(builds)
        .merge(health_routes(&state))
        .route("/grpc.reflection.v1.ServerReflection/{method}", call_reflection.clone())
        .route("/grpc.reflection.v1alpha.ServerReflection/{method}", call_reflection)
        .merge(looks)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method);
    opened(router, state, origins)
}

/// What is left of that for who comes when the service is stopping: whether it is well, which it is not.
pub(crate) fn late_router(state: &Arc<ApiState>, origins: &Origins) -> axum::Router {
    let router = axum::Router::new().merge(health_routes(state)).fallback(is_stopping);
    opened(router, Arc::clone(state), origins)
}

/// Lets in whom the mode and the settings let in.
fn opened(
    router: axum::Router<Arc<ApiState>>,
    state: Arc<ApiState>,
    origins: &Origins,
) -> axum::Router {
    let router = router
        .layer(from_fn_with_state(Arc::clone(&state), catch_panics))
        .with_state(Arc::clone(&state));
    let router = match state.mode {
        Mode::Development => local::only(state, origins.clone(), router),
        Mode::Tokens => router,
    };
    cors::open_to(origins.clone(), router)
}

/// Where it is asked whether the service is well.
fn health_routes(state: &Arc<ApiState>) -> axum::Router<Arc<ApiState>> {
    let health = health_service(state);
    let call_health = any(move |request| call(health.clone(), request))
        .layer(from_fn_with_state(Arc::clone(state), slow::cut_open))
        .layer(from_fn_with_state(Arc::clone(state), open::bound));
    let look = get(rest::health).layer(from_fn_with_state(Arc::clone(state), open::bound_look));
    axum::Router::new().route("/health", look).route("/grpc.health.v1.Health/{method}", call_health)
}

/// Health, which anybody may ask.
fn health_service(state: &ApiState) -> Rpc {
    let health = Arc::new(HealthService::new(health::Health::new(Arc::clone(&state.heart))));
    let router = health.register(connectrpc::Router::new());
    let limits = connectrpc_health::request_limits();
    let router = connectrpc_health::apply_request_limits(router, limits);
    rpc(state, router, OPEN_MESSAGE_BYTES_MAX)
}

/// Reflection, which anybody may ask, in a stream that lasts no longer than a body may.
fn reflection_service(state: &ApiState) -> Rpc {
    let router = connectrpc::Router::new();
    let router = match Reflector::from_descriptor_set_bytes(api::FILE_DESCRIPTOR_SET) {
        Ok(reflector) => connectrpc_reflection::install(router, reflector),
        Err(error) => {
            tracing::error!(%error, "the descriptors cannot be read: there is no reflection");
            router
        }
    };
    let deadline = deadlines().with_max(state.body_max).with_default_timeout(state.body_max);
    rpc(state, router, OPEN_MESSAGE_BYTES_MAX).with_deadline_policy(deadline)
}

/// Whoever names a deadline for a stream is taken at his word.
fn deadlines() -> DeadlinePolicy {
    DeadlinePolicy::new().with_enforce_on_streams(true)
}

fn rpc(state: &ApiState, router: connectrpc::Router, bytes_max: usize) -> Rpc {
    let limits =
        Limits::default().with_max_request_body_size(bytes_max).with_max_message_size(bytes_max);
    ConnectRpcService::new(Guard::new(router, Arc::clone(&state.meters.observe)))
        .with_limits(limits)
        .with_deadline_policy(deadlines())
}

async fn call(rpc: Rpc, request: Request) -> Response {
    let response = match rpc.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    // Keeps its length, so that HTTP/1.1 need not send it in chunks.
    response.map(|body| {
        if let ConnectRpcBody::Full(full) = body { Body::new(full) } else { Body::new(body) }
    })
}

/// `ListBuilds` is an RPC and a documented plain route at once; a message in the query, or a
/// body, makes it an RPC.
async fn list_builds(State(state): State<Arc<ApiState>>, rpc: Rpc, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let form = Form::of(&head);
    let request = Request::from_parts(head, body);
    match form {
        Form::Plain => rest::list.call(request, state).await,
        Form::Person | Form::Program => call(rpc, request).await,
    }
}

/// The RPC that a path names, in our own word for it.
fn method_named(path: &str) -> &'static str {
    let last = path.rsplit('/').next().unwrap_or_default();
    api::METHODS.iter().find(|method| method.name == last).map_or("unknown", |method| method.name)
}

/// Nobody gets to a build past here without saying who he is.
async fn gate(State(state): State<Arc<ApiState>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let (mut head, body) = request.into_parts();
    if head.method == Method::POST {
        spelling::mend_content_type(&mut head.headers);
    }
    let reader = Reader::of(&head);
    let asked = Arc::new(Asked::of(&head));
    let id = head.extensions.get::<server::PeerId>().map(|id| &id.0);
    let admitted = match state.auth.caller(&head.headers, &asked, id).await {
        Ok(caller) => match state.auth.precheck(&caller).await {
            Ok(()) => Ok(caller),
            Err(answer) => {
                state.refused(&caller, None, "", &answer);
                Err((answer, caller.rate().copied()))
            }
        },
        Err(refusal) => {
            let answer = Answer::refused(&refusal);
            let suspect = state.auth.suspect(&head.headers, id);
            let who = suspect.as_ref().map(|(tenant, id)| (tenant.as_ref(), id.as_str()));
            state.refusals.note(&asked, who, None, &answer);
            Err((answer, None))
        }
    };
    let caller = match admitted {
        Ok(caller) => caller,
        Err((answer, rate)) => {
            (state.meters.observe)("refused", answer.code().as_str(), start.elapsed());
            state.refused.swallow(body).await;
            let mut response = reader.refuse(answer);
            rate.inspect(|rate| rate.write(response.headers_mut()));
            return response;
        }
    };
    // The route as it was declared: whoever makes up paths must not make up names of metrics.
    let matched = head.extensions.get::<MatchedPath>().map(MatchedPath::as_str);
    let route = match matched.and_then(|path| path.split('/').nth(2)).unwrap_or_default() {
        // The RPCs share one.
        "{method}" => method_named(head.uri.path()),
        route => route,
    };
    let route = route.to_owned();
    let span = {
        let parent = head.headers.get("traceparent").and_then(|value| value.to_str().ok());
        crate::telemetry::request_span(&route, parent)
    };
    let trace = span.in_scope(crate::telemetry::traceparent);
    let caller = caller.traced(trace.as_deref());
    head.extensions.insert(caller.clone());
    let _begun = (state.meters.begin)();
    let request = Request::from_parts(head, body);
    let mut response = admit(&state, &reader, request, next).instrument(span).await;
    if reader.form() == Form::Plain {
        let route = format!("{}/{route}", api::SERVICE);
        (state.meters.observe)(&route, response.status().as_str(), start.elapsed());
    }
    if let Some(rate) = caller.rate() {
        rate.write(response.headers_mut());
    }
    response
}

/// Answers a caller that the gate let in, within the bounds of what one may hold. In one piece, and
/// not as layers: each of those clones what is behind it for each request.
async fn admit(state: &ApiState, reader: &Reader, request: Request, next: Next) -> Response {
    let answer = async |request| spelling::answer_in_both(reader.form(), request, next).await;
    let in_time = async |request| slow::cut(state, reader, request, answer).await;
    carried::bound(state, reader, request, in_time).await
}

/// Turns a panic of a plain route into an answer; `guard` does it for RPCs.
async fn catch_panics(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    let uri = request.uri().clone();
    caught(&state.meters.observe, uri.path(), next.run(request)).await
}

/// The answer, or that there is none for a panic, of which whoever measures is told.
async fn caught(observe: &Observe, path: &str, answer: impl Future<Output = Response>) -> Response {
    let start = Instant::now();
    let answer = AssertUnwindSafe(answer).catch_unwind().await;
    answer.unwrap_or_else(|_| {
        let response = Answer::panicked().into_response();
        for code in [PANICKED, response.status().as_str()] {
            observe(path, code, start.elapsed());
        }
        response
    })
}

async fn no_route(State(state): State<Arc<ApiState>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    state.refused.swallow(body).await;
    let is_rpc = Protocol::detect(&head.headers).is_some_and(|protocol| protocol.is_streaming);
    let form = if is_rpc { Form::Program } else { Form::Plain };
    spelling::refuse(Answer::no_route(head.uri.path()), form, &head.headers)
}

async fn is_stopping(State(state): State<Arc<ApiState>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    state.refused.swallow(body).await;
    let answer = Answer::of(&ServiceError::Stopping);
    spelling::refuse(answer, Form::of(&head), &head.headers)
}

async fn no_method(method: Method) -> Answer {
    Answer::no_method(&method)
}
