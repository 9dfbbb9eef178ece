//! What one try of a build takes and does, measured while it runs.
//!
//! The worker asks for a [`LiveUsage`] at each heartbeat, with which it is written down. It comes
//! from the build's process as the kernel shows it, from the staging directory, and from what the
//! process says of itself. Pulls, lookups in caches and steps that failed are counted here, when
//! they happen. It does not know the store.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci::Image;
use tokio::time::Instant;

use super::disk::lock;
use super::process::{self, ProcessUsage};
use super::record::{Isolation, LiveUsage};
use super::{BuildEvent, LayerOrigin, Phase};
use crate::telemetry::{Cache, Metrics, Pull, RunningBuild};

/// CPU is taken over at least so long: the kernel counts in hundredths of a second.
const RATE_OVER: Duration = Duration::from_millis(200);

/// See the module.
pub(super) struct Meter {
    metrics: Arc<Metrics>,
    registry: String,
    staging: PathBuf,
    /// Whether layer packs are looked up in a cache.
    keeps_packs: bool,
    started: Instant,
    shown: RunningBuild,
    seen: Mutex<Seen>,
}

struct Seen {
    /// The build's process, while it is certain to have this number.
    pid: Option<u32>,
    usage: LiveUsage,
    /// When CPU was looked at, and how much of it had been used.
    rated: (Instant, u64),
    /// What is being done, and since when.
    step: &'static str,
    step_began: Instant,
    /// The engine's phase, and since when.
    phase: Option<(Phase, Instant)>,
    phases: Vec<(Phase, Duration)>,
    /// Bytes that came, by layer.
    fetched: Vec<u64>,
    layers_packed: usize,
    /// Whether the registry has been asked for something that has not come yet.
    is_pulling: bool,
    /// Which layers are being fetched, and how many bytes are still to come.
    awaited: HashMap<usize, u64>,
    /// When something came from the registry, or was asked of it.
    heard_upstream: Instant,
}

/// Lets the meter look at a process; it must be dropped before the process is waited for, when
/// the number becomes free for another one.
pub(super) struct Watched<'a>(&'a Meter);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        lock(&self.0.seen).pid = None;
    }
}

impl Meter {
    /// For a try that begins now and asks `registry` for an image.
    pub(super) fn new(
        metrics: Arc<Metrics>,
        registry: &str,
        staging: PathBuf,
        keeps_packs: bool,
    ) -> Self {
        let (started, shown) = (Instant::now(), metrics.running_build());
        let seen = Seen {
            pid: None,
            usage: LiveUsage::default(),
            rated: (started, 0),
            step: "resolve",
            step_began: started,
            phase: None,
            phases: Vec::new(),
            fetched: Vec::new(),
            layers_packed: 0,
            is_pulling: true,
            awaited: HashMap::new(),
            heard_upstream: started,
        };
        let registry = registry.to_owned();
        Self { metrics, registry, staging, keeps_packs, started, shown, seen: Mutex::new(seen) }
    }

    /// The build's processes are about to start.
    pub(super) fn shut_in(&self, isolation: Isolation) {
        lock(&self.seen).usage.so_far.isolation = Some(isolation);
    }

    /// The image is known.
    pub(super) fn resolved(&self, image: &Image) {
        let mut seen = lock(&self.seen);
        seen.usage.so_far.pull_ms = millis(self.started.elapsed());
        seen.usage.so_far.source_bytes = image.layers.iter().map(|layer| layer.size_bytes).sum();
        seen.fetched = vec![0; image.layers.len()];
        seen.is_pulling = false;
        seen.enter("start");
    }

    /// It was looked whether the artifact exists.
    pub(super) fn looked_up(&self, is_there: bool) {
        self.metrics.cache_lookup(Cache::Artifacts, is_there);
        if is_there {
            self.metrics.pull(&self.registry, Pull::Known);
        }
    }

    /// The build's process runs.
    pub(super) fn watch(&self, pid: u32) -> Watched<'_> {
        let mut seen = lock(&self.seen);
        seen.pid = Some(pid);
        seen.rated = (Instant::now(), 0);
        Watched(self)
    }

    /// The artifact is made, and on its way.
    pub(super) fn publishing(&self) {
        lock(&self.seen).enter("publish");
    }

    /// The build's process said something.
    pub(super) fn apply(&self, event: &BuildEvent) {
        let mut seen = lock(&self.seen);
        match event {
            BuildEvent::PhaseStarted { phase } => {
                seen.phase = Some((*phase, Instant::now()));
                seen.enter(step(*phase));
                // It asks the registry itself, for what the worker knows, and for the layers.
                seen.is_pulling |= *phase == Phase::Resolve;
                seen.heard_upstream = Instant::now();
            }
            BuildEvent::PhaseFinished { phase, secs } => {
                let took = Duration::try_from_secs_f64(*secs).unwrap_or_default();
                seen.phase = None;
                seen.phases.push((*phase, took));
                if *phase == Phase::Layers {
                    seen.is_pulling = false;
                    self.metrics.pull(&self.registry, seen.pull());
                }
            }
            BuildEvent::LayerStarted { layer, size_bytes, .. } => {
                seen.heard_upstream = Instant::now();
                if *layer < seen.fetched.len() {
                    seen.awaited.insert(*layer, *size_bytes);
                }
            }
            BuildEvent::LayerProgress { layer, bytes } => {
                seen.heard_upstream = Instant::now();
                // What came in whole is not waited for, however long it takes to unpack.
                seen.awaited.retain(|awaited, size| awaited != layer || bytes < size);
                if let Some(fetched) = seen.fetched.get_mut(*layer) {
                    *fetched = (*fetched).max(*bytes);
                }
            }
            BuildEvent::LayerReady { layer, origin, .. } => {
                seen.awaited.remove(layer);
                seen.layers_packed += usize::from(*origin == LayerOrigin::Packed);
                if self.keeps_packs {
                    self.metrics.cache_lookup(Cache::Layers, *origin == LayerOrigin::Cached);
                }
            }
            BuildEvent::Resolved { .. }
            | BuildEvent::LayerWaiting { .. }
            | BuildEvent::CommandStarted { .. }
            | BuildEvent::CommandOutput { .. }
            | BuildEvent::WriteProgress { .. }
            | BuildEvent::Warning { .. } => {}
        }
    }

    /// The try has failed, at what it was doing.
    pub(super) fn failed(&self) {
        let seen = lock(&self.seen);
        self.metrics.step(seen.step, seen.step_began.elapsed().as_secs_f64(), true);
        if seen.is_pulling {
            self.metrics.pull(&self.registry, Pull::Failed);
        }
    }

    /// The most resident memory that the build's processes were seen to have together.
    pub(super) fn memory_peak_bytes(&self) -> u64 {
        lock(&self.seen).usage.so_far.memory_peak_bytes
    }

    /// For how long nothing has come of what the registry was asked for; none if it owes nothing.
    pub(super) fn upstream_silence(&self) -> Option<Duration> {
        let seen = lock(&self.seen);
        let is_awaited = match seen.phase {
            Some((Phase::Layers, _)) => !seen.awaited.is_empty(),
            _ => seen.is_pulling && seen.step == "resolve",
        };
        is_awaited.then(|| seen.heard_upstream.elapsed())
    }

    /// What the try takes now, and has cost so far.
    pub(super) async fn sample(&self) -> LiveUsage {
        let pid = lock(&self.seen).pid;
        let staging = self.staging.clone();
        let look = move || {
            (pid.and_then(ProcessUsage::of), process::disk_bytes(pid, &staging), Instant::now())
        };
        let looked = tokio::task::spawn_blocking(look).await;
        let mut seen = lock(&self.seen);
        // What has ended meanwhile may have left its number to another process.
        if let (Ok((process, disk_bytes, at)), true) = (looked, seen.pid == pid) {
            seen.note(process, disk_bytes, at);
        }
        seen.add_up(self.started);
        let usage = seen.usage.clone();
        self.shown.set(usage.memory_bytes, usage.cpu_percent, usage.disk_bytes);
        usage
    }
}

impl Seen {
    fn enter(&mut self, step: &'static str) {
        if self.step != step {
            (self.step, self.step_began) = (step, Instant::now());
        }
    }

    fn note(&mut self, process: Option<ProcessUsage>, disk_bytes: u64, at: Instant) {
        let usage = &mut self.usage;
        usage.disk_bytes = disk_bytes;
        usage.so_far.disk_bytes = usage.so_far.disk_bytes.max(disk_bytes);
        let Some(process) = process else {
            (usage.memory_bytes, usage.cpu_percent) = (0, 0);
            return;
        };
        usage.memory_bytes = process.memory_bytes;
        let peak_bytes = process.memory_peak_bytes.max(process.memory_bytes);
        usage.so_far.memory_peak_bytes = usage.so_far.memory_peak_bytes.max(peak_bytes);
        usage.so_far.cpu_ms = usage.so_far.cpu_ms.max(process.cpu_ms);
        let (rated_at, rated_ms) = self.rated;
        let wall = at.saturating_duration_since(rated_at);
        if wall >= RATE_OVER {
            let used_ms = process.cpu_ms.saturating_sub(rated_ms);
            usage.cpu_percent = used_ms.saturating_mul(100) / millis(wall).max(1);
            self.rated = (at, process.cpu_ms);
        }
    }

    /// Figures that are sums of others.
    fn add_up(&mut self, started: Instant) {
        let took = |wanted: &[Phase]| {
            let ended = self.phases.iter().filter(|(phase, _)| wanted.contains(phase));
            let running = self.phase.filter(|(phase, _)| wanted.contains(phase));
            let running = running.map(|(_, began)| began.elapsed());
            millis(ended.map(|(_, took)| *took).sum::<Duration>() + running.unwrap_or_default())
        };
        let extract_ms = took(&[Phase::Layers]);
        let build_ms = took(&[Phase::Commands, Phase::Flatten, Phase::Layout, Phase::Write]);
        let optimize_ms = took(&[Phase::Compress]);
        let so_far = &mut self.usage.so_far;
        (so_far.extract_ms, so_far.build_ms) = (extract_ms, build_ms);
        so_far.optimize_ms = optimize_ms;
        so_far.total_ms = millis(started.elapsed());
        so_far.fetched_bytes = self.fetched.iter().sum();
    }

    /// How asking the registry ended, now that every layer is there.
    fn pull(&self) -> Pull {
        let asked =
            self.phases.iter().filter(|(phase, _)| matches!(phase, Phase::Resolve | Phase::Layers));
        let took = Duration::from_millis(self.usage.so_far.pull_ms)
            + asked.map(|(_, took)| *took).sum::<Duration>();
        if self.layers_packed > 0 { Pull::Fetched(took) } else { Pull::Known }
    }
}

/// A phase as metrics call it.
fn step(phase: Phase) -> &'static str {
    match phase {
        Phase::Resolve => "resolve",
        Phase::Layers => "layers",
        Phase::Commands => "commands",
        Phase::Flatten | Phase::Layout | Phase::Write => "build",
        Phase::Compress => "compress",
        Phase::Publish => "publish",
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::telemetry::Telemetry;
    use crate::telemetry::tests::readable;

    fn meter(telemetry: &Telemetry, keeps_packs: bool) -> Meter {
        let staging = PathBuf::from("no such directory");
        let meter = Meter::new(telemetry.metrics(), "ghcr.io", staging, keeps_packs);
        lock(&meter.seen).fetched = vec![0; 2];
        lock(&meter.seen).is_pulling = false;
        meter
    }

    fn ready(layer: usize, origin: LayerOrigin) -> BuildEvent {
        BuildEvent::LayerReady { layer, digest: "sha256:ab".into(), origin }
    }

    fn phase(meter: &Meter, phase: Phase, secs: f64, events: &[BuildEvent]) {
        meter.apply(&BuildEvent::PhaseStarted { phase });
        events.iter().for_each(|event| meter.apply(event));
        meter.apply(&BuildEvent::PhaseFinished { phase, secs });
    }

    fn counted(telemetry: &Telemetry, line: &str) -> bool {
        telemetry.metrics().render().contains(&format!("\n{line}\n"))
    }

    #[tokio::test]
    async fn a_build_that_fetches_is_a_pull_and_shows_what_came() {
        let telemetry = readable(false);
        let meter = meter(&telemetry, true);
        meter.looked_up(false);
        phase(&meter, Phase::Resolve, 0.5, &[]);
        let progress = |layer, bytes| BuildEvent::LayerProgress { layer, bytes };
        meter.apply(&BuildEvent::PhaseStarted { phase: Phase::Layers });
        meter.apply(&progress(1, 1000));
        meter.apply(&progress(1, 3000));
        let usage = meter.sample().await;
        assert_eq!((usage.so_far.fetched_bytes, usage.memory_bytes), (3000, 0));
        meter.apply(&ready(0, LayerOrigin::Cached));
        meter.apply(&ready(1, LayerOrigin::Packed));
        assert!(!telemetry.metrics().render().contains("builderd_docker_pulls_total{"));
        meter.apply(&BuildEvent::PhaseFinished { phase: Phase::Layers, secs: 2.0 });
        phase(&meter, Phase::Flatten, 0.25, &[]);
        phase(&meter, Phase::Write, 1.0, &[]);
        let so_far = meter.sample().await.so_far;
        assert_eq!((so_far.extract_ms, so_far.build_ms, so_far.optimize_ms), (2000, 1250, 0));
        assert_eq!(so_far.fetched_bytes, 3000);
        for line in [
            r#"builderd_docker_pulls_total{registry="ghcr.io",status="fetched"} 1"#,
            r#"builderd_docker_pull_duration_seconds_sum{registry="ghcr.io"} 2.5"#,
            r#"builderd_cache_hit_ratio{cache_type="layers"} 0.5"#,
            r#"builderd_cache_hit_ratio{cache_type="artifacts"} 0"#,
        ] {
            assert!(counted(&telemetry, line), "{line}\n{}", telemetry.metrics().render());
        }
    }

    #[tokio::test]
    async fn what_is_known_is_asked_for_and_not_fetched() {
        let telemetry = readable(false);
        let by_layers = meter(&telemetry, true);
        phase(&by_layers, Phase::Resolve, 0.1, &[]);
        phase(&by_layers, Phase::Layers, 0.1, &[ready(0, LayerOrigin::Cached)]);
        meter(&telemetry, true).looked_up(true);
        let line = r#"builderd_docker_pulls_total{registry="ghcr.io",status="known"} 2"#;
        assert!(counted(&telemetry, line));
        assert!(!telemetry.metrics().render().contains("docker_pull_duration_seconds_count{"));
        // Without a cache nothing is looked up.
        let before = telemetry.metrics().render();
        meter(&telemetry, false).apply(&ready(0, LayerOrigin::Packed));
        assert_eq!(telemetry.metrics().render(), before);
    }

    #[tokio::test]
    async fn a_failure_is_counted_at_its_step_and_is_a_failed_pull_only_while_pulling() {
        let telemetry = readable(false);
        let pulls = r#"builderd_docker_pulls_total{registry="ghcr.io",status="failed"}"#;
        let steps = |step: &str, count: u32| {
            let line = format!("builderd_build_step_errors_total{{step=\"{step}\"}} {count}");
            assert!(counted(&telemetry, &line), "{line}\n{}", telemetry.metrics().render());
        };
        let waits = meter(&telemetry, true);
        lock(&waits.seen).enter("start");
        waits.failed();
        steps("start", 1);
        assert!(!telemetry.metrics().render().contains(pulls));
        // Nothing but the name is known yet.
        Meter::new(telemetry.metrics(), "ghcr.io", PathBuf::new(), true).failed();
        steps("resolve", 1);
        assert!(counted(&telemetry, &format!("{pulls} 1")));
        let breaks_off = meter(&telemetry, true);
        phase(&breaks_off, Phase::Resolve, 0.1, &[]);
        breaks_off.apply(&BuildEvent::PhaseStarted { phase: Phase::Layers });
        breaks_off.failed();
        steps("layers", 1);
        assert!(counted(&telemetry, &format!("{pulls} 2")));
        let late = meter(&telemetry, true);
        phase(&late, Phase::Layers, 0.1, &[ready(0, LayerOrigin::Packed)]);
        late.apply(&BuildEvent::PhaseStarted { phase: Phase::Write });
        late.failed();
        steps("build", 1);
        late.publishing();
        late.failed();
        steps("publish", 1);
        assert!(counted(&telemetry, &format!("{pulls} 2")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_is_silent_while_it_owes_something_and_nothing_comes() {
        let telemetry = readable(false);
        let fresh = Meter::new(telemetry.metrics(), "ghcr.io", PathBuf::new(), true);
        let wait = |secs| tokio::time::advance(Duration::from_secs(secs));
        wait(5).await;
        assert_eq!(fresh.upstream_silence(), Some(Duration::from_secs(5)), "it was asked first");
        let meter = meter(&telemetry, true);
        wait(5).await;
        meter.apply(&BuildEvent::PhaseStarted { phase: Phase::Layers });
        assert_eq!(meter.upstream_silence(), None, "it was asked for no layer yet");
        let (digest, size_bytes) = ("sha256:ab".to_owned(), 3000);
        meter.apply(&BuildEvent::LayerStarted { layer: 1, digest, size_bytes });
        wait(7).await;
        assert_eq!(meter.upstream_silence(), Some(Duration::from_secs(7)));
        meter.apply(&BuildEvent::LayerProgress { layer: 1, bytes: 1000 });
        wait(2).await;
        assert_eq!(meter.upstream_silence(), Some(Duration::from_secs(2)));
        // All of it is here: what takes long now is unpacking it.
        meter.apply(&BuildEvent::LayerProgress { layer: 1, bytes: 3000 });
        assert_eq!(meter.upstream_silence(), None);
        meter.apply(&ready(1, LayerOrigin::Packed));
        meter.apply(&BuildEvent::PhaseFinished { phase: Phase::Layers, secs: 2.0 });
        phase(&meter, Phase::Write, 1.0, &[]);
        assert_eq!(meter.upstream_silence(), None);
    }

    /// Uses a core until it is killed.
    #[expect(clippy::disallowed_methods, reason = "tests start programs")]
    fn busy() -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_process_is_seen_while_it_is_watched() {
        let telemetry = readable(false);
        let directory = tempfile::tempdir_in(".").unwrap();
        std::fs::write(directory.path().join("rootfs.ext4"), vec![1; 1 << 20]).unwrap();
        let staging = directory.path().to_owned();
        let meter = Meter::new(telemetry.metrics(), "ghcr.io", staging, true);
        let mut process = busy();
        let watched = meter.watch(process.id());
        let give_up = Instant::now() + Duration::from_secs(60);
        let usage = loop {
            let usage = meter.sample().await;
            // Other tests share the cores.
            if usage.cpu_percent > 0 {
                break usage;
            }
            assert!(Instant::now() < give_up, "{usage:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert!(usage.cpu_percent <= 110, "one thread: {usage:?}");
        assert!((100 << 10..1 << 30).contains(&usage.memory_bytes), "{usage:?}");
        assert!((1 << 20..2 << 20).contains(&usage.disk_bytes), "{usage:?}");
        assert!(usage.so_far.cpu_ms > 0 && usage.so_far.total_ms >= 200, "{usage:?}");
        let line = format!("builderd_memory_usage_bytes {}", usage.memory_bytes);
        assert!(counted(&telemetry, &line));

        drop(watched);
        std::fs::remove_file(directory.path().join("rootfs.ext4")).unwrap();
        let after = meter.sample().await;
        assert_eq!((after.memory_bytes, after.cpu_percent, after.disk_bytes), (0, 0, 0));
        let peak = (after.so_far.memory_peak_bytes, after.so_far.disk_bytes);
        assert!(peak >= (usage.memory_bytes, 1 << 20), "{after:?}");
        assert!(after.so_far.cpu_ms >= usage.so_far.cpu_ms);
        process.kill().unwrap();
        process.wait().unwrap();
        drop(meter);
        assert!(counted(&telemetry, "builderd_memory_usage_bytes 0"));
    }
}
