//! Work on foreign bytes, in processes that can reach nothing: `builderd confined`.
//!
//! A layer's blob goes in through a pipe and its pack comes out in a file that the
//! worker was handed; another worker gets the packs and makes the image. A worker
//! has no credentials, no network, no directory and no other build: who takes one
//! over holds the bytes that he sent, and can spoil what is made of them. So the
//! parent trusts a worker's word about its own layer or image and nothing else; it
//! hashes blobs itself and files packs by that digest.
//!
//! This half starts workers and listens; `inside` is what runs in them.

mod inside;
mod told;

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};

use bytes::Bytes;
use rootfs::{Limits, PackSummary, Tally, TreeLimits};
use sandbox::{Outcome, Sandbox, SandboxPolicy, Wall};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::disk::{Disk, Lane, Liking, direct_twin};
use super::{BuildError, BuildEvent, Compression, ImageOptions, Observer, Phase};

pub(crate) use inside::main;
pub use told::ToldError;
pub(super) use told::chain;

/// Longest line that is read from a worker.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// How much of a worker's complaints is kept.
const COMPLAINT_BYTES_MAX: u64 = 4 << 10;
/// A worker's threads: two or three to a layer, and those that compress.
const THREADS_MAX: u64 = 160;
/// Descriptors beside those that are handed over.
const SPARE_FILES: u64 = 24;
/// The pipe of a blob: fewer turns between the process that fetches and the one that inflates.
const PIPE_BYTES: usize = 1 << 20;

/// What a worker reads first.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    policy: SandboxPolicy,
    /// For each file whether the next descriptor is the same file past the page cache.
    has_twin: Vec<bool>,
    task: Task,
}

#[derive(Debug, Serialize, Deserialize)]
enum Task {
    /// Nothing: what matters is which walls stand.
    Probe,
    Pack(Box<PackTask>),
    Image(Box<ImageTask>),
}

/// One layer: the blob follows on standard input, the pack goes to the first file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PackTask {
    /// Its place from the bottom, from 0.
    pub(super) layer: usize,
    /// Of its blob, as the manifest says.
    pub(super) digest: oci::Digest,
    /// Where in the file.
    pub(super) part: Range<u64>,
    pub(super) liking: Liking,
    pub(super) limits: Limits,
    /// What the layers have come to before: bytes of blobs, of tars, of data.
    pub(super) counted: [u64; 3],
    /// What is known of the disk.
    pub(super) writes: Lane,
}

/// One image: the packs are among the files.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ImageTask {
    pub(super) layers: Vec<LayerPart>,
    pub(super) tree_limits: TreeLimits,
    pub(super) options: ImageOptions,
    pub(super) manifest_digest: String,
    /// The sum of what commands have changed.
    pub(super) changes: Option<String>,
    /// When the config says the image was made.
    pub(super) created_secs: i64,
    pub(super) hash: bool,
    pub(super) compression: Compression,
    pub(super) jobs: usize,
    /// For messages: the name of the output.
    pub(super) output: std::path::PathBuf,
    /// The file in which all packs lie, if it can become the image.
    pub(super) slabs: Option<usize>,
    /// The empty file that becomes the image otherwise.
    pub(super) image: usize,
    /// The empty file for its compressed form.
    pub(super) compressed: Option<usize>,
}

/// A pack as a part of one of the files.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LayerPart {
    pub(super) digest: oci::Digest,
    pub(super) file: usize,
    pub(super) base: u64,
    pub(super) length: u64,
}

/// What a worker has made of an image.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ImageMade {
    /// Which of the files is the result.
    pub(super) file: usize,
    /// Which of them is the image, before it was compressed.
    pub(super) image: usize,
    pub(super) image_bytes: u64,
    pub(super) image_sha256: Option<String>,
    pub(super) compressed_bytes: Option<u64>,
    pub(super) compressed_sha256: Option<String>,
    pub(super) uuid: String,
    pub(super) filesystem_bytes: u64,
    pub(super) free_bytes: u64,
    pub(super) data_bytes: u64,
    pub(super) inodes_used: u64,
    pub(super) inodes_total: u64,
    /// Path, bytes, files.
    pub(super) biggest_directories: Vec<(String, u64, u64)>,
}

/// What a worker took.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub(super) cpu_ms: u64,
    pub(super) memory_peak_bytes: u64,
}

/// What a worker says, one JSON object per line.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    /// The first: what it stands behind.
    Walls(Vec<Wall>),
    Event(BuildEvent),
    /// What the layer has come to so far.
    Tally {
        blob_bytes: u64,
        tar_bytes: u64,
        data_bytes: u64,
    },
    Packed {
        summary: PackSummary,
        writes: Lane,
        taken: Taken,
    },
    Made {
        made: Box<ImageMade>,
        taken: Taken,
    },
    Failed(ToldError),
}

/// Tries which walls this host gives a worker.
///
/// # Errors
/// [`BuildError`] when there is no worker at all.
pub(crate) fn probe() -> Result<Vec<Wall>, BuildError> {
    let mut worker = Worker::start(Task::Probe, &[], Phase::Resolve)?;
    drop(worker.stdin.take());
    let given = worker.sandbox.walls();
    let result = listen(&mut worker.lines, &worker.sandbox, &[], |line| match line {
        Line::Walls(mut walls) => {
            walls.extend_from_slice(given);
            Ok(Some(walls))
        }
        Line::Failed(told) => Err(BuildError::Told(told)),
        Line::Event(_) | Line::Tally { .. } | Line::Packed { .. } | Line::Made { .. } => Ok(None),
    });
    worker.end(result)
}

/// Makes the pack of one layer from the chunks of its blob.
///
/// # Errors
/// [`BuildError`], as the worker tells it, or that it ended without a word.
pub(super) fn pack(
    task: PackTask,
    file: &File,
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    walls: &[Wall],
    tally: &Tally,
    disk: &Disk,
) -> Result<(PackSummary, Taken), BuildError> {
    let (layer, digest, limits) = (task.layer, task.digest, task.limits.clone());
    let mut counted = task.counted;
    let mut worker = Worker::start(Task::Pack(Box::new(task)), &[file], Phase::Layers)?;
    let stdin = worker.stdin.take();
    let result = std::thread::scope(|scope| {
        let sandbox = &worker.sandbox;
        scope.spawn(move || feed(chunks, stdin, sandbox));
        let told = listen(&mut worker.lines, sandbox, walls, |line| match line {
            Line::Tally { blob_bytes, tar_bytes, data_bytes } => {
                let now = [blob_bytes, tar_bytes, data_bytes];
                let more: Vec<u64> =
                    now.iter().zip(counted).map(|(now, told)| now.saturating_sub(told)).collect();
                counted = now;
                tally
                    .add(more[0], more[1], more[2], &limits)
                    .map_err(|source| BuildError::Pack { layer, digest, source })
                    .map(|()| None)
            }
            Line::Packed { summary, writes, taken } => {
                disk.learn(&writes);
                Ok(Some((summary, taken)))
            }
            Line::Failed(told) => Err(BuildError::Told(told)),
            Line::Walls(_) | Line::Event(_) | Line::Made { .. } => Ok(None),
        });
        if told.is_err() {
            sandbox.kill();
        }
        told
    });
    worker.end(result)
}

/// Hands the blob on. A worker that does not want more is no concern of this side; one whose blob
/// will not come must not take what it has for all of it.
fn feed(
    mut chunks: mpsc::Receiver<io::Result<Bytes>>,
    stdin: Option<PipeWriter>,
    sandbox: &Sandbox,
) {
    let Some(mut stdin) = stdin else { return };
    // Refused beyond the user's share of pipe memory; then it is as large as it was.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdin, PIPE_BYTES);
    while let Some(chunk) = chunks.blocking_recv() {
        match chunk {
            Ok(chunk) => {
                if stdin.write_all(&chunk).is_err() {
                    return;
                }
            }
            Err(_) => {
                sandbox.kill();
                return;
            }
        }
    }
}

/// Makes the image from its packs.
///
/// # Errors
/// As [`pack`].
pub(super) fn image(
    task: ImageTask,
    files: &[&File],
    walls: &[Wall],
    observer: &dyn Observer,
) -> Result<(ImageMade, Taken), BuildError> {
    let mut phase = Phase::Flatten;
    let mut worker = Worker::start(Task::Image(Box::new(task)), files, phase)?;
    drop(worker.stdin.take());
    let result = listen(&mut worker.lines, &worker.sandbox, walls, |line| match line {
        Line::Event(event) => {
            if let BuildEvent::PhaseStarted { phase: next } = &event {
                phase = *next;
            }
            observer.event(&event);
            Ok(None)
        }
        Line::Made { made, taken } => Ok(Some((*made, taken))),
        Line::Failed(told) => Err(BuildError::Told(told)),
        Line::Walls(_) | Line::Tally { .. } | Line::Packed { .. } => Ok(None),
    });
    worker.phase = phase;
    worker.end(result)
}

/// A worker, from the parent's side.
struct Worker {
    sandbox: Sandbox,
    phase: Phase,
    stdin: Option<PipeWriter>,
    lines: BufReader<PipeReader>,
    stderr: PipeReader,
}

impl Worker {
    fn start(task: Task, files: &[&File], phase: Phase) -> Result<Self, BuildError> {
        let failed = |source| BuildError::Worker { phase, source };
        let twins: Vec<Option<File>> = files.iter().map(|file| direct_twin(file)).collect();
        let mut handed: Vec<BorrowedFd<'_>> = Vec::with_capacity(2 * files.len());
        for (file, twin) in files.iter().zip(&twins) {
            handed.push(file.as_fd());
            handed.extend(twin.as_ref().map(|twin| twin.as_fd()));
        }
        let policy = SandboxPolicy {
            // Those of this process, which are the build's, are inherited.
            memory_bytes_max: None,
            file_bytes_max: None,
            files_max: 2 * handed.len() as u64 + SPARE_FILES,
            threads_max: THREADS_MAX,
        };
        let has_twin = twins.iter().map(Option::is_some).collect();
        let order = serde_json::to_vec(&Order { policy, has_twin, task })
            .map_err(|error| failed(error.into()))?;
        let program = File::open("/proc/self/exe").map_err(failed)?;
        let (sandbox, pipes) = Sandbox::spawn(&program, &[c"builderd", c"confined"], &handed)
            .map_err(|error| failed(io::Error::other(chain(&error))))?;
        let mut stdin = pipes.stdin;
        let length = u32::try_from(order.len()).map_err(|error| failed(io::Error::other(error)))?;
        // One that ended at once says why on its standard error.
        let _ = stdin.write_all(&length.to_le_bytes()).and_then(|()| stdin.write_all(&order));
        let lines = BufReader::new(pipes.stdout);
        Ok(Self { sandbox, phase, stdin: Some(stdin), lines, stderr: pipes.stderr })
    }

    /// Waits for the worker's end. Without a result its end is the reason.
    fn end<T>(mut self, result: Result<Option<T>, BuildError>) -> Result<T, BuildError> {
        drop(self.lines);
        if let Some(result) = result? {
            return Ok(result);
        }
        let phase = self.phase;
        let mut complaint = Vec::new();
        let _ = (&mut self.stderr).take(COMPLAINT_BYTES_MAX).read_to_end(&mut complaint);
        let outcome = self.sandbox.wait().map_err(|source| BuildError::Worker { phase, source })?;
        let complaint = String::from_utf8_lossy(&complaint);
        Err(ended(phase, outcome, &complaint))
    }
}

/// What the end of a worker without a word means.
fn ended(phase: Phase, outcome: Outcome, complaint: &str) -> BuildError {
    // The standard library's last words, "alloc::handle_alloc_error".
    if complaint.contains("memory allocation of") {
        return BuildError::OutOfMemory { phase };
    }
    let complaint: String =
        complaint.lines().take(2).collect::<Vec<_>>().join(" ").chars().take(500).collect();
    BuildError::WorkerEnded { phase, outcome: outcome.to_string(), complaint }
}

/// Takes lines until `take` gives a result or an error, or there are no more.
fn listen<T>(
    lines: &mut BufReader<PipeReader>,
    sandbox: &Sandbox,
    walls: &[Wall],
    mut take: impl FnMut(Line) -> Result<Option<T>, BuildError>,
) -> Result<Option<T>, BuildError> {
    let mut are_seen = walls.is_empty();
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).unwrap_or(0);
        if count == 0 {
            return Ok(None);
        }
        let Ok(line) = serde_json::from_slice(&line) else { return Ok(None) };
        if let Line::Walls(stand) = &line {
            let stands = |wall: &Wall| stand.contains(wall) || sandbox.walls().contains(wall);
            let missing: Vec<Wall> = walls.iter().copied().filter(|wall| !stands(wall)).collect();
            if !missing.is_empty() {
                return Err(BuildError::Walls { missing });
            }
            are_seen = true;
        }
        if !are_seen {
            return Ok(None);
        }
        if let Some(result) = take(line)? {
            return Ok(Some(result));
        }
    }
}
