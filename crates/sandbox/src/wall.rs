//! What stands between a confined process and the host.

use serde::{Deserialize, Serialize};

/// One wall. A host gives all of them, or says which it cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wall {
    /// user_namespaces(7): root inside is nobody outside.
    UserNamespace,
    /// pid_namespaces(7): no other process can be named; all die with the first.
    PidNamespace,
    /// network_namespaces(7): no interface, not even loopback, is up.
    NetworkNamespace,
    /// ipc_namespaces(7).
    IpcNamespace,
    /// uts_namespaces(7).
    UtsNamespace,
    /// cgroup_namespaces(7).
    CgroupNamespace,
    /// mount_namespaces(7) and pivot_root(2): the only directory is an empty one that cannot be
    /// written.
    EmptyRoot,
    /// capabilities(7): none, and none in the bounding set.
    NoCapabilities,
    /// `PR_SET_NO_NEW_PRIVS`, prctl(2).
    NoNewPrivileges,
    /// seccomp(2) with an allow-list.
    Seccomp,
    /// landlock(7): no file can be opened, no address bound or connected to.
    Landlock,
    /// mount_namespaces(7): who fetches for a build sees that build's directories alone
    /// ([`narrow`](crate::narrow)).
    OwnFiles,
    /// pid_namespaces(7): who fetches for a build names that build's processes alone, and they end
    /// with it ([`Processes::Own`](crate::Processes)).
    OwnProcesses,
    /// user_namespaces(7) and mount_setattr(2): who fetches for a build is a user of that build alone
    /// ([`narrow`](crate::narrow)).
    OwnUsers,
    /// cgroups(7): memory, CPU and number of processes of a build are held by the kernel.
    Cgroup,
}

impl Wall {
    /// Every wall.
    pub const ALL: [Self; 15] = [
        Self::UserNamespace,
        Self::PidNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::EmptyRoot,
        Self::NoCapabilities,
        Self::NoNewPrivileges,
        Self::Seccomp,
        Self::Landlock,
        Self::OwnFiles,
        Self::OwnProcesses,
        Self::OwnUsers,
        Self::Cgroup,
    ];

    /// Those that do not stand around a worker: they are around its whole build, or around who
    /// fetches for it.
    pub const AROUND_BUILDS: [Self; 4] =
        [Self::OwnFiles, Self::OwnProcesses, Self::OwnUsers, Self::Cgroup];

    /// Those that come with the namespaces a process is started in.
    pub const NAMESPACES: [Self; 6] = [
        Self::UserNamespace,
        Self::PidNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
    ];

    /// The word for people and programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UserNamespace => "user-namespace",
            Self::PidNamespace => "pid-namespace",
            Self::NetworkNamespace => "network-namespace",
            Self::IpcNamespace => "ipc-namespace",
            Self::UtsNamespace => "uts-namespace",
            Self::CgroupNamespace => "cgroup-namespace",
            Self::EmptyRoot => "empty-root",
            Self::NoCapabilities => "no-capabilities",
            Self::NoNewPrivileges => "no-new-privileges",
            Self::Seccomp => "seccomp",
            Self::Landlock => "landlock",
            Self::OwnFiles => "own-files",
            Self::OwnProcesses => "own-processes",
            Self::OwnUsers => "own-users",
            Self::Cgroup => "cgroup",
        }
    }

    /// The wall of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|wall| wall.as_str() == name)
    }
}

impl std::fmt::Display for Wall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wall_has_one_name_in_text_and_on_the_wire() {
        for wall in Wall::ALL {
            assert_eq!(Wall::named(wall.as_str()), Some(wall));
        }
        assert_eq!(Wall::named("moat"), None);
    }
}
