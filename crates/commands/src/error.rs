//! Why commands were not run, or failed.

use std::borrow::Cow;
use std::io;

use sandbox::SandboxError;
use serde::{Deserialize, Serialize};

/// What a host lacks for commands.
#[derive(Debug, thiserror::Error)]
pub enum Unable {
    /// Mounts, other users' files and limits need root.
    #[error("commands need a service that runs as root")]
    NotRoot,
    /// user_namespaces(7).
    #[error("commands need user namespaces, which this host does not give to root")]
    NoNamespaces,
    /// The file system `overlay`.
    #[error("commands need the file system overlay: load the kernel module of that name")]
    NoOverlay,
    /// A program that has to be there.
    #[error("commands need the program {program}: install it, or name another in the settings")]
    NoProgram {
        /// Its name or path.
        program: String,
        /// What the system says.
        source: io::Error,
    },
    /// The runtime has known holes.
    #[error(
        "{program} {version} has known holes ({}): install runc 1.2.8, 1.3.3, 1.4.0 or later, or \
         accept each by name",
        holes.join(", ")
    )]
    Vulnerable {
        /// The runtime.
        program: String,
        /// Its version.
        version: String,
        /// Those that were not accepted.
        holes: Vec<&'static str>,
    },
    /// cgroups(7).
    #[error("commands cannot be held to their limits")]
    NoLimits(#[source] SandboxError),
}

/// How a command ended that did not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommandEnd {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// It needed more memory than commands may have.
    OutOfMemory,
    /// It ran longer than a command may.
    TimedOut,
    /// It needed more disk than commands may have.
    DiskFull,
    /// It failed after the kernel had refused it a process.
    TooManyProcesses,
}

impl CommandEnd {
    /// Whether it came to the end of what commands may take, time aside.
    #[must_use]
    pub fn is_limit(self) -> bool {
        match self {
            Self::OutOfMemory | Self::DiskFull | Self::TooManyProcesses => true,
            Self::Exited(_) | Self::Killed(_) | Self::TimedOut => false,
        }
    }
}

impl std::fmt::Display for CommandEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "ended with exit code {code}"),
            Self::Killed(signal) => write!(f, "was ended by signal {signal}"),
            Self::OutOfMemory => f.write_str("needs more memory than commands may have"),
            Self::TimedOut => f.write_str("takes longer than a command may"),
            Self::DiskFull => f.write_str("needs more disk than commands may have"),
            Self::TooManyProcesses => f.write_str("needs more processes than commands may have"),
        }
    }
}

/// Why the commands of a build made no layer.
#[derive(Debug, thiserror::Error)]
pub enum CommandsError {
    /// The host cannot run commands.
    #[error(transparent)]
    Unable(#[from] Unable),
    /// A process could not be started.
    #[error("cannot run commands")]
    Sandbox(#[from] SandboxError),
    /// A file of this side failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: Cow<'static, str>,
        /// Why.
        source: io::Error,
    },
    /// A command did not end well.
    #[error("command {} (`{command}`) {end}", .index + 1)]
    Failed {
        /// Its place, from 0.
        index: usize,
        /// The command.
        command: String,
        /// How it ended.
        end: CommandEnd,
    },
    /// A command did not end well after it was refused a place in the network, as whoever served
    /// the door says.
    #[error(
        "command {} (`{command}`) {end}; it was refused the network: {rule}",
        .index + 1
    )]
    Denied {
        /// Its place, from 0.
        index: usize,
        /// The command.
        command: String,
        /// How it ended.
        end: CommandEnd,
        /// The place, and why.
        rule: String,
    },
    /// The image or what the commands made of it is at fault.
    #[error("{0}")]
    Refused(String),
    /// The host is at fault.
    #[error("commands cannot be run here: {0}")]
    Broken(String),
}

impl CommandsError {
    /// A file of this side failed.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action: action.into(), source }
    }

    /// Whether who ordered the commands can mend it.
    #[must_use]
    pub fn is_theirs(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::Denied { .. } | Self::Refused(_))
    }
}
