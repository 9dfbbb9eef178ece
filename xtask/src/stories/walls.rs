//! Stories about what stands between builds and the host, and that nothing of a build stays.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::Verdict;
use super::lab::{Corner, Lab, root_needed};
use super::service::{place, slow_image, slowly};
use crate::process::Program;
use crate::service::api::{Api, Order};
use crate::service::{Server, until};
use crate::workspace;

/// How long a build may take to get going.
const START: Duration = Duration::from_secs(60);
/// How long what a build leaves may outlive it.
const AFTERLIFE: Duration = Duration::from_secs(1);
/// Builds that run beside each other.
const BESIDE: usize = 4;
/// Where the tests of the sandbox lie in the guest.
const GUEST_TESTS: &str = "/root/sandbox-tests";

/// This machine may have version 1, or both; the guest has version 2 alone.
pub(super) fn every_attack_on_a_worker_fails_also_where_cgroups_are_of_version_2(
    lab: &Lab,
) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let kernel = lab.kernel()?;
    let corner = lab.corner()?;
    let disk = corner.output("rootfs.ext4");
    corner.build(&lab.pushed("small")?, &disk, &["--free-space", "256MiB"])?;
    let (tests, attacker) = sandbox_tests()?;
    // The tests know the place where the attacker was built.
    let place = attacker.display().to_string();
    carry(&corner, &disk, &[(&tests, GUEST_TESTS.into()), (&attacker, place)])?;
    let proof = kernel.boot(
        &disk,
        &format!(
            "mount -t cgroup2 none /sys/fs/cgroup; ls /sys/fs/cgroup; \
             {GUEST_TESTS} --test-threads=1 --nocapture 2>&1"
        ),
    )?;
    let passed = proof.console.lines().find(|line| line.starts_with("test result: ok."));
    // What version 1 alone has cannot be tried there.
    let is_skipped = |line: &&str| line.contains("skipped") && !line.contains("of version 1");
    let skipped = proof.console.lines().find(is_skipped);
    match (passed, skipped) {
        (Some(line), None) => println!("      in the guest: {line}"),
        _ => bail!("the guest said:\n{}", proof.console),
    }
    Ok(Verdict::Passed)
}

/// Puts programs into an image, without what only a debugger wants of them.
pub(super) fn carry(corner: &Corner<'_>, disk: &Path, luggage: &[(&Path, String)]) -> Result<()> {
    let mut script = String::new();
    for (number, (from, to)) in luggage.iter().enumerate() {
        let stripped = corner.path(&format!("stripped-{number}"));
        Program::new("strip").arg("-o").arg(&stripped).arg(from).run()?;
        for directory in Path::new(to).ancestors().skip(1).collect::<Vec<_>>().iter().rev() {
            if directory.parent().is_some() {
                script.push_str(&format!("mkdir {}\n", directory.display()));
            }
        }
        script.push_str(&format!("write {} {to}\n", stripped.display()));
        script.push_str(&format!("set_inode_field {to} mode 0100755\n"));
    }
    let commands = corner.path("debugfs");
    std::fs::write(&commands, script)?;
    // Says so of directories that are there, and goes on.
    Program::new("debugfs").arg("-w").arg("-f").arg(&commands).arg(disk).run()
}

/// The test program of the sandbox, and the attacker that it starts.
fn sandbox_tests() -> Result<(PathBuf, PathBuf)> {
    let text = workspace::cargo()
        .args(["test", "--package", "sandbox", "--no-run", "--quiet", "--message-format=json"])
        .text()?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut found = (None, None);
    for message in messages {
        let Some(path) = message["executable"].as_str() else { continue };
        match (message["target"]["name"].as_str(), message["profile"]["test"].as_bool()) {
            (Some("it"), Some(true)) => found.0 = Some(PathBuf::from(path)),
            (Some("attacker"), Some(false)) => found.1 = Some(PathBuf::from(path)),
            _ => {}
        }
    }
    found.0.zip(found.1).context("cargo names no tests of the sandbox")
}

pub(super) fn of_a_stopped_build_nothing_is_left_after_a_second(lab: &Lab) -> Result<Verdict> {
    let (cancelled, killed) = (lab.scale(24, 1000), lab.scale(6, 200));
    println!("      {cancelled} cancelled and {killed} killed builds");
    let corner = lab.corner()?;
    let (throttle, place) = slowly(lab, place(lab, &corner)?)?;
    let place = place.set("MAX_CONCURRENT_BUILDS", &BESIDE.to_string());
    let server = place.start()?;
    let api = Api::new(server.address(), "restless", "DEDICATED");
    let image = slow_image(lab, &throttle, 1)?;
    // Of services that were killed before, and will clear it away when they start again.
    let before = groups();
    let held_before = Held::by(&server)?;
    let mut took = Vec::new();
    for _ in 0..cancelled {
        let id = running(&api, &server, &image)?;
        let started = Instant::now();
        api.ask("CancelBuild", &json!({"buildId": id}))?;
        until("the build is gone", START, || {
            let state = api.build(&id)?["state"].take();
            let is_over = state == "BUILD_STATE_CANCELLED" && groups().is_subset(&before);
            Ok((is_over && server.children().is_empty()).then_some(()))
        })?;
        took.push(started.elapsed());
    }
    for _ in 0..killed {
        let id = running(&api, &server, &image)?;
        // Before, it is a process that could not be told what to do.
        api.wait_for(&id, &["EXTRACTING"], START)?;
        for child in server.children() {
            Program::new("kill").args(["-KILL", &child.to_string()]).run()?;
        }
        let build = until("the killed build ends", START, || {
            let build = api.build(&id)?;
            Ok((build["state"] == "BUILD_STATE_FAILED").then_some(build))
        })?;
        let message = build["errorMessage"].as_str().unwrap_or_default();
        if !message.contains("signal 9") {
            bail!("a killed build failed with {message:?}");
        }
        nothing_left(&server, &before, &held_before)?;
    }
    took.sort_unstable();
    let at = |hundredths: usize| took[(took.len() - 1) * hundredths / 100];
    println!("      cancelled in {:?} (median), {:?} (p99)", at(50), at(99));
    if at(99) > AFTERLIFE {
        bail!("the p99 of cancelling is {:?}", at(99));
    }
    nothing_left(&server, &before, &held_before)?;
    place.nothing_staged()?;
    Ok(Verdict::Passed)
}

/// A build that has got its own process, and that fails for good when that ends.
fn running(api: &Api, server: &Server, image: &str) -> Result<String> {
    let mut message = api.message(&Order::of(image));
    message["config"]["retryPolicy"] = json!({"maxRetries": 0});
    let created = api.ask("CreateBuild", &message)?;
    let id = created["buildId"].as_str().context("the answer names no build")?.to_owned();
    until("a process builds", START, || Ok((!server.children().is_empty()).then_some(())))?;
    Ok(id)
}

fn nothing_left(server: &Server, before: &BTreeSet<PathBuf>, held: &Held) -> Result<()> {
    let left = until("nothing is left", AFTERLIFE, || {
        let is_empty = groups().is_subset(before) && server.children().is_empty();
        Ok((is_empty && Held::by(server)?.since(held).is_empty()).then_some(()))
    });
    left.with_context(|| {
        let held = Held::by(server).map(|now| now.since(held)).unwrap_or_default();
        format!("{:?}, {:?} and {held:?} are left", groups(), server.children())
    })
}

/// What a service holds of the kernel beside its processes: without a process a mount or a
/// namespace stays only where somebody has it.
#[derive(Debug, Default)]
pub(super) struct Held {
    mounts: BTreeSet<String>,
    namespaces: BTreeSet<String>,
}

impl Held {
    /// As of now; nothing to somebody who is not root, who is not told.
    pub(super) fn by(server: &Server) -> Result<Self> {
        const KINDS: [&str; 8] =
            ["cgroup:[", "ipc:[", "mnt:[", "net:[", "pid:[", "time:[", "user:[", "uts:["];
        if root_needed().is_some() {
            return Ok(Self::default());
        }
        let own = PathBuf::from(format!("/proc/{}", server.id()));
        let mounts = std::fs::read_to_string(own.join("mounts"))?;
        // Files are opened and closed meanwhile.
        let files = std::fs::read_dir(own.join("fd"))?.flatten();
        let files = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        let names = files.map(|target| target.display().to_string());
        let is_namespace = |name: &String| KINDS.iter().any(|kind| name.starts_with(kind));
        Ok(Self {
            mounts: mounts.lines().map(str::to_owned).collect(),
            namespaces: names.filter(is_namespace).collect(),
        })
    }

    /// What was not there before.
    pub(super) fn since(&self, before: &Self) -> Vec<String> {
        let mounts = self.mounts.difference(&before.mounts);
        mounts.chain(self.namespaces.difference(&before.namespaces)).cloned().collect()
    }
}

/// Groups of builds and of their commands in any hierarchy of this machine.
pub(super) fn groups() -> BTreeSet<PathBuf> {
    let (mut found, mut todo) = (BTreeSet::new(), vec![(PathBuf::from("/sys/fs/cgroup"), 0)]);
    while let Some((directory, depth)) = todo.pop() {
        // Groups come and go while they are listed.
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let is_of_commands = directory.ends_with("commands");
            match name.starts_with("build_") || is_of_commands {
                true => drop(found.insert(entry.path())),
                false if depth < 6 => todo.push((entry.path(), depth + 1)),
                false => {}
            }
        }
    }
    found
}
