//! What a caller can choose about pulling, with defaults that suit a person at a terminal.
//!
//! It reads no files and no environment: paths and secrets come from the caller.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::Credentials;
use crate::egress::{AllowedPlace, EgressDenied, EgressPolicy};
use crate::reference::{Reference, mirror_parts};
use crate::transport::origin_of;

/// How a source is reached and how much of it is accepted.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Mirrors by registry (`docker.io`, `ghcr.io`, or `*` for every registry), tried in
    /// order before the registry itself. A mirror is `host[:port][/path-prefix]`.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// The hosts (`host` or `host:port`) that are spoken to without TLS. There is no falling
    /// back: a host is either here or has a certificate.
    pub plain_http: BTreeSet<String>,
    /// Certificate authorities, as PEM, trusted beside the system's.
    pub extra_ca_pem: Vec<Vec<u8>>,
    /// Docker's `config.json`; a file that does not exist counts as empty.
    pub docker_config: Option<PathBuf>,
    /// Credentials by registry host; they win over `docker_config`.
    pub credentials: BTreeMap<String, Credentials>,
    /// Blobs that are read from one registry at a time.
    pub connections_per_host: usize,
    /// When and how often to try again.
    pub retry: RetryPolicy,
    /// How long to wait for an answer.
    pub timeouts: Timeouts,
    /// The `User-Agent` header.
    pub user_agent: String,
    /// How much of a source is accepted.
    pub limits: Limits,
    /// Whether the proxy settings of the environment (`HTTPS_PROXY`, …) are obeyed; never under a
    /// closed `egress`, which judges the addresses that are connected to.
    pub system_proxy: bool,
    /// Where to go at all, whoever names the place.
    pub egress: EgressPolicy,
    /// How to wait between attempts; tests put a recorder here.
    pub sleep: Sleep,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            mirrors: BTreeMap::new(),
            plain_http: BTreeSet::new(),
            extra_ca_pem: Vec::new(),
            docker_config: None,
            credentials: BTreeMap::new(),
            connections_per_host: 4,
            retry: RetryPolicy::default(),
            timeouts: Timeouts::default(),
            user_agent: concat!("builderd/", env!("CARGO_PKG_VERSION")).to_owned(),
            limits: Limits::default(),
            system_proxy: true,
            egress: EgressPolicy::default(),
            sleep: Sleep::default(),
        }
    }
}

impl ClientOptions {
    /// Adds a mirror as users write it: `HOST=MIRROR`, or `MIRROR` for Docker Hub's.
    pub fn add_mirror(&mut self, text: &str) {
        let (host, mirror) = text.split_once('=').unwrap_or(("docker.io", text));
        self.mirrors.entry(host.to_owned()).or_default().push(mirror.to_owned());
    }

    /// Closes `egress`: only public addresses are gone to, `allowed` places, and, because
    /// whoever runs this has named them, the mirrors and plain-HTTP hosts there are by now.
    pub fn close_egress(&mut self, mut allowed: Vec<AllowedPlace>, blocked: Vec<String>) {
        let is_plain = |host: &str| self.plain_http.contains(&host.to_ascii_lowercase());
        let mirrors = self.mirrors.values().flatten();
        let mirrors = mirrors.filter_map(|mirror| mirror_parts(mirror)).map(|(host, _)| host);
        let places = mirrors.map(|host| AllowedPlace::of_registry(host, is_plain(host)));
        let plain = self.plain_http.iter().map(|host| AllowedPlace::of_registry(host, true));
        allowed.extend(places.chain(plain).flatten());
        self.egress = EgressPolicy::closed(allowed, blocked);
    }

    /// What can be said of an image's registry before anything is asked: whether `egress` lets
    /// us go there, as far as its name alone decides that.
    ///
    /// # Errors
    /// [`EgressDenied`]
    pub fn check_registry(&self, reference: &Reference) -> Result<(), EgressDenied> {
        match origin_of(reference.api_host(), &self.plain_http) {
            Some(url) => self.egress.check(&url),
            // It is no host at all, which is said where it is asked.
            None => Ok(()),
        }
    }
}

/// When and how often to try again. Waits double from `wait_first` up to `wait_max`.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Further attempts after the first, counted anew after real progress.
    pub retries: u32,
    /// Further attempts at a mirror, which is worth less patience.
    pub retries_mirror: u32,
    /// The first wait.
    pub wait_first: Duration,
    /// The longest wait of our own choosing.
    pub wait_max: Duration,
    /// The longest `Retry-After` that is waited for; a server that asks for more is an error.
    pub retry_after_max: Duration,
    /// Bytes of a blob that count as real progress.
    pub progress_bytes: u64,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            retries: 5,
            retries_mirror: 1,
            wait_first: Duration::from_millis(250),
            wait_max: Duration::from_secs(10),
            retry_after_max: Duration::from_secs(60),
            progress_bytes: 1 << 20,
        }
    }
}

/// How long to wait for an answer. There is no limit on a whole download: that is the
/// caller's, who knows the deadline of the build.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// For the head of an answer.
    pub response: Duration,
    /// For the next bytes of a body.
    pub stall: Duration,
    /// For a credential helper.
    pub helper: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(15),
            response: Duration::from_secs(60),
            stall: Duration::from_secs(30),
            helper: Duration::from_secs(30),
        }
    }
}

/// How much of a source is accepted. Beyond is an error, nothing is cut short.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of a manifest or index.
    pub manifest_bytes_max: u64,
    /// Size of an image config.
    pub config_bytes_max: u64,
    /// Number of layers.
    pub layers_max: usize,
    /// Size of one layer blob.
    pub layer_bytes_max: u64,
    /// Size of all layer blobs of an image.
    pub image_bytes_max: u64,
    /// Indexes within indexes.
    pub index_depth_max: usize,
    /// Documents read while looking for a platform.
    pub documents_max: usize,
    /// Redirects followed for one request.
    pub redirects_max: usize,
    /// Entries of an archive's tar.
    pub archive_entries_max: usize,
    /// Bytes of a spooled archive (stdin, or inflated gzip).
    pub spool_bytes_max: u64,
    /// Spooled bytes per byte read, looked at once `spool_ratio_free_bytes` have been spooled
    /// (deflate cannot do more than about 1030).
    pub spool_ratio_max: u64,
    /// How much may be spooled before `spool_ratio_max` is looked at.
    pub spool_ratio_free_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            manifest_bytes_max: 4 << 20,
            config_bytes_max: 8 << 20,
            layers_max: 1024,
            layer_bytes_max: 256 << 30,
            image_bytes_max: 1 << 40,
            index_depth_max: 4,
            documents_max: 64,
            redirects_max: 8,
            archive_entries_max: 100_000,
            spool_bytes_max: 1 << 40,
            spool_ratio_max: 500,
            spool_ratio_free_bytes: 1 << 30,
        }
    }
}

type Pause = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A way to wait.
#[derive(Clone)]
pub struct Sleep(Arc<dyn Fn(Duration) -> Pause + Send + Sync>);

impl Sleep {
    /// Waits by calling `wait`.
    pub fn new<F, P>(wait: F) -> Sleep
    where
        F: Fn(Duration) -> P + Send + Sync + 'static,
        P: Future<Output = ()> + Send + 'static,
    {
        Sleep(Arc::new(move |duration| Box::pin(wait(duration))))
    }

    pub(crate) fn wait(&self, duration: Duration) -> Pause {
        (self.0)(duration)
    }
}

impl Default for Sleep {
    fn default() -> Sleep {
        Sleep::new(tokio::time::sleep)
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sleep")
    }
}
