//! What is in reach of whoever takes over the process of a build that fetches, by an answer of its
//! registry, while a command of the same build runs: looked at from outside.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::Table;
use super::ground::{BUILD, Ground};
use super::neighbours::descendants;
use crate::service::until;

/// Of the host, and nothing that fetches needs it.
const OF_THE_HOST: [&str; 5] = ["/etc/shadow", "/root", "/sys", "/var", "/dev/loop-control"];
/// CAP_DAC_OVERRIDE, CAP_SETGID and CAP_SETUID: capabilities(7).
const CAPABILITIES: &str = "00000000000000c2";
const LOOK_AGAIN: Duration = Duration::from_millis(50);

pub(super) fn run(ground: &Ground, table: &mut Table) -> Result<()> {
    let config = Ground::tools_config();
    let image = ground.image("fetched", &config, |writer| ground.tools(writer))?;
    // Nobody else's, on this machine.
    let command = format!("sleep 4{}", std::process::id());
    let id = ground.create(&ground.order(&image, &[&command]))?;
    let process = until("a command runs", BUILD, || {
        std::thread::sleep(LOOK_AGAIN);
        Ok(fetcher(ground, &command))
    })?;
    table.add("files of the host, with commands", "own-files", files(ground, &process));
    table.add("processes of the host, with commands", "own-processes", processes(&process));
    table.add("rights on the host, with commands", "capabilities", rights(&process));
    table.add("what the kernel counts by user", "users of its own", user(&process));
    ground.attacker.ask("CancelBuild", &json!({"buildId": id}))?;
    ground.attacker.wait_for(&id, &["CANCELLED"], BUILD)?;
    table.healthy(ground);
    Ok(())
}

/// The process in `/proc`, once the command runs.
fn fetcher(ground: &Ground, command: &str) -> Option<PathBuf> {
    let all: Vec<PathBuf> = descendants(ground.server.id())
        .into_iter()
        .map(|process| PathBuf::from(format!("/proc/{process}")))
        .collect();
    let words = |process: &Path| {
        let words = std::fs::read(process.join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ")
    };
    if !all.iter().any(|process| words(process) == command) {
        return None;
    }
    // Two of the same words wait for it, and have nothing open.
    let has_files = |process: &Path| {
        std::fs::read_dir(process.join("fd")).is_ok_and(|mut files| files.next().is_some())
    };
    all.into_iter().find(|process| words(process).ends_with(" build-child") && has_files(process))
}

fn files(ground: &Ground, process: &Path) -> Result<String> {
    let root = process.join("root");
    let inside = |path: &Path| path.strip_prefix("/").map(|path| root.join(path));
    let database = ground.place.database();
    // Of a directory that its own are in it sees the name.
    let elsewhere =
        OF_THE_HOST.map(Path::new).into_iter().filter(|path| !database.starts_with(path));
    for path in elsewhere.chain([&*database]) {
        if inside(path)?.symlink_metadata().is_ok() {
            bail!("{} is in reach", path.display());
        }
    }
    if !database.exists() {
        bail!("there is no {}", database.display());
    }
    let names = |directory: &Path| -> Result<Vec<String>> {
        let list = std::fs::read_dir(directory);
        let list = list.with_context(|| format!("cannot list {}", directory.display()))?;
        list.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let (staged, all) =
        (names(&inside(&ground.place.staging())?)?, names(&ground.place.staging())?);
    if staged.len() != 1 || all.len() < 2 {
        bail!("of {all:?} it sees {staged:?}");
    }
    let domains = |cache: &Path| names(&cache.join("packs-v3"));
    let (seen, all) = (domains(&inside(&ground.cache)?)?, domains(&ground.cache)?);
    if seen.len() != 1 || all.len() < 2 {
        bail!("of the layers {all:?} it sees {seen:?}");
    }
    Ok("one directory, and the layers of its domain".into())
}

fn processes(process: &Path) -> Result<String> {
    let list = std::fs::read_dir(process.join("root/proc"))?.flatten();
    let names = list.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let numbers: Vec<u32> = names.filter_map(|name| name.parse().ok()).collect();
    match numbers.len() {
        // The first of the namespace, and itself.
        2 => Ok("none of them".into()),
        count => bail!("it can name {count} processes: {numbers:?}"),
    }
}

fn rights(process: &Path) -> Result<String> {
    let status = std::fs::read_to_string(process.join("status"))?;
    for (name, wanted) in [("CapPrm:", CAPABILITIES), ("NoNewPrivs:", "1"), ("Seccomp:", "2")] {
        let value = status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if value != Some(wanted) {
            bail!("{name} {value:?}");
        }
    }
    Ok("none but to start workers".into())
}

/// Which user it is on the host: nobody whom another build has, nor root.
fn user(process: &Path) -> Result<String> {
    /// Above what systems give to people and services.
    const OWN: u32 = 0x6400_0000;
    let users = |name: &str| {
        let status = std::fs::read_to_string(process.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let numbers = line.context("no such line")?.split_whitespace();
        Ok::<Vec<u32>, anyhow::Error>(numbers.filter_map(|number| number.parse().ok()).collect())
    };
    for name in ["Uid:", "Gid:"] {
        let users = users(name)?;
        if users.len() != 4 || users.iter().any(|user| *user < OWN) {
            bail!("{name} {users:?}");
        }
    }
    let map = std::fs::read_to_string(process.join("uid_map"))?;
    let mut ranges = map.lines().map(|line| line.split_whitespace().nth(1));
    let is_own = |first: Option<&str>| {
        first.is_some_and(|first| first.parse().is_ok_and(|first: u32| first >= OWN))
    };
    match ranges.all(is_own) {
        true => Ok("none but its own".into()),
        false => bail!("it can be others: {map}"),
    }
}
