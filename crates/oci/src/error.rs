//! Everything that can go wrong between a source and verified bytes, who has to act, and how.
//!
//! Errors name hosts, never whole URLs: a URL may carry a signature or a password. This module
//! does not decide what is tried again inside the client; `retry` does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::archive::ArchiveError;
use crate::auth::docker_config::CredentialsError;
use crate::config::ConfigError;
use crate::digest::Digest;
use crate::egress::EgressDenied;
use crate::manifest::{ManifestError, shown};
use crate::platform::Platform;
use crate::spool::SpoolError;

/// Why an image or a blob could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry wants (other) credentials.
    #[error("{host} refuses access to {what}{}", after_colon(message))]
    Unauthorized {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// Whether credentials were sent.
        sent_credentials: bool,
        /// What the registry said.
        message: String,
    },
    /// The registry has no such image.
    #[error("{host} does not have {what}{}", after_colon(message))]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// What the registry said.
        message: String,
    },
    /// The layer is marked as not distributable and the registry does not have it.
    #[error("layer {digest} is a foreign layer that {host} does not have")]
    ForeignLayer {
        /// The layer.
        digest: Digest,
        /// The registry.
        host: String,
    },
    /// Too many requests, and waiting was no help or too long.
    #[error("{host} limits the rate of requests{}", after_colon(message))]
    RateLimited {
        /// The server.
        host: String,
        /// How long the server wants us to wait.
        retry_after: Option<Duration>,
        /// What the server said.
        message: String,
    },
    /// Another status than success.
    #[error(
        "{host} answered with status {status} to the request for {what}{}",
        after_colon(message)
    )]
    Status {
        /// The server.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
        /// How long the server wants us to wait.
        retry_after: Option<Duration>,
        /// What the server said.
        message: String,
    },
    /// No connection, or it broke before an answer.
    #[error("cannot reach {host}, or it hung up")]
    Connect {
        /// The server.
        host: String,
        /// What happened, without the URL.
        source: reqwest::Error,
    },
    /// The server's certificate is not one we trust.
    #[error("the certificate of {host} is not trusted")]
    Certificate {
        /// The server.
        host: String,
        /// What is wrong with it.
        source: reqwest::Error,
    },
    /// The server does not speak TLS.
    #[error("{host} does not speak TLS")]
    PlainHttpServer {
        /// The server.
        host: String,
        /// What came instead.
        source: reqwest::Error,
    },
    /// The server fell silent.
    #[error("{host} sent nothing for {} seconds while we waited for {what}", waited.as_secs_f32())]
    Timeout {
        /// The server.
        host: String,
        /// What we waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// A blob or document stopped before its end.
    #[error("{host} broke off {what} after {received_bytes} bytes")]
    Cut {
        /// The server.
        host: String,
        /// What was being read.
        what: String,
        /// How much had come, over all attempts.
        received_bytes: u64,
        /// What the transport said; none if the body just ended.
        source: Option<reqwest::Error>,
    },
    /// A redirect that would lead where we do not go.
    #[error("{host} redirects to {target}, which is refused: {reason}")]
    RedirectRefused {
        /// Who redirected.
        host: String,
        /// The host of the target.
        target: String,
        /// Why not.
        reason: &'static str,
    },
    /// A chain of redirects without end.
    #[error("{host} redirects more than {limit} times")]
    TooManyRedirects {
        /// Who redirected first.
        host: String,
        /// The limit.
        limit: usize,
    },
    /// The answer makes no sense in HTTP or in the distribution protocol.
    #[error("{host} sent a senseless answer for {what}: {reason}")]
    Protocol {
        /// The server.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The token server's answer was no token.
    #[error("{realm} gave no token for {host}: {reason}")]
    Token {
        /// The registry.
        host: String,
        /// The token server.
        realm: String,
        /// What came instead.
        reason: String,
    },
    /// Credentials or tokens would travel unencrypted.
    #[error("{host} sends us to {realm} for a token without TLS, which is refused")]
    InsecureRealm {
        /// The registry.
        host: String,
        /// The token server.
        realm: String,
    },
    /// The egress policy forbids to go there.
    #[error("{host} may not be reached from here")]
    EgressDenied {
        /// The host that the request, a redirect or a registry names.
        host: String,
        /// The rule.
        source: EgressDenied,
    },
    /// The bytes are not the ones that were named.
    #[error("{what} is not what was asked for: expected {expected}, got {actual}")]
    DigestMismatch {
        /// What was read.
        what: String,
        /// The digest it should have.
        expected: Digest,
        /// The digest it has.
        actual: Digest,
    },
    /// The number of bytes is not the one that was named.
    #[error("{what} has {actual_bytes} bytes, expected {expected_bytes}")]
    SizeMismatch {
        /// What was read.
        what: String,
        /// The size it should have.
        expected_bytes: u64,
        /// The size it has, or where reading stopped when it is larger.
        actual_bytes: u64,
    },
    /// Larger than we accept.
    #[error("{what} is larger than the limit of {bytes_max} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// The limit.
        bytes_max: u64,
    },
    /// The manifest or index is refused.
    #[error("the manifest of {name} is not acceptable")]
    Manifest {
        /// The image.
        name: String,
        /// Why.
        source: ManifestError,
    },
    /// The image config is refused.
    #[error("the config {digest} is not acceptable")]
    Config {
        /// The config.
        digest: Digest,
        /// Why.
        source: ConfigError,
    },
    /// Manifest and config disagree.
    #[error("the manifest of {name} has {layers} layers but its config has {diff_ids} diff_ids")]
    LayerCount {
        /// The image.
        name: String,
        /// Layers in the manifest.
        layers: usize,
        /// Entries in `rootfs.diff_ids`.
        diff_ids: usize,
    },
    /// The image exists, but not for this platform.
    #[error("{name} has no image for {wanted}, only for {}", list(available))]
    NoSuchPlatform {
        /// The image.
        name: String,
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        available: Vec<Platform>,
    },
    /// Indexes nest too deeply or hold too many documents.
    #[error("the index of {name} nests too deeply or has too many entries to look through")]
    IndexTooDeep {
        /// The image.
        name: String,
    },
    /// The docker config or a credential helper is of no use.
    #[error("the credentials for {host} cannot be had")]
    Credentials {
        /// The registry.
        host: String,
        /// Why.
        source: CredentialsError,
    },
    /// An option has a value that cannot be used.
    #[error("option {option} cannot be used: {reason}")]
    Option {
        /// Which.
        option: &'static str,
        /// Why.
        reason: String,
    },
    /// No HTTP client can be made here.
    #[error("the HTTP client cannot be set up")]
    Client {
        /// Why.
        source: reqwest::Error,
    },
    /// An archive cannot be read.
    #[error("cannot use the archive {}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: ArchiveError,
    },
    /// An archive or layout has no such image.
    #[error("{} has no image {tag:?}, only {}", path.display(), list(available))]
    NoSuchTag {
        /// The archive or layout.
        path: PathBuf,
        /// What was asked for.
        tag: String,
        /// What there is.
        available: Vec<String>,
    },
    /// An archive or layout has several images and none was chosen.
    #[error("{} has several images: {}", path.display(), list(available))]
    SeveralImages {
        /// The archive or layout; `-` is standard input.
        path: PathBuf,
        /// What a source begins with that names one of them.
        transport: &'static str,
        /// What there is.
        available: Vec<String>,
    },
    /// A directory is no OCI layout.
    #[error("{} is not an OCI image layout: {reason}", path.display())]
    NotALayout {
        /// The directory.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// An archive or layout lacks a blob it names.
    #[error("{} lacks the blob {digest}", path.display())]
    MissingBlob {
        /// The archive or layout.
        path: PathBuf,
        /// The blob.
        digest: Digest,
    },
    /// A temporary copy of the archive could not be made.
    #[error("cannot keep a temporary copy of {}", path.display())]
    Spool {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: SpoolError,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Who has to act for an error to go away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The user: the name, the options, the credentials, the image itself.
    Yours,
    /// Whoever runs this program: its disk, its setup.
    Ours,
    /// Whoever runs the registry or what lies between.
    Upstream,
}

impl PullError {
    /// Who has to act.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            PullError::Unauthorized { .. }
            | PullError::NotFound { .. }
            | PullError::ForeignLayer { .. }
            | PullError::Certificate { .. }
            | PullError::PlainHttpServer { .. }
            | PullError::InsecureRealm { .. }
            | PullError::EgressDenied { .. }
            | PullError::RedirectRefused { .. }
            | PullError::TooLarge { .. }
            | PullError::Manifest { .. }
            | PullError::Config { .. }
            | PullError::LayerCount { .. }
            | PullError::NoSuchPlatform { .. }
            | PullError::IndexTooDeep { .. }
            | PullError::Credentials { .. }
            | PullError::Option { .. }
            | PullError::Archive { .. }
            | PullError::NoSuchTag { .. }
            | PullError::SeveralImages { .. }
            | PullError::NotALayout { .. }
            | PullError::MissingBlob { .. } => Blame::Yours,
            PullError::RateLimited { .. }
            | PullError::Status { .. }
            | PullError::Connect { .. }
            | PullError::Timeout { .. }
            | PullError::Cut { .. }
            | PullError::TooManyRedirects { .. }
            | PullError::Protocol { .. }
            | PullError::Token { .. }
            | PullError::DigestMismatch { .. }
            | PullError::SizeMismatch { .. } => Blame::Upstream,
            PullError::Spool {
                source: SpoolError::Read(_) | SpoolError::TooLarge(_) | SpoolError::Ratio { .. },
                ..
            } => Blame::Yours,
            PullError::Io { source, .. } if is_about_the_path(source) => Blame::Yours,
            PullError::Client { .. } | PullError::Spool { .. } | PullError::Io { .. } => {
                Blame::Ours
            }
        }
    }

    /// Whether the same call may succeed later with nothing changed on our side.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            PullError::RateLimited { .. }
            | PullError::Connect { .. }
            | PullError::Timeout { .. }
            | PullError::Cut { .. } => true,
            PullError::Status { status, .. } => *status >= 500 || matches!(status, 408 | 425),
            PullError::Unauthorized { .. }
            | PullError::NotFound { .. }
            | PullError::ForeignLayer { .. }
            | PullError::Certificate { .. }
            | PullError::PlainHttpServer { .. }
            | PullError::RedirectRefused { .. }
            | PullError::TooManyRedirects { .. }
            | PullError::Protocol { .. }
            | PullError::Token { .. }
            | PullError::InsecureRealm { .. }
            | PullError::EgressDenied { .. }
            | PullError::DigestMismatch { .. }
            | PullError::SizeMismatch { .. }
            | PullError::TooLarge { .. }
            | PullError::Manifest { .. }
            | PullError::Config { .. }
            | PullError::LayerCount { .. }
            | PullError::NoSuchPlatform { .. }
            | PullError::IndexTooDeep { .. }
            | PullError::Credentials { .. }
            | PullError::Option { .. }
            | PullError::Client { .. }
            | PullError::Archive { .. }
            | PullError::NoSuchTag { .. }
            | PullError::SeveralImages { .. }
            | PullError::NotALayout { .. }
            | PullError::MissingBlob { .. }
            | PullError::Spool { .. }
            | PullError::Io { .. } => false,
        }
    }

    /// Puts `changed` in place of every text of a document that it quotes. What an answer says
    /// beside documents is taken care of where it comes in (`transport`).
    pub(crate) fn with_quotes(mut self, changed: &dyn Fn(&str) -> String) -> PullError {
        if let PullError::Manifest { source, .. } = &mut self {
            source.change_quotes(changed);
        }
        if let PullError::Config { source, .. } = &mut self {
            source.change_quotes(changed);
        }
        if let PullError::NoSuchPlatform { available, .. } = &mut self {
            for platform in available {
                platform.os = changed(&platform.os);
                platform.architecture = changed(&platform.architecture);
                platform.variant = platform.variant.as_deref().map(changed);
            }
        }
        self
    }

    /// How long the server asked us to wait.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        if let PullError::RateLimited { retry_after, .. } | PullError::Status { retry_after, .. } =
            self
        {
            return *retry_after;
        }
        None
    }

    /// What the user can do about it, as one sentence, where there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        self.hint_about_registries().or_else(|| self.hint_about_images())
    }

    fn hint_about_registries(&self) -> Option<String> {
        let hub = |host: &str| host == "registry-1.docker.io";
        let login = |host: &str| {
            let argument = if hub(host) { String::new() } else { format!(" {host}") };
            format!("docker login{argument}")
        };
        if let PullError::Unauthorized { host, sent_credentials, .. } = self {
            let login = login(host);
            return Some(if *sent_credentials {
                format!(
                    "the stored credentials were refused: renew them with `{login}`, or ask for access to the repository"
                )
            } else {
                format!(
                    "check the name, or log in with `{login}`: registries answer like this to private images and to ones that do not exist"
                )
            });
        }
        if let PullError::RateLimited { host, .. } = self {
            let login = login(host);
            return Some(format!(
                "wait, name a mirror, or log in with `{login}`: limits are higher for known users"
            ));
        }
        if let PullError::PlainHttpServer { host, .. }
        | PullError::InsecureRealm { realm: host, .. } = self
        {
            return Some(format!(
                "if {host} really speaks plain HTTP, name it as a plain-HTTP host"
            ));
        }
        if let PullError::RedirectRefused { target, .. } = self {
            return Some(format!(
                "if {target} really is meant to speak plain HTTP, name it as a plain-HTTP host"
            ));
        }
        if let PullError::EgressDenied { source, .. } = self {
            let allowed =
                "use a registry on a public address, or ask whoever runs this to allow it";
            return source.can_be_allowed().then(|| allowed.to_owned());
        }
        if let PullError::Certificate { .. } = self {
            return Some("if the registry has a private certificate authority, pass its certificate as an extra CA".to_owned());
        }
        if let PullError::Connect { .. } | PullError::Timeout { .. } = self {
            return Some("check the host name, the network and the proxy settings".to_owned());
        }
        if let PullError::Client { .. } = self {
            return Some(
                "check that the system's CA certificates are installed (package ca-certificates)"
                    .to_owned(),
            );
        }
        None
    }

    fn hint_about_images(&self) -> Option<String> {
        if let PullError::NoSuchPlatform { available, .. } = self {
            let first = shown(&available.first()?.to_string());
            return Some(format!("choose one of these platforms, for example --platform {first}"));
        }
        if let PullError::NotFound { .. } = self {
            return Some("check the name and the tag".to_owned());
        }
        if let PullError::ForeignLayer { .. } = self {
            return Some("push the image with its foreign layers (dockerd: allow-nondistributable-artifacts) or build from another base: foreign URLs are never followed".to_owned());
        }
        if let PullError::Manifest { source: ManifestError::Schema1, .. } = self {
            return Some(
                "pull and push the image again with a current tool, which converts it".to_owned(),
            );
        }
        if let PullError::Manifest { source: ManifestError::Encrypted(_), .. } = self {
            return Some(
                "decrypt the image first, for example with `skopeo copy --decryption-key`"
                    .to_owned(),
            );
        }
        if let PullError::SeveralImages { path, transport, available } = self {
            // `-` has no room for a name.
            let is_stdin = path.as_os_str() == "-";
            let path = if is_stdin { Path::new("/dev/stdin") } else { path.as_path() };
            let first = available.first()?;
            return Some(format!("choose one, for example {transport}:{}:{first}", path.display()));
        }
        if let PullError::NoSuchTag { .. } = self {
            return Some("add one of these names after the path, separated by a colon".to_owned());
        }
        if let PullError::MissingBlob { .. } = self {
            return Some(
                "the copy is incomplete: make it again, with all platforms if it has several"
                    .to_owned(),
            );
        }
        if let PullError::Archive { source, .. } = self {
            return source.hint();
        }
        None
    }
}

/// Whether the file is the problem, and not the disk.
fn is_about_the_path(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound, PermissionDenied};
    [NotFound, PermissionDenied, NotADirectory, IsADirectory].contains(&error.kind())
}

fn after_colon(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

fn list<T: ToString>(items: &[T]) -> String {
    const SHOWN_MAX: usize = 30;
    if items.is_empty() {
        return "nothing".to_owned();
    }
    let shown: Vec<String> =
        items.iter().take(SHOWN_MAX).map(|item| shown(&item.to_string())).collect();
    let more = items.len().saturating_sub(SHOWN_MAX);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{tail}", shown.join(", "))
}
