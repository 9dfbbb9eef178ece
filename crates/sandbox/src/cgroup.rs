//! Groups of processes that the kernel holds to their limits: cgroups(7), version 2, version 1,
//! and hosts that have both, where each controller is on the one or the other.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, Signal};

use crate::SandboxError;
use crate::spawn::pid;

/// How long the kernel may take to end what was killed.
const DEATH_MAX: Duration = Duration::from_secs(5);
const DEATH_POLL: Duration = Duration::from_millis(2);
/// Descriptors of processes that are about to be ended.
const HELD_AT_ONCE: usize = 64;
/// How long a group may be without processes that will have some.
const EMPTY_MAX: Duration = Duration::from_secs(60);
/// The period of CPU limits, in microseconds; the kernel's default.
const CPU_PERIOD_USECS: u64 = 100_000;
/// The group that a service moves itself into on version 2, where only leaves have processes.
const OWN_LEAF: &str = "service";

/// What a group may take. None: no limit of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupLimits {
    /// Bytes of memory, page cache included; no swap beside it.
    pub memory_bytes_max: Option<u64>,
    /// Processes and threads.
    pub pids_max: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
}

/// What a group has taken so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CgroupUsage {
    /// Bytes of memory at the most.
    pub memory_peak_bytes: u64,
    /// CPU time.
    pub cpu_usecs: u64,
    /// Processes ended because memory ran out.
    pub out_of_memory_kills: u64,
    /// Processes and threads refused by `pids_max`.
    pub pids_refused: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Kernel documentation, "Control Group v2", `cpu.weight`.
const CPU_WEIGHT_MAX: u64 = 10_000;

/// The controllers used here.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// Of version 1 alone.
const ACCOUNTING: &str = "cpuacct";

/// A place in the hierarchies below which groups can be made.
#[derive(Clone, Debug)]
pub struct CgroupRoot {
    /// By controller: the directory, and the version of its hierarchy.
    places: BTreeMap<&'static str, (PathBuf, Version)>,
    /// The same place in the hierarchies that are not used here, where container runtimes make
    /// their groups as well. Not made here.
    elsewhere: Vec<PathBuf>,
}

impl CgroupRoot {
    /// Finds the group of this process in each hierarchy and makes `name` below it, the place of all
    /// groups of one service. On version 2 this process is moved into a leaf beside it first, and
    /// the controllers are handed down.
    ///
    /// # Errors
    /// [`SandboxError`] when a controller is missing, or the place is not ours to write in: a
    /// service of systemd needs `Delegate=yes`.
    pub fn open(name: &str) -> Result<Self, SandboxError> {
        let failed = |source: io::Error| SandboxError::new("read /proc/self/cgroup", source);
        let groups = fs::read_to_string("/proc/self/cgroup").map_err(failed)?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(failed)?;
        let mut places = BTreeMap::new();
        for controller in CONTROLLERS {
            let (base, version) = find(controller, &groups, &mounts).ok_or_else(|| {
                let text = format!("find the cgroup controller {controller}");
                SandboxError::new(&text, io::Error::from(io::ErrorKind::NotFound))
            })?;
            let place = base.join(name);
            clear_places(&base, name);
            let made =
                |source| SandboxError::new(&format!("make the cgroup {}", place.display()), source);
            if version == Version::V2 {
                hand_down(&base, controller).map_err(made)?;
            }
            make_place(&place, controller, version).map_err(made)?;
            places.insert(controller, (place, version));
        }
        add_accounting(&mut places, &groups, &mounts, name)?;
        let elsewhere = hierarchies(&groups, &mounts).into_iter().map(|base| base.join(name));
        let is_used = |place: &PathBuf| places.values().any(|(used, _)| used == place);
        let elsewhere = elsewhere.filter(|place| !is_used(place)).collect();
        Ok(Self { places, elsewhere })
    }

    /// Removes groups below `name` beside this process's own, in every hierarchy, that have no
    /// process any more and of which `is_left` says that nobody comes back to them. Container
    /// runtimes make such groups also in hierarchies that are not used here, where nobody who is
    /// killed can remove them.
    pub fn remove_empty(name: &str, is_left: impl Fn(&str) -> bool) {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let all = hierarchies(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
        for place in all.into_iter().map(|base| base.join(name)) {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                if entry.file_name().to_str().is_some_and(&is_left) {
                    // The kernel refuses where a process is.
                    let _ = fs::remove_dir(entry.path());
                }
            }
        }
    }

    /// The directories below which groups are made.
    pub fn places(&self) -> impl Iterator<Item = &Path> {
        self.places.values().map(|(place, _)| place.as_path())
    }

    /// A new group with `limits`, still without processes. One of the same name that was left is
    /// ended and removed first, with its weight and what was counted in it.
    ///
    /// # Errors
    /// [`SandboxError`] with the file that could not be written, or as [`Cgroup::end`] has it.
    pub fn create(&self, name: &str, limits: &CgroupLimits) -> Result<Cgroup, SandboxError> {
        self.existing(name).end()?;
        let group = self.existing(name);
        // Dropped on an error, it removes what was made so far.
        for (controller, (directory, version)) in &group.places {
            let place = &self.places[controller].0;
            let result = make_below(place, controller, *version, directory)
                .and_then(|()| set(controller, directory, *version, limits));
            result.map_err(|source| {
                SandboxError::new(&format!("make the cgroup {}", directory.display()), source)
            })?;
        }
        Ok(group)
    }

    /// Ends every process in the groups below and removes them: what a service that died has
    /// left. Gives their names.
    pub fn sweep(&self) -> Vec<String> {
        let names = self.names();
        for name in &names {
            drop(self.existing(name));
        }
        names
    }

    /// The names of the groups below.
    fn names(&self) -> Vec<String> {
        let mut names = std::collections::BTreeSet::new();
        for place in self.places().chain(self.elsewhere.iter().map(PathBuf::as_path)) {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    names.insert(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        names.into_iter().collect()
    }

    /// Removes the place itself, when nothing is below it any more. Where runtimes make it, it
    /// stays: another service may have the same place there, and be about to use it.
    pub fn remove(self) {
        for place in self.places() {
            let _ = fs::remove_dir(place);
        }
    }

    /// A group that somebody else has made below, a container's: its processes are ended and it is
    /// removed when the answer is dropped. One that is not there has no processes.
    #[must_use]
    pub fn existing(&self, name: &str) -> Cgroup {
        let below = |(place, version): &(PathBuf, Version)| (place.join(name), *version);
        Cgroup {
            places: self.places.iter().map(|(&c, place)| (c, below(place))).collect(),
            elsewhere: self.elsewhere.iter().map(|place| place.join(name)).collect(),
        }
    }
}

/// A group of processes. Dropped, all of them are ended and the group is removed.
#[derive(Debug)]
pub struct Cgroup {
    places: BTreeMap<&'static str, (PathBuf, Version)>,
    /// Those of the same name that a runtime may have made in the other hierarchies.
    elsewhere: Vec<PathBuf>,
}

impl Cgroup {
    /// Puts a process into the group; those it starts from now on are in it as well.
    ///
    /// # Errors
    /// [`SandboxError`] with the group that would not have it.
    pub fn add(&self, pid: u32) -> Result<(), SandboxError> {
        for directory in self.directories() {
            write(directory, "cgroup.procs", &pid.to_string()).map_err(|source| {
                let text = format!("put process {pid} into the cgroup {}", directory.display());
                SandboxError::new(&text, source)
            })?;
        }
        Ok(())
    }

    /// What the group has taken; what the kernel does not tell is 0.
    #[must_use]
    pub fn usage(&self) -> CgroupUsage {
        let number = |controller: &str, v1: (&str, &str), v2: (&str, &str)| {
            let (directory, version) = self.places.get(controller)?;
            let (file, key) = if *version == Version::V1 { v1 } else { v2 };
            value(&fs::read_to_string(directory.join(file)).ok()?, key)
        };
        let peak = ("memory.max_usage_in_bytes", "");
        let stat = ("cpu.stat", "usage_usec");
        CgroupUsage {
            memory_peak_bytes: number("memory", peak, ("memory.peak", "")).unwrap_or(0),
            cpu_usecs: number("cpu", stat, stat)
                .or_else(|| Some(number(ACCOUNTING, ("cpuacct.usage", ""), stat)? / 1000))
                .unwrap_or(0),
            out_of_memory_kills: number(
                "memory",
                ("memory.oom_control", "oom_kill"),
                ("memory.events", "oom_kill"),
            )
            .unwrap_or(0),
            pids_refused: number("pids", ("pids.events", "max"), ("pids.events", "max"))
                .unwrap_or(0),
        }
    }

    /// Which share of the CPUs it has beside other groups when there are too few: 1 to 10,000, all
    /// groups having 100 at first.
    ///
    /// # Errors
    /// [`SandboxError`] with the group that would not have it.
    pub fn set_cpu_weight(&self, weight: u64) -> Result<(), SandboxError> {
        let Some((directory, version)) = self.places.get("cpu") else { return Ok(()) };
        let weight = weight.clamp(1, CPU_WEIGHT_MAX);
        let result = match version {
            // A group has 1024 of them at first, and 2 at the least.
            Version::V1 => write(directory, "cpu.shares", &(weight * 1024 / 100).to_string()),
            Version::V2 => write(directory, "cpu.weight", &weight.to_string()),
        };
        result.map_err(|source| {
            SandboxError::new(&format!("weigh the cgroup {}", directory.display()), source)
        })
    }

    /// How much of the CPUs it may take at the most, in thousandths of one; none: as much as there
    /// is. Groups below may have no limit of their own: version 1 refuses one below theirs.
    ///
    /// # Errors
    /// [`SandboxError`] with the group that would not have it.
    pub fn set_cpu_limit(&self, millis: Option<u64>) -> Result<(), SandboxError> {
        let Some((directory, version)) = self.places.get("cpu") else { return Ok(()) };
        limit_cpu(directory, *version, millis).map_err(|source| {
            SandboxError::new(&format!("limit the cgroup {}", directory.display()), source)
        })
    }

    /// Directories of the group, for tools that put processes into them.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        let mut all: Vec<&Path> = self.places.values().map(|(place, _)| place.as_path()).collect();
        all.dedup();
        all.into_iter()
    }

    /// Ends every process of the group that is there now. Does not wait.
    pub fn kill(&self) {
        self.hurry();
        for (directory, version) in self.places.values() {
            if *version == Version::V2 {
                // Since Linux 5.14: all at once, children in the making too.
                let _ = write(directory, "cgroup.kill", "1");
            }
            kill_below(directory);
        }
    }

    /// Who is killed needs the CPU once more to end, and must not wait for it behind others; nor may
    /// he be frozen, as a runtime may have left him.
    fn hurry(&self) {
        // One that is not there has nothing to end.
        let _ = self.set_cpu_weight(CPU_WEIGHT_MAX);
        let _ = self.set_cpu_limit(None);
        for directory in &self.elsewhere {
            // Of version 1 alone: on version 2 the frozen can be killed.
            let _ = write(directory, "freezer.state", "THAWED");
        }
    }

    /// Ends every process of the group, waits until the kernel has let go of the last one, with its
    /// memory and its files, and removes the group.
    ///
    /// # Errors
    /// [`SandboxError`] when that takes longer than some seconds: who waits for a disk is not ended
    /// before the disk has answered, and what he has begun to write may still be written.
    pub fn end(mut self) -> Result<(), SandboxError> {
        let left = self.clear();
        // What could not be ended now is not waited for once more.
        self.places.clear();
        self.elsewhere.clear();
        left.map_or(Ok(()), |directory| {
            let text = format!("end the processes of the cgroup {}", directory.display());
            Err(SandboxError::new(&text, io::Error::from(io::ErrorKind::TimedOut)))
        })
    }

    /// Ends and removes the group; tells of one that is still there.
    fn clear(&self) -> Option<PathBuf> {
        let wait = if self.kill_all() { DEATH_MAX } else { Duration::ZERO };
        let deadline = Instant::now() + wait;
        let mut left = None;
        for (directory, _) in self.places.values() {
            if !remove_below(directory, deadline) {
                left = Some(directory.clone());
            }
        }
        for directory in &self.elsewhere {
            remove_below(directory, deadline);
        }
        left
    }

    /// Ends every process of the group, also one that starts others as fast as it can. Whether none
    /// is left.
    fn kill_all(&self) -> bool {
        let deadline = Instant::now() + DEATH_MAX;
        self.hurry();
        loop {
            let mut alive = 0;
            for (directory, version) in self.places.values() {
                if *version == Version::V2 {
                    // Since Linux 5.14: all at once, children in the making too.
                    let _ = write(directory, "cgroup.kill", "1");
                }
                alive += kill_below(directory);
            }
            if alive == 0 || Instant::now() > deadline {
                return alive == 0;
            }
            std::thread::sleep(DEATH_POLL);
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Kills the processes of a group and of those below it; tells how many were there.
fn kill_below(directory: &Path) -> usize {
    let mut count = 0;
    for below in groups_below(directory) {
        count += kill_below(&below);
    }
    count + kill_listed(|| processes(directory))
}

/// Kills the processes that are listed; tells how many were.
fn kill_listed(listed: impl Fn() -> Vec<u32>) -> usize {
    let numbers = listed();
    for some in numbers.chunks(HELD_AT_ONCE) {
        let hold = |&number: &u32| {
            let process = rustix::process::pidfd_open(pid(number)?, PidfdFlags::empty());
            Some((number, process.ok()?))
        };
        let held: Vec<(u32, OwnedFd)> = some.iter().filter_map(hold).collect();
        // Numbers of processes are given again: who is listed still, behind being held, is meant.
        let still = listed();
        for (_, process) in held.iter().filter(|(number, _)| still.contains(number)) {
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
    }
    numbers.len()
}

/// The processes of a group. One that cannot be named from here is 0.
fn processes(directory: &Path) -> Vec<u32> {
    let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    listed.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Removes a group and those below it; false if one is still there at the end of `deadline`.
fn remove_below(directory: &Path, deadline: Instant) -> bool {
    for below in groups_below(directory) {
        remove_below(&below, deadline);
    }
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            // As long as the last process is not wholly gone.
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::sleep(DEATH_POLL);
            }
            Err(_) => return false,
        }
    }
}

fn groups_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let groups = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    groups.map(|entry| entry.path()).collect()
}

/// The directory of this process's group in the hierarchy that has `controller`.
fn find(controller: &str, groups: &str, mounts: &str) -> Option<(PathBuf, Version)> {
    // proc(5): "hierarchy-ID:controller-list:cgroup-path".
    let v1 = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then_some(path)
    });
    if let Some(path) = v1 {
        let mounted = mounted(mounts, "cgroup", Some(controller), path)?;
        return Some((mounted, Version::V1));
    }
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mounted = mounted(mounts, "cgroup2", None, path)?;
    let offered = fs::read_to_string(mounted.join("cgroup.controllers")).ok()?;
    offered.split_whitespace().any(|name| name == controller).then_some((mounted, Version::V2))
}

/// The directories of this process's group in all hierarchies.
fn hierarchies(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let found = groups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        match controllers.split(',').next()? {
            "" => mounted(mounts, "cgroup2", None, path),
            controller => mounted(mounts, "cgroup", Some(controller), path),
        }
    });
    found.collect()
}

/// Where the group `path` of the hierarchy is mounted: proc(5), "/proc/pid/mountinfo".
fn mounted(mounts: &str, kind: &str, controller: Option<&str>, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut back = back.split(' ');
        let options = (back.next()? == kind).then(|| back.nth(1))??;
        let is_it = controller.is_none_or(|name| options.split(',').any(|option| option == name));
        let mut front = front.split(' ').skip(3);
        let (root, point) = (front.next()?, front.next()?);
        let below = Path::new(path).strip_prefix(root).ok()?;
        is_it.then(|| Path::new(point).join(below))
    })
}

/// On version 1 the time that groups take is told by a controller of its own. A host without it
/// tells none.
fn add_accounting(
    places: &mut BTreeMap<&'static str, (PathBuf, Version)>,
    groups: &str,
    mounts: &str,
    name: &str,
) -> Result<(), SandboxError> {
    if places.get("cpu").is_none_or(|(_, version)| *version == Version::V2) {
        return Ok(());
    }
    let Some((base, version)) = find(ACCOUNTING, groups, mounts) else { return Ok(()) };
    let place = base.join(name);
    clear_places(&base, name);
    make_place(&place, ACCOUNTING, version).map_err(|source| {
        SandboxError::new(&format!("make the cgroup {}", place.display()), source)
    })?;
    places.insert(ACCOUNTING, (place, version));
    Ok(())
}

/// Lets groups below `base` have `controller`. Where `base` is not the top, it may have no
/// processes of its own then: "no internal processes", cgroups(7).
fn hand_down(base: &Path, controller: &str) -> io::Result<()> {
    let enable = || write(base, "cgroup.subtree_control", &format!("+{controller}"));
    match enable() {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
        other => return other,
    }
    let leaf = base.join(OWN_LEAF);
    make(&leaf)?;
    move_all(&leaf, &fs::read_to_string(base.join("cgroup.procs"))?)?;
    enable()
}

/// Puts processes, a line for each, into a group.
fn move_all(group: &Path, listed: &str) -> io::Result<()> {
    for process in listed.lines() {
        match write(group, "cgroup.procs", process) {
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            moved => moved?,
        }
    }
    Ok(())
}

/// A place below which groups can have `controller`.
fn make_place(place: &Path, controller: &str, version: Version) -> io::Result<()> {
    make(place)?;
    match version {
        Version::V1 => Ok(()),
        Version::V2 => write(place, "cgroup.subtree_control", &format!("+{controller}")),
    }
}

/// Makes a group in its place. That is gone when somebody else has cleared away what nobody used, or
/// does so now: from then on it stays.
fn make_below(
    place: &Path,
    controller: &str,
    version: Version,
    directory: &Path,
) -> io::Result<()> {
    const TRIES: u32 = 16;
    let make_both = || make_place(place, controller, version).and_then(|()| make(directory));
    let mut made = make_both();
    for _ in 1..TRIES {
        match &made {
            Err(error) if error.kind() == io::ErrorKind::NotFound => made = make_both(),
            _ => break,
        }
    }
    made
}

/// Removes the places of services that were killed and never came back: those with a name like
/// `name`, and no process in them for a while. The kernel refuses to remove any other.
fn clear_places(base: &Path, name: &str) {
    let Some((kind, _)) = name.split_once('-') else { return };
    for place in groups_below(base) {
        let other = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if other != name && other.strip_prefix(kind).is_some_and(|rest| rest.starts_with('-')) {
            for group in groups_below(&place).iter().filter(|group| is_old(group)) {
                let _ = fs::remove_dir(group);
            }
            let _ = fs::remove_dir(&place);
        }
    }
}

/// Whether a group has been there longer than one waits for its first process.
fn is_old(group: &Path) -> bool {
    let made = fs::metadata(group).and_then(|metadata| metadata.modified());
    made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > EMPTY_MAX))
}

fn set(
    controller: &str,
    directory: &Path,
    version: Version,
    limits: &CgroupLimits,
) -> io::Result<()> {
    match (controller, version) {
        ("memory", Version::V1) => {
            let Some(bytes) = limits.memory_bytes_max else { return Ok(()) };
            write(directory, "memory.limit_in_bytes", &bytes.to_string())?;
            // Only where the kernel counts swap.
            optional(write(directory, "memory.memsw.limit_in_bytes", &bytes.to_string()))
        }
        ("memory", Version::V2) => {
            let Some(bytes) = limits.memory_bytes_max else { return Ok(()) };
            write(directory, "memory.max", &bytes.to_string())?;
            optional(write(directory, "memory.swap.max", "0"))
        }
        ("pids", _) => match limits.pids_max {
            Some(most) => write(directory, "pids.max", &most.to_string()),
            None => Ok(()),
        },
        ("cpu", version) if limits.cpu_millis.is_some() => {
            limit_cpu(directory, version, limits.cpu_millis)
        }
        _ => Ok(()),
    }
}

fn limit_cpu(directory: &Path, version: Version, millis: Option<u64>) -> io::Result<()> {
    // The kernel has none below 1 ms.
    let quota = millis.map(|millis| (CPU_PERIOD_USECS.saturating_mul(millis) / 1000).max(1000));
    match version {
        Version::V1 => {
            write(directory, "cpu.cfs_period_us", &CPU_PERIOD_USECS.to_string())?;
            let quota = quota.map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
            write(directory, "cpu.cfs_quota_us", &quota)
        }
        Version::V2 => {
            let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
            write(directory, "cpu.max", &format!("{quota} {CPU_PERIOD_USECS}"))
        }
    }
}

fn optional(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn make(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Opened without making: a file that is not there is an error, not a new file.
fn write(directory: &Path, file: &str, text: &str) -> io::Result<()> {
    use std::io::Write as _;
    fs::OpenOptions::new().write(true).open(directory.join(file))?.write_all(text.as_bytes())
}

/// The number of a file that is one, or of the line that starts with `key`.
fn value(text: &str, key: &str) -> Option<u64> {
    if key.is_empty() {
        return text.trim().parse().ok();
    }
    text.lines().find_map(|line| {
        let (name, number) = line.split_once(' ')?;
        (name == key).then(|| number.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
25 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
27 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
28 25 0:25 /docker/abc /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
29 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";

    #[test]
    fn a_controller_is_found_on_the_hierarchy_that_has_it() {
        let groups = "5:cpu,cpuacct:/a\n4:memory:/b/c\n3:pids:/docker/abc/d\n0::/";
        let place = |controller| find(controller, groups, MOUNTS).unwrap();
        assert_eq!(place("memory"), ("/sys/fs/cgroup/memory/b/c".into(), Version::V1));
        assert_eq!(place("cpu"), ("/sys/fs/cgroup/cpu,cpuacct/a".into(), Version::V1));
        assert_eq!(place("pids"), ("/sys/fs/cgroup/pids/d".into(), Version::V1));
        assert_eq!(find("io", groups, MOUNTS), None);
    }

    fn sleeper() -> std::process::Child {
        #[expect(clippy::disallowed_methods, reason = "tests start programs")]
        let sleeper = std::process::Command::new("sleep").arg("60").spawn();
        sleeper.unwrap()
    }

    #[test]
    fn a_number_that_is_given_to_somebody_else_meanwhile_kills_nobody() {
        let mut other = sleeper();
        let number = other.id();
        let looks = std::cell::Cell::new(0);
        // Between two looks who had the number has ended, and one outside of the group has got it.
        let listed = || match looks.replace(looks.get() + 1) {
            0 => vec![number],
            _ => Vec::new(),
        };
        assert_eq!(kill_listed(listed), 1);
        std::thread::sleep(Duration::from_millis(100));
        assert!(other.try_wait().unwrap().is_none(), "it was none of the group's");
        assert_eq!(kill_listed(|| vec![number]), 1);
        let ended = std::os::unix::process::ExitStatusExt::signal(&other.wait().unwrap());
        assert_eq!(ended, Some(libc::SIGKILL));
        // Nobody has the number now.
        assert_eq!(kill_listed(|| vec![number]), 1);
    }

    #[test]
    fn who_has_ended_before_he_is_moved_keeps_nobody_where_he_is() {
        let name = format!("builderd-test-move-{}", std::process::id());
        let Ok(root) = CgroupRoot::open(&name) else {
            println!("skipped: no cgroups for this user");
            return;
        };
        let group = root.create("moved", &CgroupLimits::default()).unwrap();
        let (mut gone, mut lives) = (sleeper(), sleeper());
        gone.kill().unwrap();
        gone.wait().unwrap();
        let listed = format!("{}\n{}\n", gone.id(), lives.id());
        let directory = group.directories().next().unwrap();
        move_all(directory, &listed).unwrap();
        assert_eq!(processes(directory), [lives.id()]);
        // What is no process at all is told.
        move_all(directory, "x\n").unwrap_err();
        drop(group);
        root.remove();
        lives.wait().unwrap();
    }

    #[test]
    fn numbers_are_read_alone_or_by_their_key() {
        assert_eq!(value("4096\n", ""), Some(4096));
        assert_eq!(value("low 0\noom 2\noom_kill 7\n", "oom_kill"), Some(7));
        assert_eq!(value("max\n", ""), None);
        assert_eq!(value("", "oom_kill"), None);
    }
}
