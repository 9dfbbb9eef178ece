//! Attacks by a tenant, all through the public API: commands, images, registries, requests. Each
//! must fail for the reason that is stated here, and leave the service healthy.
//!
//! The suite needs a binary and a directory and nothing else of a lab, so that it also runs in a
//! machine that has no tools: [`run`] is `cargo xtask attacks`.

mod commands;
mod fetcher;
mod foreign;
mod ground;
mod names;
mod neighbours;
mod rogue;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ground::{Ground, Programs};

use super::Verdict;
use super::lab::{Lab, root_needed};
use super::walls::{Held, carry, groups};
use crate::arguments::Arguments;
use crate::machine;
use crate::process::Program;

/// The last line of a suite in which everything went as it should.
const ALL_FAILED: &str = "every attack failed as it should";

/// Where the suite lies in the guest.
const GUEST: &str = "/root/attacks";
/// An emulated machine is some thirty times slower.
const GUEST_LIMIT: Duration = Duration::from_secs(1500);
const GUEST_MEMORY_MIB: u32 = 2048;

pub(super) fn every_attack_by_a_tenant_fails_for_its_reason_and_leaves_the_service_healthy(
    lab: &Lab,
) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    suite(lab.binary(), &corner.path("attacks"), &corner.path("programs"))?;
    Ok(Verdict::Passed)
}

/// This machine may have version 1, or both; the guest has version 2 alone.
pub(super) fn every_attack_by_a_tenant_fails_where_cgroups_are_of_version_2(
    lab: &Lab,
) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    if lab.scale(0, 1) == 0 {
        let reason = "takes many minutes in an emulated machine: `cargo xtask soak` does it";
        return Ok(Verdict::Skipped(reason.into()));
    }
    let kernel = lab.kernel()?;
    let corner = lab.corner()?;
    let disk = corner.output("rootfs.ext4");
    corner.build(&lab.pushed("small")?, &disk, &["--free-space", "3GiB"])?;
    let programs = Programs::make(&corner.path("programs"))?;
    let own = std::env::current_exe().context("this program has no name")?;
    let runtime = PathBuf::from(Program::shell("command -v runc || ls /usr/sbin/runc").text()?);
    let inside = |name: &str| format!("{GUEST}/{name}");
    carry(
        &corner,
        &disk,
        &[
            (lab.binary(), inside("builderd")),
            (&own, inside("xtask")),
            (&programs.attack, inside("programs/attack")),
            (&programs.overwrite, inside("programs/overwrite.so")),
            (&runtime, "/usr/sbin/runc".into()),
            // Its /bin is a link to there.
            (Path::new("/bin/busybox"), "/usr/bin/busybox".into()),
        ],
    )?;
    let proof = kernel.boot_within(
        &disk,
        &format!(
            "busybox ifconfig lo 127.0.0.1 up; mount -t cgroup2 none /sys/fs/cgroup; \
             mount -t tmpfs none /tmp; touch /etc/hosts /etc/resolv.conf; \
             echo hosts: files dns > /etc/nsswitch.conf; cd {GUEST}; \
             ./xtask attacks --binary {GUEST}/builderd --programs programs --dir {GUEST}/ground 2>&1"
        ),
        GUEST_LIMIT,
        GUEST_MEMORY_MIB,
    )?;
    for line in
        proof.console.lines().filter(|line| line.starts_with('|') || line.starts_with("between"))
    {
        println!("      {line}");
    }
    if !proof.console.contains(ALL_FAILED) {
        bail!("the guest said:\n{}", proof.console);
    }
    println!("      in the guest: {:.0} s", proof.wall.as_secs_f64());
    Ok(Verdict::Passed)
}

/// `cargo xtask attacks [--binary FILE] [--programs DIR] [--dir DIR]`
pub(crate) fn run(mut arguments: Arguments) -> Result<()> {
    let binary = match arguments.value("--binary")? {
        Some(path) => Path::new(&path).canonicalize()?,
        None => crate::workspace::release_binary("builderd")?,
    };
    let scratch = match arguments.value("--dir")? {
        Some(dir) => (PathBuf::from(dir), None),
        None => {
            machine::require(&[machine::DEMO, machine::SERVICE])?;
            let dir = crate::chores::scratch()?;
            (dir.path().join("attacks"), Some(dir))
        }
    };
    let programs = arguments.value("--programs")?.map(PathBuf::from);
    arguments.end()?;
    let programs = programs.unwrap_or_else(|| scratch.0.join("programs"));
    suite(&binary, &scratch.0, &programs)
}

/// Everything that was tried.
#[derive(Default)]
struct Table {
    rows: Vec<(String, String, Result<String>)>,
}

impl Table {
    /// An attack, the wall that is to stop it, and what came of it.
    fn add(&mut self, attack: &str, wall: &str, result: Result<String>) {
        self.rows.push((attack.to_owned(), wall.to_owned(), result));
    }

    /// After heavy attacks: a row of its own only when the service did not take them well.
    fn healthy(&mut self, ground: &Ground) {
        if let Err(error) = ground.is_healthy() {
            let before = self.rows.last().map_or("the start", |(attack, ..)| attack).to_owned();
            self.add(&format!("(after {before})"), "the service is healthy", Err(error));
        }
    }

    fn print(&self) {
        println!("| attack | wall | result |\n|---|---|---|");
        for (attack, wall, result) in &self.rows {
            let result = match result {
                Ok(found) => found.clone(),
                Err(error) => format!("**NOT AS EXPECTED**: {error:#}"),
            };
            println!("| {} | {wall} | {} |", cell(attack), cell(&result));
        }
    }

    fn failures(&self) -> usize {
        self.rows.iter().filter(|(.., result)| result.is_err()).count()
    }
}

/// A text that stays within its cell.
fn cell(text: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(printable).collect::<String>().replace('|', "\\|")
}

/// Attacks a service of its own below `dir`, prints the table, and fails if anything went another
/// way than it should.
fn suite(binary: &Path, dir: &Path, programs: &Path) -> Result<()> {
    let started = Instant::now();
    let loops = loops(dir)?;
    let ground = Ground::open(binary, dir, programs)?;
    let mut table = Table::default();
    table.healthy(&ground);
    // What the others are after lies there, and in the caches, from the start.
    let theirs = neighbours::Private::built(&ground)?;
    commands::run(&ground, &mut table)?;
    fetcher::run(&ground, &mut table)?;
    foreign::images(&ground, &mut table)?;
    foreign::registries(&ground, &mut table)?;
    neighbours::run(&ground, &mut table, &theirs)?;
    let (honest, slowest) = ground.honest();
    let complaints = ground.place.complaints();
    let left = leave(ground, &loops);
    table.add("whatever all of them have left", "the end of a build", left);
    table.print();
    println!(
        "between them {honest} honest builds of another tenant, the slowest in {} ms; {:.1} s",
        slowest.as_millis(),
        started.elapsed().as_secs_f64()
    );
    match table.failures() {
        0 => println!("{ALL_FAILED}"),
        count => bail!("{count} attacks went another way; the service warned of:\n{complaints}"),
    }
    Ok(())
}

/// Stops the service and looks for what should be gone.
fn leave(ground: Ground, loops_before: &BTreeSet<PathBuf>) -> Result<String> {
    ground.nothing_escaped()?;
    let children = ground.server.children();
    if !children.is_empty() {
        bail!("processes {children:?} of builds still run");
    }
    let held = Held::by(&ground.server)?.since(&ground.held);
    if !held.is_empty() {
        bail!("the service still holds {held:?}");
    }
    let builds = ground.all_builds()?;
    let Ground { server, place, dir, .. } = ground;
    let status = server.stop(Duration::from_secs(20))?;
    if !status.success() {
        bail!("SIGTERM ended the service with {status}");
    }
    place.nothing_staged()?;
    // Other services may have builds of their own on this machine; runtimes make groups of commands
    // beside those of builds, named after processes.
    let is_ours = |group: &PathBuf| {
        let is_of_commands = group.parent().is_some_and(|place| place.ends_with("commands"));
        let is_dead = |name: &str| {
            name.split('-').next().is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        };
        let name = group.file_name().and_then(|name| name.to_str());
        builds.iter().any(|id| group.ends_with(id)) || is_of_commands && name.is_some_and(is_dead)
    };
    let groups = groups().into_iter().filter(is_ours);
    let left: Vec<PathBuf> = groups.chain(loops(&dir)?.difference(loops_before).cloned()).collect();
    if !left.is_empty() {
        bail!("{left:?} are left");
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let dir = dir.display().to_string();
    match mounts.lines().find(|line| line.contains(&dir)) {
        Some(line) => bail!("mounted: {line}"),
        None => {
            let count = builds.len();
            let kinds = "process, group, loop device, mount, namespace or file";
            Ok(format!("of {count} builds no {kinds}"))
        }
    }
}

/// Loop devices whose files lie, or lay, below a directory.
fn loops(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for device in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = device.path().join("loop/backing_file");
        // One that has no file has none to read.
        let behind = std::fs::read_to_string(file).unwrap_or_default();
        if behind.contains(dir.to_str().context("the directory has an odd name")?) {
            found.insert(device.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_of_the_table_stays_one_cell() {
        assert_eq!(cell("a|b\nc\u{1b}"), "a\\|b c ");
    }

    #[test]
    fn a_result_that_was_not_expected_counts_as_a_failure() {
        let mut table = Table::default();
        table.add("a", "wall", Ok("EPERM".into()));
        assert_eq!(table.failures(), 0);
        table.add("b", "wall", Err(anyhow::anyhow!("SUCCEEDED")));
        assert_eq!(table.failures(), 1);
    }
}
