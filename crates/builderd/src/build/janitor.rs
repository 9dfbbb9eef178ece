//! What must be done now and then: leases that ran out, artifacts that are too old or too many,
//! files that nothing names any more.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::host;
use super::record::Micros;
use super::service::ServiceRules;
use super::worker::ATTEMPTS_MAX;
use crate::artifact::ArtifactStore;
use crate::causes::chain;
use crate::clock::Clock;
use crate::packs::{CacheError, PackCache};
use crate::store::{Leases, Store, StoreError};
use crate::telemetry::{Metrics, StorageLevels, TenantLevels};

/// How often leases are looked at.
const REAP_EVERY: Duration = Duration::from_secs(2);
/// A stored file that nothing names is left alone while it is younger: the build that made it
/// may be about to name it.
const GRACE_SECS: u64 = 3600;
/// A tenant's key that was retired is kept for so long though no artifact needs it: a build may have
/// asked for it before, and not yet said what it seals.
const KEY_GRACE_SECS: u64 = 24 * 3600;
/// Deleted artifacts that are removed in one go, one after the other; behind it is a pause of
/// [`REAP_EVERY`]. So no more than 50 in a second go from a store that is quick, and a hundred keys, some
/// 10 KB, are in memory. From one that is as slow as it may be a round takes 100 minutes
/// ([`REMOVE_MAX`] each), of which who stops the service waits for one file's.
const DROPPED_MAX: u32 = 100;
/// How long removing a stored file may take: less than its removal is respected.
const REMOVE_MAX: Duration = Duration::from_secs(60);
/// How often it is looked what tenants use, if anybody wants to know.
const TENANTS_EVERY: Duration = Duration::from_secs(10);
/// So many of them: the busiest, then the biggest. Their names are labels of metrics.
const TENANTS_MAX: u32 = 50;

/// What the janitor needs to know of the settings.
#[derive(Clone, Debug)]
pub(crate) struct JanitorRules {
    /// How often artifacts are looked at.
    pub(crate) sweep_every: Duration,
    /// Artifacts of builds that ended earlier are removed.
    pub(crate) retention_secs: u64,
    /// What the audit log tells of longer ago is forgotten.
    pub(crate) audit_retention_secs: u64,
    /// What all artifacts together may take.
    pub(crate) storage_bytes_max: u64,
    /// The pack cache and its limit.
    pub(crate) packs: Option<(PackCache, u64)>,
    /// What tenants may use.
    pub(crate) tenants: ServiceRules,
}

/// What removes stored files.
#[derive(Clone)]
struct Remover {
    store: Store,
    artifacts: Arc<dyn ArtifactStore>,
    clock: Arc<dyn Clock>,
}

/// See the module.
pub(crate) struct Janitor {
    store: Store,
    artifacts: Arc<dyn ArtifactStore>,
    clock: Arc<dyn Clock>,
    remover: Remover,
    metrics: Arc<Metrics>,
    rules: JanitorRules,
    /// Files that nothing named at the last sweep; those that still nothing names are removed.
    unnamed: HashSet<String>,
}

impl Janitor {
    pub(crate) fn new(
        store: Store,
        artifacts: Arc<dyn ArtifactStore>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
        rules: JanitorRules,
    ) -> Self {
        let remover = Remover {
            store: store.clone(),
            artifacts: Arc::clone(&artifacts),
            clock: Arc::clone(&clock),
        };
        Self { store, artifacts, clock, remover, metrics, rules, unnamed: HashSet::new() }
    }

    /// Works until `stop` is set.
    pub(crate) async fn run(self, stop: watch::Receiver<bool>) {
        // A file store that does not answer keeps nobody's lease from being looked at.
        let remover = self.remover.clone();
        tokio::join!(remover.run(stop.clone()), self.look_around(stop));
    }

    async fn look_around(mut self, mut stop: watch::Receiver<bool>) {
        let (mut swept, mut counted): (Option<Instant>, Option<Instant>) = (None, None);
        while !*stop.borrow() {
            if let Err(error) = self.reap().await {
                tracing::warn!(error = chain(&error), "leases could not be looked at");
            }
            if counted.is_none_or(|counted| counted.elapsed() >= TENANTS_EVERY) {
                counted = Some(Instant::now());
                if let Err(error) = self.count_tenants().await {
                    let error = chain(&error);
                    tracing::warn!(error, "it could not be looked what tenants use");
                }
            }
            if swept.is_none_or(|swept| swept.elapsed() >= self.rules.sweep_every) {
                swept = Some(Instant::now());
                if let Err(error) = self.sweep(&stop).await {
                    tracing::warn!(%error, "artifacts could not be swept");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(REAP_EVERY) => {}
                _ = stop.changed() => {}
            }
        }
    }

    async fn reap(&self) -> Result<(), StoreError> {
        let system = self.store.system();
        let reaped = system.reap(Leases::Expired, ATTEMPTS_MAX, self.clock.now()).await?;
        if reaped > 0 {
            tracing::warn!(reaped, "builds whose workers fell silent were taken back");
        }
        let depth = system.depth().await?;
        self.metrics.set_depth(depth.queued, depth.running);
        Ok(())
    }

    async fn count_tenants(&self) -> Result<(), StoreError> {
        if !self.metrics.names_tenants() {
            return Ok(());
        }
        let busiest = self.store.system().busiest(TENANTS_MAX, self.clock.now()).await?;
        let levels = busiest.into_iter().map(|load| {
            let of_tier = self.rules.tenants.limits(load.tenant.tier);
            let limits = load.tenant.limits.as_ref().unwrap_or(of_tier);
            TenantLevels {
                running: load.running,
                created_today: load.created_today,
                storage_bytes: load.storage_bytes,
                storage_bytes_max: limits.storage_bytes,
                tenant: load.tenant.id,
            }
        });
        self.metrics.set_tenants(levels.collect());
        Ok(())
    }

    /// Forgets what is too old or too much, then removes the files that nothing names, until `stop` is
    /// set. What cannot be done keeps nothing else from being done; the first of it is the error.
    pub(crate) async fn sweep(&mut self, stop: &watch::Receiver<bool>) -> io::Result<()> {
        // What the kernel let go only after its build had been cleared away.
        host::clear_leftovers().await;
        let forgotten = self.forget(stop).await;
        let swept = self.sweep_files(stop).await;
        let pruned = match self.rules.packs.clone().filter(|_| !*stop.borrow()) {
            Some((packs, limit_bytes)) => prune(packs, limit_bytes).await.map(Some),
            None => Ok(None),
        };
        let space = self.artifacts.space();
        let levels = StorageLevels {
            artifact_bytes: swept.as_ref().ok().and_then(|swept| swept.bytes),
            cache_bytes: pruned.as_ref().copied().unwrap_or_default(),
            space: space.as_ref().copied().unwrap_or_default(),
        };
        self.metrics.set_storage(levels);
        let swept = swept.and_then(|swept| swept.problem.map_or(Ok(()), Err));
        forgotten.and(swept).and(pruned.map(drop)).and(space.map(drop))
    }

    /// What the database need not know any more.
    async fn forget(&self, stop: &watch::Receiver<bool>) -> io::Result<()> {
        let system = self.store.system();
        let expired = system.expire(self.before(self.rules.retention_secs)).await;
        if *stop.borrow() {
            return expired.map(drop).map_err(io::Error::other);
        }
        let forgotten = system.forget_audit(self.before(self.rules.audit_retention_secs)).await;
        if let Ok(forgotten @ 1..) = forgotten {
            tracing::info!(forgotten, "rows of the audit log were kept long enough");
        }
        let pruned = system.prune_tenant_keys(self.before(KEY_GRACE_SECS)).await;
        let evicted = system.evict(self.rules.storage_bytes_max).await;
        let done = [expired.map(drop), forgotten.map(drop), pruned.map(drop), evicted.map(drop)];
        done.into_iter().collect::<Result<(), StoreError>>().map_err(io::Error::other)
    }

    /// Removes files that nothing named at the last sweep either, until `stop` is set.
    async fn sweep_files(&mut self, stop: &watch::Receiver<bool>) -> io::Result<Swept> {
        let system = self.store.system();
        let mut unnamed = HashSet::new();
        let (mut bytes, mut problem) = (0, None);
        let (mut is_away, mut stopped) = (false, stop.clone());
        let listed = tokio::select! {
            biased;
            // A sender that is gone will never say it; nobody wants us any more.
            _ = stopped.wait_for(|stopping| *stopping) => Vec::new(),
            listed = self.artifacts.list() => listed?,
        };
        for stored in listed {
            if *stop.borrow() {
                break;
            }
            bytes += stored.size_bytes;
            if stored.age_secs < GRACE_SECS
                || system.artifact_is_referenced(&stored.key).await.map_err(io::Error::other)?
            {
                continue;
            }
            // A store that does not answer is not waited for once for each file.
            if is_away || !self.unnamed.contains(&stored.key) {
                unnamed.insert(stored.key);
                continue;
            }
            match self.remover.remove(&stored.key).await {
                Ok(false) => {}
                Ok(true) => {
                    bytes -= stored.size_bytes;
                    tracing::info!(key = stored.key, "an artifact that nothing names was removed");
                }
                Err(error) => {
                    tracing::warn!(key = stored.key, %error, "an artifact could not be removed");
                    is_away = error.kind() == io::ErrorKind::TimedOut;
                    problem.get_or_insert(error);
                    unnamed.insert(stored.key);
                }
            }
        }
        self.unnamed = unnamed;
        Ok(Swept { bytes: (!*stop.borrow()).then_some(bytes), problem })
    }
}

/// What a look at stored files came to.
struct Swept {
    /// What they take, if all were looked at.
    bytes: Option<u64>,
    /// Why the first of those that should have gone is still there.
    problem: Option<io::Error>,
}

impl Janitor {
    /// The moment so long ago.
    fn before(&self, secs: u64) -> Micros {
        let age = i64::try_from(secs).unwrap_or(i64::MAX).saturating_mul(Micros::SECOND);
        Micros(self.clock.now().0.saturating_sub(age))
    }
}

impl Remover {
    /// Removes what was dropped, soon after it was: whoever builds and deletes again and again must
    /// not fill the disk past what he may have.
    async fn run(self, mut stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            if let Err(error) = self.remove_dropped(&stop).await {
                tracing::warn!(%error, "deleted artifacts could not be removed; tried again later");
            }
            tokio::select! {
                () = tokio::time::sleep(REAP_EVERY) => {}
                _ = stop.changed() => {}
            }
        }
    }

    /// Removes files that builds have let go, until `stop` is set. The first that cannot be removed is
    /// the error, and the others are done all the same, unless the store does not answer.
    async fn remove_dropped(&self, stop: &watch::Receiver<bool>) -> io::Result<()> {
        let system = self.store.system();
        let dropped = system.dropped(DROPPED_MAX, self.clock.now()).await;
        let mut result = Ok(());
        for key in dropped.map_err(io::Error::other)? {
            if *stop.borrow() {
                break;
            }
            match self.remove(&key).await {
                Ok(true) => tracing::info!(key, "an artifact that no build has was removed"),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }

    /// Removes a stored file unless a build has it or is about to store it again: whoever wants
    /// to, waits until this is over. Returns whether it is gone.
    async fn remove(&self, key: &str) -> io::Result<bool> {
        let system = self.store.system();
        let begun = system.begin_removal(key, self.clock.now()).await.map_err(io::Error::other)?;
        let Some(removal) = begun else { return Ok(false) };
        // Without an answer it may still happen; builds wait until the removal expires.
        let removed = tokio::time::timeout(REMOVE_MAX, self.artifacts.remove(key)).await;
        removed.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        system.end_removal(&removal).await.map_err(io::Error::other)?;
        Ok(true)
    }
}

/// Removes the packs that are too many; the bytes of those that stay.
async fn prune(packs: PackCache, limit_bytes: u64) -> io::Result<u64> {
    let prune = move || {
        packs.prune(limit_bytes)?;
        Ok::<_, CacheError>(packs.entries()?.iter().map(|pack| pack.size_bytes).sum())
    };
    let pruned = tokio::task::spawn_blocking(prune).await.map_err(io::Error::other)?;
    pruned.map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
