//! What every door calls: create, look at, cancel, delete builds, read logs and artifacts.
//!
//! Each call takes a [`Principal`], asks it for the permit the call needs, and works on that
//! tenant's rows alone. A build of somebody else is not there. It knows neither messages nor
//! HTTP; the doors translate. Running builds is `worker`'s business.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::hex;
use super::record::{Build, BuildId, BuildRequest, BuildResult, LogLine, Micros, Stats, Usage};
use super::remedy::egress_remedy;
use super::state::BuildState;
use crate::artifact::{ArtifactStore, OpenArtifact};
use crate::clock::Clock;
use crate::seal::{MasterKey, SealError};
use crate::store::{
    Accepted, Cancel, Changes, Delete, Depth, Filter, NewBuild, Page, QuotaExceeded, Revision,
    Seen, Store, StoreError,
};
use crate::telemetry::Metrics;
use crate::tenant::{Denied, Principal, Right, TenantId, TenantLimits, Tier};

/// Most lines of one read of a log.
pub const LOG_LINES_MAX: u32 = 1000;
/// How long a forced delete waits for a running build to stop: longer than the lease of a worker
/// that died, shorter than the minute after which proxies hang up.
pub(crate) const STOP_WAIT: Duration = Duration::from_secs(45);
/// How often it looks, when nobody says that something changed.
const STOP_LOOK: Duration = Duration::from_millis(100);

/// Why the service did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The credential does not include the right.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// There is no such build, or it is somebody else's.
    #[error("build not found: {0}")]
    NotFound(String),
    /// The request is malformed.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which field, as the door calls it.
        field: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The request needs something that does not exist yet.
    #[error("{what} is not implemented: {instead}")]
    Unimplemented {
        /// What was asked for.
        what: String,
        /// What to do instead.
        instead: String,
    },
    /// A quota is used up.
    #[error("{} limit exceeded: {}/{}", .0.quota_type, .0.current, .0.limit)]
    Quota(QuotaExceeded),
    /// The registry is not among those that the tenant may use.
    #[error("images from {registry} are not allowed for this tenant: {allowed} are")]
    RegistryDenied {
        /// Where the image is.
        registry: String,
        /// Where images may come from.
        allowed: String,
    },
    /// The registry is a place that nobody's builds may reach.
    #[error("{registry} may not be reached from here: {rule}{}", and_then(rule))]
    RegistryUnreachable {
        /// Where the image is.
        registry: String,
        /// Why not.
        rule: oci::EgressDenied,
    },
    /// The idempotency key belongs to another request, or to that of a caller whose builds this
    /// one may not see.
    #[error(
        "the idempotency key was used before, for another request or by another credential: use a \
         new one"
    )]
    KeyReused,
    /// The build has not ended.
    #[error("the build is {0}: cancel it first, or use force")]
    NotEnded(BuildState),
    /// The build was told to stop and has not, for so many seconds.
    #[error(
        "the build is {state}: it was told to stop and has not for {secs} s; it will be \
         cancelled, so delete it again in a while"
    )]
    NotStopped {
        /// Where it still is.
        state: BuildState,
        /// How long that was waited for.
        secs: u64,
    },
    /// The build has no artifact.
    #[error("the build is {0}: it has no artifact")]
    NoArtifact(BuildState),
    /// The artifact was removed: too old, or the store was full.
    #[error("the artifact was removed by the retention rules: build it again")]
    ArtifactGone,
    /// The service is stopping.
    #[error("the service is stopping; try again")]
    Stopping,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The artifact store failed.
    #[error("the artifact store failed")]
    Artifact(#[source] std::io::Error),
    /// Credentials could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
}

fn and_then(rule: &oci::EgressDenied) -> String {
    egress_remedy(rule).map(|remedy| format!("; {remedy}")).unwrap_or_default()
}

/// Registry credentials of one build.
#[derive(Clone, Debug)]
pub struct RegistryCredentials {
    /// The registry they are for; the image's when empty.
    pub registry: String,
    /// User name; empty with a token.
    pub username: String,
    /// Password, or the token.
    pub secret: SecretString,
}

/// A build that somebody orders.
#[derive(Clone, Debug)]
pub struct Order {
    /// What to build.
    pub request: BuildRequest,
    /// How to get it.
    pub credentials: Option<RegistryCredentials>,
    /// Limits that are to be lower than the tenant's; 0 leaves one as it is.
    pub lower: LowerLimits,
    /// Two orders with the same key are one build.
    pub idempotency_key: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

/// Limits a request may lower; 0 leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LowerLimits {
    /// Memory of the build.
    pub memory_bytes: u64,
    /// Its cores.
    pub cpu_cores: u32,
    /// Its disk.
    pub disk_bytes: u64,
    /// Its wall time in seconds.
    pub timeout_secs: u32,
}

/// What a tenant may use, and uses.
#[derive(Clone, Debug)]
pub struct Quotas {
    /// May.
    pub limits: TenantLimits,
    /// Does.
    pub usage: Usage,
    /// What is used up.
    pub violations: Vec<QuotaExceeded>,
    /// When the daily figures start again.
    pub reset_at: Micros,
}

/// A piece of a log.
#[derive(Clone, Debug)]
pub struct LogPage {
    /// The lines.
    pub lines: Vec<LogLine>,
    /// The offset to ask for next.
    pub next_offset: u64,
    /// Whether the build has ended and there is nothing behind these lines.
    pub is_end: bool,
}

/// How the service as a whole does.
#[derive(Clone, Debug)]
pub struct Overview {
    /// Waiting and running builds.
    pub depth: Depth,
    /// Bytes of all artifacts.
    pub storage_bytes: u64,
}

/// Settings of the service.
#[derive(Clone, Debug)]
pub(crate) struct ServiceRules {
    /// Limits for tenants of a tier; the tier table, unless settings say otherwise.
    pub(crate) limits: [TenantLimits; 4],
    /// Whether a build may bring credentials.
    pub(crate) registry_auth: bool,
    /// Registries images may come from, for every tenant; all when empty.
    pub(crate) allowed_registries: Vec<String>,
    /// How builds reach registries, and which they can never.
    pub(crate) registries: oci::ClientOptions,
    /// The same for tenants that may reach more.
    pub(crate) registries_of_tenants: HashMap<TenantId, oci::ClientOptions>,
    /// The longest any build may take, in seconds.
    pub(crate) build_secs_max: u64,
    /// Why builds run no commands here, if they run none.
    pub(crate) no_commands: Option<String>,
    /// How long a forced delete waits for a build to stop: [`STOP_WAIT`], but in tests.
    pub(crate) stop_wait: Duration,
}

impl ServiceRules {
    pub(crate) fn limits(&self, tier: Tier) -> &TenantLimits {
        match tier {
            Tier::Free => &self.limits[0],
            Tier::Pro => &self.limits[1],
            Tier::Enterprise => &self.limits[2],
            Tier::Dedicated => &self.limits[3],
        }
    }
}

/// The service.
pub struct BuildService {
    store: Store,
    artifacts: Arc<dyn ArtifactStore>,
    key: Arc<MasterKey>,
    clock: Arc<dyn Clock>,
    rules: ServiceRules,
    metrics: Arc<Metrics>,
}

impl BuildService {
    pub(crate) fn new(
        store: Store,
        artifacts: Arc<dyn ArtifactStore>,
        key: Arc<MasterKey>,
        clock: Arc<dyn Clock>,
        rules: ServiceRules,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { store, artifacts, key, clock, rules, metrics }
    }

    /// What a tenant may use: what the operator set for it, else its tier's.
    ///
    /// # Errors
    /// [`ServiceError::Store`]
    pub async fn limits(&self, who: &Principal) -> Result<TenantLimits, ServiceError> {
        let row = self.store.system().tenant(who.tenant()).await?;
        Ok(row.and_then(|row| row.limits).unwrap_or_else(|| self.rules.limits(who.tier()).clone()))
    }

    /// Accepts a build. When this returns, the build is in the database. A key that was used for
    /// the same request gives that build, to its creator and to whoever may see builds.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn create(&self, who: &Principal, order: Order) -> Result<Build, ServiceError> {
        let permit = who.permit(Right::BuildCreate)?;
        let tenant_limits = self.limits(who).await?;
        self.check_source(who.tenant(), &tenant_limits, &order)?;
        let limits = self.lowered(&tenant_limits, order.lower);
        let id = BuildId::new();
        let sealed_credentials = match &order.credentials {
            Some(credentials) => Some(self.key.seal(who.tenant(), &id, credentials)?),
            None => None,
        };
        let build = NewBuild {
            id,
            request_hash: request_hash(&order),
            request: order.request,
            limits,
            customer: who.customer().map(str::to_owned),
            organization: who.organization().map(str::to_owned),
            rights: who.rights().clone(),
            sealed_credentials,
            idempotency_key: order.idempotency_key,
            created_by: who.credential().map(str::to_owned),
            traceparent: order.traceparent,
            created_at: self.clock.now(),
        };
        match self.store.tenant(&permit).create(&tenant_limits, build).await? {
            Accepted::Created(build) => {
                self.metrics.build_created(who.tenant(), who.tier());
                Ok(build)
            }
            Accepted::Known { build, created_by } if may_know(who, created_by.as_deref()) => {
                Ok(build)
            }
            Accepted::Known { .. } | Accepted::KeyReused => Err(ServiceError::KeyReused),
            Accepted::Quota(quota) => {
                self.metrics.quota_violation(who.tenant(), quota.quota_type);
                Err(ServiceError::Quota(quota))
            }
        }
    }

    /// What can be said of a source before anything is fetched.
    fn check_source(
        &self,
        tenant: &TenantId,
        limits: &TenantLimits,
        order: &Order,
    ) -> Result<(), ServiceError> {
        let invalid = |problem: String| ServiceError::Invalid {
            field: "config.source.docker_image.image_uri".into(),
            problem,
        };
        let reference: oci::Reference =
            order.request.image.parse().map_err(|error| invalid(format!("{error}")))?;
        let registry = reference.registry().to_owned();
        for allowed in [&limits.allowed_registries, &self.rules.allowed_registries] {
            if !allowed.is_empty() && !allowed.iter().any(|name| name == "*" || *name == registry) {
                return Err(ServiceError::RegistryDenied { registry, allowed: allowed.join(", ") });
            }
        }
        let own = self.rules.registries_of_tenants.get(tenant);
        let reachable = own.unwrap_or(&self.rules.registries).check_registry(&reference);
        reachable.map_err(|rule| ServiceError::RegistryUnreachable { registry, rule })?;
        if let Some(reason) = &self.rules.no_commands
            && !order.request.commands.is_empty()
        {
            return Err(ServiceError::Invalid {
                field: "config.strategy.docker_strategy.custom_commands".into(),
                problem: format!("builds run no commands here: {reason}"),
            });
        }
        if order.credentials.is_some() && !self.rules.registry_auth {
            return Err(ServiceError::Invalid {
                field: "config.source.docker_image.auth".into(),
                problem: "registry credentials are turned off here \
                          (UNKEY_BUILDERD_DOCKER_REGISTRY_AUTH)"
                    .into(),
            });
        }
        Ok(())
    }

    fn lowered(&self, limits: &TenantLimits, lower: LowerLimits) -> TenantLimits {
        fn least<N: Ord + Default>(limit: N, asked: N) -> N {
            if asked == N::default() { limit } else { limit.min(asked) }
        }
        let most = u32::try_from(self.rules.build_secs_max).unwrap_or(u32::MAX);
        TenantLimits {
            memory_bytes: least(limits.memory_bytes, lower.memory_bytes),
            cpu_cores: least(limits.cpu_cores, lower.cpu_cores),
            disk_bytes: least(limits.disk_bytes, lower.disk_bytes),
            timeout_secs: least(limits.timeout_secs.min(most), lower.timeout_secs),
            ..limits.clone()
        }
    }

    /// One build.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] also for builds of others.
    pub async fn get(&self, who: &Principal, id: &str) -> Result<Build, ServiceError> {
        let permit = who.permit(Right::BuildRead)?;
        let found = self.store.tenant(&permit).get(&known(id)?).await?;
        found.ok_or_else(|| ServiceError::NotFound(id.to_owned()))
    }

    /// One build with the last messages of its log, oldest first.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] also for builds of others.
    pub async fn get_with_log(
        &self,
        who: &Principal,
        id: &str,
        lines: u32,
    ) -> Result<Seen, ServiceError> {
        let permit = who.permit(Right::BuildRead)?;
        let found = self.store.tenant(&permit).get_with_log(&known(id)?, lines).await?;
        found.ok_or_else(|| ServiceError::NotFound(id.to_owned()))
    }

    /// How often a build was changed after its end; none if it has not ended or is not there.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn revision_of_ended(
        &self,
        who: &Principal,
        id: &str,
    ) -> Result<Option<Revision>, ServiceError> {
        let permit = who.permit(Right::BuildRead)?;
        Ok(self.store.tenant(&permit).revision_of_ended(&known(id)?).await?)
    }

    /// The tenant's builds, newest first.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn list(&self, who: &Principal, filter: &Filter) -> Result<Page, ServiceError> {
        let permit = who.permit(Right::BuildRead)?;
        Ok(self.store.tenant(&permit).list(filter).await?)
    }

    /// Cancels a build; one that has ended stays as it is. Returns the state after it: a running
    /// build's worker is told and stops within a second.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn cancel(
        &self,
        who: &Principal,
        id: &str,
        reason: &str,
    ) -> Result<Cancel, ServiceError> {
        let permit = who.permit(Right::BuildCancel)?;
        let now = self.clock.now();
        let done = self.store.tenant(&permit).cancel(&known(id)?, reason, now).await?;
        done.ok_or_else(|| ServiceError::NotFound(id.to_owned()))
    }

    /// Deletes a build with its log; its artifact goes when no other build has it. With `force`
    /// a build that has not ended is cancelled and waited for first, which takes the right to
    /// cancel.
    ///
    /// # Errors
    /// [`ServiceError::NotEnded`] without `force`; with it [`ServiceError::NotStopped`], and the
    /// build stays cancelled.
    pub async fn delete(&self, who: &Principal, id: &str, force: bool) -> Result<(), ServiceError> {
        let permit = who.permit(Right::BuildDelete)?;
        let (store, build) = (self.store.tenant(&permit), known(id)?);
        let (wait, mut changes) = (self.rules.stop_wait, self.changes());
        let mut told_at = None;
        loop {
            let state = match store.delete(&build, self.clock.now()).await? {
                None => return Err(ServiceError::NotFound(id.to_owned())),
                Some(Delete::Done) => return Ok(()),
                Some(Delete::Running(state)) => state,
            };
            match told_at {
                None if !force => return Err(ServiceError::NotEnded(state)),
                None => {
                    let permit = who.permit(Right::BuildCancel)?;
                    let now = self.clock.now();
                    self.store.tenant(&permit).cancel(&build, "deleted", now).await?;
                    told_at = Some(Instant::now());
                }
                Some(told_at) if told_at.elapsed() >= wait => {
                    return Err(ServiceError::NotStopped { state, secs: wait.as_secs() });
                }
                Some(_) => changes.wait(STOP_LOOK).await,
            }
        }
    }

    /// Lines of a log from `offset` on, at most [`LOG_LINES_MAX`].
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn log(
        &self,
        who: &Principal,
        id: &str,
        offset: u64,
        limit: u32,
    ) -> Result<LogPage, ServiceError> {
        let permit = who.permit(Right::BuildRead)?;
        let (store, build) = (self.store.tenant(&permit), known(id)?);
        // The state first: a build that has ended says nothing any more. And not all of the build: every
        // follower asks each time that something changes.
        let state = store.state(&build).await?;
        let state = state.ok_or_else(|| ServiceError::NotFound(id.to_owned()))?;
        let limit = limit.clamp(1, LOG_LINES_MAX);
        let lines = store.log(&build, offset, limit).await?;
        let whole = u32::try_from(lines.len()).is_ok_and(|count| count < limit);
        let next_offset = lines.last().map_or(offset, |line| line.offset + 1);
        Ok(LogPage { lines, next_offset, is_end: whole && state.is_terminal() })
    }

    /// Sees from now on when a log may have grown; whoever follows one looks again.
    pub fn changes(&self) -> Changes {
        self.store.system().changes()
    }

    /// What the tenant may use, and uses.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn quotas(&self, who: &Principal) -> Result<Quotas, ServiceError> {
        let permit = who.permit(Right::BuildRead)?;
        let (limits, now) = (self.limits(who).await?, self.clock.now());
        let usage = self.store.tenant(&permit).usage(now).await?;
        let reset_at = now.day().plus_secs(86_400);
        let used_up = |quota_type, current, limit, reset_at| {
            (current >= limit).then_some(QuotaExceeded { quota_type, current, limit, reset_at })
        };
        let concurrent = u64::from(limits.concurrent_builds);
        let daily = u64::from(limits.daily_builds);
        let violations = [
            used_up("concurrent_builds", usage.running, concurrent, None),
            used_up("daily_builds", usage.created_today, daily, Some(reset_at)),
            used_up("storage", usage.storage_bytes, limits.storage_bytes, None),
        ];
        let violations = violations.into_iter().flatten().collect();
        Ok(Quotas { limits, usage, violations, reset_at })
    }

    /// Figures over the builds accepted in `from..to`, and the newest of these.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub async fn stats(
        &self,
        who: &Principal,
        from: Option<Micros>,
        to: Option<Micros>,
    ) -> Result<(Stats, Vec<Build>), ServiceError> {
        const RECENT: u32 = 10;
        let permit = who.permit(Right::BuildRead)?;
        let store = self.store.tenant(&permit);
        let stats = store.stats(from, to).await?;
        let before = match to {
            Some(to) => store.first_since(to).await?,
            None => None,
        };
        let newest = Filter { limit: RECENT, before, ..Filter::default() };
        let mut recent = store.list(&newest).await?.builds;
        recent.retain(|build| from.is_none_or(|from| build.created_at >= from));
        Ok((stats, recent))
    }

    /// The artifact of a completed build, open for reading.
    ///
    /// # Errors
    /// [`ServiceError::NoArtifact`], [`ServiceError::ArtifactGone`]
    pub async fn artifact(
        &self,
        who: &Principal,
        id: &str,
    ) -> Result<(BuildResult, OpenArtifact), ServiceError> {
        let permit = who.permit(Right::ArtifactRead)?;
        let found = self.store.tenant(&permit).get(&known(id)?).await?;
        let build = found.ok_or_else(|| ServiceError::NotFound(id.to_owned()))?;
        if build.state != BuildState::Completed {
            return Err(ServiceError::NoArtifact(build.state));
        }
        if !build.has_artifact {
            return Err(ServiceError::ArtifactGone);
        }
        let Some(result) = build.result else {
            let problem = format!("what came of {id} cannot be read");
            return Err(ServiceError::Store(StoreError::Corrupt(problem)));
        };
        match self.artifacts.open(&result.artifact_key).await {
            Ok(Some(open)) => Ok((result, open)),
            Ok(None) => Err(ServiceError::ArtifactGone),
            Err(source) => Err(ServiceError::Artifact(source)),
        }
    }

    /// Writes down that bytes of a build's artifact are handed out, before they are.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub(crate) async fn note_download(
        &self,
        who: &Principal,
        id: &str,
    ) -> Result<(), ServiceError> {
        let permit = who.permit(Right::ArtifactRead)?;
        Ok(self.store.tenant(&permit).note(id, self.clock.now()).await?)
    }

    /// Where an artifact lies, for `rootfs_path`.
    pub fn artifact_path(&self, key: &str) -> String {
        self.artifacts.path(key)
    }

    /// Whether the database takes writes, within so much time.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn beat(&self, at_most: Duration) -> Result<(), StoreError> {
        let beat = tokio::time::timeout(at_most, async { self.store.system().beat().await }).await;
        beat.unwrap_or_else(|_| Err(self.store.late(at_most)))
    }

    /// How the service as a whole does.
    ///
    /// # Errors
    /// [`ServiceError::Store`]
    pub async fn overview(&self) -> Result<Overview, ServiceError> {
        let system = self.store.system();
        Ok(Overview { depth: system.depth().await?, storage_bytes: system.storage_bytes().await? })
    }
}

/// A text that cannot be a build's id is the id of no build; none at all was forgotten.
fn known(id: &str) -> Result<BuildId, ServiceError> {
    if id.is_empty() {
        return Err(ServiceError::Invalid {
            field: "build_id".into(),
            problem: "is missing: name the build".into(),
        });
    }
    id.parse().map_err(|_| ServiceError::NotFound(id.chars().take(64).collect()))
}

/// Whether a caller with the key of a build is told of the build.
fn may_know(who: &Principal, created_by: Option<&str>) -> bool {
    let is_creator = created_by.is_some() && created_by == who.credential();
    is_creator || who.permit(Right::BuildRead).is_ok()
}

/// What makes two orders the same: all of it but the key, the trace and what the credentials are.
fn request_hash(order: &Order) -> String {
    // Plain data serialises.
    let request = serde_json::to_vec(&order.request).unwrap_or_default();
    let mut hash = Sha256::new_with_prefix(request);
    hash.update(format!("{:?}", order.lower));
    hex(&hash.finalize())
}
