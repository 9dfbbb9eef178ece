//! What the environment, a file and flags say, read here and nowhere else.
//!
//! `table` has every name; `settings` decides what holds and says what is wrong; [`Config`] is
//! what the service is given: checked, typed, nothing left to parse. Settings that have a flag
//! of `builderd build` are read by the flag's own declaration (`env = …` in `command/args.rs`)
//! there, so that `--help` names them; [`Environment`] is what has no flag.

mod origins;
mod page;
#[cfg(test)]
mod promised;
mod settings;
mod table;
mod tls;
mod value;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use sandbox::Wall;
use secrecy::{ExposeSecret as _, SecretString};

use crate::tenant::{TenantLimits, Tier};

pub(crate) use origins::Origins;
pub(crate) use page::{document, effective, explain};
pub(crate) use settings::{ConfigError, Settings, Sources};
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
    /// Whose pages may call the API from a browser.
    pub(crate) cors_allowed_origins: Origins,
    /// Walls around builds that the host may lack.
    pub(crate) accept_missing_walls: Vec<Wall>,
    /// The program that runs the commands of builds.
    pub(crate) oci_runtime: String,
    /// Holes that it may have.
    pub(crate) accept_vulnerable: Vec<String>,
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

/// Where artifacts and layers are kept, and how much of them.
#[derive(Debug)]
pub(crate) struct StorageConfig {
    /// Where artifacts are.
    pub(crate) backend: StorageBackend,
    /// Days after which an artifact goes.
    pub(crate) retention_days: u32,
    /// All artifacts together.
    pub(crate) max_bytes: u64,
    /// Whether artifacts of every tenant are encrypted.
    pub(crate) encrypts_all: bool,
    /// Whether layers and artifacts serve later builds.
    pub(crate) cache_enabled: bool,
    /// All layers together.
    pub(crate) cache_max_bytes: u64,
    /// Where layers are; `WORKSPACE_DIR` has no other part.
    pub(crate) cache_dir: PathBuf,
}

/// Where artifacts are.
#[derive(Debug)]
pub(crate) enum StorageBackend {
    /// Files in [`Config::rootfs_output_dir`].
    Local,
    /// An S3-compatible store.
    S3 {
        /// The bucket.
        bucket: String,
        /// Its region.
        region: String,
        /// The server; Amazon's if none.
        endpoint: Option<String>,
        /// Who we are; found by the machine's own means if none.
        access_key_id: Option<String>,
        /// And that it is us.
        secret: Option<SecretString>,
        /// Before every key.
        prefix: String,
        /// Whether the endpoint may be plain HTTP.
        allow_http: bool,
    },
    /// Google Cloud Storage.
    Gcs {
        /// The bucket.
        bucket: String,
        /// Key file; the machine's own means if none.
        credentials_file: Option<PathBuf>,
        /// Before every key.
        prefix: String,
    },
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

/// What outlives the process.
#[derive(Debug)]
pub(crate) enum DatabaseConfig {
    /// `builderd.db` in [`Config::data_dir`].
    Sqlite,
    /// PostgreSQL.
    Postgres {
        /// With user and password.
        url: SecretString,
        /// At most so many connections.
        max_connections: u32,
    },
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
    /// Reads the settings; all that is wrong with them together is told at once.
    pub(crate) fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let path = |name| settings.path(name).unwrap_or_default();
        let data_dir = path("DATABASE_DATA_DIR");
        let config = Self {
            listen: listen(settings, &mut problems),
            tls: tls::tls(settings, &mut problems),
            dev: settings.flag("DEV"),
            shutdown_timeout: settings.duration("SHUTDOWN_TIMEOUT"),
            health_rate_per_sec: settings.number("RATE_LIMIT").unwrap_or_default(),
            cors_allowed_origins: origins(settings, &mut problems),
            accept_missing_walls: walls(settings, &mut problems),
            oci_runtime: settings.text("OCI_RUNTIME").unwrap_or_default(),
            accept_vulnerable: holes(settings, &mut problems),
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
            storage: storage(settings, &mut problems),
            docker: docker(settings, &mut problems),
            tenants: tenants(settings),
            database: database(settings, &data_dir, &mut problems),
            master_key: KeyPlace::of(settings, &data_dir),
            telemetry: telemetry(settings, &mut problems),
            log: LogConfig {
                level: settings.text("LOG_LEVEL").unwrap_or_default(),
                format: match settings.text("LOG_FORMAT").as_deref() {
                    Some("text") => LogFormat::Text,
                    _ => LogFormat::Json,
                },
            },
            data_dir,
        };
        match problems.is_empty() {
            true => Ok(config),
            false => Err(ConfigError { problems }),
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

fn storage(settings: &Settings, problems: &mut Vec<String>) -> StorageConfig {
    let workspace = settings.path("WORKSPACE_DIR").unwrap_or_default();
    StorageConfig {
        backend: match settings.text("STORAGE_BACKEND").as_deref() {
            Some("s3" | "minio") => s3(settings, problems),
            Some("gcs") => StorageBackend::Gcs {
                bucket: needed(settings, "GCS_BUCKET", problems),
                credentials_file: settings.path("GCS_CREDENTIALS_FILE"),
                prefix: settings.text("STORAGE_PREFIX").unwrap_or_default(),
            },
            _ => StorageBackend::Local,
        },
        retention_days: settings.number("STORAGE_RETENTION_DAYS").unwrap_or_default(),
        max_bytes: settings.size("STORAGE_MAX_SIZE_GB").unwrap_or_default(),
        encrypts_all: settings.flag("ENABLE_ENCRYPTION"),
        cache_enabled: settings.flag("STORAGE_CACHE_ENABLED"),
        cache_max_bytes: settings.size("STORAGE_CACHE_MAX_SIZE_GB").unwrap_or_default(),
        cache_dir: settings.path("CACHE_DIR").unwrap_or_else(|| workspace.join("cache")),
    }
}

fn needed(settings: &Settings, name: &'static str, problems: &mut Vec<String>) -> String {
    settings.text(name).unwrap_or_else(|| {
        problems.push(format!(
            "{PREFIX}{name} is not set: {} needs it",
            settings.written("STORAGE_BACKEND")
        ));
        String::new()
    })
}

fn s3(settings: &Settings, problems: &mut Vec<String>) -> StorageBackend {
    let endpoint = settings.text("S3_ENDPOINT");
    let allow_http = settings.flag("S3_ALLOW_HTTP");
    let is_minio = settings.text("STORAGE_BACKEND").as_deref() == Some("minio");
    match &endpoint {
        Some(url) if !url.starts_with("https://") && !url.starts_with("http://") => {
            let name = settings.written("S3_ENDPOINT");
            problems.push(format!("{name} is `{url}`, expected a URL such as `https://host:9000`"));
        }
        Some(url) if url.starts_with("http://") && !allow_http => problems.push(format!(
            "{} is `{url}`: plain HTTP, which needs {PREFIX}S3_ALLOW_HTTP=true",
            settings.written("S3_ENDPOINT")
        )),
        None if is_minio => drop(needed(settings, "S3_ENDPOINT", problems)),
        Some(_) | None => {}
    }
    let (access_key_id, secret) =
        (settings.text("S3_ACCESS_KEY_ID"), settings.secret("S3_SECRET_ACCESS_KEY"));
    if access_key_id.is_some() != secret.is_some() {
        problems.push(format!(
            "{PREFIX}S3_ACCESS_KEY_ID and {PREFIX}S3_SECRET_ACCESS_KEY: set both or none"
        ));
    }
    StorageBackend::S3 {
        bucket: needed(settings, "S3_BUCKET", problems),
        region: settings.text("S3_REGION").unwrap_or_default(),
        endpoint,
        access_key_id,
        secret,
        prefix: settings.text("STORAGE_PREFIX").unwrap_or_default(),
        allow_http,
    }
}

fn docker(settings: &Settings, problems: &mut Vec<String>) -> DockerConfig {
    let insecure_registries = settings.names("DOCKER_INSECURE_REGISTRIES");
    DockerConfig {
        registry_auth: settings.flag("DOCKER_REGISTRY_AUTH"),
        image_bytes_max: settings.size("DOCKER_MAX_IMAGE_SIZE_GB").unwrap_or_default(),
        allowed_registries: settings.names("DOCKER_ALLOWED_REGISTRIES"),
        pull_timeout: settings.duration("DOCKER_PULL_TIMEOUT"),
        mirrors: mirrors(settings, &insecure_registries, problems),
        insecure_registries,
        egress_allowed_private: settings.names("EGRESS_ALLOWED_PRIVATE"),
        blocked_domains: settings.names("BLOCKED_DOMAINS"),
    }
}

/// Mirrors may be written as URLs; the engine takes hosts, and plain HTTP by name.
fn mirrors(settings: &Settings, insecure: &[String], problems: &mut Vec<String>) -> Vec<String> {
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

fn database(settings: &Settings, data_dir: &Path, problems: &mut Vec<String>) -> DatabaseConfig {
    let max_connections = settings.number("DATABASE_MAX_CONNECTIONS").unwrap_or_default();
    let url = settings.secret("DATABASE_URL");
    let given = url.as_ref().map(|url| url.expose_secret());
    let names_postgres =
        given.is_some_and(|url| url.starts_with("postgres://") || url.starts_with("postgresql://"));
    let is_sqlite = match settings.text("DATABASE_TYPE").as_deref() {
        // The URL says it as well.
        _ if names_postgres && !settings.is_set("DATABASE_TYPE") => false,
        Some("postgres" | "postgresql") => false,
        _ => true,
    };
    if is_sqlite {
        let own = data_dir.join("builderd.db");
        if let Some(text) = given
            && !["file:", "sqlite://", "sqlite:"].iter().any(|scheme| {
                text.strip_prefix(scheme).is_some_and(|path| same_file(Path::new(path), &own))
            })
        {
            problems.push(format!(
                "{}: with SQLite the database is {}; set {PREFIX}DATABASE_DATA_DIR, or \
                 {PREFIX}DATABASE_TYPE=postgres for a `postgres://` URL",
                settings.written("DATABASE_URL"),
                own.display()
            ));
        }
        return DatabaseConfig::Sqlite;
    }
    let from_parts = postgres_url(settings);
    match (url, names_postgres) {
        (Some(url), true) => DatabaseConfig::Postgres { url, max_connections },
        (Some(_), false) => {
            let name = settings.written("DATABASE_URL");
            problems.push(format!("{name}: expected `postgres://user:password@host:port/name`"));
            DatabaseConfig::Sqlite
        }
        (None, _) => DatabaseConfig::Postgres { url: from_parts, max_connections },
    }
}

fn same_file(one: &Path, two: &Path) -> bool {
    match (std::path::absolute(one), std::path::absolute(two)) {
        (Ok(one), Ok(two)) => one == two,
        _ => false,
    }
}

fn postgres_url(settings: &Settings) -> SecretString {
    let text = |name| settings.text(name).unwrap_or_default();
    let password = settings.secret("DATABASE_PASSWORD");
    let password = match &password {
        Some(password) => format!(":{}", percent_encoded(password.expose_secret())),
        None => String::new(),
    };
    let (user, name) = (text("DATABASE_USERNAME"), text("DATABASE_NAME"));
    SecretString::from(format!(
        "postgres://{}{password}@{}:{}/{}?sslmode={}",
        percent_encoded(&user),
        text("DATABASE_HOST"),
        settings.port("DATABASE_PORT"),
        percent_encoded(&name),
        text("DATABASE_SSL_MODE")
    ))
}

/// RFC 3986, section 2.1: everything but the unreserved characters.
fn percent_encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let encode = |byte: u8| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

fn telemetry(settings: &Settings, problems: &mut Vec<String>) -> TelemetryConfig {
    let otlp = endpoint(settings, problems);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let owned = |(name, text): &(&str, &str)| (format!("{PREFIX}{name}"), (*text).to_owned());
        let environment = variables.iter().map(owned).collect();
        let sources = Sources { environment, ..Sources::default() };
        let settings = Settings::resolve(&sources).map_err(|error| error.problems)?;
        Config::new(&settings).map_err(|error| error.problems)
    }

    fn refused(variables: &[(&str, &str)], word: &str) {
        let problems = read(variables).expect_err("should be refused");
        assert!(problems.iter().any(|problem| problem.contains(word)), "{word}: {problems:?}");
    }

    #[test]
    fn nothing_set_gives_the_documented_defaults() {
        let config = read(&[]).unwrap();
        assert_eq!(config.listen.to_string(), "0.0.0.0:8082");
        assert!(!config.dev);
        assert_eq!(config.shutdown_timeout, Duration::from_secs(15));
        assert_eq!(config.health_rate_per_sec, 100);
        assert_eq!((config.max_concurrent_builds, config.build_timeout.as_secs()), (5, 900));
        assert_eq!(config.data_dir, Path::new("/opt/builderd/data"));
        assert_eq!(config.master_key, KeyPlace::File("/opt/builderd/data/master.key".into()));
        assert_eq!(config.storage.cache_dir, Path::new("/opt/builderd/workspace/cache"));
        assert_eq!((config.storage.max_bytes, config.storage.retention_days), (100 << 30, 30));
        assert_eq!(config.storage.cache_max_bytes, 50 << 30);
        assert!(matches!(config.storage.backend, StorageBackend::Local));
        assert!(matches!(config.database, DatabaseConfig::Sqlite));
        assert_eq!(config.docker.image_bytes_max, 5 << 30);
        assert_eq!(config.docker.pull_timeout, Duration::from_secs(600));
        assert_eq!(config.telemetry.otlp, None);
        let prometheus = config.telemetry.prometheus.map(|address| address.to_string());
        assert_eq!(prometheus.as_deref(), Some("127.0.0.1:9466"));
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.tenants.limits, Tier::ALL.map(Tier::limits));
    }

    #[test]
    fn development_mode_stays_on_this_machine() {
        let config = read(&[("DEV", "true")]).unwrap();
        assert!(config.dev && config.listen.ip().is_loopback());
        assert_eq!(config.data_dir, Path::new("builderd-data/data"));
        assert!(read(&[("DEV", "1"), ("ADDRESS", "::1")]).is_ok());
        refused(&[("DEV", "1"), ("HOST", "0.0.0.0")], "development mode");
    }

    #[test]
    fn the_audit_log_is_always_written_and_kept_for_a_year() {
        assert_eq!(read(&[]).unwrap().audit_retention_days, 365);
        let kept = read(&[("ENABLE_AUDIT_LOGGING", "true"), ("AUDIT_RETENTION_DAYS", "30")]);
        assert_eq!(kept.unwrap().audit_retention_days, 30);
        refused(&[("ENABLE_AUDIT_LOGGING", "false")], "always written");
        refused(&[("AUDIT_LOG_FILE", "/var/log/audit")], "admin audit export");
        refused(&[("AUDIT_RETENTION_DAYS", "0")], "AUDIT_RETENTION_DAYS");
    }

    #[test]
    fn missing_walls_are_accepted_by_name_alone() {
        const NAME: &str = "ACCEPT_MISSING_WALLS";
        assert_eq!(read(&[]).unwrap().accept_missing_walls, []);
        let two = read(&[(NAME, "cgroup, landlock")]).unwrap().accept_missing_walls;
        assert_eq!(two, [Wall::Cgroup, Wall::Landlock]);
        refused(&[(NAME, "cgroup,moat")], "\"moat\" is none of user-namespace, ");
    }

    #[test]
    fn holes_of_the_runtime_are_accepted_by_name_alone() {
        const NAME: &str = "OCI_RUNTIME_ACCEPT_VULNERABLE";
        assert_eq!(read(&[]).unwrap().oci_runtime, "runc");
        let one = read(&[(NAME, "CVE-2025-31133")]).unwrap().accept_vulnerable;
        assert_eq!(one, ["CVE-2025-31133"]);
        refused(&[(NAME, "all")], "\"all\" is none of CVE-2025-31133, ");
    }

    #[test]
    fn the_master_key_is_a_named_file_or_a_credential_or_our_own() {
        let directory = tempfile::tempdir().unwrap();
        let place = |file: &str| {
            let name = format!("{PREFIX}MASTER_KEY_FILE");
            let credentials = Some(directory.path().to_owned());
            let environment = vec![(name, file.to_owned())];
            let sources = Sources { environment, credentials, ..Sources::default() };
            Config::new(&Settings::resolve(&sources).unwrap()).unwrap().master_key
        };
        assert_eq!(place(""), KeyPlace::File("/opt/builderd/data/master.key".into()));
        let credential = directory.path().join("builderd-master-key");
        std::fs::write(&credential, [7; 32]).unwrap();
        assert_eq!(place(""), KeyPlace::Credential(credential));
        assert_eq!(place("/etc/key"), KeyPlace::File("/etc/key".into()));
    }

    #[test]
    fn encryption_is_for_some_tiers_or_for_all() {
        assert!(!read(&[]).unwrap().storage.encrypts_all);
        assert!(read(&[("ENABLE_ENCRYPTION", "true")]).unwrap().storage.encrypts_all);
        let required = Tier::ALL.map(Tier::requires_encryption);
        assert_eq!(required, [false, false, true, true]);
    }

    #[test]
    fn pages_of_other_origins_are_let_in_by_name() {
        let origins = |variables: &[(&str, &str)]| read(variables).unwrap().cors_allowed_origins;
        const NAME: &str = "CORS_ALLOWED_ORIGINS";
        assert_eq!(origins(&[]), Origins::NONE);
        let two = (NAME, "https://app.example.com, http://localhost:5173");
        let Origins::Named(named) = origins(&[two]) else { panic!("they are named") };
        assert_eq!(named, ["https://app.example.com", "http://localhost:5173"]);
        assert_eq!(origins(&[(NAME, "*")]), Origins::Any);
        refused(&[(NAME, "https://app.example.com/")], "UNKEY_BUILDERD_CORS_ALLOWED_ORIGINS");
        refused(&[(NAME, "*"), ("DEV", "true")], "development mode");
        assert_eq!(origins(&[two, ("DEV", "true")]), Origins::Named(named));
    }

    #[test]
    fn no_setting_is_read_by_nobody() {
        let all = [
            &[][..],
            &[("STORAGE_BACKEND", "s3"), ("S3_BUCKET", "b")],
            &[("STORAGE_BACKEND", "gcs"), ("GCS_BUCKET", "b")],
            &[("DATABASE_TYPE", "postgres")],
        ];
        let mut unread: Option<std::collections::BTreeSet<&str>> = None;
        for variables in all {
            let owned = |(name, text): &(&str, &str)| (format!("{PREFIX}{name}"), (*text).into());
            let environment = variables.iter().map(owned).collect();
            let sources = Sources { environment, ..Sources::default() };
            let settings = Settings::resolve(&sources).unwrap();
            Config::new(&settings).unwrap();
            let these = settings.unread();
            unread = Some(match unread {
                Some(unread) => unread.intersection(&these).copied().collect(),
                None => these,
            });
        }
        let unread: Vec<&str> = unread.unwrap().into_iter().collect();
        let elsewhere: Vec<&str> = {
            let others = table::all()
                .filter(|setting| setting.is_refused() || setting.reader != table::Reader::Server);
            // Read by the command that reads the file.
            let mut names: Vec<&str> =
                others.map(|setting| setting.name).chain(["CONFIG"]).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(unread, elsewhere);
    }

    #[test]
    fn the_limits_of_the_default_tier_can_be_changed() {
        let config = read(&[
            ("TENANT_DEFAULT_TIER", "pro"),
            ("TENANT_DEFAULT_MAX_MEMORY_BYTES", "2147483648"),
            ("TENANT_DEFAULT_MAX_CPU_CORES", "7"),
            ("TENANT_DEFAULT_MAX_DISK_BYTES", "10737418240"),
            ("TENANT_DEFAULT_TIMEOUT_SECONDS", "901"),
            ("TENANT_DEFAULT_MAX_CONCURRENT_BUILDS", "4"),
            ("TENANT_DEFAULT_MAX_DAILY_BUILDS", "0"),
            ("TENANT_DEFAULT_MAX_STORAGE_BYTES", "50GB"),
            ("TENANT_DEFAULT_MAX_BUILD_TIME_MINUTES", "31"),
        ])
        .unwrap();
        let [free, pro, enterprise, dedicated] = config.tenants.limits;
        assert_eq!(config.tenants.default_tier, Tier::Pro);
        assert_eq!((pro.cpu_cores, pro.timeout_secs, pro.concurrent_builds), (7, 901, 4));
        assert_eq!((pro.daily_builds, pro.build_minutes), (0, 31));
        assert_eq!((pro.memory_bytes, pro.storage_bytes), (2 << 30, 50 << 30));
        assert_eq!(free, Tier::Free.limits());
        assert_eq!(enterprise, Tier::Enterprise.limits());
        assert_eq!(dedicated, Tier::Dedicated.limits());
    }

    #[test]
    fn object_stores_say_what_they_need() {
        refused(&[("STORAGE_BACKEND", "s3")], "S3_BUCKET");
        refused(&[("STORAGE_BACKEND", "gcs")], "GCS_BUCKET");
        refused(&[("STORAGE_BACKEND", "minio"), ("MINIO_BUCKET", "b")], "S3_ENDPOINT");
        let plain = ("MINIO_ENDPOINT", "http://127.0.0.1:9000");
        let minio = [("STORAGE_BACKEND", "minio"), ("MINIO_BUCKET", "b"), plain];
        refused(&minio, "S3_ALLOW_HTTP");
        refused(&[minio[0], minio[1], ("S3_ENDPOINT", "minio:9000")], "expected a URL");
        let allowed = ("S3_ALLOW_HTTP", "true");
        refused(&[minio[0], minio[1], plain, allowed, ("MINIO_ACCESS_KEY", "a")], "set both");
        let keys = [("MINIO_ACCESS_KEY", "a"), ("MINIO_SECRET_KEY", "s")];
        let config = read(&[minio[0], minio[1], plain, allowed, keys[0], keys[1]]).unwrap();
        let StorageBackend::S3 { bucket, endpoint, secret, allow_http, .. } =
            config.storage.backend
        else {
            panic!("{:?}", config.storage.backend)
        };
        assert_eq!((bucket.as_str(), endpoint.as_deref()), ("b", Some("http://127.0.0.1:9000")));
        assert!(allow_http && secret.is_some_and(|secret| secret.expose_secret() == "s"));
    }

    #[test]
    fn the_database_is_one_url_or_its_parts() {
        let url = |variables: &[(&str, &str)]| match read(variables).unwrap().database {
            DatabaseConfig::Postgres { url, .. } => url.expose_secret().to_owned(),
            DatabaseConfig::Sqlite => "sqlite".to_owned(),
        };
        let parts = [
            ("DATABASE_TYPE", "postgresql"),
            ("DATABASE_HOST", "db"),
            ("DATABASE_PASSWORD", "p@ss/1:"),
            ("DATABASE_SSL_MODE", "require"),
        ];
        let expected = "postgres://builderd:p%40ss%2F1%3A@db:5432/builderd?sslmode=require";
        assert_eq!(url(&parts), expected);
        assert_eq!(url(&[("DATABASE_URL", "postgres://u@h/n")]), "postgres://u@h/n");
        assert_eq!(url(&[("DATABASE_URL", "file:/opt/builderd/data/builderd.db")]), "sqlite");
        refused(&[("DATABASE_URL", "file:/elsewhere/builderd.db")], "DATABASE_DATA_DIR");
        let mixed = [("DATABASE_TYPE", "sqlite"), ("DATABASE_URL", "postgres://u:canary@h/n")];
        refused(&mixed, "DATABASE_URL");
        assert!(!read(&mixed).unwrap_err().join("").contains("canary"));
        refused(&[("DATABASE_TYPE", "postgres"), ("DATABASE_URL", "file:x")], "DATABASE_URL");
    }

    #[test]
    fn mirrors_may_be_urls_but_plain_http_needs_leave() {
        let mirrors = |variables: &[(&str, &str)]| read(variables).unwrap().docker.mirrors;
        let https = [("DOCKER_REGISTRY_MIRROR", "https://mirror.example.com/")];
        assert_eq!(mirrors(&https), ["mirror.example.com"]);
        assert!(mirrors(&[]).is_empty());
        let plain = ("DOCKER_REGISTRY_MIRROR", "ghcr.io=http://127.0.0.1:5000, a=b:1");
        refused(&[plain], "DOCKER_INSECURE_REGISTRIES");
        refused(&[("DOCKER_REGISTRY_MIRROR", "http://a.b=c.d")], "write `a.b`");
        refused(&[("DOCKER_REGISTRY_MIRROR", "c d")], "expected `HOST[:PORT]`");
        refused(&[("DOCKER_INSECURE_REGISTRIES", "http://a.b:1")], "write `a.b:1`");
        refused(&[("DOCKER_REGISTRY_MIRROR", "a.b/../c")], "DOCKER_REGISTRY_MIRROR");
        let below = ("DOCKER_REGISTRY_MIRROR", "http://Mirror.example:5000/hub/");
        let named = ("DOCKER_INSECURE_REGISTRIES", "mirror.example:5000");
        assert_eq!(mirrors(&[below, named]), ["Mirror.example:5000/hub"]);
        let both = [plain, ("DOCKER_INSECURE_REGISTRIES", "127.0.0.1:5000")];
        assert_eq!(mirrors(&both), ["ghcr.io=127.0.0.1:5000", "a=b:1"]);
    }

    #[test]
    fn registries_that_no_image_could_come_from_are_refused_by_name() {
        for name in ["DOCKER_ALLOWED_REGISTRIES", "ALLOWED_REGISTRIES"] {
            let problems = read(&[(name, "quay.io,https://ghcr.io")]).unwrap_err().join("");
            assert!(problems.contains(&format!("{PREFIX}{name} is `quay.io,https")), "{problems}");
            assert!(problems.contains("write `ghcr.io`"), "{problems}");
            refused(&[(name, "ghcr.io/org")], "such as `localhost:5000`");
        }
        let allowed = read(&[("DOCKER_ALLOWED_REGISTRIES", "registry-1.docker.io, *")]).unwrap();
        assert_eq!(allowed.docker.allowed_registries, ["docker.io", "*"]);
    }

    #[test]
    fn the_collector_may_be_a_host_or_a_url() {
        let otlp = |variables: &[(&str, &str)]| {
            let all = [&[("OTEL_ENABLED", "true")], variables].concat();
            read(&all).unwrap().telemetry.otlp
        };
        assert_eq!(otlp(&[]).as_deref(), Some("http://localhost:4318"));
        let secure = ("OTEL_INSECURE", "false");
        assert_eq!(otlp(&[secure]).as_deref(), Some("https://localhost:4318"));
        assert_eq!(otlp(&[("OTEL_ENDPOINT", "https://c:1/x/")]).as_deref(), Some("https://c:1/x"));
        refused(&[("OTEL_ENDPOINT", "http://c:1"), secure], "OTEL_INSECURE");
        refused(&[("OTEL_ENDPOINT", "grpc://c:1")], "expected `host:port`");
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let config = read(&[
            ("STORAGE_BACKEND", "s3"),
            ("S3_BUCKET", "b"),
            ("S3_ACCESS_KEY_ID", "k"),
            ("S3_SECRET_ACCESS_KEY", "canary-1"),
            ("DATABASE_URL", "postgres://u:canary-2@h/n"),
        ])
        .unwrap();
        assert!(!format!("{config:?}").contains("canary"));
    }
}
