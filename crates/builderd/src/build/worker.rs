//! Takes builds from the queue and sees each of them to its end.
//!
//! A worker holds a [`Lease`] while it works and says every few seconds that it lives; what it
//! writes is fenced by the lease, so that a worker that was given up changes nothing. The build
//! itself runs in a child process (`child`): ending a build is killing that process. It does not
//! know doors.
//!
//! | where | what |
//! |---|---|
//! | here | the queue is looked at, and the end of each try written down |
//! | `running` | one try: what it does in order, and what makes it stop |
//! | `source` | the image is looked for |
//! | `engine` | the child process is started, and listened to |
//! | `claims` | what it says is held against what can be |
//! | `artifact` | the artifact is named, taken if it exists, stored if it was made |
//! | `sum` | what was made is summed |

mod artifact;
mod claims;
mod engine;
mod running;
mod source;
mod sum;
#[cfg(feature = "testing")]
pub(crate) mod testing;

use std::collections::HashMap;
use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use commands::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument as _;

use super::Blame;
use super::admission::Admission;
use super::child::RegistrySpec;
use super::disk::lock;
use super::host::Host;
use super::kept::SealedPacks;
use super::progress::STORING;
use super::record::{Build, BuildResult, Failure, FailureCode, Micros};
use super::remedy::usual_remedy;
use super::shares::CpuShares;
use super::state::BuildState;
use crate::artifact::ArtifactStore;
use crate::causes::chain;
use crate::clock::Clock;
use crate::config::CommandsEgress;
use crate::keys::TenantKeys;
use crate::seal::{KeyWrapper, MasterKey};
use crate::store::{ArtifactName, Claimed, Fenced, Lease, Outcome, Store, StoreError};
use crate::telemetry::{self, Metrics};
use running::{End, Running};
pub(crate) use sum::main as build_sum;

/// What a build's process makes, in its own directory.
const MADE: &str = "rootfs.ext4";

/// A worker that says nothing for so long has lost its build.
pub(crate) const LEASE_SECS: u64 = 30;
/// How often it says that it lives, and hears of a cancel nobody hinted at.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// When heartbeats fail for so long, the worker gives its build up before somebody else takes it.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How often the queue is looked at even if nobody said that something came.
const POLL: Duration = Duration::from_secs(2);
/// A build whose workers died so often ends as failed.
pub(crate) const ATTEMPTS_MAX: u32 = 20;

/// What workers need to know of the settings.
#[derive(Clone, Debug)]
pub(crate) struct WorkerRules {
    /// Builds at once.
    pub(crate) concurrent_max: usize,
    /// How registries are reached.
    pub(crate) registry: RegistrySpec,
    /// How long fetching the image may take.
    pub(crate) pull_timeout: Duration,
    /// Where layer packs are kept, and how many bytes of them; none keeps nothing.
    pub(crate) packs: Option<(PathBuf, u64)>,
    /// Where those of protected tenants are kept, if any are.
    pub(crate) sealed_packs: Option<Arc<SealedPacks>>,
    /// Whether a known artifact may be handed out again.
    pub(crate) cache_enabled: bool,
    /// Whether artifacts of every tenant are encrypted, and not only those whose tier requires it.
    pub(crate) encrypts_all: bool,
    /// What this host gives builds.
    pub(crate) host: Arc<Host>,
    /// This program.
    pub(crate) program: PathBuf,
    /// The OCI runtime, where builds may run commands.
    pub(crate) runtime: Option<Runtime>,
    /// What commands may reach.
    pub(crate) commands_egress: CommandsEgress,
    /// How long a shutdown waits for running builds.
    pub(crate) shutdown_timeout: Duration,
}

/// All workers of this process.
pub(crate) struct Workers {
    store: Store,
    artifacts: Arc<dyn ArtifactStore>,
    key: Arc<MasterKey>,
    keys: TenantKeys,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    rules: WorkerRules,
    /// Shown as the owner of leases.
    name: String,
    /// Builds of the same artifact wait for one another.
    flights: Mutex<HashMap<String, Arc<Semaphore>>>,
    /// Which of them fit beside each other.
    admission: Arc<Admission>,
    /// Which of them the CPUs are for.
    cpus: CpuShares,
}

impl Workers {
    pub(crate) fn new(
        store: Store,
        artifacts: Arc<dyn ArtifactStore>,
        key: Arc<MasterKey>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
        rules: WorkerRules,
    ) -> Self {
        let keys = TenantKeys::new(store.clone(), Arc::clone(&key) as Arc<dyn KeyWrapper>);
        let name = format!(
            "{}-{}",
            rustix::system::uname().nodename().to_string_lossy(),
            uuid::Uuid::new_v4()
        );
        let mut directories = vec![artifacts.staging().to_owned()];
        directories.extend(rules.packs.iter().map(|(directory, _)| directory.clone()));
        Self {
            store,
            artifacts,
            key,
            keys,
            clock,
            metrics,
            rules,
            name,
            flights: Mutex::default(),
            admission: Admission::new(directories),
            cpus: CpuShares::default(),
        }
    }

    /// Works until `stop` is set; then takes nothing more, waits for what runs as long as the
    /// rules say, and puts the rest back into the queue.
    pub(crate) async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let slots = Arc::new(Semaphore::new(self.rules.concurrent_max));
        let (hurry, give_up) = watch::channel(false);
        let mut running = JoinSet::new();
        // Taken before the queue is looked at: what comes between look and wait is not missed.
        let mut changes = self.store.system().changes();
        while !*stop.borrow() {
            let slot = tokio::select! {
                slot = Arc::clone(&slots).acquire_owned() => slot,
                _ = stop.changed() => break,
            };
            let Ok(slot) = slot else { break };
            match self.claim().await {
                Some(claimed) => {
                    let (workers, give_up) = (Arc::clone(&self), give_up.clone());
                    running.spawn(async move {
                        workers.work(claimed, give_up).await;
                        drop(slot);
                    });
                }
                None => {
                    drop(slot);
                    tokio::select! {
                        () = changes.wait(POLL) => {}
                        _ = stop.changed() => break,
                    }
                }
            }
            while running.try_join_next().is_some() {}
        }
        let finish = async { while running.join_next().await.is_some() {} };
        if tokio::time::timeout(self.rules.shutdown_timeout, finish).await.is_err() {
            // Cannot fail while the builds that watch it run.
            let _ = hurry.send(true);
            while running.join_next().await.is_some() {}
        }
    }

    async fn claim(&self) -> Option<Claimed> {
        match self.store.system().claim(&self.name, LEASE_SECS, self.clock.now()).await {
            Ok(claimed) => claimed,
            Err(error) => {
                tracing::warn!(error = chain(&error), "the queue cannot be read");
                None
            }
        }
    }

    /// One try of one build, to its end.
    async fn work(&self, claimed: Claimed, give_up: watch::Receiver<bool>) {
        let (lease, build) = (claimed.lease.clone(), claimed.build.clone());
        let span = telemetry::build_span(
            build.tenant.as_str(),
            build.id.as_str(),
            build.attempt,
            build.traceparent.as_deref(),
        );
        async {
            self.metrics.build_started(build.tier);
            let started = self.clock.now();
            let end = Running::new(self, &claimed, give_up).run_to_the_end().await;
            self.conclude(&lease, &build, started, end).await;
        }
        .instrument(span)
        .await;
    }

    /// Writes how a try ended; nothing if the lease was lost.
    async fn conclude(&self, lease: &Lease, build: &Build, started: Micros, end: End) {
        let now = self.clock.now();
        let (mut turn, mut wait_secs) = (None, 0);
        let (name, outcome) = match end {
            End::Lost => {
                tracing::warn!("the lease was lost; another worker has the build");
                return;
            }
            End::Made(name, result, of) => {
                self.measure(&result);
                turn = of;
                (Some(name), Outcome::Completed(result))
            }
            End::Cancelled => (None, Outcome::Cancelled),
            End::TimedOut(failure) => (None, Outcome::TimedOut(failure)),
            End::Released => (None, Outcome::Retry { failure: None, run_at: now }),
            End::Failed(failure) => {
                match build.request.retry.delay_secs(failure.code, build.attempt) {
                    Some(wait) => {
                        wait_secs = wait;
                        let run_at = now.plus_secs(wait);
                        (None, Outcome::Retry { failure: Some(failure), run_at })
                    }
                    None => (None, Outcome::Failed(failure)),
                }
            }
        };
        let micros = u64::try_from(now.0 - started.0).unwrap_or(0);
        let secs = Duration::from_micros(micros).as_secs_f64();
        let failure = failure_of(&outcome).cloned();
        match self.finish(lease, name.as_ref(), outcome).await {
            Ok(Some(state)) if state.is_terminal() => {
                log_end(state, secs, failure.as_ref());
                self.metrics.build_ended(build.tier, state, secs);
            }
            Ok(Some(_)) => {
                if let Some(failure) = &failure {
                    log_try(secs, wait_secs, failure);
                }
            }
            Ok(None) => tracing::warn!("the lease was lost before the build could end"),
            Err(error) => {
                let error = chain(&error);
                tracing::error!(error, "the end of the build could not be written");
            }
        }
        // From here on whoever waited for it finds what was made.
        drop(turn);
    }

    /// What an artifact took, unless it was there already.
    fn measure(&self, result: &BuildResult) {
        self.metrics.sizes(result.image_bytes, result.artifact_bytes);
        let cost = &result.metrics;
        let mut steps = vec![("resolve", cost.pull_ms)];
        if !result.from_cache {
            self.metrics.cost(cost);
            steps.extend([("layers", cost.extract_ms), ("build", cost.build_ms)]);
            if cost.optimize_ms > 0 {
                steps.push(("compress", cost.optimize_ms));
            }
        }
        for (step, ms) in steps {
            self.metrics.step(step, Duration::from_millis(ms).as_secs_f64(), false);
        }
    }

    /// Tries until the lease would have run out: a build that is done must not be built again
    /// because the database was away for a moment.
    async fn finish(
        &self,
        lease: &Lease,
        artifact: Option<&ArtifactName>,
        outcome: Outcome,
    ) -> Result<Option<BuildState>, StoreError> {
        let give_up = Instant::now() + SILENCE_MAX;
        let store = self.store.lease(lease);
        loop {
            let now = self.clock.now();
            let finish = store.finish(artifact, outcome.clone(), now);
            let error = match tokio::time::timeout_at(give_up, finish).await {
                Ok(Err(error)) => error,
                Ok(Ok(state)) => return Ok(state),
                Err(_) => return Err(self.store.late(SILENCE_MAX)),
            };
            if matches!((&error, &outcome), (StoreError::Illegal(_), Outcome::Completed(_))) {
                // The last step could not be written when it was entered.
                match store.progress(BuildState::Packaging, 99, STORING, now).await {
                    Ok(Fenced::Written) => {}
                    Ok(Fenced::Lost) => return Ok(None),
                    Err(error) if error.may_pass() => {}
                    Err(error) => return Err(error),
                }
            } else if !error.may_pass() {
                return Err(error);
            }
            if Instant::now() > give_up {
                return Err(error);
            }
            tokio::time::sleep(HEARTBEAT).await;
        }
    }

    /// Whether nothing that a build makes may lie in the open, nor be shared with another tenant.
    fn protects(&self, build: &Build) -> bool {
        self.rules.encrypts_all || build.tier.requires_encryption()
    }

    /// Whether a layer that was made once need not be made again.
    fn keeps_packs(&self) -> bool {
        self.rules.packs.is_some()
    }

    /// Where layer packs are kept in the open that the build may use, and how many bytes of them.
    fn open_packs(&self, build: &Build) -> Option<&(PathBuf, u64)> {
        self.rules.packs.as_ref().filter(|_| !self.protects(build))
    }

    /// Where those are kept that it may use, if they must lie encrypted.
    fn sealed_packs(&self, build: &Build) -> Option<&SealedPacks> {
        self.rules.sealed_packs.as_deref().filter(|_| self.protects(build))
    }

    /// Where a try makes its files.
    fn staging(&self, lease: &Lease) -> PathBuf {
        self.artifacts.staging().join(try_name(lease))
    }

    /// Where commands of a try have their disk.
    fn scratch(&self, lease: &Lease) -> PathBuf {
        self.artifacts.staging().join(format!("{}-commands", try_name(lease)))
    }

    /// The permit to make this artifact; who waits for it finds it made.
    fn flight(&self, name: &ArtifactName) -> Arc<Semaphore> {
        if !self.rules.cache_enabled {
            // It would be made again all the same.
            return Arc::new(Semaphore::new(1));
        }
        let mut flights = lock(&self.flights);
        flights.retain(|_, flight| Arc::strong_count(flight) > 1);
        let key = format!("{}/{}", name.domain, name.recipe);
        Arc::clone(flights.entry(key).or_insert_with(|| Arc::new(Semaphore::new(1))))
    }
}

fn failure_of(outcome: &Outcome) -> Option<&Failure> {
    match outcome {
        Outcome::Failed(failure) | Outcome::TimedOut(failure) => Some(failure),
        Outcome::Retry { failure, .. } => failure.as_ref(),
        Outcome::Completed(_) | Outcome::Cancelled => None,
    }
}

/// Tells the operator how a build ended: what is ours to mend as a warning.
fn log_end(state: BuildState, secs: f64, failure: Option<&Failure>) {
    let state = state.as_str();
    let Some(Failure { code, step, cause, blame, .. }) = failure else {
        tracing::info!(state, secs, "the build has ended");
        return;
    };
    let code = code.as_str();
    match blame == Blame::Ours.as_str() {
        true => tracing::warn!(state, secs, code, step, blame, cause, "the build has ended"),
        false => tracing::info!(state, secs, code, step, blame, cause, "the build has ended"),
    }
}

/// Tells of a try that failed, and when the next one may begin.
fn log_try(secs: f64, wait_secs: u64, failure: &Failure) {
    let Failure { code, step, cause, blame, .. } = failure;
    let code = code.as_str();
    tracing::info!(
        secs,
        code,
        step,
        blame,
        cause,
        again_in_secs = wait_secs,
        "a try of the build has failed; it is tried again"
    );
}

fn internal(cause: &str) -> Failure {
    Failure {
        code: FailureCode::Internal,
        step: "prepare".into(),
        cause: cause.to_owned(),
        blame: Blame::Ours.as_str().to_owned(),
        remedy: usual_remedy(FailureCode::Internal, Blame::Ours).to_owned(),
    }
}

/// What directories of a try are called.
fn try_name(lease: &Lease) -> String {
    format!("{}-{}", lease.build(), lease.token())
}

/// Whether what a process of a build has made is a file, of that name alone. Who made it is not
/// trusted with the files of the service: a link must lead nobody to them. `made` is of the name itself.
pub(super) fn is_own_file(made: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    made.is_file() && made.nlink() == 1
}

/// Removes what builds of an earlier process left in the staging directory. Call it only while
/// no build runs here.
pub(crate) fn clear_leftovers(staging: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(staging)? {
        let path = entry?.path();
        match path.is_dir() && !path.is_symlink() {
            // However deep commands have made directories.
            true => commands::remove_tree(&path)?,
            false => std::fs::remove_file(&path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
