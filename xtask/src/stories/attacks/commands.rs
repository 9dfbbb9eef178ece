//! What commands of a build try: programs that attack the kernel, the host and other builds.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::Table;
use super::ground::{BUILD, Ground, OPERATORS_SECRET, VICTIMS_CANARY, VICTIMS_TOKEN};
use crate::compare::walk;
use crate::images::layout::LayoutWriter;
use crate::images::tar::Node;
use crate::process::Program;
use crate::service::api::ended;
use crate::service::until;
use crate::stories::walls::groups;

/// How long a storm may take to end on a machine that is emulated; how long it does is printed.
const STORM_END: Duration = Duration::from_secs(20);
/// How often a build is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The output of commands that is kept, and room for what else a log says.
const LOG_BYTES_MAX: usize = (1 << 20) + (64 << 10);

const CALLS: &str = "allow-list of system calls";
const CAPABILITIES: &str = "capabilities of a user namespace";
const NETWORK: &str = "network namespace";
const TREE: &str = "mount namespace";
const PROC: &str = "masked and read-only /proc";

/// What is tried, what stands in the way, and what the attacker may say of it.
type Try = (String, &'static str, &'static [&'static str]);

pub(super) fn run(ground: &Ground, table: &mut Table) -> Result<()> {
    let config = Ground::tools_config();
    let image = ground.image("tools", &config, |writer| ground.tools(writer))?;
    calls(ground, table, &image)?;
    table.add("argv and environment of everything in sight", PROC, secrets(ground, &image));
    exhaustion(ground, table, &image)?;
    table.add("memory bomb", "memory of the cgroup", memory(ground, &image));
    table.add("fork storm, cancelled", "cgroup's end", storm(ground, &image));
    table.add("fork storm without end", "time limit", endless(ground, &image));
    table.add("log flooding, 80 MB", "bounded log", flood(ground, &image));
    table.add("escape sequences in the log", "cleaned log", steer(ground, &image));
    table.add("/proc/self/exe of the OCI runtime", "read-only runtime", overwrite(ground));
    table.add("/proc and /dev that are links", "OCI runtime", links(ground));
    Ok(())
}

/// One line each, all in one build.
fn calls(ground: &Ground, table: &mut Table, image: &str) -> Result<()> {
    let tries = tries(ground);
    let script: Vec<String> = tries.iter().map(|(words, ..)| format!("attack {words}")).collect();
    let halves: Vec<String> = script.chunks(16).map(|part| part.join("; ")).collect();
    let commands: Vec<&str> = halves.iter().map(String::as_str).collect();
    let lines = ground.build(image, &commands)?.completed()?;
    let said: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("attack ")).collect();
    if said.len() != tries.len() {
        bail!("{} attacks said {} lines: {said:?}", tries.len(), said.len());
    }
    for ((words, wall, expected), line) in tries.iter().zip(said) {
        let (_, found) = line.split_once(": ").unwrap_or(("", line));
        let result = match expected.contains(&found) {
            true => Ok(found.to_owned()),
            false => bad(found, expected),
        };
        table.add(words, wall, result);
    }
    table.healthy(ground);
    Ok(())
}

fn bad(found: &str, expected: &[&str]) -> Result<String> {
    bail!("{found}, not {}", expected.join(" or "))
}

fn tries(ground: &Ground) -> Vec<Try> {
    const EPERM: &[&str] = &["EPERM"];
    const ENOENT: &[&str] = &["ENOENT"];
    const REFUSED: &[&str] = &["ECONNREFUSED"];
    const UNREACHABLE: &[&str] = &["ENETUNREACH"];
    // Of a user who owns nothing there, and of a mount that nobody writes to.
    const UNWRITABLE: &[&str] = &["EACCES", "EROFS"];
    // Not every kernel has it.
    const UNWRITABLE_OR_NONE: &[&str] = &["EACCES", "EROFS", "ENOENT"];
    let mut tries: Vec<Try> = Vec::new();
    for words in [
        "ptrace",
        "memory-of-others",
        "mount",
        "mount-anew",
        "pivot",
        "setns",
        "unshare",
        "clone",
        "keyctl",
        "add-key",
        "bpf",
        "perf",
        "userfault",
        "io-uring",
        "handle",
        "module",
        "reboot",
        "mount-cgroup",
        "unshare-cgroup",
        "vsock",
    ] {
        tries.push((words.into(), CALLS, EPERM));
    }
    for words in ["device", "raw-socket", "packet-socket"] {
        tries.push((words.into(), CAPABILITIES, EPERM));
    }
    tries.push(("nobody /bin/raised".into(), "no new privileges", &["user 65534"]));
    tries.push(("kill".into(), "PID namespace", &["ESRCH"]));
    tries.push(("write /sys/fs/cgroup/cgroup.procs".into(), TREE, ENOENT));
    tries.push(("read /srv/disk".into(), "devices are not unpacked", ENOENT));
    tries.push(("write /proc/sys/kernel/core_pattern".into(), PROC, UNWRITABLE));
    tries.push(("write /proc/sysrq-trigger".into(), PROC, UNWRITABLE_OR_NONE));
    let data = ground.place.database().display().to_string();
    let artifacts = ground.place.artifacts().display().to_string();
    for words in [
        format!("read {data}"),
        format!("read /proc/1/root{data}"),
        format!("climb {data}"),
        format!("read {artifacts}"),
        format!("climb {artifacts}"),
    ] {
        tries.push((words, TREE, ENOENT));
    }
    let service = ground.server.address().replace(':', " ");
    for place in [ground.neighbour.address().replace(':', " "), service] {
        tries.push((format!("connect {place}"), NETWORK, REFUSED));
    }
    tries.push((format!("connect ::1 {}", ground.neighbour.port()), NETWORK, REFUSED));
    for place in ["169.254.169.254 80", "10.0.0.1 443", "192.168.0.1 53", "fd00:ec2::254 80"] {
        tries.push((format!("connect {place}"), NETWORK, UNREACHABLE));
    }
    tries
}

/// Every secret there is, looked for wherever a command can look.
fn secrets(ground: &Ground, image: &str) -> Result<String> {
    // A pattern that is not what it matches: the search must not find itself.
    let pattern = |secret: &str| {
        let (front, last) = secret.split_at(secret.len() - 1);
        format!("{front}[{last}]")
    };
    let mut script =
        String::from("cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n' ");
    script.push_str("> /srv/seen; ");
    for secret in [OPERATORS_SECRET, VICTIMS_TOKEN, VICTIMS_CANARY] {
        let pattern = pattern(secret);
        script.push_str(&format!(
            "echo attack seen: $(grep -rl '{pattern}' /srv /bin /dev/shm /etc /tmp /var | wc -l); "
        ));
    }
    script.push_str("echo attack seen: $(grep -c builder[d] /srv/seen)");
    let ended = ground.build(image, &[&script])?;
    let seen = ended.said("seen");
    if seen != ["0", "0", "0", "0"] {
        bail!("secrets were found: {seen:?} {:?}", ended.build["failure"]);
    }
    Ok("nothing found".into())
}

/// What ends at a number that the kernel counts to.
fn exhaustion(ground: &Ground, table: &mut Table, image: &str) -> Result<()> {
    for (what, wall, script, word, error) in [
        ("fork bomb", "PIDs of the cgroup", "attack forks", "forks", "EAGAIN"),
        ("open files", "RLIMIT_NOFILE", "attack files", "files", "EMFILE"),
        ("inodes", "scratch file system", "attack inodes; rm -rf /srv/inodes", "inodes", "ENOSPC"),
        (
            "disk filler",
            "scratch file system",
            "attack fill /srv/full; rm /srv/full",
            "fill",
            "ENOSPC",
        ),
        ("disk filler in /dev", "size of the tmpfs", "attack fill /dev/full", "fill", "ENOSPC"),
        (
            "disk filler in /dev/shm",
            "size of the tmpfs",
            "attack fill /dev/shm/full",
            "fill",
            "ENOSPC",
        ),
    ] {
        let ended = ground.build(image, &[script])?;
        let said: Vec<String> = ended.said(word).iter().map(|&line| line.to_owned()).collect();
        let result = ended.completed().and_then(|_| match &said[..] {
            [line] if line.starts_with(&format!("{error} after ")) => Ok(line.clone()),
            other => bail!("{other:?}, not {error}"),
        });
        table.add(what, wall, result);
        table.healthy(ground);
    }
    Ok(())
}

fn memory(ground: &Ground, image: &str) -> Result<String> {
    let ended = ground.build(image, &["attack memory"])?;
    let told = ended.failed("QUOTA_EXCEEDED", "needs more memory than")?;
    ground.is_healthy()?;
    Ok(told)
}

/// Waits until a storm blows.
fn blowing(ground: &Ground, id: &str) -> Result<()> {
    until("the storm begins", BUILD, || {
        if processes("attack") > 50 {
            return Ok(Some(()));
        }
        // Not more often than the tenant may ask.
        std::thread::sleep(LOOK_AGAIN);
        let build = ground.attacker.build(id)?;
        match ended(&build) {
            true => bail!("{} before it was stopped: {}", build["state"], build["failure"]),
            false => Ok(None),
        }
    })
}

/// How many processes of this host have that name.
fn processes(name: &str) -> usize {
    let list = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = list.filter_map(|entry| std::fs::read_to_string(entry.path().join("comm")).ok());
    names.filter(|found| found.trim() == name).count()
}

fn storm(ground: &Ground, image: &str) -> Result<String> {
    let id = ground.create(&ground.order(image, &["attack storm"]))?;
    blowing(ground, &id)?;
    ground.is_healthy().context("while it blows")?;
    let started = Instant::now();
    ground.attacker.ask("CancelBuild", &json!({"buildId": id}))?;
    gone(&id)?;
    let took = started.elapsed();
    ground.attacker.wait_for(&id, &["CANCELLED"], BUILD)?;
    ground.is_healthy()?;
    Ok(format!("gone after {} ms", took.as_millis()))
}

/// Waits until no group of a build and no process of an attack is left.
fn gone(id: &str) -> Result<()> {
    until("the storm is over", STORM_END, || {
        let is_left = groups().iter().any(|group| group.ends_with(id));
        Ok((!is_left && processes("attack") == 0).then_some(()))
    })
}

fn endless(ground: &Ground, image: &str) -> Result<String> {
    // Time enough to begin, on a machine that is as slow as this one.
    let (_, slowest) = ground.honest();
    let secs = 4 + 3 * slowest.as_secs();
    let mut order = ground.order(image, &["attack storm"]);
    order["config"]["limits"]["timeoutSeconds"] = json!(secs);
    let id = ground.create(&order)?;
    let ended = ground.end(&id)?;
    gone(&id)?;
    let told = ended.failed("BUILD_TIMEOUT", &format!("took longer than {secs} seconds"))?;
    if ended.said("storm") != ["begins"] {
        bail!("it did not begin: {told}");
    }
    ground.is_healthy()?;
    Ok(told)
}

fn flood(ground: &Ground, image: &str) -> Result<String> {
    let ended = ground.build(image, &["attack flood"])?;
    let lines = ended.completed()?;
    let bytes: usize = lines.iter().map(String::len).sum();
    // Cut where there is too much of it, or where it comes faster than it is written.
    let cut = |line: &&String| line.contains("the rest is not kept") || line.contains("left out");
    let Some(told) = lines.iter().find(cut).filter(|_| bytes <= LOG_BYTES_MAX) else {
        bail!("the log has {bytes} bytes in {} lines", lines.len());
    };
    ground.is_healthy()?;
    Ok(format!("{} KiB kept: {told}", bytes >> 10))
}

fn steer(ground: &Ground, image: &str) -> Result<String> {
    let ended = ground.build(image, &["attack steer"])?;
    let said = ended.said("steer");
    if said != ["red", "written  reversed"] {
        bail!("the log says {said:?}");
    }
    let lines = ended.completed()?;
    match lines.iter().find(|line| line.chars().any(char::is_control)) {
        Some(line) => bail!("a line of the log has control characters: {line:?}"),
        None => Ok("taken out".into()),
    }
}

/// The runtime starts itself as the image's shell, with the attacker's library in it.
fn overwrite(ground: &Ground) -> Result<String> {
    let runtime = ground.runtime();
    let before = walk::sha256_of(runtime)?;
    let listed = Program::new("ldd").arg(runtime).text()?;
    // "name => /path (address)" or "/path (address)".
    let libraries: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().find(|w| w.starts_with('/')))
        .collect();
    let mut config = Ground::tools_config();
    config["Env"] = json!(["PATH=/bin", "LD_PRELOAD=/bin/overwrite.so"]);
    let image = ground.image("overwrite", &config, |writer| {
        ground.tools(writer)?;
        shell_of_the_runtime(writer, &ground.programs.overwrite, &libraries)
    })?;
    let ended = ground.build(&image, &["true"])?;
    if walk::sha256_of(runtime)? != before {
        bail!("{} is not what it was", runtime.display());
    }
    let said = ended.said("overwrite").join(" ");
    let written = ended.said("write");
    let result = match &written[..] {
        [error @ ("EROFS" | "ETXTBSY" | "EPERM" | "EACCES")] => format!("{said}: {error}"),
        other => bail!("it ran ({said}), and said {other:?}; {}", ended.build["failure"]),
    };
    ground.is_healthy()?;
    Ok(result)
}

fn shell_of_the_runtime(
    writer: &mut LayoutWriter,
    overwrite: &Path,
    libraries: &[&str],
) -> Result<()> {
    let overwrite = std::fs::read(overwrite)?;
    let mut files = Vec::new();
    for path in libraries {
        files.push((path.trim_start_matches('/'), std::fs::read(path)?));
    }
    writer.layer(|tar| {
        tar.add("bin/sh", &Node::symlink("/proc/self/exe"))?;
        tar.add("bin/overwrite.so", &Node::file(overwrite).mode(0o755))?;
        for (path, bytes) in files {
            tar.add(path, &Node::file(bytes).mode(0o755))?;
        }
        Ok(())
    })
}

/// Where the runtime mounts, links lead out of the tree.
fn links(ground: &Ground) -> Result<String> {
    let image = ground.image("links", &Ground::tools_config(), |writer| {
        ground.tools(writer)?;
        writer.layer(|tar| {
            for (name, target) in
                [("proc", "../../../../../tmp/builderd-escape"), ("dev", "/proc/1/root")]
            {
                tar.whiteout(name)?;
                tar.add(name, &Node::symlink(target))?;
            }
            Ok(())
        })
    })?;
    let ended = ground.build(&image, &["true"])?;
    ground.nothing_escaped()?;
    ended.failed("", "").or_else(|_| {
        let cause = ended.build["failure"]["cause"].as_str().unwrap_or_default().to_owned();
        match cause.is_empty() {
            true => bail!("the build ended as {}", ended.build["state"]),
            false => Ok(cause),
        }
    })
}
