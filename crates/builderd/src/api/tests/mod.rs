//! Stories about the doors, told to a real server over real sockets.
//!
//! No worker runs here: a story moves its builds itself, through the store.

mod answers;
mod artifact;
mod audit;
mod authorisation;
mod bounds;
mod certificates;
mod deleting;
mod documented;
mod health;
mod local;
mod open;
mod pages;
mod panics;
mod protocols;
mod shape;
mod slow;
mod stream;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{ApiRules, ApiState, Crowd, Meters, Mode, new_token};
use crate::artifact::{ArtifactStore as _, LocalArtifacts};
use crate::build::record::{BuildMetrics, BuildResult, LogLine, Micros};
use crate::build::service::{BuildService, ServiceRules};
use crate::build::state::BuildState;
use crate::clock::{Clock, WallClock};
use crate::config::Origins;
use crate::seal::MasterKey;
use crate::store::{Claimed, Fenced, Outcome, Store, TenantRow, TokenRow};
use crate::tenant::{Right, TenantId, Tier};
use crate::tls::Tls;

/// How long connections may live on when a story ends.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a forced delete waits here.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// A server of its own for one story.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) store: Store,
    artifacts: Arc<LocalArtifacts>,
    client: reqwest::Client,
    shutdown: watch::Sender<bool>,
    task: JoinHandle<std::io::Result<()>>,
    _directory: TempDir,
}

/// An answer, read to its end.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: reqwest::header::HeaderMap,
    pub(super) body: Vec<u8>,
}

impl Reply {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The JSON of an answer that is well.
    pub(super) fn well(self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, StatusCode::OK, "{text}");
        self.json()
    }
}

impl Server {
    /// Its tenants are of a tier that no story uses up.
    pub(super) async fn start(mode: Mode) -> Self {
        Self::start_with(mode, Tier::Enterprise).await
    }

    pub(super) async fn start_with(mode: Mode, default_tier: Tier) -> Self {
        Self::start_for(mode, default_tier, Origins::NONE).await
    }

    /// Pages of `origins` may call it.
    pub(super) async fn start_for(mode: Mode, default_tier: Tier, origins: Origins) -> Self {
        Self::start_by(rules(mode, default_tier), origins).await
    }

    pub(super) async fn start_by(api_rules: ApiRules, origins: Origins) -> Self {
        Self::start_behind(None, api_rules, origins).await
    }

    /// With TLS, of which the story has a client of its own.
    pub(super) async fn start_behind(
        tls: Option<Tls>,
        api_rules: ApiRules,
        origins: Origins,
    ) -> Self {
        Self::start_among(Crowd::up_to(0), tls, api_rules, origins).await
    }

    /// With a bound on the connections of an address.
    pub(super) async fn start_among(
        crowd: Crowd,
        tls: Option<Tls>,
        api_rules: ApiRules,
        origins: Origins,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open_sqlite(directory.path()).await.unwrap();
        let artifacts = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
        let clock: Arc<dyn Clock> = Arc::new(WallClock);
        let rules = ServiceRules {
            limits: Tier::ALL.map(Tier::limits),
            registry_auth: true,
            allowed_registries: Vec::new(),
            registries: oci::ClientOptions::default(),
            registries_of_tenants: std::collections::HashMap::new(),
            build_secs_max: 900,
            no_commands: Some("this is a test".into()),
            stop_wait: STOP_WAIT,
        };
        let key = MasterKey::load_or_create(&directory.path().join("master.key")).unwrap();
        let service = BuildService::new(
            store.clone(),
            artifacts.clone(),
            Arc::new(key),
            Arc::clone(&clock),
            rules,
            crate::telemetry::Metrics::unread(),
        );
        let (shutdown, stopping) = watch::channel(false);
        let meters = Meters {
            walls: serde_json::json!({"standing": ["seccomp"], "missing": []}),
            begin: Box::new(|| Box::new(())),
            render: Box::new(|| "builderd_up 1\n".to_owned()),
            left_out: Arc::new(|_| ()),
            observe: Arc::new(|_, _, _| ()),
        };
        let (service, stopped) = (Arc::new(service), stopping.clone());
        let state = ApiState::new(service, store.clone(), clock, meters, api_rules, stopped);
        let state = match &tls {
            Some(tls) => state.knowing(tls),
            None => state,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = super::router(&Arc::new(state), &origins);
        let entrance = super::Entrance::new(listener, tls, crowd);
        let task = tokio::spawn(super::serve(entrance, router, stopping, DRAIN));
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { address, store, artifacts, client, shutdown, task, _directory: directory }
    }

    /// Ends the story: the server must end by itself.
    pub(super) async fn stop(self) {
        self.begin_stop();
        drop(self.client);
        let ended = tokio::time::timeout(2 * DRAIN, self.task).await.expect("the server ends");
        ended.unwrap().unwrap();
    }

    pub(super) fn begin_stop(&self) {
        self.shutdown.send_replace(true);
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(super) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, self.url(path))
    }

    pub(super) fn rpc(&self, method: &str, body: &Value) -> RequestBuilder {
        self.request(Method::POST, &format!("/{}/{method}", api::SERVICE))
            .header("content-type", "application/json")
            .body(body.to_string())
    }

    pub(super) fn plain(&self, route: &str) -> RequestBuilder {
        self.request(Method::GET, &format!("/{}/{route}", api::SERVICE))
    }

    /// A token of a tenant for some rights.
    pub(super) async fn token(&self, tenant: &str, rights: &[Right]) -> String {
        self.token_of(tenant, None, rights).await
    }

    /// The same, of an organization.
    pub(super) async fn token_of(
        &self,
        tenant: &str,
        organization: Option<&str>,
        rights: &[Right],
    ) -> String {
        let (secret, id, secret_hash) = new_token();
        let tenant: TenantId = tenant.parse().unwrap();
        let system = self.store.system();
        let row = TenantRow { id: tenant.clone(), tier: Tier::Enterprise, limits: None };
        system.put_tenant(&row).await.unwrap();
        let row = TokenRow {
            id,
            secret_hash,
            tenant,
            customer: None,
            organization: organization.map(str::to_owned),
            rights: rights.iter().map(|right| right.as_str().to_owned()).collect(),
            note: String::new(),
            created_at: WallClock.now(),
            expires_at: None,
            revoked_at: None,
        };
        system.add_token(&row).await.unwrap();
        secret
    }

    /// Creates a build in development mode; gives its id.
    pub(super) async fn create(&self, tenant: &str) -> String {
        let request = self.rpc("CreateBuild", &create_body()).header("x-tenant-id", tenant);
        let created = send(request).await.well();
        created["build_id"].as_str().unwrap().to_owned()
    }

    /// A worker takes the next build.
    pub(super) async fn claim(&self) -> Claimed {
        let claimed = self.store.system().claim("story", 60, WallClock.now()).await.unwrap();
        claimed.expect("a build waits")
    }

    pub(super) async fn log(&self, claimed: &Claimed, lines: &[&str]) {
        let line = |message: &&str| LogLine {
            offset: 0,
            at: Micros(1_705_314_600_000_000),
            level: "info".into(),
            component: "builder".into(),
            message: (*message).to_owned(),
        };
        let lines: Vec<LogLine> = lines.iter().map(line).collect();
        let written = self.store.lease(&claimed.lease).append_log(&lines).await.unwrap();
        assert_eq!(written, Fenced::Written);
    }

    /// The worker publishes `content`.
    pub(super) async fn complete(&self, claimed: &Claimed, content: &[u8], compression: &str) {
        use sha2::Digest as _;
        let sha256 = crate::build::hex(&sha2::Sha256::digest(content));
        let key = format!("tenant/{sha256}");
        let staged = self.artifacts.staging().join(&sha256);
        std::fs::write(&staged, content).unwrap();
        self.artifacts.publish(&staged, &key).await.unwrap();
        let lease = self.store.lease(&claimed.lease);
        let written = lease.progress(BuildState::Packaging, 99, "Publishing", WallClock.now());
        assert_eq!(written.await.unwrap(), Fenced::Written);
        let result = BuildResult {
            artifact_key: key,
            artifact_bytes: content.len() as u64,
            sha256,
            image_bytes: 2 * content.len() as u64,
            metadata: json!({
                "original_image": "nginx:alpine",
                "artifact": {"compression": compression},
            }),
            from_cache: false,
            metrics: BuildMetrics { total_ms: 1000, cpu_ms: 750, ..BuildMetrics::default() },
        };
        let outcome = Outcome::Completed(Box::new(result));
        let written = lease.finish(None, outcome, WallClock.now()).await.unwrap();
        assert_eq!(written, Some(BuildState::Completed));
    }
}

/// As the service has them by default.
pub(super) fn rules(mode: Mode, default_tier: Tier) -> ApiRules {
    ApiRules {
        mode,
        default_tier,
        looks_per_sec: 100,
        body_max: super::BODY_MAX,
        open_max: super::OPEN_MAX,
    }
}

/// A request that every tier may make.
pub(super) fn create_body() -> Value {
    json!({"config": {
        "source": {"docker_image": {"image_uri": "ghcr.io/unkeyed/unkey:f4cfee5"}},
        "target": {"microvm_rootfs": {"format": "ext4"}},
    }})
}

pub(super) async fn send(request: RequestBuilder) -> Reply {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    Reply { status, headers, body: response.bytes().await.unwrap().to_vec() }
}
