//! `cargo xtask bench --isolation`: what it costs to shut builds in, and what a noisy tenant costs
//! a quiet one.
//!
//! Costs are differences between builds that differ in one thing: one more layer is one more
//! confined worker, one more command is one more container. The neighbours' turns alternate in one
//! run, so that a slow minute of the machine hits both.

use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::images::generated;
use crate::images::layout::LayoutWriter;
use crate::images::tar::Node;
use crate::process::Program;
use crate::registry::Registry;
use crate::service::api::{Api, Order, ended};
use crate::service::{Place, Server};
use crate::{chores, images, workspace};

/// Pairs of builds whose difference is taken.
const PAIRS: u64 = 21;
/// Layers, and commands, that the larger build of a pair has more than the smaller one.
const MORE: u64 = 8;
/// Rounds of turns alone and beside noise of each kind, and the quiet tenant's builds in each turn.
const ROUNDS: u64 = 3;
const BUILDS_EACH: u64 = 4;
/// How long the noise may take to swell, and a build of it to take.
const SWELL: Duration = Duration::from_secs(6);
const NOISE_SECS: u64 = 60;

/// What is written to memory beside the noise: about as much as a build of `small` writes twice.
const MEMORY_MIB: usize = 256;

/// As often as the smallest tier may ask.
const LOOK_AGAIN: Duration = Duration::from_millis(1500);

const COMMAND_BAR: f64 = 80.0;
const WORKER_BAR: f64 = 30.0;
const NOISE_BAR: f64 = 20.0;

/// A tenant's tier, and how many builds it may run at once.
const TIERS: [(&str, u64); 2] = [("FREE", 1), ("PRO", 3)];

struct Bench {
    binary: std::path::PathBuf,
    place: Place,
    registry: Registry,
    scratch: tempfile::TempDir,
    rounds: u64,
}

/// Prints markdown for `docs/benchmarks.md`; with `noise`, only of kinds whose name has that word.
pub(crate) fn run(binary: Option<String>, rounds: Option<u64>, noise: Option<&str>) -> Result<()> {
    if !crate::process::is_root() {
        bail!("only root can run commands of builds");
    }
    let binary = match binary {
        Some(path) => Path::new(&path).canonicalize()?,
        None => workspace::release_binary("builderd")?,
    };
    let registry = Registry::start()?;
    let scratch = chores::scratch()?;
    let place = Place::new(&binary, &scratch.path().join("service"))?
        .set("DOCKER_INSECURE_REGISTRIES", registry.address())
        // The smallest tier may have images from there alone.
        .set("DOCKER_REGISTRY_MIRROR", &format!("ghcr.io={}", registry.address()))
        // Every build is a whole one.
        .set("STORAGE_CACHE_ENABLED", "false")
        .set("OCI_RUNTIME_ACCEPT_VULNERABLE", "CVE-2025-31133,CVE-2025-52565,CVE-2025-52881");
    let rounds = rounds.unwrap_or(ROUNDS).max(1);
    let bench = Bench { binary, place, registry, scratch, rounds };
    println!("\n### What shutting in costs\n\n| | median | bar | |\n|---|---:|---:|---|");
    if noise.is_none() {
        bench.worker()?;
        bench.command()?;
    }
    let wanted = |kind: &&Kind| noise.is_none_or(|word| kind.name.contains(word));
    let kinds: Vec<&Kind> = KINDS.iter().filter(wanted).collect();
    for (tier, builds) in TIERS {
        bench.noise(tier, builds, &kinds)?;
    }
    Ok(())
}

fn row(what: &str, figure: &str, bar: &str, is_met: bool) {
    println!("| {what} | {figure} | {bar} | {} |", if is_met { "met" } else { "**missed**" });
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[expect(clippy::cast_precision_loss, reason = "a small number")]
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// What one of [`MORE`] takes, in milliseconds.
#[expect(clippy::cast_precision_loss, reason = "a small number")]
fn each(fewer: Duration, more: Duration) -> f64 {
    (milliseconds(more) - milliseconds(fewer)) / MORE as f64
}

impl Bench {
    /// One more layer of one small file, on one CPU, so that no two workers start at once: the
    /// worker's start and end, and what there is to do with such a layer.
    fn worker(&self) -> Result<()> {
        let layout = |layers: u64| -> Result<String> {
            let dir = self.scratch.path().join(format!("layers-{layers}"));
            let mut writer = LayoutWriter::create(&dir)?;
            for layer in 0..layers {
                let file = Node::file(format!("{layer}"));
                writer.layer(|tar| tar.add(format!("file-{layer}"), &file))?;
            }
            writer.finish(&json!({}))?;
            Ok(format!("oci:{}:latest", dir.display()))
        };
        let (few, many) = (layout(1)?, layout(1 + MORE)?);
        let build = |source: &str| -> Result<Duration> {
            let output = self.scratch.path().join("image");
            let program = Program::new("taskset").args(["--cpu-list", "0"]).arg(&self.binary);
            let program = program.args(["build", source, "--no-cache", "--progress", "plain"]);
            let started = Instant::now();
            program.arg("--output").arg(&output).run()?;
            Ok(started.elapsed())
        };
        let mut differences = Vec::new();
        let mut alone = Vec::new();
        for _ in 0..PAIRS {
            let fewer = build(&few)?;
            alone.push(milliseconds(fewer));
            differences.push(each(fewer, build(&many)?));
        }
        let figure = median(differences);
        let what = format!("a confined worker more (of {PAIRS} pairs, {MORE} layers more in each)");
        row(&what, &format!("{figure:.1} ms"), "≤ 30 ms", figure <= WORKER_BAR);
        let what = "the whole build of one layer, two workers, command included";
        println!("| {what} | {:.1} ms | | |", median(alone));
        Ok(())
    }

    /// One more command, from CreateBuild to the end of the log.
    fn command(&self) -> Result<()> {
        let image = self.shell()?;
        let server = self.place.start()?;
        let api = Api::new(server.address(), "commanding", "ENTERPRISE");
        let mut turn = 0;
        let mut build = |commands: u64| -> Result<Duration> {
            turn += 1;
            // A comment makes each order another one: none is answered from before.
            let commands: Vec<String> =
                (0..commands).map(|number| format!("true # {turn} {number}")).collect();
            let order = with_commands(&api, &image, &commands);
            let started = Instant::now();
            let id = created(&api, &order)?;
            api.follow(&id)?;
            let took = started.elapsed();
            api.completed(&id, Duration::from_secs(30))?;
            Ok(took)
        };
        build(1)?;
        let mut differences = Vec::new();
        for _ in 0..PAIRS {
            let fewer = build(1)?;
            differences.push(each(fewer, build(1 + MORE)?));
        }
        let figure = median(differences);
        let what = format!("a command more (of {PAIRS} pairs, {MORE} times `true` more in each)");
        row(&what, &format!("{figure:.1} ms"), "≤ 80 ms", figure <= COMMAND_BAR);
        stop(server)
    }

    /// Builds of a quiet tenant, one that has not built for a while, by turns alone and beside a
    /// noisy one of that tier that has as many builds as it may. Both are new ones in each turn:
    /// who builds all the time is not quiet, and small tiers have few builds in a day.
    fn noise(&self, tier: &'static str, builds: u64, kinds: &[&Kind]) -> Result<()> {
        let shell = self.shell()?;
        let large = self.pushed(&images::layout("small")?, "small")?;
        let server = self.place.start()?;
        let quiet = |turn: &str| Api::new(server.address(), &format!("quiet-{turn}"), "PRO");
        let mut alone = Vec::new();
        let mut beside: Vec<Vec<f64>> = kinds.iter().map(|_| Vec::new()).collect();
        let (mut memory_alone, mut memory_beside) = (Vec::new(), beside.clone());
        quiet_build(&quiet("first"), &large)?;
        for round in 0..self.rounds {
            let api = quiet(&round.to_string());
            for _ in 0..BUILDS_EACH {
                alone.push(quiet_build(&api, &large)?);
                memory_alone.push(self.memory()?);
            }
            let figures = beside.iter_mut().zip(&mut memory_beside);
            for (number, (kind, (times, memory))) in kinds.iter().zip(figures).enumerate() {
                let name = format!("noisy-{}-{number}-{round}", tier.to_lowercase());
                let noisy = Api::new(server.address(), &name, tier);
                let api = quiet(&format!("{number}-{round}"));
                let noise = Noise::new(noisy, kind, [&shell, &large]);
                noise.beside(builds, || {
                    for _ in 0..BUILDS_EACH {
                        times.push(quiet_build(&api, &large)?);
                        memory.push(self.memory()?);
                    }
                    Ok(())
                })?;
            }
        }
        let (alone, memory) = (median(alone), median(memory_alone));
        let tier = tier.to_lowercase();
        println!("| a quiet tenant's build of `small`, no cache, alone | {alone:.0} ms | | |");
        println!("| {MEMORY_MIB} MiB written to the page cache, alone | {memory:.0} ms | | |");
        for (kind, (times, memory)) in kinds.iter().zip(beside.into_iter().zip(memory_beside)) {
            let percent = (median(times) / alone - 1.0) * 100.0;
            let what = format!("slower beside {builds} builds of a tenant ({tier}): {}", kind.name);
            row(&what, &format!("{percent:.0} %"), "≤ 20 %", percent <= NOISE_BAR);
            let [mean, most] = [mean(&memory), memory.iter().copied().fold(0.0, f64::max)];
            println!("| … {MEMORY_MIB} MiB there: mean, most | {mean:.0}, {most:.0} ms | | |");
        }
        stop(server)
    }

    /// What this host takes to give fresh memory, in milliseconds: no build has a part in it. Where a
    /// virtual machine hands what lies idle back to its host, it costs several times more beside who
    /// fills memory and frees it.
    fn memory(&self) -> Result<f64> {
        let piece = vec![1; 1 << 20];
        let mut file = tempfile::tempfile_in(self.scratch.path())?;
        let started = Instant::now();
        for _ in 0..MEMORY_MIB {
            file.write_all(&piece)?;
        }
        Ok(milliseconds(started.elapsed()))
    }

    /// An image with a shell and what else busybox is.
    fn shell(&self) -> Result<String> {
        let dir = self.scratch.path().join("shell");
        if !dir.exists() {
            generated::tiny(&dir)?;
        }
        self.pushed(&dir, "shell")
    }

    fn pushed(&self, layout: &Path, name: &str) -> Result<String> {
        let name = format!("bench/{name}:latest");
        self.registry.push_as(layout, &name)?;
        Ok(format!("ghcr.io/{name}"))
    }
}

/// What a noisy tenant's builds do.
struct Kind {
    name: &'static str,
    /// One after the other in turn; an empty one is a large image, without commands.
    commands: &'static [&'static str],
}

const PROCESSORS: &str =
    "for n in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; busybox sleep 50";
const PROCESSES: &str =
    "while :; do for n in 1 2 3 4 5 6 7 8; do (busybox sleep 1 &) 2>/dev/null; done; done";
const MEMORY: &str =
    "while :; do busybox dd if=/dev/zero of=/dev/shm/x bs=1M count=60 2>/dev/null; done";
const DISK: &str =
    "while :; do busybox dd if=/dev/zero of=/srv/x bs=1M count=400 2>/dev/null; done";
/// Without the page cache, so that it takes no memory from anybody.
const DISK_ALONE: &str =
    "while :; do busybox dd if=/dev/zero of=/srv/x bs=1M count=400 oflag=direct 2>/dev/null; done";
const IMAGE: &str = "";

/// Each as much as a command gets, until it is ended.
const KINDS: [Kind; 7] = [
    Kind { name: "processors", commands: &[PROCESSORS] },
    Kind { name: "processes", commands: &[PROCESSES] },
    Kind { name: "memory", commands: &[MEMORY] },
    Kind { name: "disk", commands: &[DISK] },
    Kind { name: "disk, past the page cache", commands: &[DISK_ALONE] },
    Kind { name: "images", commands: &[IMAGE] },
    Kind { name: "all of it", commands: &[PROCESSORS, DISK, IMAGE, PROCESSES, MEMORY] },
];

/// A tenant that has as many builds as it may, one after the other.
struct Noise<'a> {
    api: Api,
    kind: &'a Kind,
    shell: &'a str,
    large: &'a str,
    done: AtomicBool,
    made: AtomicU64,
}

impl<'a> Noise<'a> {
    fn new(api: Api, kind: &'a Kind, [shell, large]: [&'a str; 2]) -> Self {
        let (done, made) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { api, kind, shell, large, done, made }
    }

    /// Measures while so many builds run.
    fn beside(&self, builds: u64, measure: impl FnOnce() -> Result<()>) -> Result<()> {
        std::thread::scope(|scope| {
            for number in 0..builds {
                scope.spawn(move || self.go_on(number));
            }
            std::thread::sleep(SWELL);
            let measured = measure();
            self.done.store(true, Ordering::Relaxed);
            measured
        })?;
        match self.made.load(Ordering::Relaxed) {
            made if made < builds => bail!("the noisy tenant had {made} builds, not {builds}"),
            _ => Ok(()),
        }
    }

    /// Keeps one build running; `number` of several begins with another command.
    fn go_on(&self, number: u64) {
        let mut turn = number;
        while !self.done.load(Ordering::Relaxed) {
            // Whatever a build of the noise comes to: a day that is over, a limit, an end.
            if self.one(turn).is_err() {
                std::thread::sleep(LOOK_AGAIN);
            }
            turn += 1;
        }
    }

    fn one(&self, turn: u64) -> Result<()> {
        let commands = self.kind.commands;
        let order = match commands[usize::try_from(turn)? % commands.len()] {
            IMAGE => self.api.message(&Order::of(self.large)),
            command => {
                // A comment makes each order another one.
                let made = self.made.load(Ordering::Relaxed);
                let command = format!("{command} # {turn} {made}");
                let mut order = with_commands(&self.api, self.shell, &[command]);
                order["config"]["limits"] = json!({"timeoutSeconds": NOISE_SECS});
                order
            }
        };
        let id = created(&self.api, &order)?;
        self.made.fetch_add(1, Ordering::Relaxed);
        let mut is_cancelled = false;
        while !ended(&self.api.build(&id)?) {
            if self.done.load(Ordering::Relaxed) && !is_cancelled {
                self.api.ask("CancelBuild", &json!({"buildId": id}))?;
                is_cancelled = true;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }
}

fn with_commands(api: &Api, image: &str, commands: &[String]) -> Value {
    let mut order = api.message(&Order::of(image));
    order["config"]["strategy"] = json!({"dockerStrategy": {"customCommands": commands}});
    order["config"]["retryPolicy"] = json!({"maxRetries": 0});
    order
}

fn created(api: &Api, order: &Value) -> Result<String> {
    let answer = api.ask("CreateBuild", order)?;
    Ok(answer["buildId"].as_str().context("the answer names no build")?.to_owned())
}

/// From CreateBuild to the end of the log, in milliseconds.
fn quiet_build(api: &Api, image: &str) -> Result<f64> {
    let started = Instant::now();
    let id = api.create(&Order::of(image))?;
    api.follow(&id)?;
    let took = started.elapsed();
    api.completed(&id, Duration::from_secs(30))?;
    Ok(milliseconds(took))
}

fn stop(server: Server) -> Result<()> {
    let status = server.stop(Duration::from_secs(30))?;
    if !status.success() {
        bail!("SIGTERM ended the service with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_shared_among_what_makes_it() {
        let (fewer, more) = (Duration::from_millis(100), Duration::from_millis(180));
        assert!((each(fewer, more) - 10.0).abs() < 1e-9);
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((mean(&[3.0, 1.0, 5.0]) - 3.0).abs() < 1e-9);
    }
}
