//! What the environment, a file and flags say, read here and nowhere else.
//!
//! `table` has every name; `settings` decides what holds and says what is wrong; [`Config`] is
//! what the service is given: checked, typed, nothing left to parse. Settings that have a flag
//! of `builderd build` are read by the flag's own declaration (`env = …` in `command/args.rs`)
//! there, so that `--help` names them; [`Environment`] is what has no flag.

mod database;
mod egress;
mod origins;
mod page;
#[cfg(test)]
mod promised;
mod settings;
mod storage;
mod table;
#[cfg(test)]
mod tests;
mod tls;
mod value;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use sandbox::Wall;

use crate::tenant::{TenantLimits, Tier};

pub(crate) use database::DatabaseConfig;
use database::database;
pub(crate) use egress::CommandsEgress;
pub(crate) use origins::Origins;
pub(crate) use page::{document, effective, explain};
pub(crate) use settings::{ConfigError, Settings, Sources};
use storage::storage;
pub(crate) use storage::{StorageBackend, StorageConfig};
pub(crate) use table::PREFIX;
pub(crate) use tls::{ClientAuth, TlsConfig, TlsSource};
pub(crate) use value::{parse_duration, parse_host, parse_mirror, parse_registry, parse_size};

/// The environment as the engine uses it.
#[derive(Debug)]
pub(crate) struct Environment {
    /// Where caches of this user go, `builderd` below it (XDG Base Directory Specification).
    pub(crate) cache_home: Option<PathBuf>,
    /// `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`.
    pub(crate) docker_config: Option<PathBuf>,
    /// `SOURCE_DATE_EPOCH` as written (reproducible-builds.org/specs/source-date-epoch).
    pub(crate) source_date_epoch: Option<String>,
}

impl Environment {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads it")]
    pub(crate) fn read() -> Self {
        // Empty means unset, as every reader of these variables has it.
        let path = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = path("HOME");
        let cache_home = path("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let docker_home = path("DOCKER_CONFIG");
        Self {
            cache_home: cache_home.or_else(|| home.as_ref().map(|home| home.join(".cache"))),
            docker_config: docker_home
                .or_else(|| home.map(|home| home.join(".docker")))
                .map(|directory| directory.join("config.json")),
            source_date_epoch: std::env::var("SOURCE_DATE_EPOCH").ok().filter(|v| !v.is_empty()),
        }
    }
}

/// The variables of the environment that are ours.
pub(crate) fn variables() -> Vec<(String, String)> {
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    std::env::vars_os()
        .map(|(name, value)| (text(name), text(value)))
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect()
}

/// Where systemd puts this service's credentials (systemd.exec(5)).
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads it")]
pub(crate) fn credentials() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// Where the master key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyPlace {
    /// A file of ours, made if there is none.
    File(PathBuf),
    /// A credential of systemd's.
    Credential(PathBuf),
}

impl KeyPlace {
    /// The credential's name.
    const CREDENTIAL: &str = "builderd-master-key";

    fn of(settings: &Settings, data_dir: &Path) -> Self {
        match (settings.path("MASTER_KEY_FILE"), settings.credential(Self::CREDENTIAL)) {
            (Some(file), _) => Self::File(file),
            (None, Some(credential)) => Self::Credential(credential),
            (None, None) => Self::File(data_dir.join("master.key")),
        }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Credential(path) => path,
        }
    }
}

/// Everything the service is told.
#[derive(Debug)]
pub(crate) struct Config {
    /// Where the API is.
    pub(crate) listen: SocketAddr,
    /// TLS of the doors; plain text if none.
    pub(crate) tls: Option<TlsConfig>,
    /// Whether headers and bodies are believed without a credential.
    pub(crate) dev: bool,
    /// How long a stop may take.
    pub(crate) shutdown_timeout: Duration,
    /// Requests to `/health`.
    pub(crate) health_rate_per_sec: u32,
    /// Connections of one address; any number if 0.
    pub(crate) connections_max: u32,
    /// Whose pages may call the API from a browser.
    pub(crate) cors_allowed_origins: Origins,
    /// Walls around builds that the host may lack.
    pub(crate) accept_missing_walls: Vec<Wall>,
    /// The program that runs the commands of builds.
    pub(crate) oci_runtime: String,
    /// Holes that it may have.
    pub(crate) accept_vulnerable: Vec<String>,
    /// What commands may reach.
    pub(crate) commands_egress: CommandsEgress,
    /// Builds that run at once.
    pub(crate) max_concurrent_builds: usize,
    /// The longest any build may take.
    pub(crate) build_timeout: Duration,
    /// What this node keeps.
    pub(crate) data_dir: PathBuf,
    /// Where artifacts are made, and with local storage lie: `ROOTFS_OUTPUT_DIR`, or for an
    /// object store `SCRATCH_DIR`.
    pub(crate) rootfs_output_dir: PathBuf,
    /// How often what is no longer needed is removed.
    pub(crate) cleanup_interval: Duration,
    /// Days after which a row of the audit log goes.
    pub(crate) audit_retention_days: u32,
    /// Artifacts and layers.
    pub(crate) storage: StorageConfig,
    /// Where images come from.
    pub(crate) docker: DockerConfig,
    /// What tenants may use.
    pub(crate) tenants: TenantConfig,
    /// What outlives the process.
    pub(crate) database: DatabaseConfig,
    /// The key over everything that is sealed.
    pub(crate) master_key: KeyPlace,
    /// Traces and metrics.
    pub(crate) telemetry: TelemetryConfig,
    /// The log.
    pub(crate) log: LogConfig,
}

/// Where images come from.
#[derive(Debug)]
pub(crate) struct DockerConfig {
    /// Whether a build may bring credentials.
    pub(crate) registry_auth: bool,
    /// The largest image.
    pub(crate) image_bytes_max: u64,
    /// Registries for every tenant; all when empty.
    pub(crate) allowed_registries: Vec<String>,
    /// How long fetching may take.
    pub(crate) pull_timeout: Duration,
    /// Each `[HOST=]MIRROR`, without a scheme.
    pub(crate) mirrors: Vec<String>,
    /// Registries over plain HTTP.
    pub(crate) insecure_registries: Vec<String>,
    /// Places that are not public and may be fetched from.
    pub(crate) egress_allowed_private: Vec<String>,
    /// The same for one tenant alone, each `TENANT=PLACE`.
    pub(crate) egress_allowed_private_of_tenants: Vec<String>,
    /// Domains that are never fetched from.
    pub(crate) blocked_domains: Vec<String>,
}

/// What tenants may use.
#[derive(Debug)]
pub(crate) struct TenantConfig {
    /// Of a tenant for which none was set.
    pub(crate) default_tier: Tier,
    /// The tier table, in the order of [`Tier::ALL`], with what the settings change in the
    /// default tier.
    pub(crate) limits: [TenantLimits; 4],
}

/// Traces and metrics.
#[derive(Clone, Debug)]
pub(crate) struct TelemetryConfig {
    /// Where both are sent, without `/v1/…`; nowhere if none.
    pub(crate) otlp: Option<String>,
    /// What we are called there.
    pub(crate) service_name: String,
    /// Our version there.
    pub(crate) service_version: String,
    /// Share of the traces that are sent.
    pub(crate) sampling_rate: f64,
    /// A port of its own for `/metrics`.
    pub(crate) prometheus: Option<SocketAddr>,
    /// Whether metrics carry the tenant.
    pub(crate) high_cardinality: bool,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// One JSON object.
    Json,
    /// For people.
    Text,
}

/// The log.
#[derive(Clone, Debug)]
pub(crate) struct LogConfig {
    /// `trace`, `debug`, `info`, `warn` or `error`.
    pub(crate) level: String,
    /// How a line looks.
    pub(crate) format: LogFormat,
}

impl Config {
    /// Reads the settings and what they come to; all that is wrong with each of them and with several
    /// together is told at once.
    pub(crate) fn load(sources: &Sources) -> Result<(Settings, Self), ConfigError> {
        let mut problems = Vec::new();
        let settings = Settings::read(sources, &mut problems);
        let config = Self::of(&settings, &mut problems);
        match problems.is_empty() {
            true => Ok((settings, config)),
            false => Err(ConfigError { problems }),
        }
    }

    fn of(settings: &Settings, problems: &mut Vec<String>) -> Self {
        let path = |name| settings.path(name).unwrap_or_default();
        let data_dir = path("DATABASE_DATA_DIR");
        Self {
            listen: settings.judge(problems, |problems| listen(settings, problems)),
            tls: settings.judge(problems, |problems| tls::tls(settings, problems)),
            dev: settings.flag("DEV"),
            shutdown_timeout: settings.duration("SHUTDOWN_TIMEOUT"),
            health_rate_per_sec: settings.number("RATE_LIMIT").unwrap_or_default(),
            connections_max: settings.number("MAX_CONNECTIONS_PER_ADDRESS").unwrap_or_default(),
            cors_allowed_origins: settings.judge(problems, |problems| origins(settings, problems)),
            accept_missing_walls: settings.judge(problems, |problems| walls(settings, problems)),
            oci_runtime: settings.text("OCI_RUNTIME").unwrap_or_default(),
            accept_vulnerable: settings.judge(problems, |problems| holes(settings, problems)),
            commands_egress: CommandsEgress::of(settings),
            max_concurrent_builds: settings
                .number("MAX_CONCURRENT_BUILDS")
                .and_then(|count| usize::try_from(count).ok())
                .unwrap_or(1),
            build_timeout: settings.duration("BUILD_TIMEOUT"),
            rootfs_output_dir: match settings.text("STORAGE_BACKEND").as_deref() {
                Some("s3" | "minio" | "gcs") => path("SCRATCH_DIR"),
                _ => path("ROOTFS_OUTPUT_DIR"),
            },
            cleanup_interval: settings.duration("CLEANUP_INTERVAL"),
            audit_retention_days: settings.number("AUDIT_RETENTION_DAYS").unwrap_or_default(),
            storage: storage(settings, problems),
            docker: docker(settings, problems),
            tenants: tenants(settings),
            database: settings.judge(problems, |problems| database(settings, &data_dir, problems)),
            master_key: KeyPlace::of(settings, &data_dir),
            telemetry: telemetry(settings, problems),
            log: LogConfig {
                level: settings.text("LOG_LEVEL").unwrap_or_default(),
                format: match settings.text("LOG_FORMAT").as_deref() {
                    Some("text") => LogFormat::Text,
                    _ => LogFormat::Json,
                },
            },
            data_dir,
        }
    }
}

fn listen(settings: &Settings, problems: &mut Vec<String>) -> SocketAddr {
    let ip = settings.ip("ADDRESS").unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    if settings.flag("DEV") && !ip.is_loopback() {
        problems.push(format!(
            "{} is `{ip}`: development mode believes everybody, so it listens on 127.0.0.1 or \
             ::1 alone",
            settings.written("ADDRESS")
        ));
    }
    SocketAddr::new(ip, settings.port("PORT"))
}

fn origins(settings: &Settings, problems: &mut Vec<String>) -> Origins {
    const NAME: &str = "CORS_ALLOWED_ORIGINS";
    let read = match Origins::read(&settings.names(NAME)) {
        Ok(Origins::Any) if settings.flag("DEV") => {
            Err("is `*`: development mode believes everybody, so name the origins".to_owned())
        }
        Ok(origins) => Ok(origins),
        Err(problem) => Err(format!("is wrong: {problem}")),
    };
    read.unwrap_or_else(|problem| {
        problems.push(format!("{} {problem}", settings.written(NAME)));
        Origins::NONE
    })
}

fn walls(settings: &Settings, problems: &mut Vec<String>) -> Vec<Wall> {
    const NAME: &str = "ACCEPT_MISSING_WALLS";
    let mut walls = Vec::new();
    for name in settings.names(NAME) {
        match Wall::named(&name) {
            Some(wall) => walls.push(wall),
            None => {
                let known = Wall::ALL.map(Wall::as_str).join(", ");
                let written = settings.written(NAME);
                problems.push(format!("{written} is wrong: {name:?} is none of {known}"));
            }
        }
    }
    walls
}

fn holes(settings: &Settings, problems: &mut Vec<String>) -> Vec<String> {
    const NAME: &str = "OCI_RUNTIME_ACCEPT_VULNERABLE";
    let (names, known) = (settings.names(NAME), commands::accepted_names());
    for name in names.iter().filter(|name| !known.contains(&name.as_str())) {
        let (written, known) = (settings.written(NAME), known.join(", "));
        problems.push(format!("{written} is wrong: {name:?} is none of {known}"));
    }
    names
}

fn docker(settings: &Settings, problems: &mut Vec<String>) -> DockerConfig {
    DockerConfig {
        registry_auth: settings.flag("DOCKER_REGISTRY_AUTH"),
        image_bytes_max: settings.size("DOCKER_MAX_IMAGE_SIZE_GB").unwrap_or_default(),
        allowed_registries: settings.names("DOCKER_ALLOWED_REGISTRIES"),
        pull_timeout: settings.duration("DOCKER_PULL_TIMEOUT"),
        mirrors: settings.judge(problems, |problems| mirrors(settings, problems)),
        insecure_registries: settings.names("DOCKER_INSECURE_REGISTRIES"),
        egress_allowed_private: settings.names("EGRESS_ALLOWED_PRIVATE"),
        egress_allowed_private_of_tenants: settings.names("EGRESS_ALLOWED_PRIVATE_OF_TENANTS"),
        blocked_domains: settings.names("BLOCKED_DOMAINS"),
    }
}

/// Mirrors may be written as URLs; the engine takes hosts, and plain HTTP by name.
fn mirrors(settings: &Settings, problems: &mut Vec<String>) -> Vec<String> {
    let insecure = settings.names("DOCKER_INSECURE_REGISTRIES");
    let text = settings.text("DOCKER_REGISTRY_MIRROR").unwrap_or_default();
    let host = |url: &str| -> Result<String, String> {
        if let Some(host) = url.strip_prefix("http://") {
            let mirror = host.trim_end_matches('/');
            let host = mirror.split('/').next().unwrap_or_default();
            return match insecure.iter().any(|name| name.eq_ignore_ascii_case(host)) {
                true => Ok(mirror.to_owned()),
                false => Err(host.to_owned()),
            };
        }
        let host = url.strip_prefix("https://").unwrap_or(url);
        Ok(host.trim_end_matches('/').to_owned())
    };
    let mut mirrors = Vec::new();
    for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
        let (of, url) = match entry.split_once('=') {
            Some((of, url)) => (format!("{of}="), url.trim()),
            None => (String::new(), entry),
        };
        match host(url) {
            Ok(host) => match parse_mirror(&format!("{of}{host}")) {
                Ok(mirror) => mirrors.push(mirror),
                Err(wrong) => problems.push(format!(
                    "{} is `{text}`: {wrong}",
                    settings.written("DOCKER_REGISTRY_MIRROR")
                )),
            },
            Err(host) => problems.push(format!(
                "{} is `{text}`: `{host}` is reached over plain HTTP only if \
                 {PREFIX}DOCKER_INSECURE_REGISTRIES names it, too",
                settings.written("DOCKER_REGISTRY_MIRROR")
            )),
        }
    }
    mirrors
}

fn tenants(settings: &Settings) -> TenantConfig {
    let default_tier = settings
        .text("TENANT_DEFAULT_TIER")
        .and_then(|tier| tier.parse().ok())
        .unwrap_or(Tier::Free);
    let limits = Tier::ALL.map(|tier| match tier == default_tier {
        true => changed(tier.limits(), settings),
        false => tier.limits(),
    });
    TenantConfig { default_tier, limits }
}

fn changed(own: TenantLimits, settings: &Settings) -> TenantLimits {
    let size = |name, own| settings.size(name).unwrap_or(own);
    let number = |name, own| settings.number(name).unwrap_or(own);
    TenantLimits {
        memory_bytes: size("TENANT_DEFAULT_MAX_MEMORY_BYTES", own.memory_bytes),
        cpu_cores: number("TENANT_DEFAULT_MAX_CPU_CORES", own.cpu_cores),
        disk_bytes: size("TENANT_DEFAULT_MAX_DISK_BYTES", own.disk_bytes),
        timeout_secs: number("TENANT_DEFAULT_TIMEOUT_SECONDS", own.timeout_secs),
        concurrent_builds: number("TENANT_DEFAULT_MAX_CONCURRENT_BUILDS", own.concurrent_builds),
        daily_builds: number("TENANT_DEFAULT_MAX_DAILY_BUILDS", own.daily_builds),
        storage_bytes: size("TENANT_DEFAULT_MAX_STORAGE_BYTES", own.storage_bytes),
        build_minutes: number("TENANT_DEFAULT_MAX_BUILD_TIME_MINUTES", own.build_minutes),
        allowed_registries: own.allowed_registries,
        external_network: own.external_network,
    }
}

fn telemetry(settings: &Settings, problems: &mut Vec<String>) -> TelemetryConfig {
    let otlp = settings.judge(problems, |problems| endpoint(settings, problems));
    let ip = settings.ip("OTEL_PROMETHEUS_INTERFACE").unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let prometheus = SocketAddr::new(ip, settings.port("OTEL_PROMETHEUS_PORT"));
    TelemetryConfig {
        otlp: otlp.filter(|_| settings.flag("OTEL_ENABLED")),
        service_name: settings.text("OTEL_SERVICE_NAME").unwrap_or_default(),
        service_version: settings
            .text("OTEL_SERVICE_VERSION")
            .unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned()),
        sampling_rate: settings.ratio("OTEL_SAMPLING_RATE"),
        prometheus: Some(prometheus).filter(|_| settings.flag("OTEL_PROMETHEUS_ENABLED")),
        high_cardinality: settings.flag("OTEL_HIGH_CARDINALITY_ENABLED"),
    }
}

fn endpoint(settings: &Settings, problems: &mut Vec<String>) -> Option<String> {
    let text = settings.text("OTEL_ENDPOINT")?;
    let is_insecure = settings.flag("OTEL_INSECURE");
    let url = match (text.contains("://"), is_insecure) {
        (true, _) => text.clone(),
        (false, true) => format!("http://{text}"),
        (false, false) => format!("https://{text}"),
    };
    let name = settings.written("OTEL_ENDPOINT");
    match Url::parse(&url) {
        Ok(parsed) if parsed.scheme() == "http" && !is_insecure => problems
            .push(format!("{name} is `{text}`: plain HTTP, but {PREFIX}OTEL_INSECURE is false")),
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") && parsed.has_host() => {}
        Ok(_) | Err(_) => problems.push(format!(
            "{name} is `{text}`, expected `host:port` or a URL that begins with http:// or https://"
        )),
    }
    Some(url.trim_end_matches('/').to_owned())
}
