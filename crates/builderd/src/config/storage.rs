//! Where artifacts and layers are kept.

use std::path::PathBuf;

use secrecy::SecretString;

use super::{PREFIX, Settings};

/// What one of the stores alone is told.
const OF_S3: [&str; 6] = [
    "S3_BUCKET",
    "S3_REGION",
    "S3_ENDPOINT",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
    "S3_ALLOW_HTTP",
];
const OF_GCS: [&str; 2] = ["GCS_BUCKET", "GCS_CREDENTIALS_FILE"];
const OF_BUCKETS: [&str; 1] = ["STORAGE_PREFIX"];

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
    /// Files in [`Config::rootfs_output_dir`](super::Config::rootfs_output_dir).
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

pub(super) fn storage(settings: &Settings, problems: &mut Vec<String>) -> StorageConfig {
    let workspace = settings.path("WORKSPACE_DIR").unwrap_or_default();
    StorageConfig {
        backend: settings.judge(problems, |problems| backend(settings, problems)),
        retention_days: settings.number("STORAGE_RETENTION_DAYS").unwrap_or_default(),
        max_bytes: settings.size("STORAGE_MAX_SIZE_GB").unwrap_or_default(),
        encrypts_all: settings.flag("ENABLE_ENCRYPTION"),
        cache_enabled: settings.flag("STORAGE_CACHE_ENABLED"),
        cache_max_bytes: settings.size("STORAGE_CACHE_MAX_SIZE_GB").unwrap_or_default(),
        cache_dir: settings.path("CACHE_DIR").unwrap_or_else(|| workspace.join("cache")),
    }
}

fn backend(settings: &Settings, problems: &mut Vec<String>) -> StorageBackend {
    let chosen = settings.text("STORAGE_BACKEND");
    let unused: &[&[&'static str]] = match chosen.as_deref() {
        Some("s3" | "minio") => &[&OF_GCS],
        Some("gcs") => &[&OF_S3],
        _ => &[&OF_S3, &OF_GCS, &OF_BUCKETS],
    };
    for names in unused {
        settings.refuse_unused(names, "STORAGE_BACKEND", problems);
    }
    match chosen.as_deref() {
        Some("s3" | "minio") => s3(settings, problems),
        Some("gcs") => StorageBackend::Gcs {
            bucket: needed(settings, "GCS_BUCKET", problems),
            credentials_file: settings.path("GCS_CREDENTIALS_FILE"),
            prefix: settings.text("STORAGE_PREFIX").unwrap_or_default(),
        },
        _ => StorageBackend::Local,
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
