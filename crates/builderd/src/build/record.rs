//! A build as the service knows it: what was asked, how it goes, what came of it.
//!
//! Everything here is data that the store keeps. It does not know SQL, doors or the engine.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::state::BuildState;
use crate::tenant::{TenantId, TenantLimits, Tier};

/// Microseconds since 1970-01-01 UTC, as the database keeps times.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Micros(pub i64);

impl Micros {
    /// One second.
    pub const SECOND: i64 = 1_000_000;

    /// This much later; stays at the end of time.
    #[must_use]
    pub fn plus_secs(self, secs: u64) -> Self {
        let micros = i64::try_from(secs).unwrap_or(i64::MAX).saturating_mul(Self::SECOND);
        Self(self.0.saturating_add(micros))
    }

    /// The first moment of the day (UTC).
    #[must_use]
    pub fn day(self) -> Self {
        const DAY: i64 = 86_400 * Micros::SECOND;
        Self(self.0.div_euclid(DAY) * DAY)
    }
}

/// A build's name, `build_` and a ULID-like sortable number: 26 of Crockford's base 32 digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildId(String);

/// Crockford's base 32 (ULID specification, "Encoding").
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const PREFIX: &str = "build_";

impl BuildId {
    /// A new name; later ones sort behind earlier ones (RFC 9562, version 7).
    pub fn new() -> Self {
        let number = Uuid::now_v7().as_u128();
        let digit = |place: u32| {
            let index = usize::try_from(number >> (5 * place) & 31).unwrap_or(0);
            char::from(DIGITS[index])
        };
        Self(PREFIX.chars().chain((0..26).rev().map(digit)).collect())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for BuildId {
    fn default() -> Self {
        Self::new()
    }
}

impl FromStr for BuildId {
    type Err = NoBuildId;

    fn from_str(text: &str) -> Result<Self, NoBuildId> {
        let number = text.strip_prefix(PREFIX).ok_or(NoBuildId)?;
        match number.len() == 26 && number.bytes().all(|byte| DIGITS.contains(&byte)) {
            true => Ok(Self(text.to_owned())),
            false => Err(NoBuildId),
        }
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that cannot be the name of a build; for doors this is "not found".
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no build has such an id")]
pub struct NoBuildId;

/// What the tenant asked for, in the engine's terms. Holds no secret.
///
/// A worker that does not know a field cannot do what it asks for: it leaves the build to one that
/// does, as nodes of several versions share a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    /// The image as it was written.
    pub image: String,
    /// Tags to try when `image` has none and `latest` does not exist.
    pub pull_tags: Vec<String>,
    /// `none`, `gzip` or `zstd`.
    pub compression: String,
    /// The uncompressed image may not be larger.
    pub size_limit_bytes: Option<u64>,
    /// Run in the image, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<String>,
    /// What the caller calls the build.
    pub name: String,
    /// The caller's labels.
    pub labels: BTreeMap<String, String>,
    /// The asset id the caller would like.
    pub suggested_asset_id: String,
    /// When to try again.
    pub retry: RetryPolicy,
    /// The door's own form of the request, as JSON, without secrets: shown again, never read.
    pub echo: String,
}

/// When a failure that may pass by itself leads to another try; a part of a [`BuildRequest`], and
/// read like one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub max_retries: u32,
    /// Wait before the first of them, in seconds; doubles each time.
    pub base_delay_secs: u64,
    /// The longest wait, in seconds.
    pub max_delay_secs: u64,
    /// Failure codes that are tried again.
    pub retry_on: Vec<FailureCode>,
}

impl Default for RetryPolicy {
    /// The documented policy (build workflows, "Retry Policies").
    fn default() -> Self {
        Self {
            max_retries: 3,
            base_delay_secs: 30,
            max_delay_secs: 300,
            retry_on: vec![
                FailureCode::NetworkError,
                FailureCode::TemporaryResourceError,
                FailureCode::RegistryRateLimit,
            ],
        }
    }
}

impl RetryPolicy {
    /// The wait before try number `attempt + 1`, `attempt` counting from 1; none if there is none.
    pub fn delay_secs(&self, code: FailureCode, attempt: u32) -> Option<u64> {
        if attempt > self.max_retries || !self.retry_on.contains(&code) {
            return None;
        }
        let factor = 1u64.checked_shl(attempt.saturating_sub(1)).unwrap_or(u64::MAX);
        Some(self.base_delay_secs.saturating_mul(factor).min(self.max_delay_secs))
    }
}

/// Why a build failed, in one word. The first six are the documented codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FailureCode {
    /// A quota was exceeded.
    QuotaExceeded,
    /// The source is malformed, missing or not accessible.
    InvalidSource,
    /// It took longer than it may.
    BuildTimeout,
    /// There is no room.
    StorageFull,
    /// A rule forbids to go there.
    NetworkDenied,
    /// The registry does not accept the credentials.
    AuthenticationFailed,
    /// The network or the registry failed; trying again may help.
    NetworkError,
    /// The machine was short of something; trying again may help.
    TemporaryResourceError,
    /// The registry asks to come back later.
    RegistryRateLimit,
    /// A defect of the service.
    Internal,
}

impl FailureCode {
    /// Every code.
    pub const ALL: [Self; 10] = [
        Self::QuotaExceeded,
        Self::InvalidSource,
        Self::BuildTimeout,
        Self::StorageFull,
        Self::NetworkDenied,
        Self::AuthenticationFailed,
        Self::NetworkError,
        Self::TemporaryResourceError,
        Self::RegistryRateLimit,
        Self::Internal,
    ];

    /// The code as it is written in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QuotaExceeded => "QUOTA_EXCEEDED",
            Self::InvalidSource => "INVALID_SOURCE",
            Self::BuildTimeout => "BUILD_TIMEOUT",
            Self::StorageFull => "STORAGE_FULL",
            Self::NetworkDenied => "NETWORK_DENIED",
            Self::AuthenticationFailed => "AUTHENTICATION_FAILED",
            Self::NetworkError => "NETWORK_ERROR",
            Self::TemporaryResourceError => "TEMPORARY_RESOURCE_ERROR",
            Self::RegistryRateLimit => "REGISTRY_RATE_LIMIT",
            Self::Internal => "INTERNAL",
        }
    }
}

/// Why a build (or one try of it) failed. Here, in an [`Attempt`], a [`BuildResult`] and what it
/// cost, which tell what was and ask for nothing, whoever does not know a field goes without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// In one word.
    pub code: FailureCode,
    /// The step in which it happened: a [`Phase`](super::Phase) by its name, `prepare` before the
    /// first, or `start` where the build's process is not there yet.
    pub step: String,
    /// What happened.
    pub cause: String,
    /// `yours`, `ours` or `upstream`.
    pub blame: String,
    /// What to do.
    pub remedy: String,
}

/// A try that did not finish the build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// From 1.
    pub attempt: u32,
    /// When a worker took it.
    pub started_at: Micros,
    /// When it was given up.
    pub ended_at: Micros,
    /// Why.
    pub failure: Failure,
}

/// What a completed build has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BuildResult {
    /// The artifact's key in the artifact store.
    pub artifact_key: String,
    /// Size of the artifact as it is stored, in bytes.
    pub artifact_bytes: u64,
    /// SHA-256 of the artifact as it is stored, in hex.
    pub sha256: String,
    /// Size of the uncompressed image, in bytes.
    pub image_bytes: u64,
    /// The metadata file's content.
    pub metadata: serde_json::Value,
    /// Whether nothing had to be built.
    pub from_cache: bool,
    /// How long what took and how much it needed.
    pub metrics: BuildMetrics,
}

/// What a build cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildMetrics {
    /// Resolving the image.
    pub pull_ms: u64,
    /// Fetching and inflating the layers.
    pub extract_ms: u64,
    /// Tree and image.
    pub build_ms: u64,
    /// Compressing.
    pub optimize_ms: u64,
    /// All of it.
    pub total_ms: u64,
    /// Compressed layers of the image, in bytes.
    pub source_bytes: u64,
    /// Of those, what was fetched: layers that the cache has are not.
    #[serde(default)]
    pub fetched_bytes: u64,
    /// Biggest memory of the build's process, in bytes.
    pub memory_peak_bytes: u64,
    /// Most disk that the build's files were seen to take at once, in bytes: packs, image,
    /// artifact.
    pub disk_bytes: u64,
    /// CPU time of the build's process, in milliseconds.
    pub cpu_ms: u64,
    /// What it was shut in by; none if nothing ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
}

/// What stood between the processes of a build and everybody else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Isolation {
    /// The name of its sandbox, that of its group of processes as well.
    pub sandbox: String,
    /// The walls that stood, by name.
    pub walls: Vec<String>,
}

/// What a running build takes, as its worker saw it last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveUsage {
    /// Memory of the build's process, in bytes; none before it starts and after it ends.
    pub memory_bytes: u64,
    /// CPU time of it over wall time since the look before, in percent: 100 is one core.
    pub cpu_percent: u64,
    /// Disk of the build's files, in bytes.
    pub disk_bytes: u64,
    /// What the try cost so far.
    pub so_far: BuildMetrics,
}

/// One line of a build's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Its number, from 0.
    pub offset: u64,
    /// When it was said.
    pub at: Micros,
    /// `debug`, `info`, `warn` or `error`.
    pub level: String,
    /// Who said it: `queue`, `puller`, `extractor`, `commands`, `builder`, `packager`.
    pub component: String,
    /// What.
    pub message: String,
}

/// One build.
#[derive(Clone, Debug, PartialEq)]
pub struct Build {
    /// Its name.
    pub id: BuildId,
    /// Whose.
    pub tenant: TenantId,
    /// The customer within the tenant.
    pub customer: Option<String>,
    /// The organization that the tenant acts for, as the credential says that asked for it.
    pub organization: Option<String>,
    /// The names of that credential's rights; none where they were not written down.
    pub rights: Vec<String>,
    /// The tenant's tier when the build was accepted.
    pub tier: Tier,
    /// What applies to it: the tenant's limits, lowered by the request.
    pub limits: TenantLimits,
    /// What was asked.
    pub request: BuildRequest,
    /// Where it stands.
    pub state: BuildState,
    /// 0 to 100.
    pub progress_percent: u32,
    /// What is being done, for people.
    pub step: String,
    /// Why it is to be cancelled, if it is.
    pub cancel_reason: Option<String>,
    /// Tries so far, the running one included.
    pub attempt: u32,
    /// The tries that did not finish it.
    pub attempts: Vec<Attempt>,
    /// When it was accepted.
    pub created_at: Micros,
    /// Before then no worker takes it.
    pub run_at: Micros,
    /// When a worker first took it.
    pub started_at: Option<Micros>,
    /// When anything last changed.
    pub updated_at: Micros,
    /// When it ended.
    pub ended_at: Option<Micros>,
    /// What came of it; what is true of it stays so when the artifact is gone.
    pub result: Option<BuildResult>,
    /// Whether the artifact is still there: the retention rules remove it.
    pub has_artifact: bool,
    /// Why nothing came of it.
    pub failure: Option<Failure>,
    /// What it takes while it runs; of one that ended without a result, what was seen last.
    pub usage: Option<LiveUsage>,
    /// W3C trace context of the request.
    pub traceparent: Option<String>,
    /// Whether all of it could be read; what could not be is missing, or as it is by default.
    pub is_whole: bool,
}

impl Build {
    /// When it may be tried again, of a build that waits for that.
    pub fn next_attempt_at(&self, now: Micros) -> Option<Micros> {
        let waits = self.state == BuildState::Queued && !self.attempts.is_empty();
        (waits && self.run_at > now).then_some(self.run_at)
    }
}

/// What a tenant uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Builds that run.
    pub running: u64,
    /// Builds that wait.
    pub queued: u64,
    /// Builds accepted today (UTC); deleting one does not give it back.
    pub created_today: u64,
    /// Of those ended today.
    pub completed_today: u64,
    /// Of those ended today.
    pub failed_today: u64,
    /// Bytes of the tenant's artifacts; an artifact of several builds counts once.
    pub storage_bytes: u64,
    /// Wall time of builds since ever, in seconds.
    pub compute_secs: u64,
}

/// Figures over a tenant's builds in a stretch of time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// All accepted.
    pub total: u64,
    /// Completed.
    pub completed: u64,
    /// Failed or timed out.
    pub failed: u64,
    /// Mean wall time of the completed ones, in milliseconds.
    pub mean_ms: u64,
    /// Bytes of their artifacts.
    pub storage_bytes: u64,
    /// Wall time of all, in seconds.
    pub compute_secs: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_twice_the_one_before_up_to_the_longest() {
        let waits = |policy: &RetryPolicy, code| {
            (1..).map_while(|attempt| policy.delay_secs(code, attempt)).collect::<Vec<_>>()
        };
        let documented = RetryPolicy::default();
        assert_eq!(waits(&documented, FailureCode::RegistryRateLimit), [30, 60, 120]);
        let often = RetryPolicy { max_retries: 70, ..documented.clone() };
        let often = waits(&often, FailureCode::NetworkError);
        assert_eq!((often.len(), &often[..5]), (70, &[30, 60, 120, 240, 300][..]));
        assert!(often[5..].iter().all(|wait| *wait == 300), "{often:?}");
        let long = RetryPolicy { max_retries: 70, max_delay_secs: u64::MAX, ..documented.clone() };
        assert_eq!(waits(&long, FailureCode::NetworkError).last(), Some(&u64::MAX));
        // What does not pass by itself is not tried again, nor what the caller leaves out.
        assert!(waits(&documented, FailureCode::InvalidSource).is_empty());
        let some = RetryPolicy { retry_on: vec![FailureCode::NetworkError], ..documented.clone() };
        assert!(waits(&some, FailureCode::RegistryRateLimit).is_empty());
        let never = RetryPolicy { max_retries: 0, ..documented };
        assert!(waits(&never, FailureCode::NetworkError).is_empty());
    }
}
