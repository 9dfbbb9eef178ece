//! The overseer: starts the keeper, listens, counts and sets the end.
//!
//! It has the host's root rights, as the keeper does, and reads nothing of the network: its order
//! comes from who fetches before that one begins, and what it is told later is judged (`judge`).

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use sandbox::{Cgroup, CgroupLimits, CgroupRoot, LoopDevice, Sandbox, Users};

use crate::counting::{BYTES_PER_FILE, Counting, guard};
use crate::judge::{self, BASE_BYTES_MAX};
use crate::order::{self, Base, Event, KeeperOrder, LINE_BYTES_MAX, Line, Order, Scratch};
use crate::overseer::{Told, Verdict};
use crate::scratch::{self, WatchedDirectory};
use crate::{CommandEnd, CommandsError, Unable, handing};

pub(crate) const ROLE: &str = "overseer";
/// The cgroups of commands, below that of this process.
const PLACE: &str = "commands";
/// By convention of shells and runtimes: the code of what a signal ended.
const SIGNALLED: i32 = 128;
/// How much of a keeper's complaints is kept.
const COMPLAINT_BYTES_MAX: u64 = 4 << 10;

/// Tells who fetches what happens; it may be a long time until that one has listened.
type Observe<'a> = &'a (dyn Fn(Event) + Sync);

/// The whole life of the process: its file is the socket through which files come and go.
pub(crate) fn main() -> io::Result<()> {
    let order: Order = order::receive(io::stdin().lock())?;
    let outside = order::take(1)?.pop().ok_or(io::ErrorKind::UnexpectedEof)?;
    // What is started must not run where who fetches may put files.
    rustix::process::chdir(&order.scratch_directory)?;
    let base = match order::receive_most(io::stdin().lock(), BASE_BYTES_MAX) {
        Ok(base) => base,
        // The build has ended, and there was nothing to do.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => {
            let text = format!("what commands are run on cannot be read: {error}");
            return order::say(&Told::Ended(Verdict::Broken { text }));
        }
    };
    // Whoever does not listen any more ends this process, or has ended.
    let observe = |event| drop(order::say(&Told::Event(event)));
    let ended = take_on(order, base, outside, &observe);
    order::say(&Told::Ended(Verdict::of(ended)))
}

/// Judges what was handed over, hands the layer's other end out, and runs the commands.
fn take_on(
    order: Order,
    base: Base,
    outside: File,
    observe: Observe<'_>,
) -> Result<(), CommandsError> {
    let io = CommandsError::io;
    let count = judge::files(&order, &base)?;
    let packs = handing::take(&outside, count).map_err(io("take the layers of the image"))?;
    judge::packs(&base, &packs)?;
    judge::image(&order, &base)?;
    let (layer, sink) = io::pipe().map_err(io("make a pipe"))?;
    handing::hand(&outside, &[layer.as_fd()]).map_err(io("hand the layer out"))?;
    drop(layer);
    run(order, base, &packs, sink, outside, observe)
}

/// Runs the commands of `order` on the image whose layer packs are in `packs`, and writes what they
/// changed to `layer`, as the tar of one more layer. If the commands have a way out of their network,
/// it is handed through `outside`.
#[expect(clippy::disallowed_methods, reason = "this process answers nobody")]
fn run(
    order: Order,
    base: Base,
    packs: &[OwnedFd],
    layer: PipeWriter,
    outside: File,
    observe: Observe<'_>,
) -> Result<(), CommandsError> {
    let groups = CgroupRoot::open(PLACE).map_err(Unable::NoLimits)?;
    clear_leftovers();
    let io = CommandsError::io;
    let (scratch, watched) = scratch(&order).map_err(io("make the disk of the commands"))?;
    let program = File::open("/proc/self/exe").map_err(io("open this program"))?;
    let arguments = [c"builderd", c"commands-process", c"keeper"];
    let mut files = vec![scratch.as_fd(), layer.as_fd(), outside.as_fd()];
    files.extend(packs.iter().map(|pack| pack.as_fd()));
    let (sandbox, pipes) = Sandbox::spawn_keeper(&program, &arguments, &files)?;
    drop(files);
    // With our copies open the layer would never end, and a door that is not opened never fail.
    drop((layer, scratch, outside));
    let group = format!("{}-{}", std::process::id(), sandbox.pid());
    // Others who end remove the place of all groups when none is in it, and a runtime that is just making
    // one does not find it.
    let place = groups.create(&format!("{group}-place"), &CgroupLimits::default());
    let place = place.map_err(Unable::NoLimits)?;
    // Files of other builds that run belong to others, until this returns.
    let held = Users::hold()?;
    let users = held.users();
    let told = KeeperOrder {
        order,
        base,
        users,
        group,
        place: PLACE.to_owned(),
        watched: watched.as_ref().map(|watched| watched.path().to_owned()),
    };
    let stdin = pipes.stdin;
    let later = Vec::new();
    let mut watch = Watch { sandbox, told, groups, stdin, observe, current: None, later };
    let counting = watched.as_ref().map(|watched| {
        Counting::start(&program, watched, users, watch.sandbox.pid(), watch.told.order.disk_bytes)
    });
    let ended = counting.transpose().and_then(|counting| {
        // One that has ended already says so by its end.
        let _ = order::send(&mut watch.stdin, &watch.told);
        watch.listen(pipes.stdout, pipes.stderr, counting)
    });
    watch.clean_up(place);
    drop(watched);
    ended
}

/// The disk of the commands: a file for a file system, or a directory.
fn scratch(order: &Order) -> io::Result<(File, Option<WatchedDirectory>)> {
    match order.scratch {
        Scratch::Sized => {
            Ok((scratch::nameless_file(&order.scratch_directory, order.disk_bytes)?, None))
        }
        Scratch::Watched => {
            let watched = WatchedDirectory::create(&order.scratch_directory)?;
            // The keeper opens it by its name: a mount knows those of its own namespace alone.
            Ok((File::open("/dev/null")?, Some(watched)))
        }
    }
}

/// Takes back from the kernel what builds have left whose process was killed: empty groups, and the
/// bounds of loop devices that nobody has any more. What a build still has is not touched.
pub fn clear_leftovers() {
    CgroupRoot::remove_empty(PLACE, |name| {
        let owner = name.split('-').next().and_then(|pid| pid.parse::<u32>().ok());
        owner.is_some_and(has_ended)
    });
    LoopDevice::unbound_free();
}

/// Whether there is no such process, or one that only waits to be asked how it ended: that one has
/// no program any more.
fn has_ended(pid: u32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe"));
    program.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// What the runtime complains of, where a command was not even started: of the image's shell, or of
/// the directory that its config names, whatever the words of the runtime for it are. What the host is
/// short of is nobody's who made an image.
fn never_started(complaint: &str, working_directory: &str) -> CommandsError {
    const SHORT: [&str; 5] = [
        "cannot allocate memory",
        "input/output error",
        "no space left on device",
        "resource temporarily unavailable",
        "too many open files",
    ];
    let lower = complaint.to_lowercase();
    let is_host_short = SHORT.iter().any(|words| lower.contains(words));
    if complaint.contains("/bin/sh") && lower.contains("no such file") {
        let text = "the image has no /bin/sh, which commands are run by".to_owned();
        return CommandsError::Refused(text);
    }
    if complaint.contains("/bin/sh") && !is_host_short {
        return CommandsError::Refused(format!(
            "the image's /bin/sh, which commands are run by, cannot be started: {complaint}"
        ));
    }
    if is_of_directory(complaint, working_directory) && !is_host_short {
        return CommandsError::Refused(format!(
            "no command can be run in the working directory of the image (WorkingDir of its config): \
             build the image with another one: {complaint}"
        ));
    }
    CommandsError::Broken(format!("the OCI runtime says: {complaint}"))
}

/// Whether a runtime complains of the directory: it makes what is not there, one above the other, and
/// goes there.
fn is_of_directory(complaint: &str, working_directory: &str) -> bool {
    let path = Path::new("/").join(working_directory);
    let is_above = |word: &str| {
        let named = Path::new(word.trim_matches(|letter| ":\"'`()".contains(letter)));
        named.is_absolute() && named != Path::new("/") && path.starts_with(named)
    };
    complaint.contains("chdir") || complaint.split_whitespace().any(is_above)
}

/// The command that runs, and since when.
struct Current {
    index: usize,
    started: Instant,
}

struct Watch<'a> {
    sandbox: Sandbox,
    told: KeeperOrder,
    groups: CgroupRoot,
    stdin: PipeWriter,
    observe: Observe<'a>,
    current: Option<Current>,
    /// What is told when no command runs: who does not listen must not keep this side from watching.
    later: Vec<Event>,
}

/// Takes the keeper's lines: tells what happens, and leaves the rest to who judges. Only this waits
/// for who listens, and with it the commands whose output it is.
fn pass_on(stdout: PipeReader, observe: Observe<'_>, judge: &mpsc::SyncSender<Vec<u8>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let read = (&mut stdout).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        let event = match serde_json::from_slice(&line) {
            Ok(Line::Event(event)) => Some(event),
            Ok(_) | Err(_) => None,
        };
        let is_judged = matches!(event, None | Some(Event::Started { .. }));
        // An empty line says that there is no more.
        let is_over = read.unwrap_or(0) == 0;
        let nobody_judges = is_judged && judge.send(line).is_err();
        if nobody_judges || is_over {
            return;
        }
        event.into_iter().for_each(observe);
    }
}

impl Watch<'_> {
    /// Takes the keeper's lines, and waits no longer than the command may take.
    fn listen(
        &mut self,
        stdout: PipeReader,
        stderr: PipeReader,
        counting: Option<Counting<'_>>,
    ) -> Result<(), CommandsError> {
        let (sender, lines) = mpsc::sync_channel(64);
        let (count_on, count_stop) = mpsc::channel();
        let (guard_on, guard_stop) = mpsc::channel();
        let ended = std::thread::scope(|scope| {
            let measurer = counting.map(|Counting { watched, sandbox, count }| {
                let (of_count, of_guard) = (sender.clone(), sender.clone());
                scope.spawn(move || count.pass_on(&of_count, &count_stop));
                scope.spawn(move || guard(watched, &of_guard, &guard_stop));
                sandbox
            });
            let observe = self.observe;
            scope.spawn(move || pass_on(stdout, observe, &sender));
            let ended = self.take_lines(&lines);
            // Nobody writes to the pipe any more, so the threads end.
            self.sandbox.kill();
            drop((lines, count_on, guard_on));
            // Nor does anybody wait for a count.
            drop(measurer);
            ended
        });
        self.tell_later();
        match ended? {
            true => Ok(()),
            false => Err(self.without_a_word(stderr)),
        }
    }

    fn take_lines(&mut self, lines: &mpsc::Receiver<Vec<u8>>) -> Result<bool, CommandsError> {
        loop {
            let line = match self.time_left() {
                None => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(left) => lines.recv_timeout(left),
            };
            let line = match line {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => return Err(self.failed(CommandEnd::TimedOut)),
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
            };
            let Ok(line) = serde_json::from_slice(&line) else { return Ok(false) };
            if self.take(line)? {
                return Ok(true);
            }
        }
    }

    fn tell_later(&mut self) {
        self.later.drain(..).for_each(self.observe);
    }

    /// Whether it was the last word.
    fn take(&mut self, line: Line) -> Result<bool, CommandsError> {
        match line {
            Line::Event(Event::Started { index }) => {
                self.current = Some(Current { index, started: Instant::now() });
                Ok(false)
            }
            // Of who counts.
            Line::Event(event) => {
                self.later.push(event);
                Ok(false)
            }
            Line::Ended { index, code, complaint, is_full } => {
                self.ended(index, code, complaint, is_full)?;
                self.current = None;
                self.tell_later();
                // A keeper that is gone says so by its end.
                let _ = self.stdin.write_all(&[1]);
                Ok(false)
            }
            Line::Used { bytes, files } => {
                let most = self.told.order.disk_bytes;
                match bytes > most || files > most / BYTES_PER_FILE {
                    true => Err(self.disk_full()),
                    false => Ok(false),
                }
            }
            Line::Done { warnings } => {
                let warnings = warnings.into_iter().map(|message| Event::Warning { message });
                self.later.extend(warnings);
                Ok(true)
            }
            Line::Failed { text, is_theirs: true } => Err(CommandsError::Refused(text)),
            Line::Failed { text, is_theirs: false } => Err(CommandsError::Broken(text)),
        }
    }

    /// Counts what a command took, ends what it left running, and says whether it ended well.
    fn ended(
        &mut self,
        index: usize,
        code: i32,
        complaint: Option<String>,
        is_full: bool,
    ) -> Result<(), CommandsError> {
        let group = self.groups.existing(&format!("{}-{index}", self.told.group));
        let usage = group.usage();
        drop(group);
        let is_short = usage.out_of_memory_kills > 0;
        match complaint {
            // The runtime is in that group, too, until the command begins.
            Some(_) if is_short => return Err(self.failed(CommandEnd::OutOfMemory)),
            // It makes the directories that it mounts on.
            Some(_) if is_full => return Err(self.failed(CommandEnd::DiskFull)),
            Some(complaint) => {
                let directory = &self.told.base.working_directory;
                return Err(never_started(&complaint, directory));
            }
            None => {}
        }
        match code {
            0 if is_short => {
                let command = &self.told.order.commands[index];
                let message = format!(
                    "command {} (`{command}`) ended well, but the kernel ended {} of its processes \
                     for want of memory",
                    index + 1,
                    usage.out_of_memory_kills
                );
                self.later.push(Event::Warning { message });
                Ok(())
            }
            0 => Ok(()),
            _ if is_short => Err(self.failed(CommandEnd::OutOfMemory)),
            _ if is_full || self.is_file_too_large(code) => Err(self.failed(CommandEnd::DiskFull)),
            _ if usage.pids_refused > 0 => Err(self.failed(CommandEnd::TooManyProcesses)),
            code if code > SIGNALLED => Err(self.failed(CommandEnd::Killed(code - SIGNALLED))),
            code => Err(self.failed(CommandEnd::Exited(code))),
        }
    }

    fn time_left(&self) -> Option<Duration> {
        let current = self.current.as_ref()?;
        let most = Duration::from_secs(self.told.order.limits.secs_max?);
        Some(most.saturating_sub(current.started.elapsed()))
    }

    /// Whether the signal of a file that is larger than the whole disk ended it.
    fn is_file_too_large(&self, code: i32) -> bool {
        const SIGXFSZ: i32 = 25;
        self.told.order.scratch == Scratch::Watched && code == SIGNALLED + SIGXFSZ
    }

    fn disk_full(&self) -> CommandsError {
        match self.current {
            Some(_) => self.failed(CommandEnd::DiskFull),
            None => CommandsError::Refused(
                "the image and what commands made of it need more disk than the build may have"
                    .to_owned(),
            ),
        }
    }

    fn failed(&self, end: CommandEnd) -> CommandsError {
        let index = self.current.as_ref().map_or(0, |current| current.index);
        let command = self.told.order.commands.get(index).cloned().unwrap_or_default();
        CommandsError::Failed { index, command, end }
    }

    fn without_a_word(&mut self, stderr: PipeReader) -> CommandsError {
        let mut complaint = String::new();
        let _ = stderr.take(COMPLAINT_BYTES_MAX).read_to_string(&mut complaint);
        let outcome = match self.sandbox.wait() {
            Ok(outcome) => outcome.to_string(),
            Err(error) => error.to_string(),
        };
        CommandsError::Broken(format!(
            "their keeper ended without a result ({outcome}): {}",
            complaint.trim()
        ))
    }

    /// The end of the keeper was the end of everything but the groups.
    fn clean_up(mut self, place: Cgroup) {
        self.sandbox.kill();
        let _ = self.sandbox.wait();
        for index in 0..self.told.order.commands.len() {
            drop(self.groups.existing(&format!("{}-{index}", self.told.group)));
        }
        drop(place);
        self.groups.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_runtime_complains_of_is_the_images_fault_or_the_hosts() {
        let is_theirs = |complaint: &str, directory: &str| {
            let error = never_started(complaint, directory);
            assert!(error.to_string().contains("image") == error.is_theirs(), "{error}");
            error.is_theirs()
        };
        for complaint in [
            "exec: \"/bin/sh\": stat /bin/sh: no such file or directory",
            "exec: \"/bin/sh\": permission denied",
            "exec /bin/sh: exec format error",
            "exec /bin/sh: argument list too long",
            "error during container init: mkdir /srv/file: not a directory",
            "mkdir /srv: too many levels of symbolic links",
            "chdir to cwd (\"/srv/file/x\") set in config.json failed: permission denied",
        ] {
            assert!(is_theirs(complaint, "srv/file/x"), "{complaint}");
        }
        for complaint in [
            "exec /bin/sh: cannot allocate memory",
            "mkdir /srv: input/output error",
            "mkdir /sys/fs/cgroup/x: no such file or directory",
            "mkdir /: read-only file system",
            "unable to apply cgroup configuration",
        ] {
            assert!(!is_theirs(complaint, "/srv/file/x"), "{complaint}");
        }
    }

    #[test]
    fn who_has_ended_and_was_not_asked_about_it_has_ended() {
        assert!(!has_ended(std::process::id()));
        let mut child = crate::host::command("/bin/sh".as_ref()).args(["-c", ":"]).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !has_ended(child.id()) {
            assert!(Instant::now() < until, "nobody asks, and it is there still");
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(has_ended(child.id()));
    }
}
