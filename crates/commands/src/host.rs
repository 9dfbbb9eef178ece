//! What a host must have for commands, and whether its runtime is one to trust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Joins, Scratch, Unable};

/// The program that makes the scratch file system.
pub(crate) const MKFS: &str = "mkfs.ext4";
/// Where the programs are looked for: the service's own search path is not to be trusted.
pub(crate) const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Holes of runc by which a container writes to the host's /proc; opencontainers/runc, security
/// advisories of November 2025.
const HOLES: [&str; 3] = ["CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"];

/// The names by which known holes of a runtime can be accepted.
#[must_use]
pub fn accepted_names() -> &'static [&'static str] {
    &HOLES
}

/// A runtime that was found and may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// Where it is.
    pub program: PathBuf,
    /// What it calls itself: `runc 1.3.3`.
    pub version: String,
    /// Holes it has that were accepted by name.
    pub accepted: Vec<&'static str>,
    /// How this host holds the disk of commands to its size.
    pub scratch: Scratch,
    /// How it goes into a user namespace.
    pub joins: Joins,
}

/// Whether this host can run commands with `program` (a path, or a name that is looked for), and
/// which of its known holes were accepted.
///
/// # Errors
/// [`Unable`] names the first thing that is missing.
pub fn check(program: &str, accepted: &[String]) -> Result<Runtime, Unable> {
    if !rustix::process::geteuid().is_root() {
        return Err(Unable::NotRoot);
    }
    if !sandbox::can_isolate() {
        return Err(Unable::NoNamespaces);
    }
    let scratch = scratch(sandbox::LoopDevice::is_there());
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        return Err(Unable::NoOverlay);
    }
    if scratch == Scratch::Sized {
        find(MKFS)?;
    }
    let program = find(program)?;
    let missing = |source| Unable::NoProgram { program: program.display().to_string(), source };
    let told = command(&program).arg("--version").stdin(Stdio::null()).output().map_err(missing)?;
    let version = version(&String::from_utf8_lossy(&told.stdout))
        .ok_or_else(|| missing(std::io::Error::other("it does not say its version")))?;
    let holes = holes(&version);
    let (taken, open): (Vec<_>, Vec<_>) =
        holes.into_iter().partition(|hole| accepted.iter().any(|name| name == hole));
    match open.is_empty() {
        true => {
            let joins = joins(&version);
            Ok(Runtime { program, version, accepted: taken, scratch, joins })
        }
        false => {
            Err(Unable::Vulnerable { program: program.display().to_string(), version, holes: open })
        }
    }
}

/// A file system of its own needs a block device.
fn scratch(has_loop_devices: bool) -> Scratch {
    if has_loop_devices { Scratch::Sized } else { Scratch::Watched }
}

/// The one place that starts programs of the host.
#[expect(clippy::disallowed_methods, reason = "an OCI runtime and mkfs.ext4 are programs")]
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", SEARCH_PATH);
    command
}

pub(crate) fn find(program: &str) -> Result<PathBuf, Unable> {
    let places = SEARCH_PATH.split(':').map(|place| Path::new(place).join(program));
    let named = Path::new(program);
    let found = match named.is_absolute() {
        true => named.is_file().then(|| named.to_owned()),
        false => places.into_iter().find(|path| path.is_file()),
    };
    found.ok_or_else(|| Unable::NoProgram {
        program: program.to_owned(),
        source: std::io::ErrorKind::NotFound.into(),
    })
}

/// `runc version 1.1.5+ds1` and a newline → `runc 1.1.5+ds1`.
fn version(told: &str) -> Option<String> {
    let (name, version) = told.lines().next()?.split_once(" version ")?;
    Some(format!("{} {}", name.trim(), version.trim()))
}

/// What is known of a version. Of other runtimes nothing is: who names one answers for it.
fn holes(version: &str) -> Vec<&'static str> {
    let Some(((major, minor, patch), candidate)) = runc(version) else { return Vec::new() };
    let is_mended = match (major, minor) {
        (1, 2) => patch >= 8,
        (1, 3) => patch >= 3,
        (1, 4) if patch == 0 && !candidate.is_empty() => !matches!(candidate, "rc.1" | "rc.2"),
        other => other >= (1, 4),
    };
    if is_mended { Vec::new() } else { HOLES.to_vec() }
}

/// Since runc 1.2 a configuration must not name users beside the path of their namespace (opencontainers/runc,
/// `libcontainer/specconv`); before, it had to. Candidates of 1.2 are no releases.
fn joins(version: &str) -> Joins {
    match runc(version) {
        None => Joins::Never,
        Some(((major, minor, _), _)) if (major, minor) < (1, 2) => Joins::First,
        Some(_) => Joins::Last,
    }
}

/// The number of a version of runc, and which candidate for it that was.
fn runc(version: &str) -> Option<((u32, u32, u32), &str)> {
    let number = version.strip_prefix("runc ")?;
    let number = number.split('+').next().unwrap_or(number);
    let (number, candidate) = number.split_once('-').unwrap_or((number, ""));
    let mut parts = number.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    Some(((part(), part(), part()), candidate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_runc_before_the_fixes_have_the_holes() {
        for (version, is_good) in [
            ("runc 1.1.5+ds1", false),
            ("runc 1.2.7", false),
            ("runc 1.2.8", true),
            ("runc 1.3.2", false),
            ("runc 1.3.3", true),
            ("runc 1.3.6+ds1", true),
            ("runc 1.4.0-rc.2", false),
            ("runc 1.4.0-rc.3", true),
            ("runc 1.4.0", true),
            ("runc 2.0.0", true),
            ("runc unknown", false),
            ("crun 1.8.1", true),
        ] {
            assert_eq!(holes(version).is_empty(), is_good, "{version}");
        }
    }

    #[test]
    fn how_a_runtime_joins_a_namespace_is_told_by_its_version() {
        for (version, wanted) in [
            ("runc 1.1.5+ds1", Joins::First),
            ("runc 1.1.15", Joins::First),
            ("runc 1.2.0", Joins::Last),
            ("runc 1.3.6+ds1", Joins::Last),
            ("runc 1.4.0-rc.3", Joins::Last),
            ("runc 2.0.0", Joins::Last),
            ("crun 1.8.1", Joins::Never),
        ] {
            assert_eq!(joins(version), wanted, "{version}");
        }
    }

    #[test]
    fn a_host_without_loop_devices_watches_the_disk_of_commands() {
        assert_eq!(scratch(true), Scratch::Sized);
        assert_eq!(scratch(false), Scratch::Watched);
    }

    #[test]
    fn a_runtime_says_its_version_in_the_first_line() {
        let told = "runc version 1.1.5+ds1\ncommit: 1.1.5\nspec: 1.0.2-dev\n";
        assert_eq!(version(told).unwrap(), "runc 1.1.5+ds1");
        assert_eq!(version("crun version 1.8.1\n").unwrap(), "crun 1.8.1");
        assert_eq!(version("usage: sh\n"), None);
    }

    #[test]
    fn a_runtime_that_is_not_there_is_named() {
        let error = find("no-such-runtime").unwrap_err().to_string();
        assert!(error.contains("no-such-runtime"), "{error}");
        assert!(find("/no/such/runtime").is_err());
    }
}
