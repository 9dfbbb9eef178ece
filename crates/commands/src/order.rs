//! What the processes are told, and what they tell: JSON, one object per line.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use rootfs::TreeLimits;
use sandbox::{Access, SandboxPolicy, Users, Wall};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest line that is read from one of the processes.
pub(crate) const LINE_BYTES_MAX: u64 = 1 << 20;
/// Threads of a confined process: its own and those the C library may want.
const THREADS_MAX: u64 = 16;

/// The commands of one build, as they are known before anything is fetched.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Where the nameless file of the scratch file system is made, or its directory. Nobody who
    /// fetches may reach it.
    pub scratch_directory: PathBuf,
    /// How its size is kept.
    #[serde(default)]
    pub scratch: Scratch,
    /// That size: tree and changes together, in bytes.
    pub disk_bytes: u64,
    /// The OCI runtime, as [`check`](crate::check) found it.
    pub runtime: PathBuf,
    /// How it goes into a user namespace.
    #[serde(default)]
    pub joins: Joins,
    /// Each is run by `/bin/sh -c`, in this order.
    pub commands: Vec<String>,
    /// What each command may take.
    pub limits: CommandLimits,
    /// What the flattened tree may contain.
    pub tree_limits: TreeLimits,
    /// Bytes of all files that the commands made or changed, holes included.
    pub layer_bytes_max: u64,
    /// Whether the commands have one way out of their network, which is handed to who fetches.
    pub has_door: bool,
}

/// What the commands are run on, as the process says that has fetched it: all that is believed of
/// that one. It names nothing of the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Base {
    /// `NAME=VALUE`, as the image's config has them.
    pub environment: Vec<String>,
    /// As the image's config has it; `/` when it is empty.
    pub working_directory: String,
    /// The layers of the image, bottom first.
    pub packs: Vec<PackPart>,
}

/// How the disk of commands is held to its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scratch {
    /// It is a file system of that size, on a loop device: the kernel refuses more.
    #[default]
    Sized,
    /// It is a directory of the host's file system, and the commands are ended soon after more
    /// than that lies there. For hosts without loop devices.
    Watched,
}

impl Scratch {
    /// The word for logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sized => "sized",
            Self::Watched => "watched",
        }
    }
}

/// How a runtime goes into a user namespace that somebody else has made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Joins {
    /// Not as far as is known: it makes one.
    #[default]
    Never,
    /// First of all, and it must be told who the users there are: runc before 1.2. It has no right to
    /// another's network by then.
    First,
    /// When it has gone into the others, and it must not be told who the users there are: it looks. runc
    /// since 1.2.
    Last,
}

/// What one command may take; of the CPUs, what the group of its caller may.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CommandLimits {
    /// Bytes of memory, page cache included; no swap beside it.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids_max: u32,
    /// Seconds; none: only the build's own time counts.
    pub secs_max: Option<u64>,
}

/// A layer pack as a part of one of the files handed over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PackPart {
    /// Which of the files.
    pub file: usize,
    /// Where in it, in bytes.
    pub base: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// What happens while commands run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The image's files lie ready.
    Unpacked,
    /// A command begins.
    Started {
        /// Its place, from 0.
        index: usize,
    },
    /// A line of its output, without control characters.
    Output {
        /// The command's place, from 0.
        index: usize,
        /// The line.
        line: String,
    },
    /// Something that is not an error but should be seen.
    Warning {
        /// What.
        message: String,
    },
}

/// What a keeper reads first.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeeperOrder {
    pub(crate) order: Order,
    pub(crate) base: Base,
    pub(crate) users: Users,
    /// The container of a command is `{group}-{index}`, in the cgroup `{place}` of the service.
    pub(crate) group: String,
    pub(crate) place: String,
    /// The directory that is watched, where no file system of its own is made.
    pub(crate) watched: Option<PathBuf>,
}

/// What the unpacker reads.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct UnpackOrder {
    pub(crate) packs: Vec<PackPart>,
    /// How many files hold them.
    pub(crate) files: usize,
    pub(crate) tree_limits: TreeLimits,
}

/// What the reader reads.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LayerOrder {
    pub(crate) bytes_max: u64,
}

/// What the measurer reads: beyond this it need not count on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MeasureOrder {
    pub(crate) bytes_max: u64,
    pub(crate) files_max: u64,
}

/// What a process says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Line {
    Event(Event),
    /// A command's container has ended and waits to be removed: the parent counts what it took,
    /// removes its group, and answers with a byte.
    Ended {
        index: usize,
        code: i32,
        /// What the runtime itself has to complain.
        complaint: Option<String>,
        /// Whether the file system it worked on had no room left.
        is_full: bool,
    },
    /// What lies in a watched directory.
    Used {
        bytes: u64,
        files: u64,
    },
    /// The work is done; what was left out of it.
    Done {
        warnings: Vec<String>,
    },
    Failed {
        text: String,
        is_theirs: bool,
    },
}

/// Why a process could not do its work.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub(crate) text: String,
    pub(crate) is_theirs: bool,
}

impl Trouble {
    pub(crate) fn theirs(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_theirs: true }
    }

    pub(crate) fn ours(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_theirs: false }
    }

    /// A step of this side that failed; a full scratch file system is the order's own doing.
    pub(crate) fn of(action: &str, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        match error.kind() == io::ErrorKind::StorageFull {
            true => Self::theirs(format!("cannot {action}: the disk of the build is full")),
            false => Self::ours(format!("cannot {action}: {error}")),
        }
    }
}

/// Sends an order ahead of everything else on a process's standard input.
pub(crate) fn send(mut to: impl io::Write, order: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(order)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&text)
}

/// Takes the order that [`send`] has sent.
pub(crate) fn receive<T: DeserializeOwned>(from: impl io::Read) -> io::Result<T> {
    receive_most(from, u32::MAX)
}

/// As [`receive`]: one that is longer is an error, and not read.
pub(crate) fn receive_most<T: DeserializeOwned>(
    mut from: impl io::Read,
    bytes_max: u32,
) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > bytes_max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut text = Vec::new();
    from.by_ref().take(u64::from(length)).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Says a line to the parent.
pub(crate) fn say(line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// Says how the work went, as the last line.
pub(crate) fn say_end(result: Result<Vec<String>, Trouble>) -> io::Result<()> {
    say(&match result {
        Ok(warnings) => Line::Done { warnings },
        Err(Trouble { text, is_theirs }) => Line::Failed { text, is_theirs },
    })
}

/// Files that were handed over; fewer than were promised is a defect of the parent.
pub(crate) fn take(count: usize) -> io::Result<Vec<File>> {
    sandbox::take_files(count)
        .ok_or_else(|| io::Error::other("files that were ordered were not handed over"))
}

/// Shuts this process in with its one directory.
pub(crate) fn confine(directory: &File, access: Access, files: usize) -> io::Result<()> {
    let walls =
        sandbox::confine_to(&policy(files), directory.as_fd(), access).map_err(io::Error::other)?;
    // It has a user namespace of its own, so whatever host this is, it can.
    match walls.contains(&Wall::EmptyRoot) {
        true => Ok(()),
        false => Err(io::Error::other("the host's files are still in reach")),
    }
}

/// What a confined process may take beside its limits as part of the build.
fn policy(files: usize) -> SandboxPolicy {
    /// One for each directory on the way down, and some for the process itself.
    const FILES: u64 = 1024;
    SandboxPolicy {
        memory_bytes_max: None,
        file_bytes_max: None,
        files_max: FILES + files as u64,
        threads_max: THREADS_MAX,
    }
}
