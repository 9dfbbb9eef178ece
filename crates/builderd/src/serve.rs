//! The service, wired together top to bottom: settings → database and artifacts → service →
//! doors, workers, janitor. It decides nothing; each part is told what it needs and no more.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use commands::{Runtime, Scratch};
use futures_util::FutureExt as _;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::gcp::GoogleCloudStorageBuilder;
use sandbox::Wall;
use secrecy::ExposeSecret as _;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api::{self, ApiRules, Meters, Mode};
use crate::artifact::{
    ArtifactStore, LocalArtifacts, MeteredArtifacts, ObjectArtifacts, SealedArtifacts,
};
use crate::build::child::RegistrySpec;
use crate::build::host::{Host, aside};
use crate::build::janitor::{Janitor, JanitorRules};
use crate::build::kept::SealedPacks;
use crate::build::service::{BuildService, STOP_WAIT, ServiceRules};
use crate::build::worker::{ATTEMPTS_MAX, WorkerRules, Workers, clear_leftovers};
use crate::causes::chain;
use crate::clock::{Clock, WallClock};
use crate::config::{Config, DatabaseConfig, KeyPlace, StorageBackend};
use crate::keys::TenantKeys;
use crate::packs::{CacheError, PackCache};
use crate::parts::{PartError, Parts};
use crate::private;
use crate::seal::{KeyWrapper, MasterKey, SealError};
use crate::store::{DirectoryProblem, Leases, Store, StoreError};
use crate::telemetry::{self, TelemetryError};
use crate::tls::{self, Keeper, Tls, TlsError};

/// Why the service did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// A directory or file cannot be used.
    #[error("cannot use {}", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory that a setting names cannot be used.
    #[error("cannot use {}, which {setting} names", path.display())]
    Directory {
        /// The setting.
        setting: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Another server works in the same place.
    #[error("another builderd uses {}: stop it, or choose another directory", .0.display())]
    InUse(PathBuf),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The master key.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The pack cache.
    #[error(transparent)]
    Packs(#[from] CacheError),
    /// The object store's settings.
    #[error("the object store cannot be used")]
    Objects(#[source] object_store::Error),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Logs, metrics or traces.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// A part of it.
    #[error("the service stopped")]
    Part(#[from] PartError),
    /// The host cannot shut builds in.
    #[error(
        "this host cannot give builds: {0}; use one that can, or accept what is missing by name in \
         UNKEY_BUILDERD_ACCEPT_MISSING_WALLS"
    )]
    Walls(String),
    /// The runtime.
    #[error("the service stopped")]
    Runtime(#[source] io::Error),
}

impl ServeError {
    /// What to do about it, where the error does not say so itself.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        let in_use = matches!(
            self,
            Self::Store(StoreError::DataDirectory { problem: DirectoryProblem::InUse, .. })
        );
        in_use
            .then_some("stop that one, or use another directory (UNKEY_BUILDERD_DATABASE_DATA_DIR)")
    }
}

/// Runs the service until SIGTERM or SIGINT, and a second signal ends it at once.
///
/// # Errors
/// [`ServeError`]
pub(crate) fn run(config: Config) -> Result<(), ServeError> {
    let host = open_host(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    runtime.block_on(async {
        let telemetry = telemetry::start(&config)?;
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(stop_on_signals(stop));
        let tls = match &config.tls {
            Some(settings) => Some(tls::start(settings, telemetry.metrics()).await?),
            None => {
                outlive_hangups();
                None
            }
        };
        let address = config.listen.to_string();
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(|source| ServeError::Listen { address, source })?;
        let listening = |source| ServeError::Listen { address: "/metrics".into(), source };
        if let Some(port) = telemetry::bind_metrics(&config.telemetry).await.map_err(listening)? {
            let wanted = config.tls.as_ref().is_some_and(|settings| settings.for_metrics);
            let tls = tls.as_ref().filter(|_| wanted).map(|(tls, _)| tls.clone());
            let address = port.local_addr().map_err(listening)?;
            tracing::info!(%address, tls = tls.is_some(), "listening for metrics");
            let page = telemetry::metrics_router(telemetry.metrics());
            let crowd = api::Crowd::up_to(config.connections_max);
            let (entrance, drain) = (api::Entrance::new(port, tls, crowd), config.shutdown_timeout);
            tokio::spawn(api::serve(entrance, page, stopped.clone(), drain));
        }
        tell_of_walls(&host);
        let served = serve(config, host, (listener, tls), telemetry.metrics(), stopped).await;
        telemetry.finish().await;
        served
    })
}

async fn stop_on_signals(stop: watch::Sender<bool>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    for turn in 0..2 {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if turn == 0 {
            tracing::info!("stopping; builds that do not finish go back to the queue");
            // The receivers live as long as the service.
            let _ = stop.send(true);
        }
    }
    std::process::exit(130);
}

/// A SIGHUP, at which certificates are read anew, ends no server that has none.
fn outlive_hangups() {
    use tokio::signal::unix::{SignalKind, signal};
    // From now on, and not when the task begins.
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!(
                "SIGHUP: nothing is read anew without TLS; settings are read at a start"
            );
        }
    });
}

/// Where clients come in, and what keeps it secure.
type Entry = (TcpListener, Option<(Tls, Keeper)>);

/// The wiring; tests give a listener on port 0 and their own `stopped`.
pub(crate) async fn serve(
    config: Config,
    host: Host,
    (listener, tls): Entry,
    metrics: Arc<telemetry::Metrics>,
    stopped: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let clock: Arc<dyn Clock> = Arc::new(WallClock);
    make_directory("UNKEY_BUILDERD_DATABASE_DATA_DIR", &config.data_dir)?;
    make_directory(output_setting(&config), &config.rootfs_output_dir)?;
    let _ours = claim_directory(&config.rootfs_output_dir)?;
    let host = swept(host).await;
    let store = open_store(&config).await?;
    let key = Arc::new(master_key(&config.master_key, &store).await?);
    let artifacts = sealed(metered(open_artifacts(&config)?, &config, &metrics), &store, &key);
    clear_leftovers(artifacts.staging())
        .map_err(|source| ServeError::Path { path: artifacts.staging().to_owned(), source })?;
    if matches!(config.database, DatabaseConfig::Sqlite) {
        // Its lock says that no other server lives: nobody has to wait for the leases of the last.
        store.system().reap(Leases::All, ATTEMPTS_MAX, clock.now()).await?;
    }
    let caches = config.storage.cache_enabled;
    let packs = caches.then(|| open_packs(&config)).transpose()?;
    let (service_rules, mut worker_rules) = rules(&config, &host)?;
    worker_rules.sealed_packs = caches.then(|| sealed_packs(&config, &store, &key)).transpose()?;
    let service = Arc::new(BuildService::new(
        store.clone(),
        Arc::clone(&artifacts),
        Arc::clone(&key),
        Arc::clone(&clock),
        service_rules,
        Arc::clone(&metrics),
    ));
    let workers = Arc::new(Workers::new(
        store.clone(),
        Arc::clone(&artifacts),
        key,
        Arc::clone(&clock),
        Arc::clone(&metrics),
        worker_rules,
    ));
    let janitor = Janitor::new(
        store.clone(),
        Arc::clone(&artifacts),
        Arc::clone(&clock),
        Arc::clone(&metrics),
        janitor_rules(&config, packs),
    );
    let (meters, rules) = (meters(&metrics, &host), api_rules(&config));
    let mut parts = Parts::new();
    let stopping = parts.stopping();
    let state = api::ApiState::new(service, store, clock, meters, rules, stopping.clone());
    let (tls, keeper) = tls.unzip();
    let state = match &tls {
        Some(tls) => state.knowing(tls),
        None => state,
    };
    let written = state.written();
    let mut late = open_doors(&mut parts, &config, (listener, tls), state)?;
    if let Some(keeper) = keeper {
        parts.start("the keeper of certificates", keeper.run(stopping.clone()));
    }
    let (work, tidy) = (workers.run(stopping.clone()), janitor.run(stopping));
    parts.start("the workers", work.map(Ok));
    parts.start("the janitor", tidy.map(Ok));
    let ended = parts.run(stopped).await;
    late.shutdown().await;
    written.wait().await;
    artifacts.settle().await;
    aside(move || host.close()).await;
    Ok(ended?)
}

/// Starts the API. Who comes when it ends is answered by another task, which is none of the parts: it is
/// there until all of them have ended.
fn open_doors(
    parts: &mut Parts,
    config: &Config,
    (listener, tls): (TcpListener, Option<Tls>),
    state: api::ApiState,
) -> Result<JoinSet<()>, ServeError> {
    let address = listener.local_addr().map_err(ServeError::Runtime)?;
    tell_address(address, config.dev, tls.is_some());
    let (state, origins) = (Arc::new(state), &config.cors_allowed_origins);
    let (router, late_router) = (api::router(&state, origins), api::late_router(&state, origins));
    let crowd = api::Crowd::up_to(config.connections_max);
    let entrance = api::Entrance::new(listener, tls, crowd);
    let late = api::serve_late(entrance.clone(), late_router, parts.stopping());
    let answer = api::serve(entrance, router, parts.stopping(), config.shutdown_timeout);
    parts.start("the API", answer);
    Ok(JoinSet::from_iter([late]))
}

/// The host, without what an earlier service has left on it.
async fn swept(host: Host) -> Arc<Host> {
    let host = Arc::new(host);
    let left = Arc::clone(&host);
    aside(move || left.sweep()).await;
    host
}

/// What whoever starts the service should see.
fn tell_address(address: SocketAddr, dev: bool, tls: bool) {
    if dev {
        tracing::warn!("development mode: whoever reaches this port is believed without a token");
    }
    tracing::info!(%address, dev, tls, "listening");
}

/// What is missing of the host must have been accepted by name, but in development, where nobody
/// is a stranger.
fn open_host(config: &Config) -> Result<Host, ServeError> {
    // What a host gives depends on the file systems where builds read and write.
    let output = &config.rootfs_output_dir;
    make_private(output_setting(config), output)?;
    let packs = config.storage.cache_enabled.then(|| make_cache(config)).transpose()?;
    let host = Host::open(output, packs.as_slice());
    let accepted = |wall: &Wall| config.dev || config.accept_missing_walls.contains(wall);
    let missing = host.missing().iter().filter(|(wall, _)| !accepted(wall));
    let missing: Vec<String> = missing.map(|(wall, why)| format!("{wall} ({why})")).collect();
    match missing.is_empty() {
        true => Ok(host),
        false => Err(ServeError::Walls(missing.join(", "))),
    }
}

/// What runs the commands of builds, or why there is nothing that does.
fn open_runtime(config: &Config, host: &Host) -> Result<Runtime, String> {
    let groups = host.missing().iter().find(|(wall, _)| *wall == Wall::Cgroup);
    let found = match groups {
        Some((_, why)) => Err(format!("commands cannot be held to their limits: {why}")),
        None => commands::check(&config.oci_runtime, &config.accept_vulnerable)
            .map_err(|unable| unable.to_string()),
    };
    match &found {
        Ok(Runtime { version, accepted, scratch, .. }) if accepted.is_empty() => {
            tracing::info!(version, disk = scratch.as_str(), "builds may run commands");
        }
        Ok(Runtime { version, accepted, scratch, .. }) => {
            let (holes, disk) = (accepted.join(", "), scratch.as_str());
            tracing::warn!(
                version,
                holes,
                disk,
                "builds may run commands; their runtime has holes"
            );
        }
        Err(reason) => tracing::info!(reason, "builds run no commands"),
    }
    if found.as_ref().is_ok_and(|runtime| runtime.scratch == Scratch::Watched) {
        tracing::warn!(
            "this host has no loop devices: what commands have on disk is only watched, and they \
             are ended a little after it is too much"
        );
    }
    found
}

fn tell_of_walls(host: &Host) {
    for (wall, why) in host.missing() {
        tracing::warn!(%wall, why, "builds run without a wall that this host cannot give");
    }
}

/// The key of every server on this database: the first one makes it.
pub(crate) async fn master_key(place: &KeyPlace, store: &Store) -> Result<MasterKey, ServeError> {
    let system = store.system();
    let key = match (place, system.master_key().await?) {
        (KeyPlace::Credential(path), _) => MasterKey::load_credential(path)?,
        (KeyPlace::File(path), Some(_)) => MasterKey::load(path)?,
        (KeyPlace::File(path), None) => MasterKey::load_or_create(path)?,
    };
    let held = system.claim_master_key(key.id()).await?;
    Ok(key.must_be(&held, place.path())?)
}

/// Which setting says where artifacts are made.
fn output_setting(config: &Config) -> &'static str {
    match &config.storage.backend {
        StorageBackend::Local => "UNKEY_BUILDERD_ROOTFS_OUTPUT_DIR",
        StorageBackend::S3 { .. } | StorageBackend::Gcs { .. } => "UNKEY_BUILDERD_SCRATCH_DIR",
    }
}

/// One that is there already is its maker's: whom it lets in is for him to say.
fn make_directory(setting: &'static str, path: &Path) -> Result<(), ServeError> {
    make_private(setting, path)?;
    let failed = |source| ServeError::Directory { setting, path: path.to_owned(), source };
    if private::is_open(path).map_err(failed)? {
        tracing::warn!(
            setting,
            path = %path.display(),
            "every user of this machine may look into this directory: `chmod o=` it, unless that is \
             wanted"
        );
    }
    Ok(())
}

fn make_private(setting: &'static str, path: &Path) -> Result<(), ServeError> {
    private::make_directory(path).map_err(|source| {
        let path = path.to_owned();
        ServeError::Directory { setting, path, source }
    })
}

/// The directory of the cache of layers.
fn make_cache(config: &Config) -> Result<&Path, ServeError> {
    let setting = "UNKEY_BUILDERD_CACHE_DIR or UNKEY_BUILDERD_WORKSPACE_DIR";
    make_private(setting, &config.storage.cache_dir)?;
    Ok(&config.storage.cache_dir)
}

/// The cache of layers, closed to others also where an earlier version has made it.
fn open_packs(config: &Config) -> Result<PackCache, ServeError> {
    let packs = PackCache::open(make_cache(config)?)?;
    match packs.close_to_others() {
        Ok(closed) => {
            for path in closed {
                tracing::warn!(
                    path = %path.display(),
                    "the layers of builds could be read by other users, and cannot any more"
                );
            }
        }
        Err(error) => tracing::warn!(
            error = %chain(&error),
            "the layers of builds may be read by other users: that cannot be changed"
        ),
    }
    Ok(packs)
}

/// Staged files belong to one process: another one would remove them at its start.
fn claim_directory(path: &Path) -> Result<std::fs::File, ServeError> {
    let lock = path.join(".lock");
    let failed = |source| ServeError::Path { path: lock.clone(), source };
    let file = private::file_options().open(&lock).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(ServeError::InUse(path.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(failed(source)),
    }
}

async fn open_store(config: &Config) -> Result<Store, StoreError> {
    match &config.database {
        DatabaseConfig::Sqlite => Store::open_sqlite(&config.data_dir).await,
        DatabaseConfig::Postgres { url, max_connections } => {
            Store::open_postgres(url.expose_secret(), *max_connections).await
        }
    }
}

fn open_artifacts(config: &Config) -> Result<Arc<dyn ArtifactStore>, ServeError> {
    let root = &config.rootfs_output_dir;
    let failed = |source| ServeError::Path { path: root.clone(), source };
    let objects: (Arc<dyn ObjectStore>, String, &str) = match &config.storage.backend {
        StorageBackend::Local => {
            return Ok(Arc::new(LocalArtifacts::open(root).map_err(failed)?));
        }
        StorageBackend::S3 {
            bucket,
            region,
            endpoint,
            access_key_id,
            secret,
            prefix,
            allow_http,
        } => {
            let mut builder = AmazonS3Builder::new()
                .with_bucket_name(bucket)
                .with_region(region)
                .with_allow_http(*allow_http);
            if let Some(endpoint) = endpoint {
                builder = builder.with_endpoint(endpoint);
            }
            if let (Some(id), Some(secret)) = (access_key_id, secret) {
                builder =
                    builder.with_access_key_id(id).with_secret_access_key(secret.expose_secret());
            }
            let store = builder.build().map_err(ServeError::Objects)?;
            (Arc::new(store), format!("s3://{bucket}"), prefix)
        }
        StorageBackend::Gcs { bucket, credentials_file, prefix } => {
            let mut builder = GoogleCloudStorageBuilder::new().with_bucket_name(bucket);
            if let Some(file) = credentials_file {
                builder = builder.with_service_account_path(file.to_string_lossy());
            }
            let store = builder.build().map_err(ServeError::Objects)?;
            (Arc::new(store), format!("gs://{bucket}"), prefix)
        }
    };
    let (store, url, prefix) = objects;
    Ok(Arc::new(ObjectArtifacts::open(store, &url, prefix, root).map_err(failed)?))
}

/// The store, with what it does counted.
fn metered(
    artifacts: Arc<dyn ArtifactStore>,
    config: &Config,
    metrics: &Arc<telemetry::Metrics>,
) -> Arc<dyn ArtifactStore> {
    let backend = match &config.storage.backend {
        StorageBackend::Local => "local",
        StorageBackend::S3 { .. } => "s3",
        StorageBackend::Gcs { .. } => "gcs",
    };
    Arc::new(MeteredArtifacts::new(artifacts, backend, Arc::clone(metrics)))
}

/// The store, with what must be encrypted sealed under the tenants' keys.
fn sealed(
    artifacts: Arc<dyn ArtifactStore>,
    store: &Store,
    key: &Arc<MasterKey>,
) -> Arc<dyn ArtifactStore> {
    let wrapper = Arc::clone(key) as Arc<dyn KeyWrapper>;
    Arc::new(SealedArtifacts::new(artifacts, Arc::new(TenantKeys::new(store.clone(), wrapper))))
}

/// Where layers of protected tenants are kept.
fn sealed_packs(
    config: &Config,
    store: &Store,
    key: &Arc<MasterKey>,
) -> Result<Arc<SealedPacks>, ServeError> {
    let wrapper = Arc::clone(key) as Arc<dyn KeyWrapper>;
    let keys = Arc::new(TenantKeys::new(store.clone(), wrapper));
    let (directory, limit_bytes) = (&config.rootfs_output_dir, config.storage.cache_max_bytes);
    let packs = SealedPacks::open(directory, limit_bytes, keys);
    let packs = packs.map_err(|source| ServeError::Path { path: directory.clone(), source })?;
    Ok(Arc::new(packs))
}

fn api_rules(config: &Config) -> ApiRules {
    ApiRules {
        mode: if config.dev { Mode::Development } else { Mode::Tokens },
        default_tier: config.tenants.default_tier,
        looks_per_sec: config.health_rate_per_sec,
        body_max: api::BODY_MAX,
        open_max: api::OPEN_MAX,
    }
}

fn meters(metrics: &Arc<telemetry::Metrics>, host: &Host) -> Meters {
    let (shown, told, counted) = (Arc::clone(metrics), Arc::clone(metrics), Arc::clone(metrics));
    let counting = Arc::clone(metrics);
    let missing = host.missing().iter().map(|(wall, why)| json!({"wall": wall, "reason": why}));
    let walls = json!({"standing": host.stand(), "missing": missing.collect::<Vec<_>>()});
    Meters {
        render: Box::new(move || shown.render()),
        walls,
        left_out: Arc::new(move |count| counting.audit_left_out(count)),
        observe: Arc::new(move |method, code, time| match code {
            api::PANICKED => told.rpc_panicked(method),
            code => told.rpc(method, code, time.as_secs_f64()),
        }),
        begin: Box::new(move || Box::new(counted.rpc_begun())),
    }
}

fn registries(config: &Config) -> RegistrySpec {
    let docker = &config.docker;
    let spec = RegistrySpec {
        mirrors: docker.mirrors.clone(),
        insecure: docker.insecure_registries.clone(),
        allowed_private: docker.egress_allowed_private.clone(),
        blocked_domains: docker.blocked_domains.clone(),
        image_bytes_max: docker.image_bytes_max,
        ..RegistrySpec::default()
    };
    spec.with_places_of_tenants(&docker.egress_allowed_private_of_tenants)
}

/// Those of doors and of workers, which agree whether builds run commands.
fn rules(config: &Config, host: &Arc<Host>) -> Result<(ServiceRules, WorkerRules), ServeError> {
    let runtime = open_runtime(config, host);
    let no_commands = runtime.as_ref().err().cloned();
    let runtime = runtime.ok();
    Ok((
        ServiceRules { no_commands, ..service_rules(config) },
        WorkerRules { runtime, ..worker_rules(config, Arc::clone(host))? },
    ))
}

fn service_rules(config: &Config) -> ServiceRules {
    ServiceRules {
        limits: config.tenants.limits.clone(),
        registry_auth: config.docker.registry_auth,
        allowed_registries: config.docker.allowed_registries.clone(),
        registries: registries(config).client_options(),
        registries_of_tenants: registries(config).of_tenants(),
        build_secs_max: config.build_timeout.as_secs(),
        no_commands: None,
        stop_wait: STOP_WAIT,
    }
}

fn worker_rules(config: &Config, host: Arc<Host>) -> Result<WorkerRules, ServeError> {
    let program = std::env::current_exe()
        .map_err(|source| ServeError::Path { path: "/proc/self/exe".into(), source })?;
    let storage = &config.storage;
    Ok(WorkerRules {
        concurrent_max: config.max_concurrent_builds,
        registry: registries(config),
        pull_timeout: config.docker.pull_timeout,
        encrypts_all: storage.encrypts_all,
        packs: storage.cache_enabled.then(|| {
            // The process of a build works in another directory.
            let directory = std::path::absolute(&storage.cache_dir);
            let directory = directory.unwrap_or_else(|_| storage.cache_dir.clone());
            (directory, storage.cache_max_bytes)
        }),
        sealed_packs: None,
        cache_enabled: storage.cache_enabled,
        host,
        program,
        runtime: None,
        commands_egress: config.commands_egress.clone(),
        shutdown_timeout: config.shutdown_timeout,
    })
}

fn janitor_rules(config: &Config, packs: Option<PackCache>) -> JanitorRules {
    let storage = &config.storage;
    JanitorRules {
        sweep_every: config.cleanup_interval,
        retention_secs: u64::from(storage.retention_days) * 86_400,
        audit_retention_secs: u64::from(config.audit_retention_days) * 86_400,
        storage_bytes_max: storage.max_bytes,
        packs: packs.map(|packs| (packs, storage.cache_max_bytes)),
        tenants: service_rules(config),
    }
}

#[cfg(test)]
mod tests;
