//! A worker, from the parent's side: started, listened to, ended.
//!
//! Who has taken one over decides what it says and whether it ever ends. Whatever that
//! is, this side reads so many bytes and lines and waits so long, and no longer; only a
//! worker that says nothing at all, and may be at work, has the time of its build. What
//! words mean is not known here.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sandbox::{Ender, Outcome, Pipes, Sandbox, SandboxPolicy, Wall};

use super::{Line, Order, Task};
use crate::build::disk::{direct_twin, is_writable, lock};
use crate::build::{BuildError, Phase};
use crate::causes::chain;

/// Longest line that is read from a worker.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Lines of one worker: one for every 16 MiB of the largest layer, and more than enough for an image.
const LINES_MAX: u32 = 1 << 17;
/// How much of a worker's complaints is kept.
const COMPLAINT_BYTES_MAX: usize = 4 << 10;
/// How long a worker that says no more may take to end, and its complaints to come.
const END_MAX: Duration = Duration::from_secs(1);
/// A worker's threads: two or three to a layer, and those that compress.
const THREADS_MAX: u64 = 160;
/// Descriptors beside those that are handed over.
const SPARE_FILES: u64 = 24;

/// What a worker runs.
pub(in crate::build) struct Program {
    file: File,
    arguments: Vec<CString>,
    /// Those that run it, or did; none when they were ended. Held while one starts.
    workers: Mutex<Option<Vec<Ender>>>,
}

impl Program {
    /// This program, as a worker of its own.
    pub(in crate::build) fn own(phase: Phase) -> Result<Self, BuildError> {
        let file = File::open("/proc/self/exe");
        let file = file.map_err(|source| BuildError::Worker { phase, source })?;
        Ok(Self::new(file, vec![c"builderd".to_owned(), c"confined".to_owned()]))
    }

    pub(in crate::build) fn new(file: File, arguments: Vec<CString>) -> Self {
        Self { file, arguments, workers: Mutex::new(Some(Vec::new())) }
    }

    /// Ends the workers that still run it, one that is about to start too, and lets none start any more.
    /// When this returns none has a file open, unless its disk keeps it waiting for longer than a second.
    pub(in crate::build) fn end_workers(&self) {
        let workers = lock(&self.workers).take().unwrap_or_default();
        // All at once, and then one by one.
        for most in [Duration::ZERO, END_MAX] {
            for worker in &workers {
                let _ = worker.end(most);
            }
        }
    }

    /// Starts one, with files of these.
    fn spawn(&self, files: &[BorrowedFd<'_>]) -> io::Result<(Sandbox, Pipes)> {
        let mut workers = lock(&self.workers);
        let workers = workers.as_mut().ok_or_else(|| io::Error::other("the work is over"))?;
        let arguments: Vec<&CStr> = self.arguments.iter().map(|word| &**word).collect();
        let (sandbox, pipes) = Sandbox::spawn(&self.file, &arguments, files)
            .map_err(|error| io::Error::other(chain(&error)))?;
        workers.push(sandbox.ender()?);
        Ok((sandbox, pipes))
    }
}

/// A file for a worker.
#[derive(Clone, Copy)]
pub(super) enum Handed<'a> {
    /// Never more than that, whatever may be done with the file here.
    ToRead(&'a File),
    ToWrite(&'a File),
}

/// A file as it is handed over, and the same past the page cache.
struct Opened<'a> {
    file: BorrowedFd<'a>,
    /// Another open file, where `file` itself could do too much.
    own: Option<File>,
    twin: Option<File>,
}

impl<'a> Opened<'a> {
    fn new(handed: Handed<'a>) -> io::Result<Self> {
        let (file, own) = match handed {
            Handed::ToRead(file) if is_writable(file) => (file, Some(read_only(file)?)),
            Handed::ToRead(file) | Handed::ToWrite(file) => (file, None),
        };
        let twin = direct_twin(own.as_ref().unwrap_or(file));
        Ok(Self { file: file.as_fd(), own, twin })
    }

    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let file = self.own.as_ref().map_or(self.file, |own| own.as_fd());
        std::iter::once(file).chain(self.twin.as_ref().map(|twin| twin.as_fd()))
    }
}

/// The same file, opened to be read.
///
/// # Errors
/// When the system does not open it once more.
pub(in crate::build) fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// What one line means for whoever listens.
pub(super) enum Said<T> {
    /// It goes on.
    More,
    /// The last word.
    Last(T),
    /// No worker says that.
    Nonsense,
}

/// What came of listening to a worker.
pub(super) enum Heard<T> {
    /// Its last word.
    Last(T),
    /// It has ended, without one.
    Ended,
    /// It was ended for what it did.
    Stopped(&'static str),
}

/// See the module.
pub(super) struct Worker {
    pub(super) sandbox: Sandbox,
    pub(super) phase: Phase,
    pub(super) stdin: Option<PipeWriter>,
    pub(super) lines: BufReader<PipeReader>,
    complaint: Complaint,
}

impl Worker {
    pub(super) fn start(
        program: &Program,
        task: Task,
        files: &[Handed<'_>],
        phase: Phase,
    ) -> Result<Self, BuildError> {
        let failed = |source| BuildError::Worker { phase, source };
        let opened = files.iter().map(|file| Opened::new(*file)).collect::<io::Result<Vec<_>>>();
        let opened = opened.map_err(failed)?;
        let handed: Vec<BorrowedFd<'_>> = opened.iter().flat_map(Opened::descriptors).collect();
        let policy = SandboxPolicy {
            // Those of this process, which are the build's, are inherited.
            memory_bytes_max: None,
            file_bytes_max: None,
            files_max: 2 * handed.len() as u64 + SPARE_FILES,
            threads_max: THREADS_MAX,
        };
        let has_twin = opened.iter().map(|file| file.twin.is_some()).collect();
        let order = serde_json::to_vec(&Order { policy, has_twin, task })
            .map_err(|error| failed(error.into()))?;
        let (sandbox, pipes) = program.spawn(&handed).map_err(failed)?;
        let mut stdin = pipes.stdin;
        let length = u32::try_from(order.len()).map_err(|error| failed(io::Error::other(error)))?;
        // One that has ended already says so by its end.
        let _ = stdin.write_all(&length.to_le_bytes()).and_then(|()| stdin.write_all(&order));
        let lines = BufReader::new(pipes.stdout);
        let complaint = Complaint::of(pipes.stderr).map_err(failed)?;
        Ok(Self { sandbox, phase, stdin: Some(stdin), lines, complaint })
    }

    /// Waits for the worker's end. Without a last word its end is the reason.
    pub(super) fn end<T>(mut self, heard: Result<Heard<T>, BuildError>) -> Result<T, BuildError> {
        let problem = match heard? {
            Heard::Last(last) => return Ok(last),
            Heard::Ended => None,
            Heard::Stopped(problem) => Some(problem),
        };
        let phase = self.phase;
        let outcome = self.sandbox.wait().map_err(|source| BuildError::Worker { phase, source })?;
        let complaint = self.complaint.take();
        Err(match problem {
            Some(problem) => {
                BuildError::WorkerStopped { phase, problem, complaint: abridged(&complaint) }
            }
            None => ended(phase, outcome, &complaint),
        })
    }
}

/// What a worker writes to standard error: the beginning is kept, and the rest taken too, so that
/// an honest one is never kept waiting for who reads it.
struct Complaint {
    kept: Arc<Mutex<Vec<u8>>>,
    is_over: Receiver<()>,
}

impl Complaint {
    fn of(mut stderr: PipeReader) -> io::Result<Self> {
        let kept = Arc::<Mutex<Vec<u8>>>::default();
        let (over, is_over) = sync_channel(1);
        let keeping = Arc::clone(&kept);
        let read = move || {
            let mut buffer = [0; COMPLAINT_BYTES_MAX];
            // Ends with the worker: nobody else has the other end.
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                let mut kept = lock(&keeping);
                let count = count.min(COMPLAINT_BYTES_MAX - kept.len());
                kept.extend_from_slice(&buffer[..count]);
            }
            // Not wanted any more of one that had a last word.
            let _ = over.send(());
        };
        std::thread::Builder::new().name("complaint".to_owned()).spawn(read)?;
        Ok(Self { kept, is_over })
    }

    /// Of a worker that has ended.
    fn take(&self) -> String {
        let _ = self.is_over.recv_timeout(END_MAX);
        String::from_utf8_lossy(&lock(&self.kept)).into_owned()
    }
}

/// What the end of a worker without a word means.
fn ended(phase: Phase, outcome: Outcome, complaint: &str) -> BuildError {
    // The standard library's last words, "alloc::handle_alloc_error".
    if complaint.contains("memory allocation of") {
        return BuildError::OutOfMemory { phase };
    }
    let complaint = abridged(complaint);
    BuildError::WorkerEnded { phase, outcome: outcome.to_string(), complaint }
}

fn abridged(complaint: &str) -> String {
    super::claims::plain(&complaint.lines().take(2).collect::<Vec<_>>().join(" "), 500)
}

/// Takes lines until `take` gives the last word or an error, or there are no more. Afterwards the
/// worker has ended, or is about to: nobody who writes to it waits for ever.
pub(super) fn listen<T>(
    lines: &mut BufReader<PipeReader>,
    sandbox: &Sandbox,
    walls: &[Wall],
    take: impl FnMut(Line) -> Result<Said<T>, BuildError>,
) -> Result<Heard<T>, BuildError> {
    let heard = hear(lines, sandbox.walls(), walls, take);
    if matches!(heard, Ok(Heard::Ended)) {
        if sandbox.ends_within(END_MAX) {
            return heard;
        }
        sandbox.kill();
        return Ok(Heard::Stopped("stopped talking"));
    }
    sandbox.kill();
    heard
}

/// Takes the lines of a worker behind the walls that were `given` to it, which must come to all of
/// `walls`.
pub(super) fn hear<T>(
    lines: &mut impl BufRead,
    given: &[Wall],
    walls: &[Wall],
    mut take: impl FnMut(Line) -> Result<Said<T>, BuildError>,
) -> Result<Heard<T>, BuildError> {
    const NONSENSE: &str = "did not make sense";
    let mut are_seen = walls.is_empty();
    let mut line = Vec::new();
    for _ in 0..LINES_MAX {
        line.clear();
        let count = lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).unwrap_or(0);
        // Who is ended in the middle of a line has ended.
        if line.last() != Some(&b'\n') && (count as u64) < LINE_BYTES_MAX {
            return Ok(Heard::Ended);
        }
        let Ok(line) = serde_json::from_slice(&line) else { return Ok(Heard::Stopped(NONSENSE)) };
        if let Line::Walls(stand) = &line {
            let stands = |wall: &Wall| stand.contains(wall) || given.contains(wall);
            let missing: Vec<Wall> = walls.iter().copied().filter(|wall| !stands(wall)).collect();
            if !missing.is_empty() {
                return Err(BuildError::Walls { missing });
            }
            are_seen = true;
        }
        if !are_seen {
            return Ok(Heard::Stopped(NONSENSE));
        }
        match take(line)? {
            Said::More => {}
            Said::Last(last) => return Ok(Heard::Last(last)),
            Said::Nonsense => return Ok(Heard::Stopped(NONSENSE)),
        }
    }
    Ok(Heard::Stopped("talked without end"))
}
