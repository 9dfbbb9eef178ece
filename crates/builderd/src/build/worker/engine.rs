//! The engine's process of a build: what it is told, how it is started, what it says.

use std::convert::Infallible;
use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use oci::Image;
use sandbox::{HeldUsers, Users, Wall};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{Instant, MissedTickBehavior};

use super::claims::Claims;
use super::running::Running;
use super::sum::{SumOrder, Summed};
use super::{MADE, internal, try_name};
use crate::build::child::{
    ChildLine, ChildReport, ChildSpec, LINE_BYTES_MAX, PackSpec, RegistrySpec,
};
use crate::build::host::Group;
use crate::build::kept::OwnPacks;
use crate::build::progress::Progress;
use crate::build::record::{Failure, FailureCode};
use crate::build::{BuildEvent, CommandsSpec, EgressSpec, Phase, error};
use crate::causes::chain;
use crate::packs::PackCache;
use crate::telemetry::Steps;

/// Processes and threads of a command: enough for a compiler on many cores.
const COMMAND_PIDS_MAX: u32 = 512;
/// How much of a child's complaints is kept.
const COMPLAINT_BYTES_MAX: u64 = 16 << 10;
/// How often it is looked at who has taken how much of the CPUs.
const CPU_BEAT: Duration = Duration::from_millis(250);

/// Ends the processes of a group, where there is one.
async fn end(group: Option<Group>) -> io::Result<()> {
    match group {
        Some(group) => group.end().await,
        None => Ok(()),
    }
}

/// The most memory of a build's processes, by two counts that are both too high, if anything: that of
/// the processes one by one, to which what they share belongs more than once, and that of their group,
/// to which what they have read and written belongs as well.
pub(super) fn memory_peak_bytes(one_by_one: u64, of_group: Option<u64>) -> u64 {
    of_group.filter(|bytes| *bytes > 0).map_or(one_by_one, |bytes| bytes.min(one_by_one))
}

fn still_there(error: io::Error) -> Failure {
    tracing::error!(error = chain(&error), "what the build has made may still be written to");
    Failure {
        code: FailureCode::TemporaryResourceError,
        step: Phase::Publish.as_str().into(),
        cause: "the build's processes could not be ended in time".into(),
        blame: "ours".into(),
        remedy: "try again later".into(),
    }
}

impl Running<'_> {
    fn child_spec(
        &self,
        image: &Image,
        registry: RegistrySpec,
        own: Option<&OwnPacks>,
    ) -> Result<ChildSpec, Failure> {
        let (build, rules) = (self.build(), &self.workers.rules);
        let reference: oci::Reference =
            build.request.image.parse().map_err(|_| internal("the image has no valid name"))?;
        let domain = self.packs_domain(image);
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
            commands: self.commands_spec(&registry)?,
            registry,
            output: self.staging().join(MADE),
            compression: build.request.compression.clone(),
            packs: match (own, self.workers.open_packs(build)) {
                (Some(own), _) => Some(PackSpec {
                    directory: own.directory.clone(),
                    domain: own.domain().to_owned(),
                    // Of one image, and gone with the build.
                    limit_bytes: u64::MAX,
                }),
                (None, Some((directory, limit_bytes))) => Some(PackSpec {
                    directory: directory.clone(),
                    domain,
                    limit_bytes: *limit_bytes,
                }),
                (None, None) => None,
            },
            jobs: usize::try_from(build.limits.cpu_cores).unwrap_or(1).clamp(1, cpus),
            image_bytes_max: Some(self.image_bytes_max()),
            memory_bytes: build.limits.memory_bytes,
            disk_bytes: disk,
            walls: rules.host.worker_walls(),
            has_own_files: rules.host.stand().contains(&Wall::OwnFiles),
            has_own_processes: rules.host.stand().contains(&Wall::OwnProcesses),
            users: None,
        })
    }

    /// The build's commands with what they may take: they share with the rest of the build, which
    /// needs some of its memory, and half of its disk for layers and the image.
    fn commands_spec(&self, registry: &RegistrySpec) -> Result<Option<CommandsSpec>, Failure> {
        let (build, rules) = (self.build(), &self.workers.rules);
        if build.request.commands.is_empty() {
            return Ok(None);
        }
        let Some(runtime) = &rules.runtime else {
            return Err(Failure {
                code: FailureCode::TemporaryResourceError,
                step: Phase::Commands.as_str().into(),
                cause: "this server runs no commands; the one that took the build does".into(),
                blame: "ours".into(),
                remedy: "try again; if that fails in the same way, ask the operator to give every \
                         server an OCI runtime"
                    .into(),
            });
        };
        Ok(Some(CommandsSpec {
            commands: build.request.commands.clone(),
            runtime: runtime.program.clone(),
            joins: runtime.joins,
            scratch: runtime.scratch,
            scratch_directory: self.scratch(),
            egress: self.egress_spec(registry),
            memory_bytes: build.limits.memory_bytes / 8 * 7,
            pids_max: COMMAND_PIDS_MAX,
            disk_bytes: build.limits.disk_bytes / 2,
        }))
    }

    /// What the build's commands may reach: what the operator allows its tier and its tenant.
    fn egress_spec(&self, registry: &RegistrySpec) -> Option<EgressSpec> {
        let (build, rules) = (self.build(), &self.workers.rules.commands_egress);
        let names = rules.names(build.tier, &build.tenant);
        (!names.is_empty()).then(|| EgressSpec {
            names,
            allowed_private: registry.allowed_private.clone(),
            blocked_domains: registry.blocked_domains.clone(),
            bytes_max: rules.bytes_max,
        })
    }

    /// Runs the engine in its own process and listens until it is done.
    pub(super) async fn run_child(
        &self,
        image: &Image,
        registry: RegistrySpec,
        own: Option<&OwnPacks>,
    ) -> Result<ChildReport, Failure> {
        let mut spec = self.child_spec(image, registry, own)?;
        let failed = |error: io::Error| Failure {
            code: FailureCode::TemporaryResourceError,
            step: "start".into(),
            cause: format!("the build's process could not be started: {error}"),
            blame: "ours".into(),
            remedy: "try again later".into(),
        };
        tokio::fs::create_dir_all(self.staging()).await.map_err(failed)?;
        if spec.commands.is_some() {
            tokio::fs::create_dir_all(self.scratch()).await.map_err(failed)?;
        }
        // Until those have ended who are these users.
        let held = self.own_users().map_err(failed)?;
        spec.users = held.as_ref().map(HeldUsers::users);
        let group = self.group().await.map_err(failed)?;
        let text = serde_json::to_vec(&spec).map_err(|error| failed(error.into()))?;
        let child = self.spawn("build-child", &text, group.as_ref());
        let mut child = child.await.map_err(failed)?;
        let Some(stdout) = child.stdout.take() else {
            return Err(internal("the build's process has no output"));
        };
        let mut stderr = child.stderr.take();
        let watched = child.id().map(|pid| self.meter.watch(pid));
        let listen = self.listen(stdout, image);
        let complain = async {
            let mut text = Vec::new();
            if let Some(stderr) = &mut stderr {
                // What a child says there is for the operator, and only the beginning of it; the rest is
                // taken too, so that an honest one is never kept waiting for who reads it.
                let _ = (&mut *stderr).take(COMPLAINT_BYTES_MAX).read_to_end(&mut text).await;
                let _ = tokio::io::copy(stderr, &mut tokio::io::sink()).await;
            }
            String::from_utf8_lossy(&text).into_owned()
        };
        let (last, complaint) = tokio::select! {
            told = async { tokio::join!(listen, complain) } => told,
            never = self.share_cpus(group.as_ref()) => match never {},
        };
        drop(watched);
        let status = child.wait().await.map_err(failed)?;
        self.prune_packs();
        if !complaint.is_empty() {
            tracing::warn!(complaint, "the build's process complained");
        }
        let usage = group.as_ref().map(Group::usage).unwrap_or_default();
        let ended = end(group).await;
        drop(held);
        match last {
            Some(ChildLine::Done(mut report)) => {
                // What it has made is looked at next: nobody may change it then.
                ended.map_err(still_there)?;
                let told = report.memory_peak_bytes.max(self.meter.memory_peak_bytes());
                // The commands of a build have groups of their own.
                let is_alone = self.build().request.commands.is_empty();
                let counted = Some(usage.memory_peak_bytes).filter(|_| is_alone);
                report.memory_peak_bytes = memory_peak_bytes(told, counted);
                Ok(*report)
            }
            Some(ChildLine::Failed(failure)) => {
                Err(error::explained(failure, &usage, self.build().limits.memory_bytes))
            }
            Some(ChildLine::Event(_)) | None => {
                let limits = &self.build().limits;
                let failure = error::died(status, limits, self.journal.step(), &complaint);
                Err(error::explained(failure, &usage, limits.memory_bytes))
            }
        }
    }

    /// Users for the processes of this try, where the host lets them be of their own.
    fn own_users(&self) -> io::Result<Option<HeldUsers>> {
        let has_them = self.workers.rules.host.stand().contains(&Wall::OwnUsers);
        let held = has_them.then(Users::hold_few);
        held.transpose().map_err(io::Error::other)
    }

    /// Holds the whole cache of layers to its limit: the build's process has seen its own part alone.
    fn prune_packs(&self) {
        let Some((directory, limit)) = self.workers.open_packs(self.build()).cloned() else {
            return;
        };
        tokio::task::spawn_blocking(move || {
            let pruned = PackCache::open(&directory).and_then(|cache| cache.prune(limit));
            if let Err(error) = pruned {
                tracing::warn!(error = chain(&error), "the cache of layers could not be pruned");
            }
        });
    }

    /// Gives the try its part of the CPUs, for as long as it is waited for.
    async fn share_cpus(&self, group: Option<&Group>) -> Infallible {
        let Some(group) = group else { return std::future::pending().await };
        let (build, cpus) = (self.build(), &self.workers.cpus);
        let mut share = cpus.enter(&build.tenant, build.tier, Instant::now());
        let mut limit = self.cpu_millis();
        let mut beat = tokio::time::interval(CPU_BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                () = cpus.changed() => {}
            }
            let part = share.part(group.usage().cpu_usecs, Instant::now());
            let mut result = group.set_cpu_weight(part.weight);
            let wanted = part.held_to.unwrap_or(u64::MAX).min(self.cpu_millis());
            if wanted != limit && result.is_ok() {
                result = group.set_cpu_limit(wanted);
            }
            match result {
                Ok(()) => limit = wanted,
                Err(error) => tracing::debug!(%error, "the build has no part of the CPUs"),
            }
        }
    }

    /// How much of the CPUs the build may take, in thousandths of one.
    fn cpu_millis(&self) -> u64 {
        u64::from(self.build().limits.cpu_cores.max(1)).saturating_mul(1000)
    }

    /// The group of this try's processes. The next try has another: this one may still be ending.
    async fn group(&self) -> io::Result<Option<Group>> {
        let (name, memory_bytes) =
            (try_name(&self.claimed.lease), self.build().limits.memory_bytes);
        let (host, cpu_millis) = (Arc::clone(&self.workers.rules.host), self.cpu_millis());
        // One of that name that is there still is ended first, which may take its time.
        let group = move || host.group(&name, memory_bytes, cpu_millis);
        let group = tokio::task::spawn_blocking(group).await.map_err(io::Error::other)?;
        group.map_err(io::Error::other)
    }

    /// The sum of so many bytes of what the build has made. Its processes have ended; this one is
    /// held to its limits, and its part of the CPUs, as they were.
    pub(super) async fn sum(&self, size_bytes: u64) -> io::Result<Summed> {
        let group = self.group().await?;
        let order = serde_json::to_vec(&SumOrder { file: MADE.into(), size_bytes })?;
        let child = self.spawn("build-sum", &order, group.as_ref()).await?;
        let output = tokio::select! {
            output = child.wait_with_output() => output?,
            never = self.share_cpus(group.as_ref()) => match never {},
        };
        if let Err(error) = end(group).await {
            // It only reads.
            tracing::warn!(%error, "the process that computed a sum is still there");
        }
        let summed = Summed::said(&output.stdout).filter(|_| output.status.success());
        summed.ok_or_else(|| {
            let complaint = String::from_utf8_lossy(&output.stderr);
            io::Error::other(format!("{}: {}", output.status, complaint.trim()))
        })
    }

    /// Starts this program once more as `role`, in the build's own directory. The process is in its
    /// group before it knows what to do.
    async fn spawn(&self, role: &str, order: &[u8], group: Option<&Group>) -> io::Result<Child> {
        let mut child = Command::new(&self.workers.rules.program)
            .arg(role)
            .env_clear()
            .current_dir(self.staging())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for the server, which decides what becomes of its builds.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        if let (Some(group), Some(pid)) = (group, child.id()) {
            group.add(pid).map_err(io::Error::other)?;
        }
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(order).await?;
        }
        Ok(child)
    }

    /// Takes the child's lines; returns the last word.
    async fn listen(&self, stdout: ChildStdout, image: &Image) -> Option<ChildLine> {
        let (mut progress, mut steps) = (Progress::new(image), Steps::default());
        let mut claims = Claims::new();
        let mut lines = BufReader::new(stdout);
        loop {
            let mut line = Vec::new();
            let most = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
            let count = (&mut lines).take(most).read_until(b'\n', &mut line).await.ok()?;
            if count == 0 {
                return None;
            }
            match claims.read(&line) {
                Ok(None) => {}
                Ok(Some(ChildLine::Event(event))) => {
                    self.meter.apply(&event);
                    steps.apply(&event);
                    if matches!(event, BuildEvent::PhaseStarted { phase: Phase::Publish }) {
                        // Everything is made and nothing let go: the most disk it will take.
                        self.meter.sample().await;
                    }
                    progress.apply(&event, &self.journal).await;
                    // Until then the pipe holds the build back.
                    self.journal.room().await;
                }
                Ok(last) => return last,
                Err(problem) => {
                    tracing::error!(problem, "the build's process does not make sense");
                    return None;
                }
            }
        }
    }
}
