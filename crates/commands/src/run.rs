//! The parent's side: starts the keeper, listens, counts and sets the end.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use sandbox::{CgroupRoot, Sandbox, Users};

use crate::order::{self, Event, KeeperOrder, LINE_BYTES_MAX, Line, Order};
use crate::{CommandEnd, CommandsError, Unable};

/// The cgroups of commands, below that of this process.
const PLACE: &str = "commands";
/// By convention of shells and runtimes: the code of what a signal ended.
const SIGNALLED: i32 = 128;
/// How much of a keeper's complaints is kept.
const COMPLAINT_BYTES_MAX: u64 = 4 << 10;

/// Runs the commands of `order` on the image whose layer packs are in `packs`, and writes what they
/// changed to `layer`, as the tar of one more layer. The tar is worth something only when this
/// succeeds.
///
/// The thread that calls must live until this returns: with it everything that was started ends.
///
/// # Errors
/// [`CommandsError`]; the first command that does not end well ends it.
pub fn run(
    order: Order,
    packs: &[&File],
    layer: PipeWriter,
    observe: &mut dyn FnMut(Event),
) -> Result<(), CommandsError> {
    let groups = CgroupRoot::open(PLACE).map_err(Unable::NoLimits)?;
    sweep(&groups);
    let io = |action| move |source| CommandsError::Io { action, source };
    let scratch = scratch_file(&order.scratch_directory, order.disk_bytes)
        .map_err(io("make the scratch file of the commands"))?;
    let program = File::open("/proc/self/exe").map_err(io("open this program"))?;
    let arguments = [c"builderd", c"commands-process", c"keeper"];
    let mut files = vec![scratch.as_fd(), layer.as_fd()];
    files.extend(packs.iter().map(|pack| pack.as_fd()));
    let (sandbox, pipes) = Sandbox::spawn_keeper(&program, &arguments, &files)?;
    drop(files);
    // With our copy open the layer would never end.
    drop((layer, scratch));
    let group = format!("{}-{}", std::process::id(), sandbox.pid());
    let users = Users::of(sandbox.pid());
    let told = KeeperOrder { order, users, group, place: PLACE.to_owned() };
    let mut stdin = pipes.stdin;
    // One that has ended already says so by its end.
    let _ = order::send(&mut stdin, &told);
    let mut watch = Watch { sandbox, told, groups, stdin, observe, current: None };
    let ended = watch.listen(pipes.stdout, pipes.stderr);
    watch.clean_up();
    ended
}

/// A file without a name: it is gone with its last user.
fn scratch_file(directory: &Path, bytes: u64) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// Removes the groups that builds have left whose process was killed.
fn sweep(groups: &CgroupRoot) {
    for name in groups.names() {
        let owner = name.split('-').next().and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            drop(groups.existing(&name));
        }
    }
}

/// What the runtime complains of, where a command was not even started.
fn never_started(complaint: &str) -> CommandsError {
    match complaint.contains("/bin/sh") && complaint.contains("no such file") {
        true => {
            CommandsError::Refused("the image has no /bin/sh, which commands are run by".to_owned())
        }
        false => CommandsError::Broken(format!("the OCI runtime says: {complaint}")),
    }
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
    observe: &'a mut dyn FnMut(Event),
    current: Option<Current>,
}

impl Watch<'_> {
    /// Takes the keeper's lines, and waits no longer than the command may take.
    fn listen(&mut self, stdout: PipeReader, stderr: PipeReader) -> Result<(), CommandsError> {
        let (sender, lines) = mpsc::sync_channel(64);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut stdout = BufReader::new(stdout);
                loop {
                    let mut line = Vec::new();
                    let read = (&mut stdout).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
                    if read.unwrap_or(0) == 0 || sender.send(line).is_err() {
                        return;
                    }
                }
            });
            let ended = self.take_lines(&lines);
            // Nobody writes to the pipe any more, so the thread ends.
            self.sandbox.kill();
            drop(lines);
            ended
        })
        .and_then(|is_done| match is_done {
            true => Ok(()),
            false => Err(self.without_a_word(stderr)),
        })
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

    /// Whether it was the last word.
    fn take(&mut self, line: Line) -> Result<bool, CommandsError> {
        match line {
            Line::Event(event) => {
                if let Event::Started { index } = event {
                    self.current = Some(Current { index, started: Instant::now() });
                }
                (self.observe)(event);
                Ok(false)
            }
            Line::Ended { index, code, complaint } => {
                self.ended(index, code, complaint)?;
                self.current = None;
                // A keeper that is gone says so by its end.
                let _ = self.stdin.write_all(&[1]);
                Ok(false)
            }
            Line::Done { warnings } => {
                for message in warnings {
                    (self.observe)(Event::Warning { message });
                }
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
    ) -> Result<(), CommandsError> {
        let group = self.groups.existing(&format!("{}-{index}", self.told.group));
        let usage = group.usage();
        drop(group);
        if let Some(complaint) = complaint {
            return Err(never_started(&complaint));
        }
        let is_short = usage.out_of_memory_kills > 0;
        match code {
            0 if is_short => {
                let command = &self.told.order.commands[index];
                let message = format!(
                    "command {} (`{command}`) ended well, but the kernel ended {} of its processes \
                     for want of memory",
                    index + 1,
                    usage.out_of_memory_kills
                );
                (self.observe)(Event::Warning { message });
                Ok(())
            }
            0 => Ok(()),
            _ if is_short => Err(self.failed(CommandEnd::OutOfMemory)),
            code if code > SIGNALLED => Err(self.failed(CommandEnd::Killed(code - SIGNALLED))),
            code => Err(self.failed(CommandEnd::Exited(code))),
        }
    }

    fn time_left(&self) -> Option<Duration> {
        let current = self.current.as_ref()?;
        let most = Duration::from_secs(self.told.order.limits.secs_max?);
        Some(most.saturating_sub(current.started.elapsed()))
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
    fn clean_up(mut self) {
        self.sandbox.kill();
        let _ = self.sandbox.wait();
        for index in 0..self.told.order.commands.len() {
            drop(self.groups.existing(&format!("{}-{index}", self.told.group)));
        }
        self.groups.remove();
    }
}
