//! What this host gives builds: walls around their workers, and groups that hold them to their
//! limits. Found out once, at the start; it does not know builds.

use std::io;
use std::path::Path;

use sandbox::{Cgroup, CgroupLimits, CgroupRoot, CgroupUsage, SandboxError, Wall};
use sha2::{Digest as _, Sha256};

use super::{child, confined, hex};
use crate::causes::chain;
use crate::staged::Staged;

/// Processes and threads of one build: those of its workers, and room for what they start.
const PIDS_MAX: u64 = 1024;

/// The walls of this host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Host {
    stand: Vec<Wall>,
    missing: Vec<(Wall, String)>,
    groups: Option<CgroupRoot>,
}

impl Host {
    /// Tries every wall. `place` is what this service alone uses: groups are named by it, so that
    /// two services on one host do not clear away each other's. In it, and in `others`, builds read and
    /// write.
    pub(crate) fn open(place: &Path, others: &[&Path]) -> Self {
        let mut host = Self::default();
        let reason = match confined::probe() {
            Ok(stand) => {
                host.stand = stand;
                "the kernel or its settings refuse it".to_owned()
            }
            Err(error) => chain(&error),
        };
        for (wall, tried) in child::probe() {
            match tried {
                Ok(()) => host.stand.push(wall),
                Err(reason) => host.missing.push((wall, reason)),
            }
        }
        // Where the server itself cannot write now there is nothing to be told of a wall.
        let is_writable = |place: &&Path| Staged::create_private_in(place).is_ok();
        let places: Vec<&Path> =
            others.iter().copied().chain([place]).filter(is_writable).collect();
        match host.give_own_users(&places) {
            Ok(()) => host.stand.push(Wall::OwnUsers),
            Err(reason) => host.missing.push((Wall::OwnUsers, reason)),
        }
        match CgroupRoot::open(&group_name(place)) {
            Ok(groups) => {
                host.groups = Some(groups);
                host.stand.push(Wall::Cgroup);
            }
            Err(error) => host.missing.push((Wall::Cgroup, chain(&error))),
        }
        for wall in Wall::ALL {
            let is_known = host.missing.iter().any(|(missing, _)| *missing == wall);
            if !host.stand.contains(&wall) && !is_known {
                host.missing.push((wall, reason.clone()));
            }
        }
        host.stand.sort_unstable();
        host.missing.sort_by_key(|(wall, _)| *wall);
        host
    }

    /// The walls that stand.
    pub(crate) fn stand(&self) -> &[Wall] {
        &self.stand
    }

    /// Those that every worker must find: none may be missing later that stood at the start.
    pub(crate) fn worker_walls(&self) -> Vec<Wall> {
        self.stand.iter().copied().filter(|wall| !Wall::AROUND_BUILDS.contains(wall)).collect()
    }

    /// Those that this host cannot give, and why.
    pub(crate) fn missing(&self) -> &[(Wall, String)] {
        &self.missing
    }

    /// Whether the processes of a build that fetch can be users of their own, who read and write in
    /// `places`; if not, why.
    fn give_own_users(&self, places: &[&Path]) -> Result<(), String> {
        match self.stand.contains(&Wall::OwnFiles) {
            true => child::probe_users(self.stand.contains(&Wall::OwnProcesses), places),
            false => Err(format!("there is no wall {}", Wall::OwnFiles)),
        }
    }

    /// Ends what builds of a service that died have left, and removes their groups.
    pub(crate) fn sweep(&self) {
        let left = self.groups.as_ref().map(CgroupRoot::sweep).unwrap_or_default();
        if !left.is_empty() {
            tracing::warn!(builds = left.join(" "), "processes of dead builds were cleared away");
        }
        clear_leftovers_here();
    }

    /// Removes the place of the groups. No build may run any more.
    pub(crate) fn close(&self) {
        if let Some(groups) = self.groups.clone() {
            groups.sweep();
            groups.remove();
        }
        clear_leftovers_here();
    }

    /// Where the groups are.
    #[cfg(test)]
    pub(super) fn places(&self) -> Vec<std::path::PathBuf> {
        let groups = self.groups.iter();
        groups.flat_map(|groups| groups.places().map(Path::to_owned).collect::<Vec<_>>()).collect()
    }

    /// A group for one try of a build; none on a host without them.
    ///
    /// # Errors
    /// [`SandboxError`] when the kernel refuses the group or a limit.
    pub(crate) fn group(
        &self,
        name: &str,
        memory_bytes: u64,
        cpu_millis: u64,
    ) -> Result<Option<Group>, SandboxError> {
        let Some(groups) = &self.groups else { return Ok(None) };
        let limits = CgroupLimits {
            memory_bytes_max: Some(memory_bytes),
            pids_max: Some(PIDS_MAX),
            cpu_millis: Some(cpu_millis),
        };
        Ok(Some(Group(Some(groups.create(name, &limits)?))))
    }
}

/// The processes of one try of a build. Dropped, they are ended and their group is removed.
#[derive(Debug)]
pub(crate) struct Group(Option<Cgroup>);

impl Group {
    /// Puts a process into it, with all that it starts from now on.
    ///
    /// # Errors
    /// [`SandboxError`] when the kernel refuses.
    pub(crate) fn add(&self, pid: u32) -> Result<(), SandboxError> {
        self.0.as_ref().map_or(Ok(()), |group| group.add(pid))
    }

    /// Which share of the CPUs they have beside other builds: 1 to 10,000.
    ///
    /// # Errors
    /// [`SandboxError`] when the kernel refuses.
    pub(crate) fn set_cpu_weight(&self, weight: u64) -> Result<(), SandboxError> {
        self.0.as_ref().map_or(Ok(()), |group| group.set_cpu_weight(weight))
    }

    /// How much of the CPUs they may take at the most, in thousandths of one.
    ///
    /// # Errors
    /// [`SandboxError`] when the kernel refuses.
    pub(crate) fn set_cpu_limit(&self, millis: u64) -> Result<(), SandboxError> {
        self.0.as_ref().map_or(Ok(()), |group| group.set_cpu_limit(Some(millis)))
    }

    /// Ends them, and waits until none is left and the group is gone. Who stops waiting has them
    /// ended all the same.
    ///
    /// # Errors
    /// When one could not be ended in some seconds: what it has begun to write may still be written.
    /// The next start of the service clears the group away.
    pub(crate) async fn end(mut self) -> io::Result<()> {
        let Some(group) = self.0.take() else { return Ok(()) };
        let ended = tokio::task::spawn_blocking(move || group.end()).await;
        ended.map_err(io::Error::other)?.map_err(io::Error::other)
    }

    /// What they have taken together.
    pub(crate) fn usage(&self) -> CgroupUsage {
        self.0.as_ref().map(Cgroup::usage).unwrap_or_default()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let Some(group) = self.0.take() else { return };
        group.kill();
        // The kernel takes its time to let go of the last process: not a time to hold up others.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(group))),
            Err(_) => drop(group),
        }
    }
}

/// Takes back from the kernel what builds have left whose process was killed; what it does not give now
/// is asked for the next time.
pub(crate) async fn clear_leftovers() {
    aside(clear_leftovers_here).await;
}

/// The same on this thread: who calls it is aside of the others already.
#[expect(clippy::disallowed_methods, reason = "the place that all others ask")]
fn clear_leftovers_here() {
    commands::clear_leftovers();
}

/// Has the kernel work for us, which takes its time: not a time to hold up others.
pub(crate) async fn aside(work: impl FnOnce() + Send + 'static) {
    if let Err(error) = tokio::task::spawn_blocking(work).await {
        tracing::error!(%error, "what the kernel was to do is not done");
    }
}

fn group_name(place: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let place = std::path::absolute(place).unwrap_or_else(|_| place.to_owned());
    let sum: [u8; 32] = Sha256::digest(place.as_os_str().as_bytes()).into();
    format!("builderd-{}", hex(&sum[..8]))
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::thread::{self, ThreadId};

    use super::*;

    #[test]
    fn two_services_name_their_groups_apart() {
        let (one, other) = (group_name(Path::new("/a")), group_name(Path::new("/b")));
        assert_ne!(one, other);
        assert_eq!(one, group_name(Path::new("/a")));
    }

    #[tokio::test]
    async fn what_the_kernel_takes_its_time_for_is_done_aside() {
        static DONE_BY: OnceLock<ThreadId> = OnceLock::new();
        aside(|| DONE_BY.set(thread::current().id()).unwrap()).await;
        assert_ne!(DONE_BY.get().copied(), Some(thread::current().id()));
        assert!(DONE_BY.get().is_some(), "it is waited for");
    }

    #[test]
    fn every_wall_stands_or_is_missing_for_a_reason() {
        // This program is no builderd: its probe fails, and says so.
        let host = Host::open(Path::new("/nowhere/of/a/test"), &[]);
        for wall in Wall::ALL {
            let stands = host.stand().contains(&wall);
            let missing = host.missing().iter().find(|(missing, _)| *missing == wall);
            assert_ne!(stands, missing.is_some(), "{wall}");
            assert!(missing.is_none_or(|(_, why)| !why.is_empty()), "{wall}");
        }
        host.close();
    }
}
