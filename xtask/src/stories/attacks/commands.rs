//! What commands of a build try: programs that attack the kernel, the host and other builds.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::Table;
use super::ground::{BUILD, Ground, OPERATORS_SECRET, VICTIMS_CANARY, VICTIMS_TOKEN};
use super::names::TURNING;
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
/// The kernel says the same where either stands: a row cannot tell which it was.
const CALLS_OR_CAPABILITIES: &str = "allow-list of system calls, capabilities";
const NETWORK: &str = "network namespace";
const TREE: &str = "mount namespace";
const PROC: &str = "masked and read-only /proc";
const PROC_OR_USERS: &str = "read-only /proc, user namespace";
/// What the attacker hides from himself: a search that does not find it finds nothing.
const CONTROL: &str = "secret-of-the-attacker-1f8e";

/// What is tried, what stands in the way, and what the attacker may say of it.
type Try = (String, &'static str, &'static [&'static str]);

pub(super) fn run(ground: &Ground, table: &mut Table) -> Result<()> {
    let config = Ground::tools_config();
    let image = ground.image("tools", &config, |writer| ground.tools(writer))?;
    calls(ground, table, &image)?;
    through_proxy(ground, table, &image)?;
    table.add("a namespace of the server's", "seven namespaces", namespaces(ground, &image));
    table.add("argv and environment of everything in sight", PROC, secrets(ground, &image));
    exhaustion(ground, table, &image)?;
    table.add("memory bomb", "memory of the cgroup", memory(ground, &image));
    table.add("fork storm, cancelled", "cgroup's end", storm(ground, &image));
    table.add("fork storm without end", "time limit", endless(ground, &image));
    table.add("log flooding, 80 MB", "bounded log", flood(ground, &image));
    table.add("escape sequences in the log", "cleaned log", steer(ground, &image));
    let result = overwrite(ground);
    table.add("/proc/self/exe of the OCI runtime", "a copy of it, user namespace", result);
    table.add("/proc and /dev that are links", "what is unpacked", links(ground));
    Ok(())
}

/// One line each, all in one build.
fn calls(ground: &Ground, table: &mut Table, image: &str) -> Result<()> {
    let tries = tries(ground)?;
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

/// System calls, of which the wall is that they are refused.
fn refused() -> Vec<Try> {
    const EPERM: &[&str] = &["EPERM"];
    let mut tries: Vec<Try> = Vec::new();
    for words in [
        "ptrace",
        "memory-of-others",
        "unshare",
        "clone",
        "keyctl",
        "add-key",
        "perf",
        "userfault",
        "io-uring",
        "vsock",
        "open-tree",
        "senseless-mount",
        "senseless-setns",
        "senseless-unshare",
    ] {
        tries.push((words.into(), CALLS, EPERM));
    }
    for words in [
        "mount",
        "mount-anew",
        "pivot",
        "setns",
        "bpf",
        "handle",
        "module",
        "reboot",
        "mount-cgroup",
        "unshare-cgroup",
        "raw-socket",
        "packet-socket",
    ] {
        tries.push((words.into(), CALLS_OR_CAPABILITIES, EPERM));
    }
    tries.push(("device".into(), CAPABILITIES, EPERM));
    tries
}

fn tries(ground: &Ground) -> Result<Vec<Try>> {
    const ENOENT: &[&str] = &["ENOENT"];
    const REFUSED: &[&str] = &["ECONNREFUSED"];
    const UNREACHABLE: &[&str] = &["ENETUNREACH"];
    // Of a user who owns nothing there, and of a mount that nobody writes to.
    const UNWRITABLE: &[&str] = &["EACCES", "EROFS"];
    // Not every kernel has it.
    const UNWRITABLE_OR_NONE: &[&str] = &["EACCES", "EROFS", "ENOENT"];
    let mut tries = refused();
    // CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SYS_CHROOT, SETFCAP.
    for set in ["CapEff", "CapBnd"] {
        tries.push((format!("status {set}"), "nine capabilities", &["00000000800400fb"]));
    }
    tries.push(("status Seccomp".into(), CALLS, &["2"]));
    tries.push(("status NoNewPrivs".into(), "no new privileges", &["1"]));
    tries.push(("nobody /bin/raised".into(), "no new privileges", &["user 65534"]));
    tries.push(("kill".into(), "PID namespace", &["ESRCH"]));
    // Groups have other places there on each kind of host; a command sees no place at all.
    tries.push(("read /sys/fs/cgroup".into(), TREE, ENOENT));
    tries.push(("written-to /proc/sys".into(), PROC, &["EROFS"]));
    tries.push(("read /srv/disk".into(), "devices are not unpacked", ENOENT));
    tries.push(("write /proc/sys/kernel/core_pattern".into(), PROC_OR_USERS, UNWRITABLE));
    tries.push(("write /proc/sysrq-trigger".into(), PROC_OR_USERS, UNWRITABLE_OR_NONE));
    for file in ours(ground)? {
        let file = file.display();
        for words in
            [format!("read {file}"), format!("read /proc/1/root{file}"), format!("climb {file}")]
        {
            tries.push((words, TREE, ENOENT));
        }
    }
    let service = ground.server.address().replace(':', " ");
    for place in [ground.neighbour.address().replace(':', " "), service] {
        tries.push((format!("connect {place}"), NETWORK, REFUSED));
    }
    // Where nobody listens nothing is proved.
    if ground.neighbour.is_on_v6() {
        tries.push((format!("connect ::1 {}", ground.neighbour.port()), NETWORK, REFUSED));
    }
    for place in ["169.254.169.254 80", "10.0.0.1 443", "192.168.0.1 53", "fd00:ec2::254 80"] {
        tries.push((format!("connect {place}"), NETWORK, UNREACHABLE));
    }
    Ok(tries)
}

/// Files that no command may see, and that are there: the database with the logs, an artifact and
/// the pack of a layer, which the victim has by now.
fn ours(ground: &Ground) -> Result<[PathBuf; 3]> {
    let database = ground.place.database();
    database.metadata().with_context(|| database.display().to_string())?;
    let artifact = file_below(&ground.place.artifacts())?;
    Ok([database, artifact, file_below(&ground.cache)?])
}

fn file_below(directory: &Path) -> Result<PathBuf> {
    let mut todo = vec![directory.to_owned()];
    while let Some(place) = todo.pop() {
        for entry in std::fs::read_dir(&place)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            match entry.metadata()?.len() {
                1.. if kind.is_file() => return Ok(entry.path()),
                _ if kind.is_dir() => todo.push(entry.path()),
                _ => {}
            }
        }
    }
    bail!("nothing lies below {}", directory.display())
}

/// Where commands may reach whatever is public, they have one way out, which judges every place.
fn through_proxy(ground: &Ground, table: &mut Table, image: &str) -> Result<()> {
    let port = ground.neighbour.port();
    let before = ground.neighbour.connections();
    let places = [
        format!("127.0.0.1:{port}"),
        format!("0x7f.1:{port}"),
        format!("[::1]:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        format!("localhost:{port}"),
        ground.server.address().to_owned(),
        "169.254.169.254:80".to_owned(),
        "10.0.0.1:443".to_owned(),
        format!("inside.attacker.example:{port}"),
        "metadata.attacker.example:80".to_owned(),
        format!("both.attacker.example:{port}"),
    ];
    // What the operator allows is reached, or the rest proves nothing; the last one twice, since
    // it leads there and to the neighbour in turn.
    let (allowed, turning) = (ground.names.lure().to_string(), format!("{TURNING}:{port}"));
    let all = [&[allowed][..], &places, &[turning.clone(), turning]].concat();
    let script: Vec<String> = all.iter().map(|place| format!("attack proxy '{place}'")).collect();
    let ended = ground.roam(image, &[&script.join("; ")])?;
    let said = ended.said("proxy");
    let [allowed, denied @ .., one, other] = &said[..] else {
        bail!("it said {said:?}: {}", ended.build["failure"]);
    };
    if *allowed != "200" || denied.len() != places.len() {
        bail!("the proxy said {said:?}: {:?}", ended.lines);
    }
    let judged = |is_refused: bool, said: &str| match is_refused {
        true => Ok(said.to_owned()),
        false => bail!("{said}"),
    };
    for (place, said) in places.iter().zip(denied) {
        let what = format!("CONNECT {}", place.replace(port, "PORT"));
        table.add(&what, "proxy of the commands", judged(*said == "403", said));
    }
    let turned = ["200 403", "403 200"].contains(&format!("{one} {other}").as_str());
    let turned = judged(turned, &format!("{one}, {other}"));
    table.add("CONNECT to a name that turns, twice", "proxy of the commands", turned);
    let met = ground.neighbour.connections() - before;
    let untouched = judged(met == 0, &format!("{met} connections"));
    table.add("any of them at the neighbour", "proxy of the commands", untouched);
    Ok(())
}

/// Whoever is in a namespace of the server's has that one's powers over it.
fn namespaces(ground: &Ground, image: &str) -> Result<String> {
    const KINDS: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    let script = KINDS.map(|kind| format!("attack namespace {kind}")).join("; ");
    let ended = ground.build(image, &[&script])?;
    let said = ended.said("namespace");
    if said.len() != KINDS.len() {
        bail!("it said {said:?}: {}", ended.build["failure"]);
    }
    for (kind, own) in KINDS.iter().zip(said) {
        let path = format!("/proc/{}/ns/{kind}", ground.server.id());
        let servers = std::fs::read_link(path)?.display().to_string();
        if own == servers || !own.starts_with(&format!("{kind}:[")) {
            bail!("a command is in {own}, and the server in {servers}");
        }
    }
    Ok("none of them".into())
}

/// Every secret there is, looked for wherever a command can look.
fn secrets(ground: &Ground, image: &str) -> Result<String> {
    // A pattern that is not what it matches: the search must not find itself.
    let pattern = |secret: &str| {
        let (front, last) = secret.split_at(secret.len() - 1);
        format!("{front}[{last}]")
    };
    let mut script = format!("export OWN={CONTROL}; cat /proc/*/environ /proc/*/cmdline ");
    script.push_str("2>/dev/null | tr '\\0' '\\n' > /srv/seen; ");
    for secret in [OPERATORS_SECRET, VICTIMS_TOKEN, VICTIMS_CANARY, CONTROL] {
        let pattern = pattern(secret);
        script.push_str(&format!(
            "echo attack seen: $(grep -rl '{pattern}' /srv /bin /dev/shm /etc /tmp /var | wc -l); "
        ));
    }
    script.push_str("echo attack seen: $(grep -c builder[d] /srv/seen)");
    let ended = ground.build(image, &[&script])?;
    match ended.said("seen")[..] {
        ["0", "0", "0", "1", "0"] => Ok("nothing found but its own".into()),
        [_, _, _, "0", _] => bail!("the search does not even find its own: {:?}", ended.lines),
        ref seen => bail!("secrets were found: {seen:?} {:?}", ended.build["failure"]),
    }
}

/// What ends at a number that the kernel counts to: with which error, and after how much. Another
/// wall far behind the one that is meant would end it, too, and so would one in front of it.
type Exhaustion = (&'static str, &'static str, &'static str, &'static str, RangeInclusive<u64>);

fn exhaustion(ground: &Ground, table: &mut Table, image: &str) -> Result<()> {
    const DISK: &str = "scratch file system";
    const TMPFS: &str = "size of the tmpfs";
    let tried: [Exhaustion; 6] = [
        ("fork bomb", "PIDs of the cgroup", "attack forks", "EAGAIN", 100..=512),
        ("open files", "RLIMIT_NOFILE", "attack files", "EMFILE", 100..=65_536),
        ("inodes", DISK, "attack inodes; rm -rf /srv/inodes", "ENOSPC", 1000..=1 << 20),
        // KiB from here on. There is a device at /dev/full that is always full.
        ("disk filler", DISK, "attack fill /srv/full; rm /srv/full", "ENOSPC", 1 << 14..=1 << 18),
        ("disk filler in /dev", TMPFS, "attack fill /dev/more", "ENOSPC", 4..=64),
        ("disk filler in /dev/shm", TMPFS, "attack fill /dev/shm/more", "ENOSPC", 1024..=65_536),
    ];
    for (what, wall, script, error, bounds) in tried {
        let word = script.split([' ', ';']).nth(1).unwrap_or_default();
        let ended = ground.build(image, &[script])?;
        let said: Vec<String> = ended.said(word).iter().map(|&line| line.to_owned()).collect();
        let result = ended.completed().and_then(|_| match &said[..] {
            [line] if counted(line, error).is_some_and(|count| bounds.contains(&count)) => {
                Ok(line.clone())
            }
            other => bail!("{other:?}, not {error} after {bounds:?}"),
        });
        table.add(what, wall, result);
        table.healthy(ground);
    }
    Ok(())
}

/// How much there was before this error.
fn counted(line: &str, error: &str) -> Option<u64> {
    let rest = line.strip_prefix(error)?.strip_prefix(" after ")?;
    rest.split(' ').next()?.parse().ok()
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
    // The runtime never sees it: it would follow the one of /dev out of the image.
    ended.failed("INVALID_SOURCE", "/dev of the image is no directory")
}
