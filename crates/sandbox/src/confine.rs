//! The child's half: a process shuts itself in before it looks at foreign bytes.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};
use rustix::fs::StatVfsMountFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use crate::{SandboxError, SandboxPolicy, Wall, seccomp, users};

/// Any directory that is there can hold the mount that becomes the root.
pub(crate) const MOUNT_POINTS: [&str; 3] = ["/tmp", "/run", "/proc"];

/// An empty directory in the root of a [narrowed](crate::narrow) process: those that it starts mount
/// nothing that is not mounted yet.
pub(crate) const EMPTY: &str = "/empty";

/// Of a root that holds nothing.
const NOTHING: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Shuts this process in and tells which walls stand. To be called once, before the first thread
/// is started and before anything foreign is read; what was opened before stays open.
///
/// Limits, no-new-privileges, seccomp and the end with the parent are never done without. An
/// empty root, capabilities and landlock depend on the host and the namespaces: what is not in
/// the answer does not stand.
///
/// # Errors
/// [`SandboxError`] when one of the first could not be had.
pub fn confine(policy: &SandboxPolicy) -> Result<Vec<Wall>, SandboxError> {
    shut_in(policy, None)
}

/// What may be done in the one directory that a process keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read what is there.
    Look,
    /// Also make files of any kind but devices, and give them away.
    Fill,
}

/// As [`confine`], but `directory` and what is below it stays in reach, by its descriptor, whoever
/// owns the files there: the process keeps the capabilities which that needs, in its own user
/// namespace only.
///
/// # Errors
/// As [`confine`].
pub fn confine_to(
    policy: &SandboxPolicy,
    directory: BorrowedFd<'_>,
    access: Access,
) -> Result<Vec<Wall>, SandboxError> {
    shut_in(policy, Some((directory, access)))
}

fn shut_in(
    policy: &SandboxPolicy,
    reach: Option<(BorrowedFd<'_>, Access)>,
) -> Result<Vec<Wall>, SandboxError> {
    let access = reach.map(|(_, access)| access);
    let failed =
        |action: &'static str| move |source: rustix::io::Errno| SandboxError::new(action, source);
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("end with the parent"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("refuse to be traced"))?;
    let mut walls = Vec::new();
    // What is counted by user must not count the processes of others.
    let has_own_user = has_own_user();
    if empty_root().is_ok() {
        walls.push(Wall::EmptyRoot);
    }
    let threads_max = if has_own_user { policy.threads_max } else { u64::MAX };
    SandboxPolicy { threads_max, ..policy.clone() }
        .apply()
        .map_err(|source| SandboxError::new("limit the process", source))?;
    if drop_capabilities(kept(access)).is_ok() {
        walls.extend(access.is_none().then_some(Wall::NoCapabilities));
    }
    rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    walls.push(Wall::NoNewPrivileges);
    if landlocked(reach) {
        walls.push(Wall::Landlock);
    }
    seccomp::apply(access).map_err(|source| SandboxError::new("filter system calls", source))?;
    walls.push(Wall::Seccomp);
    Ok(walls)
}

/// Whether this user was made for this process alone.
fn has_own_user() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let outside = map.split_ascii_whitespace().nth(1).and_then(|id| id.parse::<u32>().ok());
    outside.is_some_and(|outside| (users::START..u32::MAX).contains(&outside))
}

/// Makes an empty directory that nobody can write the root, and lets go of all else that is
/// mounted. pivot_root(2), "pivot_root(".", ".")".
///
/// In mounts that are certainly this process's own: root on a host without user namespaces would
/// otherwise take the root directory from everybody.
fn empty_root() -> io::Result<()> {
    // SAFETY: this process has one thread still, and nothing but its mounts becomes its own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    let point = MOUNT_POINTS.into_iter().find(|path| Path::new(path).is_dir());
    let point = point.ok_or(io::ErrorKind::NotFound)?;
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let options = Some(c"size=4k,nr_inodes=2,mode=0555");
    let of_old = match rustix::mount::mount("none", point, "tmpfs", NOTHING, options) {
        Err(Errno::PERM) => {
            bind_nothing(point)?;
            MountFlags::BIND
        }
        mounted => {
            mounted?;
            MountFlags::empty()
        }
    };
    rustix::process::chdir(point)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::mount::mount_remount("/", of_old | NOTHING | MountFlags::RDONLY, "")?;
    Ok(rustix::process::chdir("/")?)
}

/// The same from a directory that holds nothing and that nobody can write, if this process has one.
fn bind_nothing(point: &str) -> io::Result<()> {
    let is_closed = rustix::fs::statvfs(EMPTY)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    match is_closed && fs::read_dir(EMPTY)?.next().is_none() {
        true => Ok(rustix::mount::mount_bind(EMPTY, point)?),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// What is needed to read, and to make, files of many owners.
fn kept(access: Option<Access>) -> CapabilitySet {
    let read = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    match access {
        None => CapabilitySet::empty(),
        Some(Access::Look) => read,
        Some(Access::Fill) => {
            let own = CapabilitySet::CHOWN | CapabilitySet::FOWNER | CapabilitySet::FSETID;
            read | own | CapabilitySet::SETFCAP
        }
    }
}

pub(crate) fn drop_capabilities(kept: CapabilitySet) -> io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) => rustix::thread::remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            // The kernel knows no more.
            Err(_) => break,
        }
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: none };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Forbids to signal processes that this one has not started, and to speak to their abstract
/// sockets, where the kernel knows how (Linux 6.12). Files are no part of it: mounts stay possible.
pub(crate) fn keep_to_itself() {
    // A second wall behind that of PID namespaces, and it is that one which is told by name.
    let _ = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .scope(Scope::from_all(ABI::V6))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
}

/// Forbids to open any file (but below the one directory), to bind and connect, and to signal or
/// reach processes outside. What the kernel is too old for is left out; without the file system part
/// there is no wall.
fn landlocked(reach: Option<(BorrowedFd<'_>, Access)>) -> bool {
    let allowed = reach.map(|(directory, access)| {
        let rights = match access {
            Access::Look => AccessFs::from_read(ABI::V5),
            Access::Fill => AccessFs::from_all(ABI::V5),
        };
        PathBeneath::new(directory, rights)
    });
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V5)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.add_rules(allowed.map(Ok::<_, RulesetError>)))
        .and_then(landlock::RulesetCreated::restrict_self);
    ruleset.is_ok_and(|status| status.ruleset != RulesetStatus::NotEnforced)
}
