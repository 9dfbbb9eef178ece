//! One try of a build, from its claim to its end.
//!
//! One place waits for what happens to it ([`Running::must_stop`]), another decides what follows
//! ([`Running::run_to_the_end`]). It does not know how an end is written down.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci::Image;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::Instant;
use tracing::Instrument as _;

use super::artifact::set_name;
use super::{HEARTBEAT, LEASE_SECS, SILENCE_MAX, Workers, internal, try_name};
use crate::build::Blame;
use crate::build::admission::Needs;
use crate::build::host;
use crate::build::journal::Journal;
use crate::build::kept::OwnPacks;
use crate::build::meter::Meter;
use crate::build::progress::{RESOLVING, TAKING};
use crate::build::record::{Build, BuildMetrics, BuildResult, Failure, FailureCode, Isolation};
use crate::build::state::BuildState;
use crate::store::{ArtifactName, Claimed, Heartbeat, StoreError};
use crate::telemetry;

/// How long the last lines of a log may take.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);

/// A build waits this part of its time for another one of the same image, and no longer: that may be a
/// stranger's, made to be slow. Of the 15 minutes that a build has at the most by default that is a minute
/// and a half, in which it keeps its place among the builds that run; and it has so much less for itself.
/// Then the image is made twice at once, which costs a whole build.
const TURN_PART: u32 = 10;

/// A registry that has sent nothing for so long, of what it was asked for, is what used up the time;
/// in a build of a short time, half of it.
const SILENCE_OF_UPSTREAM: Duration = Duration::from_secs(10);

/// How a try ends.
pub(super) enum End {
    /// Who waits for the turn finds the artifact only when this end is written.
    Made(ArtifactName, Box<BuildResult>, Option<OwnedSemaphorePermit>),
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
pub(super) struct Running<'a> {
    pub(super) workers: &'a Workers,
    pub(super) claimed: &'a Claimed,
    give_up: watch::Receiver<bool>,
    pub(super) journal: Journal<'a>,
    pub(super) meter: Meter,
    deadline: Instant,
}

impl<'a> Running<'a> {
    pub(super) fn new(
        workers: &'a Workers,
        claimed: &'a Claimed,
        give_up: watch::Receiver<bool>,
    ) -> Self {
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
            meter: Meter::new(metrics, registry, staging, workers.keeps_packs()),
            deadline: Instant::now() + limit,
        }
    }

    pub(super) fn build(&self) -> &Build {
        &self.claimed.build
    }

    pub(super) async fn run_to_the_end(&self) -> End {
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

    pub(super) fn too_late(&self) -> Failure {
        let secs = self.build().limits.build_secs();
        let cause = format!("the build took longer than {secs} seconds");
        let (cause, blame, remedy) = match self.meter.upstream_silence() {
            Some(silence) if silence >= SILENCE_OF_UPSTREAM.min(Duration::from_secs(secs) / 2) => (
                format!(
                    "{cause}, and nothing came from the registry in the last {} \
                     seconds",
                    silence.as_secs()
                ),
                Blame::Upstream,
                "try again later; if that fails in the same way, ask whoever runs the registry, or \
                 take the image from another one",
            ),
            _ => {
                (cause, Blame::Yours, "use a smaller image, or a tier whose builds may take longer")
            }
        };
        Failure {
            code: FailureCode::BuildTimeout,
            step: self.journal.step(),
            cause,
            blame: blame.as_str().to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    async fn tell_end(&self, end: &End) {
        match end {
            End::Made(_, result, _) => {
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
            // Whoever writes the end down says by whom.
            End::Cancelled => {}
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

    pub(super) fn staging(&self) -> PathBuf {
        self.workers.staging(&self.claimed.lease)
    }

    /// Where commands have their disk: beside, since who fetches sees the other one.
    pub(super) fn scratch(&self) -> PathBuf {
        self.workers.scratch(&self.claimed.lease)
    }

    async fn clear_staging(&self) {
        let packs = self.workers.sealed_packs(self.build());
        let packs = packs.map(|packs| packs.directory(&try_name(&self.claimed.lease)));
        for directory in packs.into_iter().chain([self.staging(), self.scratch()]) {
            let removed = tokio::task::spawn_blocking(move || commands::remove_tree(&directory));
            if let Err(error) = removed.await.map_err(io::Error::other).flatten() {
                tracing::warn!(%error, "a directory of the build could not be removed");
            }
        }
        // What is not cleared away now is at the next sweep.
        host::clear_leftovers().await;
    }

    /// Opens the encrypted packs of the image's layers that there are.
    async fn restore_packs(&self, image: &Image) -> Option<OwnPacks> {
        let packs = self.workers.sealed_packs(self.build())?;
        let name = try_name(&self.claimed.lease);
        let (domain, now) = (self.domain(image).to_string(), self.workers.clock.now());
        let whose = (&self.build().tenant, domain.as_str());
        match packs.restore(&name, whose, &digests(image), now).await {
            Ok(own) => Some(own),
            Err(error) => {
                tracing::warn!(%error, "kept layers could not be opened");
                None
            }
        }
    }

    /// Keeps the packs that were made, encrypted.
    async fn keep_packs(&self, image: &Image, own: &OwnPacks) {
        let Some(packs) = self.workers.sealed_packs(self.build()) else { return };
        let (tenant, now) = (&self.build().tenant, self.workers.clock.now());
        if let Err(error) = packs.keep(tenant, own, &digests(image), now).await {
            tracing::warn!(%error, "layers could not be kept");
        }
    }

    /// The build itself: resolve, look whether it is made, else make it.
    async fn make(&self) -> End {
        let started = Instant::now();
        match self.try_to_make(started).await {
            Ok((name, result, turn)) => End::Made(name, Box::new(result), turn),
            Err(failure) => {
                let cause = self.journal.blotted(&failure.cause);
                End::Failed(Failure { cause, ..failure })
            }
        }
    }

    async fn try_to_make(
        &self,
        started: Instant,
    ) -> Result<(ArtifactName, BuildResult, Option<OwnedSemaphorePermit>), Failure> {
        let request = &self.build().request;
        self.journal.say("info", "puller", format!("resolving {}", request.image));
        self.journal.enter(BuildState::Preparing, 1, RESOLVING).await;
        let registry = self.registry()?;
        let resolve = self.resolve(registry).instrument(telemetry::step_span("resolve"));
        let (image, registry) = resolve.await?;
        let pull_ms = millis(started);
        self.meter.resolved(&image);
        self.journal.say("info", "puller", described(&image));
        let name = self.artifact_name(&image);
        let turn = self.turn(&name).await?;
        if let Some(mut result) = self.known(&name).await {
            self.journal.enter(BuildState::Packaging, 99, TAKING).await;
            self.journal.say("info", "packager", "the same image was built before".into());
            set_name(&mut result.metadata, &request.image);
            result.from_cache = true;
            let source_bytes = image.layers.iter().map(|layer| layer.size_bytes).sum();
            let total_ms = millis(started);
            result.metrics =
                BuildMetrics { pull_ms, total_ms, source_bytes, ..BuildMetrics::default() };
            return Ok((name, result, turn));
        }
        let mut needs = Needs::of(&image, &self.build().limits);
        if self.workers.protects(self.build()) {
            // The plain file and the encrypted one lie beside each other.
            needs.disk_bytes += needs.disk_bytes / 2;
        }
        let waiting = || {
            let line = "waiting until disk and memory are free beside other builds";
            self.journal.say("info", "queue", line.into());
        };
        let _share = self.workers.admission.admit(needs, waiting).await?;
        self.meter.shut_in(Isolation {
            sandbox: try_name(&self.claimed.lease),
            walls: self.workers.rules.host.stand().iter().map(ToString::to_string).collect(),
        });
        let running = telemetry::step_span("run");
        let own = self.restore_packs(&image).await;
        let run = self.run_child(&image, registry, own.as_ref());
        let report = run.instrument(running).await?;
        let publish = self.publish(&name, &image, report, pull_ms, started);
        let result = publish.instrument(telemetry::step_span("publish")).await?;
        if let Some(own) = &own {
            self.keep_packs(&image, own).await;
        }
        Ok((name, result, turn))
    }

    /// Waits until nobody else makes the artifact on this node; none if that takes too long, and
    /// then both make it.
    pub(super) async fn turn(
        &self,
        name: &ArtifactName,
    ) -> Result<Option<OwnedSemaphorePermit>, Failure> {
        let flight = self.workers.flight(name);
        if let Ok(turn) = Arc::clone(&flight).try_acquire_owned() {
            return Ok(Some(turn));
        }
        self.journal.say("info", "queue", "waiting for another build of the same image".into());
        let patience = Duration::from_secs(self.build().limits.build_secs()) / TURN_PART;
        match tokio::time::timeout(patience, flight.acquire_owned()).await {
            Ok(turn) => turn.map(Some).map_err(|_| internal("the service is stopping")),
            Err(_) => {
                let line = "the other build takes long: it is not waited for any more";
                self.journal.say("info", "queue", line.into());
                Ok(None)
            }
        }
    }
}

fn digests(image: &Image) -> HashSet<oci::Digest> {
    image.layers.iter().map(|layer| layer.digest).collect()
}

fn described(image: &Image) -> String {
    let bytes: u64 = image.layers.iter().map(|layer| layer.size_bytes).sum();
    let (digest, layers) = (image.manifest_digest, image.layers.len());
    format!("{}: {digest}, {}, {layers} layers, {bytes} bytes", image.name, image.platform)
}

pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
