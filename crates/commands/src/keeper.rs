//! The keeper: makes the scratch file system, lets the tree be unpacked into it, starts the
//! runtime for each command, and lets what changed be read.
//!
//! It is the first process of its PID namespace and has mounts of its own, so nothing it makes
//! outlives it. It runs with root's rights and reads nothing that a stranger has written but the
//! output of commands, which it passes on by lines.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Gid, Mode, OFlags, StatVfsMountFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use sandbox::{LoopDevice, Outcome, Sandbox, SandboxError, UserNamespace, Users};
use serde::Serialize;

use crate::bundle::Surroundings;
use crate::drain::Drain;
use crate::order::{
    self, Base, Event, KeeperOrder, LINE_BYTES_MAX, LayerOrder, Line, Trouble, UnpackOrder,
};
use crate::output::{Output, Said};
use crate::scratch::{TREE, WORK};
use crate::{ARGUMENT, Joins, bundle, door, host, layer, unpack};

pub(crate) const ROLE: &str = "keeper";
/// Any directory that is there can carry what the keeper mounts; its programs are not there.
const PLACES: [&str; 3] = ["/mnt", "/run", "/tmp"];
/// How long a confined process may go on when it has said its last line.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);
/// What a full file system still has, since it counts roughly near its end: a share of it, and so
/// many bytes at least.
const FULL_SHARE: u64 = 256;
const FULL_BYTES: u64 = 1 << 20;
/// Of what commands write to.
const SCRATCH_FLAGS: MountFlags =
    MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOATIME);

/// The whole life of the process: its files are that of the scratch file system, where the layer
/// goes, the socket by which a door is handed out, and those of the packs.
pub(crate) fn main() -> io::Result<()> {
    // A file that is handed to a confined process must be the program, whatever /proc is then.
    let program = File::open("/proc/self/exe")?;
    let order: KeeperOrder = order::receive(io::stdin().lock())?;
    let mut files = order::take(3 + packs_of(&order.base))?;
    let packs = files.split_off(3);
    let (Some(outside), Some(layer), Some(scratch)) = (files.pop(), files.pop(), files.pop())
    else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let result =
        Keeper::new(order, program, outside).and_then(|keeper| keeper.run(scratch, layer, &packs));
    order::say_end(result)
}

/// How many files hold the layers, of which the overseer has judged that there are so many.
pub(crate) fn packs_of(base: &Base) -> usize {
    base.packs.iter().map(|pack| pack.file + 1).max().unwrap_or(0)
}

struct Keeper {
    order: KeeperOrder,
    program: File,
    base: PathBuf,
    /// The directory that is watched, as the host has it: opened before anything covers it.
    watched: Option<OwnedFd>,
    /// Where the way out is, if there is one.
    door: Option<SocketAddr>,
    /// That of the commands' users, where there is a use for it.
    namespace: Option<UserNamespace>,
    /// Its name, where the runtime goes there.
    joined: Option<PathBuf>,
}

/// What an overlay is made of.
struct Layers {
    lower: PathBuf,
    upper: PathBuf,
    work: PathBuf,
}

impl Keeper {
    /// Takes mounts of its own, and a place for more; opens the door.
    fn new(order: KeeperOrder, program: File, outside: File) -> Result<Self, Trouble> {
        let failed = |error: rustix::io::Errno| Trouble::of("arrange mounts", error);
        let door = match order.order.has_door {
            true => {
                let opened = door::open(&outside);
                Some(opened.map_err(|error| Trouble::of("open the way out", error))?)
            }
            false => None,
        };
        drop(outside);
        let place = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let watched = order.watched.as_ref();
        let watched = watched.map(|path| rustix::fs::open(path, place, Mode::empty()));
        let watched = watched.transpose().map_err(failed)?;
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", private).map_err(failed)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // That of the parent names other processes.
        rustix::mount::mount("proc", "/proc", "proc", flags, None).map_err(failed)?;
        let base = PLACES.into_iter().find(|path| Path::new(path).is_dir());
        let base = base.ok_or_else(|| Trouble::ours("there is no /mnt, /run or /tmp"))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("tmpfs", base, "tmpfs", flags, Some(c"size=64m,mode=0755"))
            .map_err(failed)?;
        let is_joined = match order.order.joins {
            Joins::Never => false,
            // The door is in the keeper's network.
            Joins::First => door.is_none(),
            Joins::Last => true,
        };
        // A disk of its own shows the owners on it as those users.
        let namespace = match is_joined || watched.is_none() {
            true => Some(order.users.namespace().map_err(broken)?),
            false => None,
        };
        let joined = namespace.as_ref().filter(|_| is_joined);
        let joined = joined.map(|namespace| Self::name_namespace(namespace, Path::new(base)));
        let joined = joined.transpose()?;
        Ok(Self { order, program, base: base.into(), watched, door, namespace, joined })
    }

    /// Gives a user namespace a name as of a file: runc takes one below the `/proc` of a process for that
    /// process's own.
    fn name_namespace(namespace: &UserNamespace, base: &Path) -> Result<PathBuf, Trouble> {
        let name = base.join("users");
        let failed = |error: io::Error| Trouble::of("name the commands' users", error);
        File::create_new(&name).map_err(failed)?;
        rustix::mount::mount_bind(descriptor(namespace.as_fd()), &name)
            .map_err(|error| failed(error.into()))?;
        Ok(name)
    }

    fn run(&self, scratch: File, layer: File, packs: &[File]) -> Result<Vec<String>, Trouble> {
        self.mount_scratch(&scratch)?;
        drop(scratch);
        let tree = open(&self.tree())?;
        let mut warnings = self.unpack(&tree, packs)?;
        tell(Event::Unpacked)?;
        // mount(2) follows links.
        let (lower, upper) = (left(&tree, unpack::LOWER)?, left(&tree, unpack::UPPER)?);
        let merged = self.mount_overlay(&lower, &upper)?;
        let mut output = Output::default();
        if self.joined.is_some() {
            bundle::set_limits(&self.order.order)
                .map_err(|error| Trouble::of("limit the commands", error))?;
        }
        for index in 0..self.order.order.commands.len() {
            self.command(index, &merged, &mut output)?;
        }
        let failed = |error: rustix::io::Errno| Trouble::of("take the overlay apart", error);
        rustix::mount::unmount(&merged, UnmountFlags::empty()).map_err(failed)?;
        warnings.extend(self.read(&upper, &layer)?);
        Ok(warnings)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.base.join(name)
    }

    fn tree(&self) -> PathBuf {
        self.at("scratch").join(TREE)
    }

    /// Whether the file system of this build alone has hardly room for another file.
    fn is_full(&self) -> bool {
        let left = rustix::fs::statvfs(self.at("scratch")).ok();
        let is_full = |left: rustix::fs::StatVfs| {
            let least = (left.f_blocks / FULL_SHARE).max(FULL_BYTES / left.f_frsize.max(1));
            left.f_bavail < least || left.f_ffree == 0
        };
        self.watched.is_none() && left.is_some_and(is_full)
    }

    /// Where image and changes lie, and the directories for them.
    fn mount_scratch(&self, file: &File) -> Result<(), Trouble> {
        let scratch = self.at("scratch");
        make_directory(&scratch, 0o755)?;
        match &self.watched {
            None => {
                self.make_scratch(file, &scratch)?;
                make_directory(&scratch, 0o755)?;
            }
            Some(directory) => {
                let failed =
                    |error: rustix::io::Errno| Trouble::of("mount the watched directory", error);
                rustix::mount::mount_bind(descriptor(directory.as_fd()), &scratch)
                    .map_err(failed)?;
                let flags = MountFlags::BIND | SCRATCH_FLAGS;
                rustix::mount::mount_remount(&scratch, flags, c"").map_err(failed)?;
            }
        }
        let tree = scratch.join(TREE);
        make_directory(&tree, 0o755)?;
        make_directory(&scratch.join(WORK), 0o700)?;
        let give = |path: &Path, id: u32| {
            rustix::fs::chown(path, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)))
                .map_err(|error| Trouble::of("give a directory to its users", error))
        };
        if let (None, Some(namespace)) = (&self.watched, &self.namespace) {
            // No user of the commands has this number: the names beside the tree are not theirs.
            give(&scratch, Users::COUNT)?;
            if self.show_owners(namespace, &scratch)? {
                return Ok(());
            }
        }
        give(&tree, self.order.users.first)
    }

    /// Has the image's own owners on the disk, and those of the commands wherever one looks from here on.
    /// Not in a directory of the host's, where a program with the bit of setuid would be its root's, and
    /// not before Linux 6.0, whose overlays cannot be made of such a mount (5.19: have no ACLs then): the
    /// commands' owners are on the disk there. What is read back is the same.
    fn show_owners(&self, namespace: &UserNamespace, scratch: &Path) -> Result<bool, Trouble> {
        let lower = self.at("lower");
        make_directory(&lower, 0o755)?;
        let layers =
            Layers { lower: lower.clone(), upper: scratch.join(TREE), work: scratch.join(WORK) };
        let is_good = || {
            match self.overlay(&lower, &layers) {
                Err(error) if is_refused(&error) => return Ok(false),
                made => made?,
            }
            let acl = rustix::fs::getxattr(&lower, "system.posix_acl_access", &mut [0; 64][..]);
            rustix::mount::unmount(&lower, UnmountFlags::empty())?;
            Ok(acl == Err(rustix::io::Errno::NODATA))
        };
        namespace.show_owners(scratch, is_good).map_err(broken)
    }

    /// The file system of this build alone: it ends at its size, and its devices are none.
    fn make_scratch(&self, file: &File, scratch: &Path) -> Result<(), Trouble> {
        let mkfs = host::find(host::MKFS).map_err(|error| Trouble::ours(error.to_string()))?;
        let made = host::command(&mkfs)
            .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E"])
            .arg("lazy_itable_init=1,nodiscard")
            .arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
            .stdin(Stdio::null())
            .output()
            .map_err(|error| Trouble::of("start mkfs.ext4", error))?;
        if !made.status.success() {
            let said = String::from_utf8_lossy(&made.stderr);
            return Err(Trouble::ours(format!("mkfs.ext4 failed: {}", said.trim())));
        }
        let device = LoopDevice::attach(file).map_err(broken)?;
        let failed = |error: rustix::io::Errno| Trouble::of("mount the scratch file system", error);
        let options = Some(c"noinit_itable");
        rustix::mount::mount(device.path(), scratch, "ext4", SCRATCH_FLAGS, options)
            .map_err(failed)?;
        // The mount keeps it from here on.
        drop(device);
        Ok(())
    }

    fn unpack(&self, tree: &File, packs: &[File]) -> Result<Vec<String>, Trouble> {
        let order = UnpackOrder {
            packs: self.order.base.packs.clone(),
            files: packs.len(),
            tree_limits: self.order.order.tree_limits.clone(),
        };
        let tree = sandbox::without_parent(tree.as_fd()).map_err(broken)?;
        let mut files = vec![tree.as_fd()];
        files.extend(packs.iter().map(|pack| pack.as_fd()));
        self.confined(unpack::ROLE, &order, &files)
    }

    fn mount_overlay(&self, lower: &OwnedFd, upper: &OwnedFd) -> Result<PathBuf, Trouble> {
        let merged = self.at("merged");
        make_directory(&merged, 0o755)?;
        let layers = Layers {
            lower: descriptor(lower.as_fd()),
            upper: descriptor(upper.as_fd()),
            work: self.at("scratch").join(WORK),
        };
        self.overlay(&merged, &layers).map_err(|error| match self.is_full() {
            true => Trouble::theirs("the image leaves no room on the disk of its commands"),
            false => Trouble::of("mount the overlay", error),
        })?;
        Ok(merged)
    }

    /// Names go up and down, files are copied when they are first changed. `userxattr`: what marks
    /// a directory is written where confined processes can read it. What the overlay does for the commands
    /// it does as their root, since nobody else has a number on the disk.
    fn overlay(&self, place: &Path, layers: &Layers) -> io::Result<()> {
        let data = format!(
            "lowerdir={},upperdir={},workdir={},userxattr",
            layers.lower.display(),
            layers.upper.display(),
            layers.work.display()
        );
        let data = CString::new(data).map_err(io::Error::other)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        self.order.users.as_first(|| {
            Ok(rustix::mount::mount("overlay", place, "overlay", flags, Some(&*data))?)
        })?;
        // One that cannot write to its work directory is mounted all the same, to be read.
        let flags = rustix::fs::statvfs(place)?.f_flag;
        if !flags.contains(StatVfsMountFlags::RDONLY) {
            return Ok(());
        }
        rustix::mount::unmount(place, UnmountFlags::empty())?;
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn command(&self, index: usize, merged: &Path, output: &mut Output) -> Result<(), Trouble> {
        let order = &self.order.order;
        let command = &order.commands[index];
        // Runtimes follow links there, some of them on the host.
        let root = open(merged)?;
        unpack::MOUNT_POINTS.iter().try_for_each(|name| left(&root, name).map(drop))?;
        drop(root);
        let name = format!("{}-{index}", self.order.group);
        let bundle = self.at(&name);
        make_directory(&bundle, 0o700)?;
        let group = format!("{}/{name}", self.order.place);
        let told = &self.order;
        let around = Surroundings {
            root: merged,
            group: &group,
            users: told.users,
            namespace: self.joined.as_deref(),
            door: self.door,
        };
        let config = bundle::config(order, &told.base, command, &around);
        let text = serde_json::to_vec(&config).map_err(|error| Trouble::ours(error.to_string()))?;
        fs::write(bundle.join("config.json"), text)
            .map_err(|error| Trouble::of("write the container's configuration", error))?;
        tell(Event::Started { index })?;
        let (code, complaint) = self.contain(index, &name, &bundle, output)?;
        let is_full = self.is_full();
        order::say(&Line::Ended { index, code, complaint, is_full }).map_err(parent_gone)?;
        // The parent has counted, and removed the group.
        let mut answer = [0];
        io::stdin().lock().read_exact(&mut answer).map_err(parent_gone)?;
        let mut delete = self.runtime();
        // What it says is nobody's, nor is what it leaves behind waited for.
        delete.args(["delete", "--force", &name]).stdout(Stdio::null()).stderr(Stdio::null());
        delete.status().map_err(|error| Trouble::of("remove the container", error))?;
        // An environment is long, and there are many commands.
        fs::remove_dir_all(&bundle).map_err(|error| Trouble::of("remove a bundle", error))
    }

    fn runtime(&self) -> std::process::Command {
        let mut command = host::command(&self.order.order.runtime);
        command.arg("--root").arg(self.at("runtime")).stdin(Stdio::null());
        command
    }

    /// Runs a container to its end, which is that of the runtime; its exit code, and what the runtime
    /// itself has to say.
    fn contain(
        &self,
        index: usize,
        name: &str,
        bundle: &Path,
        output: &mut Output,
    ) -> Result<(i32, Option<String>), Trouble> {
        let failed = |error: io::Error| Trouble::of("start the OCI runtime", error);
        let log = bundle.join("log");
        let (said, theirs) = io::pipe().map_err(failed)?;
        let errors: PipeWriter = theirs.try_clone().map_err(failed)?;
        let mut command = self.runtime();
        // The options of the program come before the word for what it is to do.
        command.arg("--log").arg(&log).args(["--log-format", "json", "run", "--keep", "--bundle"]);
        let mut running =
            command.arg(bundle).arg(name).stdout(theirs).stderr(errors).spawn().map_err(failed)?;
        // It holds our copies of the pipe's end.
        drop(command);
        let said = Drain::of(&running, said).map_err(failed)?;
        let say = |said| order::say(&Line::Event(event(index, said)));
        output.pass_on(said, say).map_err(parent_gone)?;
        let status = running.wait().map_err(failed)?;
        let code = status.code().unwrap_or_else(|| {
            128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0)
        });
        Ok((code, complaint(&log)))
    }

    fn read(&self, upper: &OwnedFd, layer: &File) -> Result<Vec<String>, Trouble> {
        let upper = sandbox::without_parent(upper.as_fd()).map_err(broken)?;
        let order = LayerOrder { bytes_max: self.order.order.layer_bytes_max };
        self.confined(layer::ROLE, &order, &[upper.as_fd(), layer.as_fd()])
    }

    /// Starts a confined process of this program and waits for its last word.
    fn confined(
        &self,
        role: &str,
        order: &impl Serialize,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<String>, Trouble> {
        let failed = |error: &dyn std::fmt::Display| {
            Trouble::ours(format!("cannot start a confined process: {error}"))
        };
        let word = |text: &str| CString::new(text).map_err(|error| failed(&error));
        let arguments = [word("builderd")?, word(ARGUMENT)?, word(role)?];
        let arguments: Vec<&std::ffi::CStr> = arguments.iter().map(|word| &**word).collect();
        let (sandbox, pipes) =
            Sandbox::spawn_as(self.order.users, &self.program, &arguments, files)
                .map_err(|error| failed(&format!("{error}: {}", error.source)))?;
        // One that has ended already says so by its end.
        let _ = order::send(pipes.stdin, order);
        last_word(role, sandbox, pipes.stdout, pipes.stderr)
    }
}

/// What is told of a piece of a command's output.
fn event(index: usize, said: Said) -> Event {
    let number = index + 1;
    let message = match said {
        Said::Line(line) => return Event::Output { index, line },
        Said::Held => {
            format!("the output of command {number} is too long: its end follows when it has ended")
        }
        Said::LeftOut(lines) => {
            format!("{lines} lines of the output of command {number} were left out here")
        }
    };
    Event::Warning { message }
}

/// Waits for the last word of a confined process, and for its end.
fn last_word(
    role: &str,
    mut sandbox: Sandbox,
    stdout: PipeReader,
    stderr: PipeReader,
) -> Result<Vec<String>, Trouble> {
    let mut line = String::new();
    let _ = BufReader::new(stdout).take(LINE_BYTES_MAX).read_line(&mut line);
    // One that was taken over may close its output, keep the other open and never end.
    if !sandbox.ends_within(LAST_WORDS_MAX) {
        sandbox.kill();
    }
    let mut complaint = String::new();
    let _ = stderr.take(4096).read_to_string(&mut complaint);
    let outcome = sandbox
        .wait()
        .map_err(|error| Trouble::ours(format!("cannot wait for a confined process: {error}")))?;
    match serde_json::from_str(&line) {
        Ok(Line::Done { warnings }) if outcome == Outcome::Exited(0) => Ok(warnings),
        Ok(Line::Failed { text, is_theirs }) => Err(Trouble { text, is_theirs }),
        _ => Err(Trouble::ours(format!(
            "the confined process {role:?} ended without a result ({outcome}): {}",
            complaint.trim()
        ))),
    }
}

/// What the runtime wrote to its log as an error: that the command was never started.
fn complaint(log: &Path) -> Option<String> {
    let text = fs::read_to_string(log).ok()?;
    let mut errors = text.lines().rev().filter_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        matches!(entry["level"].as_str(), Some("error" | "fatal"))
            .then(|| entry["msg"].as_str().unwrap_or_default().chars().take(500).collect())
    });
    errors.next()
}

fn tell(event: Event) -> Result<(), Trouble> {
    order::say(&Line::Event(event)).map_err(parent_gone)
}

/// Nobody will read why.
fn parent_gone(error: io::Error) -> Trouble {
    Trouble::of("speak with the build", error)
}

/// A directory that the unpacker has left there: who has taken it over may have left links.
fn left(place: &File, name: &str) -> Result<OwnedFd, Trouble> {
    unpack::open_directory(place.as_fd(), name.as_bytes())
        .map_err(|error| Trouble::ours(format!("the unpacker left no /{name}: {error}")))
}

/// The name by which this process alone reaches what it has open.
fn descriptor(file: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// What a kernel says whose overlays cannot be made of what they are to be made of.
fn is_refused(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidInput
            | io::ErrorKind::Unsupported
            | io::ErrorKind::ReadOnlyFilesystem
    )
}

fn broken(error: SandboxError) -> Trouble {
    Trouble::ours(format!("{error}: {}", error.source))
}

fn open(directory: &Path) -> Result<File, Trouble> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| Trouble::of("open a directory of the scratch file system", error))
}

fn make_directory(path: &Path, mode: u32) -> Result<(), Trouble> {
    let failed = |error: io::Error| Trouble::of("make a directory", error);
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unpacker_that_falls_silent_but_stays_is_ended() {
        let shell = File::open("/bin/sh").unwrap();
        // Its standard error stays open.
        let script = c"exec >&-; echo why >&2; exec sleep 1000";
        let (sandbox, pipes) = Sandbox::spawn(&shell, &[c"sh", c"-c", script], &[]).unwrap();
        drop(pipes.stdin);
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            done.send(last_word(unpack::ROLE, sandbox, pipes.stdout, pipes.stderr))
        });
        let ended = is_done.recv_timeout(Duration::from_secs(60)).expect("it is waited for");
        let text = ended.unwrap_err().text;
        assert!(text.ends_with("ended without a result (signal 9): why"), "{text}");
    }
}
