//! What must be done now and then: leases that ran out, artifacts that are too old or too many,
//! files that nothing names any more.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::record::Micros;
use super::worker::ATTEMPTS_MAX;
use crate::artifact::ArtifactStore;
use crate::clock::Clock;
use crate::packs::PackCache;
use crate::store::{Store, StoreError};
use crate::telemetry::Metrics;

/// How often leases are looked at.
const REAP_EVERY: Duration = Duration::from_secs(2);
/// A stored file that nothing names is left alone while it is younger: the build that made it
/// may be about to name it.
const GRACE_SECS: u64 = 3600;

/// What the janitor needs to know of the settings.
#[derive(Clone, Debug)]
pub(crate) struct JanitorRules {
    /// How often artifacts are looked at.
    pub(crate) sweep_every: Duration,
    /// Artifacts of builds that ended earlier are removed.
    pub(crate) retention_secs: u64,
    /// What all artifacts together may take.
    pub(crate) storage_bytes_max: u64,
    /// The pack cache and its limit.
    pub(crate) packs: Option<(PackCache, u64)>,
}

/// See the module.
pub(crate) struct Janitor {
    store: Store,
    artifacts: Arc<dyn ArtifactStore>,
    clock: Arc<dyn Clock>,
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
        Self { store, artifacts, clock, metrics, rules, unnamed: HashSet::new() }
    }

    /// Works until `stop` is set.
    pub(crate) async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut swept: Option<Instant> = None;
        while !*stop.borrow() {
            if let Err(error) = self.reap().await {
                tracing::warn!(%error, "leases could not be looked at");
            }
            if swept.is_none_or(|swept| swept.elapsed() >= self.rules.sweep_every) {
                swept = Some(Instant::now());
                if let Err(error) = self.sweep().await {
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
        let reaped = system.reap(ATTEMPTS_MAX, self.clock.now()).await?;
        if reaped > 0 {
            tracing::warn!(reaped, "builds whose workers fell silent were taken back");
        }
        let depth = system.depth().await?;
        self.metrics.set_depth(depth.queued, depth.running);
        Ok(())
    }

    /// Forgets what is too old or too much, then removes the files that nothing names.
    pub(crate) async fn sweep(&mut self) -> io::Result<()> {
        let system = self.store.system();
        let age = i64::try_from(self.rules.retention_secs).unwrap_or(i64::MAX);
        let older_than =
            Micros(self.clock.now().0.saturating_sub(age.saturating_mul(Micros::SECOND)));
        system.expire(older_than).await.map_err(io::Error::other)?;
        system.evict(self.rules.storage_bytes_max).await.map_err(io::Error::other)?;
        let mut unnamed = HashSet::new();
        let mut stored_bytes = 0;
        for stored in self.artifacts.list().await? {
            stored_bytes += stored.size_bytes;
            if stored.age_secs < GRACE_SECS
                || system.artifact_is_referenced(&stored.key).await.map_err(io::Error::other)?
            {
                continue;
            }
            if self.unnamed.contains(&stored.key) {
                self.artifacts.remove(&stored.key).await?;
                tracing::info!(key = stored.key, "an artifact that nothing names was removed");
            } else {
                unnamed.insert(stored.key);
            }
        }
        self.unnamed = unnamed;
        let space = self.artifacts.space()?;
        self.metrics.set_storage(
            stored_bytes,
            space.map_or(0, |(free, _)| free),
            space.map_or(0, |(_, all)| all),
        );
        if let Some((packs, limit_bytes)) = self.rules.packs.clone() {
            let prune = move || packs.prune(limit_bytes);
            tokio::task::spawn_blocking(prune)
                .await
                .map_err(io::Error::other)?
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}
