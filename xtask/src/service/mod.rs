//! `builderd serve` as a process, and what surrounds it: clients, PostgreSQL, an object store, a
//! slow registry.
//!
//! Used by stories, demo and bench. Knows the command line, the settings and the public API, and
//! no code of builderd.

pub(crate) mod api;
pub(crate) mod clients;
pub(crate) mod objects;
pub(crate) mod postgres;
pub(crate) mod throttle;
pub(crate) mod wire;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process::{Background, Program};

/// How long the service may take until it listens.
const START_SECS_MAX: u64 = 30;

/// The beginning of every setting's name.
const PREFIX: &str = "UNKEY_BUILDERD_";

/// One node's directories and settings; it can be started again and again.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    binary: PathBuf,
    dir: PathBuf,
    settings: Vec<(String, String)>,
}

impl Place {
    /// Everything below `dir`, on a free port, in development mode.
    pub(crate) fn new(binary: &Path, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let place = Self { binary: binary.into(), dir: dir.into(), settings: Vec::new() };
        let below = |name: &str| dir.join(name).display().to_string();
        Ok(place
            .set("PORT", "0")
            .set("LOG_FORMAT", "json")
            .set("OTEL_PROMETHEUS_ENABLED", "false")
            .set("DATABASE_DATA_DIR", &below("data"))
            .set("ROOTFS_OUTPUT_DIR", &below("rootfs"))
            .set("SCRATCH_DIR", &below("scratch"))
            .set("WORKSPACE_DIR", &below("workspace")))
    }

    /// With a setting, named without its prefix.
    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        let name = format!("{PREFIX}{name}");
        self.settings.retain(|(other, _)| *other != name);
        self.settings.push((name, value.to_owned()));
        self
    }

    /// With a variable of the environment that other programs know too.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.settings.push((name.to_owned(), value.into()));
        self
    }

    /// Where artifacts lie with local storage.
    pub(crate) fn artifacts(&self) -> PathBuf {
        self.dir.join("rootfs/artifacts")
    }

    /// Where what is being made lies.
    pub(crate) fn staging(&self) -> PathBuf {
        self.dir.join("rootfs/staging")
    }

    /// The embedded database.
    pub(crate) fn database(&self) -> PathBuf {
        self.dir.join("data/builderd.db")
    }

    /// builderd with this place's settings and no others.
    pub(crate) fn command(&self) -> Program {
        self.settled(Program::new(&self.binary))
    }

    fn settled(&self, program: Program) -> Program {
        let home = self.dir.join("home");
        let program = program.env("HOME", &home).without_env("XDG_CACHE_HOME");
        self.settings.iter().fold(program, |program, (name, value)| program.env(name, value))
    }

    /// Starts the service in development mode and waits until it listens.
    pub(crate) fn start(&self) -> Result<Server> {
        self.start_as(&["serve", "--dev"])
    }

    /// The same as operators start it: whoever asks needs a token.
    pub(crate) fn start_guarded(&self) -> Result<Server> {
        self.start_as(&["serve"])
    }

    fn start_as(&self, words: &[&str]) -> Result<Server> {
        let mut names = (0..).map(|turn| self.dir.join(format!("log-{turn}")));
        let log = names.find(|name| !name.exists()).context("no name for a log")?;
        // It must not outlive us, however we end.
        let mut process = self
            .settled(Program::new("setpriv").args(["--pdeathsig", "KILL"]))
            .arg(&self.binary)
            .args(words)
            .background(&log)?;
        let end = Instant::now() + Duration::from_secs(START_SECS_MAX);
        loop {
            let text = std::fs::read_to_string(&log)?;
            if let Some(address) = text.lines().find_map(listening) {
                return Ok(Server { process, address, log });
            }
            if let Some(status) = process.finished()? {
                bail!("builderd serve ended with {status}:\n{text}");
            }
            if Instant::now() > end {
                bail!("builderd serve does not listen after {START_SECS_MAX} s:\n{text}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What all starts so far have warned of, at most 30 lines.
    pub(crate) fn complaints(&self) -> String {
        let logs = (0..).map(|turn| self.dir.join(format!("log-{turn}")));
        let texts = logs.map_while(|log| std::fs::read_to_string(log).ok());
        let complains = |line: &str| {
            ["\"WARN\"", "\"ERROR\"", "panicked"].iter().any(|word| line.contains(word))
        };
        let mut lines: Vec<String> = texts
            .flat_map(|text| {
                text.lines().filter(|line| complains(line)).map(str::to_owned).collect::<Vec<_>>()
            })
            .collect();
        lines.truncate(30);
        lines.join("\n")
    }

    /// Fails if anything lies where unfinished artifacts are made.
    pub(crate) fn nothing_staged(&self) -> Result<()> {
        let Ok(list) = std::fs::read_dir(self.staging()) else { return Ok(()) };
        let names: Vec<_> = list.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
        if !names.is_empty() {
            bail!("{} holds {names:?}", self.staging().display());
        }
        Ok(())
    }
}

/// The address of a log line that says that the service listens.
fn listening(line: &str) -> Option<String> {
    let line: Value = serde_json::from_str(line).ok()?;
    let fields = if line["fields"].is_object() { &line["fields"] } else { &line };
    if fields["message"] != "listening" {
        return None;
    }
    fields["address"].as_str().map(str::to_owned)
}

/// A running service, killed when dropped.
pub(crate) struct Server {
    process: Background,
    address: String,
    log: PathBuf,
}

impl Server {
    /// `127.0.0.1:PORT`
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has said so far.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it at once, as a power failure would.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.process.signal("KILL")?;
        self.process.wait_for(Duration::from_secs(10))?.context("it survives SIGKILL")?;
        Ok(())
    }

    /// Asks it to stop and waits until it has.
    pub(crate) fn stop(mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.signal("TERM")?;
        let ended = self.process.wait_for(limit)?;
        ended.with_context(|| format!("it runs {limit:?} after SIGTERM:\n{}", self.said()))
    }

    /// Processes that it has started and that still run.
    pub(crate) fn children(&self) -> Vec<u32> {
        let Ok(list) = std::fs::read_dir("/proc") else { return Vec::new() };
        list.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|id| parent_of(*id) == Some(self.id()))
            .collect()
    }

    /// Memory that it has in RAM (`VmRSS` of proc_pid_status(5)).
    pub(crate) fn rss_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok(kib.context("no VmRSS")? * 1024)
    }

    /// CPU time of the process itself, without the processes it has started.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let fields = stat_fields(self.id()).context("it does not run")?;
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
        // Fields 14 and 15 of proc_pid_stat(5); the kernel counts 100 ticks in a second.
        let sum = ticks(11).zip(ticks(12)).map(|(user, system)| user + system);
        Ok(Duration::from_millis(10 * sum.context("no CPU time")?))
    }
}

/// The fields of `/proc/PID/stat` behind the name, beginning with the state (field 3).
fn stat_fields(id: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// The parent of a process that runs; a zombie has ended.
fn parent_of(id: u32) -> Option<u32> {
    let fields = stat_fields(id)?;
    if fields.first().is_none_or(|state| state == "Z") {
        return None;
    }
    fields.get(1)?.parse().ok()
}

/// A port that nobody listens on now.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Repeats `look` until it gives something or the time is up.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > end {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_both_forms_of_a_json_log() {
        let nested = r#"{"level":"INFO","fields":{"message":"listening","address":"127.0.0.1:7"}}"#;
        let flat = r#"{"level":"INFO","message":"listening","address":"127.0.0.1:7","dev":true}"#;
        for line in [nested, flat] {
            assert_eq!(listening(line).as_deref(), Some("127.0.0.1:7"));
        }
        assert_eq!(listening(r#"{"message":"stopping"}"#), None);
        assert_eq!(listening("not JSON"), None);
    }

    #[test]
    fn a_process_knows_its_parent() {
        let me = std::process::id();
        let child = Program::new("sleep").arg("60");
        let log = tempfile::NamedTempFile::new().unwrap();
        let child = child.background(log.path()).unwrap();
        assert_eq!(parent_of(child.id()), Some(me));
    }
}
