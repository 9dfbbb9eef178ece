//! Takes builds from the queue and sees each of them to its end.
//!
//! A worker holds a [`Lease`] while it works and says every few seconds that it lives; what it
//! writes is fenced by the lease, so that a worker that was given up changes nothing. The build
//! itself runs in a child process (`child`): ending a build is killing that process. One place
//! waits for what happens to a running build (`Running::must_stop`), another decides what follows.
//! It does not know doors.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci::{Fetcher, Image, Platform, Source};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument as _;

use super::child::{ChildLine, ChildReport, ChildSpec, LINE_BYTES_MAX, PackSpec, RegistrySpec};
use super::disk::lock;
use super::journal::Journal;
use super::meter::Meter;
use super::progress::Progress;
use super::record::{Build, BuildMetrics, BuildResult, Failure, FailureCode, Micros};
use super::state::BuildState;
use super::{BuildEvent, ENGINE, Phase, error, hex};
use crate::artifact::ArtifactStore;
use crate::build::child::SentCredentials;
use crate::clock::Clock;
use crate::seal::MasterKey;
use crate::store::{
    ArtifactDomain, ArtifactName, Claimed, Fenced, Heartbeat, Lease, NewFile, Outcome, Reserved,
    Store, StoreError,
};
use crate::telemetry::{self, Metrics};

/// A worker that says nothing for so long has lost its build.
pub(crate) const LEASE_SECS: u64 = 30;
/// How often it says that it lives, and hears of a cancel nobody hinted at.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// When heartbeats fail for so long, the worker gives its build up before somebody else takes it.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How long the last lines of a log may take.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);
/// How often the queue is looked at even if nobody said that something came.
const POLL: Duration = Duration::from_secs(2);
/// A build whose workers died so often ends as failed.
pub(crate) const ATTEMPTS_MAX: u32 = 5;

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
    /// Whether a known artifact may be handed out again.
    pub(crate) cache_enabled: bool,
    /// This program.
    pub(crate) program: PathBuf,
    /// How long a shutdown waits for running builds.
    pub(crate) shutdown_timeout: Duration,
}

/// All workers of this process.
pub(crate) struct Workers {
    store: Store,
    artifacts: Arc<dyn ArtifactStore>,
    key: Arc<MasterKey>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    rules: WorkerRules,
    /// Shown as the owner of leases.
    name: String,
    /// Builds of the same artifact wait for one another.
    flights: Mutex<HashMap<String, Arc<Semaphore>>>,
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
        let name = format!(
            "{}-{}",
            rustix::system::uname().nodename().to_string_lossy(),
            uuid::Uuid::new_v4()
        );
        Self { store, artifacts, key, clock, metrics, rules, name, flights: Mutex::default() }
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
                tracing::warn!(%error, "the queue cannot be read");
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
        let (name, outcome) = match end {
            End::Lost => {
                tracing::warn!("the lease was lost; another worker has the build");
                return;
            }
            End::Made(name, result) => {
                self.measure(&result);
                (Some(name), Outcome::Completed(result))
            }
            End::Cancelled => (None, Outcome::Cancelled),
            End::TimedOut(failure) => (None, Outcome::TimedOut(failure)),
            End::Released => (None, Outcome::Retry { failure: None, run_at: now }),
            End::Failed(failure) => {
                match build.request.retry.delay_secs(failure.code, build.attempt) {
                    Some(wait) => {
                        let run_at = now.plus_secs(wait);
                        (None, Outcome::Retry { failure: Some(failure), run_at })
                    }
                    None => (None, Outcome::Failed(failure)),
                }
            }
        };
        let micros = u64::try_from(now.0 - started.0).unwrap_or(0);
        let secs = Duration::from_micros(micros).as_secs_f64();
        match self.finish(lease, name.as_ref(), outcome).await {
            Ok(Some(state)) if state.is_terminal() => {
                tracing::info!(state = state.as_str(), secs, "the build has ended");
                self.metrics.build_ended(build.tier, state, secs);
            }
            Ok(Some(_)) => {}
            Ok(None) => tracing::warn!("the lease was lost before the build could end"),
            Err(error) => tracing::error!(%error, "the end of the build could not be written"),
        }
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
                Err(_) => return Err(StoreError::timed_out()),
            };
            if matches!((&error, &outcome), (StoreError::Illegal(_), Outcome::Completed(_))) {
                // The last step could not be written when it was entered.
                let step = "Storing the artifact";
                match store.progress(BuildState::Packaging, 99, step, now).await {
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

    /// Where a try makes its files.
    fn staging(&self, lease: &Lease) -> PathBuf {
        self.artifacts.staging().join(format!("{}-{}", lease.build(), lease.token()))
    }

    /// The permit to make this artifact; who waits for it finds it made.
    fn flight(&self, name: &ArtifactName) -> Arc<Semaphore> {
        let mut flights = lock(&self.flights);
        flights.retain(|_, flight| Arc::strong_count(flight) > 1);
        let key = format!("{}/{}", name.domain, name.recipe);
        Arc::clone(flights.entry(key).or_insert_with(|| Arc::new(Semaphore::new(1))))
    }
}

/// How a try ends.
enum End {
    Made(ArtifactName, Box<BuildResult>),
    Failed(Failure),
    Cancelled,
    TimedOut(Failure),
    /// The service stops.
    Released,
    /// Somebody else has the build.
    Lost,
}

/// Why a running try must stop, whatever it is at.
enum Stop {
    Cancelled,
    TimedOut,
    Released,
    Lost,
}

/// One try.
struct Running<'a> {
    workers: &'a Workers,
    claimed: &'a Claimed,
    give_up: watch::Receiver<bool>,
    journal: Journal<'a>,
    meter: Meter,
    deadline: Instant,
}

impl<'a> Running<'a> {
    fn new(workers: &'a Workers, claimed: &'a Claimed, give_up: watch::Receiver<bool>) -> Self {
        let limit = Duration::from_secs(claimed.build.limits.build_secs());
        let metrics = Arc::clone(&workers.metrics);
        let named: Option<oci::Reference> = claimed.build.request.image.parse().ok();
        let registry = named.as_ref().map_or("", oci::Reference::registry);
        let staging = workers.staging(&claimed.lease);
        Self {
            workers,
            claimed,
            give_up,
            journal: Journal::new(&workers.store, &claimed.lease, &*workers.clock),
            meter: Meter::new(metrics, registry, staging, workers.rules.packs.is_some()),
            deadline: Instant::now() + limit,
        }
    }

    fn build(&self) -> &Build {
        &self.claimed.build
    }

    async fn run_to_the_end(&self) -> End {
        let (done, is_done) = oneshot::channel();
        let end = {
            let mut work = Box::pin(async {
                let end = self.make().await;
                // Nobody waits for it when a reason to stop came first.
                let _ = done.send(());
                end
            });
            let mut watch = Box::pin(self.must_stop(is_done));
            // What loses is dropped here, before anything else needs the database: a future that
            // is kept but not polled may hold a connection.
            tokio::select! {
                end = &mut work => {
                    watch.await;
                    end
                }
                stop = &mut watch => match stop {
                    Some(Stop::Cancelled) => End::Cancelled,
                    Some(Stop::Released) => End::Released,
                    Some(Stop::TimedOut) => End::TimedOut(self.too_late()),
                    Some(Stop::Lost) => End::Lost,
                    // Its end is told before it is handed over.
                    None => work.await,
                },
            }
        };
        self.tell_end(&end).await;
        self.clear_staging().await;
        end
    }

    /// Waits for the first reason to stop, or until the work is done, and keeps the lease
    /// meanwhile.
    async fn must_stop(&self, mut is_done: oneshot::Receiver<()>) -> Option<Stop> {
        let mut give_up = self.give_up.clone();
        let mut heard = Instant::now();
        loop {
            let beat = tokio::select! {
                () = tokio::time::sleep_until(self.deadline) => return Some(Stop::TimedOut),
                () = tokio::time::sleep_until(heard + SILENCE_MAX) => {
                    tracing::error!("the database does not answer; the build is given up");
                    return Some(Stop::Lost);
                }
                _ = give_up.wait_for(|now| *now) => return Some(Stop::Released),
                _ = &mut is_done => return None,
                beat = self.beat() => beat,
            };
            match beat {
                Ok(Heartbeat::GoOn) => heard = Instant::now(),
                Ok(Heartbeat::Cancel { .. }) => return Some(Stop::Cancelled),
                Ok(Heartbeat::Lost) => return Some(Stop::Lost),
                Err(_) => {}
            }
        }
    }

    /// Waits for the next heartbeat and makes it. May be dropped at any point: what was not
    /// committed is undone.
    async fn beat(&self) -> Result<Heartbeat, StoreError> {
        tokio::time::sleep(HEARTBEAT).await;
        self.journal.flush().await;
        let usage = self.meter.sample().await;
        let lease = self.workers.store.lease(&self.claimed.lease);
        lease.heartbeat(LEASE_SECS, Some(&usage), self.workers.clock.now()).await
    }

    fn too_late(&self) -> Failure {
        let secs = self.build().limits.build_secs();
        Failure {
            code: FailureCode::BuildTimeout,
            step: self.journal.step(),
            cause: format!("the build took longer than {secs} seconds"),
            blame: "yours".into(),
            remedy: "use a smaller image, or a tier whose builds may take longer".into(),
        }
    }

    async fn tell_end(&self, end: &End) {
        match end {
            End::Made(_, result) => {
                let line =
                    format!("completed: {} bytes, sha256 {}", result.artifact_bytes, result.sha256);
                self.journal.say("info", "packager", line);
            }
            End::Failed(failure) | End::TimedOut(failure) => {
                self.meter.failed();
                let remedy = match failure.remedy.is_empty() {
                    true => String::new(),
                    false => format!(" ({})", failure.remedy),
                };
                let line = format!("{} failed: {}{remedy}", failure.step, failure.cause);
                self.journal.say("error", "builder", line);
            }
            End::Cancelled => self.journal.say("warn", "queue", "cancelled".into()),
            End::Released => {
                self.journal.say("info", "queue", "the service stops; back to the queue".into());
            }
            End::Lost => return,
        }
        // The end itself is tried for longer: `Workers::finish`.
        let flush = self.journal.flush();
        if tokio::time::timeout(LAST_WORDS_MAX, flush).await.is_err() {
            tracing::warn!("the last lines of the log could not be written in time");
        }
    }

    fn staging(&self) -> PathBuf {
        self.workers.staging(&self.claimed.lease)
    }

    async fn clear_staging(&self) {
        match tokio::fs::remove_dir_all(self.staging()).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "the staging directory could not be removed");
            }
            _ => {}
        }
    }

    /// The build itself: resolve, look whether it is made, else make it.
    async fn make(&self) -> End {
        let started = Instant::now();
        match self.try_to_make(started).await {
            Ok((name, result)) => End::Made(name, Box::new(result)),
            Err(failure) => {
                let cause = self.journal.blotted(&failure.cause);
                End::Failed(Failure { cause, ..failure })
            }
        }
    }

    async fn try_to_make(&self, started: Instant) -> Result<(ArtifactName, BuildResult), Failure> {
        let request = &self.build().request;
        self.journal.say("info", "puller", format!("resolving {}", request.image));
        self.journal.enter(BuildState::Preparing, 1, "Resolving the image").await;
        let registry = self.registry()?;
        let image = self.resolve(&registry).instrument(telemetry::step_span("resolve")).await?;
        let pull_ms = millis(started);
        self.meter.resolved(&image);
        self.journal.say("info", "puller", described(&image));
        let name = self.artifact_name(&image);
        let flight = self.workers.flight(&name);
        let _turn = flight.acquire().await.map_err(|_| internal("the service is stopping"))?;
        if let Some(mut result) = self.known(&name).await {
            self.journal.enter(BuildState::Packaging, 99, "Taking the artifact that exists").await;
            self.journal.say("info", "packager", "the same image was built before".into());
            set_name(&mut result.metadata, &request.image);
            result.from_cache = true;
            let source_bytes = image.layers.iter().map(|layer| layer.size_bytes).sum();
            let total_ms = millis(started);
            result.metrics =
                BuildMetrics { pull_ms, total_ms, source_bytes, ..BuildMetrics::default() };
            return Ok((name, result));
        }
        let running = telemetry::step_span("run");
        let report = self.run_child(&image, registry).instrument(running).await?;
        let publish = self.publish(&name, &image, report, pull_ms, started);
        let result = publish.instrument(telemetry::step_span("publish")).await?;
        Ok((name, result))
    }

    /// How registries are reached, with this build's own credentials.
    fn registry(&self) -> Result<RegistrySpec, Failure> {
        let mut registry = self.workers.rules.registry.clone();
        if let Some(sealed) = &self.claimed.sealed_credentials {
            let build = self.build();
            let opened = self.workers.key.open(&build.tenant, &build.id, sealed);
            let opened = opened.map_err(|error| internal(&error.to_string()))?;
            self.journal.hide(opened.secret.clone());
            let reference: oci::Reference =
                build.request.image.parse().map_err(|_| internal("the image has no valid name"))?;
            registry.credentials = Some(SentCredentials::new(&opened, reference.registry()));
        }
        Ok(registry)
    }

    async fn resolve(&self, registry: &RegistrySpec) -> Result<Image, Failure> {
        let options = registry.client_options();
        let mut failure = None;
        for reference in self.references()? {
            // Never parsed as a source: a tenant's name must not become a file of this machine.
            let source = Source::Registry(reference);
            let work = async {
                let spool = self.workers.artifacts.staging();
                let fetcher = Fetcher::open(&source, &options, spool).await?;
                let image = fetcher.resolve(&platform()).await;
                for note in fetcher.take_notes() {
                    self.journal.say("warn", "puller", note);
                }
                image
            };
            match tokio::time::timeout(self.workers.rules.pull_timeout, work).await {
                Ok(Ok(image)) => return Ok(image),
                Ok(Err(error)) => {
                    let missing = matches!(error, oci::PullError::NotFound { .. });
                    let error = super::BuildError::pull(&source, error);
                    failure.get_or_insert(error.failure(Phase::Resolve));
                    if !missing {
                        break;
                    }
                }
                Err(_) => {
                    failure.get_or_insert(self.slow_pull());
                    break;
                }
            }
        }
        Err(failure.unwrap_or_else(|| internal("no image was tried")))
    }

    /// What to look for, one after the other: the image, and where its name leaves the tag open,
    /// the tags that may be taken instead.
    fn references(&self) -> Result<Vec<oci::Reference>, Failure> {
        let request = &self.build().request;
        let parsed = |name: &str| {
            name.parse::<oci::Reference>().map_err(|error| Failure {
                code: FailureCode::InvalidSource,
                step: "resolve".into(),
                cause: format!("{name}: {error}"),
                blame: "yours".into(),
                remedy: "name an image as docker pull takes it".into(),
            })
        };
        let mut references = vec![parsed(&request.image)?];
        // Asked of the text: a reference without a tag is read as `latest`.
        let is_open = parsed(&format!("{}:tag", request.image)).is_ok();
        if is_open {
            for tag in &request.pull_tags {
                references.push(parsed(&format!("{}:{tag}", request.image))?);
            }
        }
        Ok(references)
    }

    fn slow_pull(&self) -> Failure {
        let secs = self.workers.rules.pull_timeout.as_secs();
        Failure {
            code: FailureCode::NetworkError,
            step: "resolve".into(),
            cause: format!("the registry took longer than {secs} seconds"),
            blame: "upstream".into(),
            remedy: "try again later".into(),
        }
    }

    /// Who may share the artifact, and what decides its bytes.
    fn artifact_name(&self, image: &Image) -> ArtifactName {
        let build = self.build();
        let domain = match image.anonymous {
            true => ArtifactDomain::Public,
            false => ArtifactDomain::Tenant(build.tenant.clone()),
        };
        let recipe = serde_json::json!({
            "engine": ENGINE,
            "manifest": image.manifest_digest.to_string(),
            "compression": build.request.compression,
            "free_space": super::DEFAULT_FREE_SPACE_BYTES,
        });
        ArtifactName { domain, recipe: hex(&Sha256::digest(recipe.to_string())) }
    }

    /// The artifact, if it may be handed out again and there is one.
    async fn known(&self, name: &ArtifactName) -> Option<BuildResult> {
        if !self.workers.rules.cache_enabled {
            return None;
        }
        let known = self.made_before(name).await;
        self.meter.looked_up(known.is_some());
        known
    }

    /// The artifact, if it was made before, is still there, and is not too large for this build.
    async fn made_before(&self, name: &ArtifactName) -> Option<BuildResult> {
        let lease = self.workers.store.lease(&self.claimed.lease);
        let known = lease.known_artifact(name).await.ok().flatten()?.result;
        let fits = known.image_bytes <= self.image_bytes_max();
        let there = self.workers.artifacts.open(&known.artifact_key).await.ok().flatten();
        there.filter(|open| fits && open.size_bytes == known.artifact_bytes).map(|_| known)
    }

    /// The largest image that this build may make, or be given.
    fn image_bytes_max(&self) -> u64 {
        let disk = self.build().limits.disk_bytes;
        self.build().request.size_limit_bytes.map_or(disk, |max| max.min(disk))
    }

    fn child_spec(&self, image: &Image, registry: RegistrySpec) -> Result<ChildSpec, Failure> {
        let (build, rules) = (self.build(), &self.workers.rules);
        let reference: oci::Reference =
            build.request.image.parse().map_err(|_| internal("the image has no valid name"))?;
        let domain = self.artifact_name(image).domain.to_string();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let disk = build.limits.disk_bytes;
        Ok(ChildSpec {
            image: format!(
                "{}/{}@{}",
                reference.registry(),
                reference.repository(),
                image.index_digest.unwrap_or(image.manifest_digest)
            ),
            platform: image.platform.to_string(),
            registry,
            output: self.staging().join("rootfs.ext4"),
            compression: build.request.compression.clone(),
            packs: rules.packs.as_ref().map(|(directory, limit_bytes)| PackSpec {
                directory: directory.clone(),
                domain,
                limit_bytes: *limit_bytes,
            }),
            jobs: usize::try_from(build.limits.cpu_cores).unwrap_or(1).clamp(1, cpus),
            image_bytes_max: Some(self.image_bytes_max()),
            memory_bytes: build.limits.memory_bytes,
            disk_bytes: disk,
        })
    }

    /// Runs the engine in its own process and listens until it is done.
    async fn run_child(
        &self,
        image: &Image,
        registry: RegistrySpec,
    ) -> Result<ChildReport, Failure> {
        let spec = self.child_spec(image, registry)?;
        let failed = |error: io::Error| Failure {
            code: FailureCode::TemporaryResourceError,
            step: "start".into(),
            cause: format!("the build's process could not be started: {error}"),
            blame: "ours".into(),
            remedy: "try again later".into(),
        };
        tokio::fs::create_dir_all(self.staging()).await.map_err(failed)?;
        let mut child = self.spawn(&spec).await.map_err(failed)?;
        let Some(stdout) = child.stdout.take() else {
            return Err(internal("the build's process has no output"));
        };
        let mut stderr = child.stderr.take();
        let watched = child.id().map(|pid| self.meter.watch(pid));
        let listen = self.listen(stdout, image);
        let complain = async {
            let mut text = Vec::new();
            if let Some(stderr) = &mut stderr {
                // What a child says there is for the operator, and only the beginning of it.
                let _ = stderr.take(16 << 10).read_to_end(&mut text).await;
            }
            String::from_utf8_lossy(&text).into_owned()
        };
        let (last, complaint) = tokio::join!(listen, complain);
        drop(watched);
        let status = child.wait().await.map_err(failed)?;
        if !complaint.is_empty() {
            tracing::warn!(complaint, "the build's process complained");
        }
        match last {
            Some(ChildLine::Done(report)) => Ok(*report),
            Some(ChildLine::Failed(failure)) => Err(failure),
            Some(ChildLine::Event(_)) | None => {
                Err(error::died(status, self.build().limits.disk_bytes, self.journal.step()))
            }
        }
    }

    async fn spawn(&self, spec: &ChildSpec) -> io::Result<Child> {
        let mut child = Command::new(&self.workers.rules.program)
            .arg("build-child")
            .env_clear()
            .current_dir(self.staging())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for the server, which decides what becomes of its builds.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let text = serde_json::to_vec(spec)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&text).await?;
        }
        Ok(child)
    }

    /// Takes the child's lines; returns the last word.
    async fn listen(&self, stdout: ChildStdout, image: &Image) -> Option<ChildLine> {
        let mut progress = Progress::new(image);
        let mut lines = BufReader::new(stdout);
        loop {
            let mut line = Vec::new();
            let most = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
            let count = (&mut lines).take(most).read_until(b'\n', &mut line).await.ok()?;
            if count == 0 {
                return None;
            }
            match serde_json::from_slice(&line) {
                Ok(ChildLine::Event(event)) => {
                    self.meter.apply(&event);
                    if matches!(event, BuildEvent::PhaseStarted { phase: Phase::Publish }) {
                        // Everything is made and nothing let go: the most disk it will take.
                        self.meter.sample().await;
                    }
                    progress.apply(&event, &self.journal).await;
                }
                Ok(last) => return Some(last),
                Err(error) => {
                    tracing::error!(%error, "the build's process does not make sense");
                    return None;
                }
            }
        }
    }

    /// Says which file is about to be stored, so that no janitor removes one of that name; waits
    /// while one just does.
    async fn reserve(&self, file: &NewFile<'_>) -> Result<(), Failure> {
        let lease = self.workers.store.lease(&self.claimed.lease);
        let mut is_told = false;
        loop {
            match lease.reserve(file, self.workers.clock.now()).await {
                Ok(Reserved::Yes) => return Ok(()),
                Ok(Reserved::Lost) => return Err(internal("another worker has the build")),
                Ok(Reserved::BeingRemoved) if !is_told => {
                    is_told = true;
                    let line = "an old file of the same content is being removed; waiting";
                    self.journal.say("info", "packager", line.into());
                }
                // Whoever keeps the lease knows when to give up.
                Ok(Reserved::BeingRemoved)
                | Err(StoreError::Unavailable(_) | StoreError::Full(_)) => {}
                Err(error) => return Err(internal(&error.to_string())),
            }
            tokio::time::sleep(HEARTBEAT).await;
        }
    }

    async fn publish(
        &self,
        name: &ArtifactName,
        image: &Image,
        report: ChildReport,
        pull_ms: u64,
        started: Instant,
    ) -> Result<BuildResult, Failure> {
        self.journal.enter(BuildState::Packaging, 98, "Storing the artifact").await;
        self.meter.publishing();
        let usage = self.meter.sample().await;
        let request = &self.build().request;
        let extension = match request.compression.as_str() {
            "gzip" => "ext4.gz",
            "zstd" => "ext4.zst",
            _ => "ext4",
        };
        let artifact_key = format!("{}/{}.{extension}", name.domain, report.sha256);
        let staged = self.staging().join("rootfs.ext4");
        let (key, size_bytes) = (artifact_key.as_str(), report.artifact_bytes);
        self.reserve(&NewFile { key, size_bytes, sha256: &report.sha256 }).await?;
        self.workers.artifacts.publish(&staged, &artifact_key).await.map_err(|error| {
            let full = error.kind() == io::ErrorKind::StorageFull;
            Failure {
                code: match full {
                    true => FailureCode::StorageFull,
                    false => FailureCode::TemporaryResourceError,
                },
                step: "publish".into(),
                cause: format!("the artifact could not be stored: {error}"),
                blame: "ours".into(),
                remedy: "try again later".into(),
            }
        })?;
        let secs = |wanted: &[Phase]| {
            let all = report.phase_secs.iter().filter(|(phase, _)| wanted.contains(phase));
            rounded_ms(all.map(|(_, secs)| secs).sum())
        };
        let mut metadata = report.metadata;
        set_name(&mut metadata, &request.image);
        let metrics = BuildMetrics {
            pull_ms,
            extract_ms: secs(&[Phase::Layers]),
            build_ms: secs(&[Phase::Flatten, Phase::Layout, Phase::Write]),
            optimize_ms: secs(&[Phase::Compress]),
            total_ms: millis(started),
            source_bytes: image.layers.iter().map(|layer| layer.size_bytes).sum(),
            fetched_bytes: report.fetched_bytes,
            memory_peak_bytes: report.memory_peak_bytes,
            disk_bytes: usage.so_far.disk_bytes,
            cpu_ms: report.cpu_ms,
        };
        Ok(BuildResult {
            artifact_key,
            artifact_bytes: report.artifact_bytes,
            sha256: report.sha256,
            image_bytes: report.image_bytes,
            metadata,
            from_cache: false,
            metrics,
        })
    }
}

/// Root file systems are built for the machines that boot them: this kind, for now.
fn platform() -> Platform {
    Platform::of_this_machine()
}

fn described(image: &Image) -> String {
    let bytes: u64 = image.layers.iter().map(|layer| layer.size_bytes).sum();
    let (digest, layers) = (image.manifest_digest, image.layers.len());
    format!("{}: {digest}, {}, {layers} layers, {bytes} bytes", image.name, image.platform)
}

fn set_name(metadata: &mut serde_json::Value, name: &str) {
    if let Some(field) = metadata.get_mut("original_image") {
        *field = name.into();
    }
}

fn internal(cause: &str) -> Failure {
    Failure {
        code: FailureCode::Internal,
        step: "prepare".into(),
        cause: cause.to_owned(),
        blame: "ours".into(),
        remedy: "please report this as a bug of builderd".into(),
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn rounded_ms(secs: f64) -> u64 {
    let whole = Duration::try_from_secs_f64(secs).unwrap_or_default();
    u64::try_from(whole.as_millis()).unwrap_or(u64::MAX)
}

/// Removes what builds of an earlier process left in the staging directory. Call it only while
/// no build runs here.
pub(crate) fn clear_leftovers(staging: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(staging)? {
        let path = entry?.path();
        match path.is_dir() && !path.is_symlink() {
            true => std::fs::remove_dir_all(&path)?,
            false => std::fs::remove_file(&path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
