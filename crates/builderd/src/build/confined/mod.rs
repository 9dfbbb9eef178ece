//! Work on foreign bytes, in processes that can reach nothing: `builderd confined`.
//!
//! A layer's blob goes in through a pipe and its pack comes out in a file that the
//! worker was handed; another worker gets the packs and makes the image. A worker
//! has no credentials, no network, no directory and no other build: who takes one
//! over holds the bytes that he sent, and can spoil what is made of them. So the
//! parent trusts a worker's word about its own layer or image and nothing else; it
//! hashes blobs itself and files packs by that digest.
//!
//! This half says what workers are to do; `worker` starts them and listens, `claims` is
//! what becomes of what they say, `inside` is what runs in them.

mod claims;
mod inside;
#[cfg(any(test, feature = "testing"))]
mod samples;
#[cfg(feature = "testing")]
pub(crate) mod testing;
mod told;
mod worker;

use std::fs::File;
use std::io::{self, PipeWriter, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rootfs::{Limits, PackError, PackSummary, Tally, TreeLimits};
use sandbox::{Sandbox, SandboxPolicy, Wall};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::disk::{Disk, Lane, Liking};
use super::shift::{Run, Shift};
use super::{BuildError, BuildEvent, Compression, ImageOptions, Observer, Phase};
use claims::{Events, Wanted};
use worker::{Handed, Said, Worker, listen};

pub(super) use claims::{NUMBER_MAX, passed};
pub(crate) use inside::main;
pub use told::ToldError;
pub(super) use worker::{Program, read_only};

/// The pipe of a blob: fewer turns between the process that fetches and the one that inflates.
const PIPE_BYTES: usize = 1 << 20;

/// The answer to [`Line::Shift`] of who has done that.
const SHIFTED: [u8; 1] = [1];
/// Of who could not, and has changed nothing that counts.
const NOT_SHIFTED: [u8; 1] = [0];

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

/// One layer: the blob follows on standard input, the pack goes to the first file, and perhaps to
/// a second one.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PackTask {
    /// Its place from the bottom, from 0.
    pub(super) layer: usize,
    /// Of its blob, as the manifest says.
    pub(super) digest: oci::Digest,
    /// Where in the first file.
    pub(super) part: Range<u64>,
    pub(super) liking: Liking,
    /// What the second file is for, if there is one.
    pub(super) second: Option<Second>,
    pub(super) limits: Limits,
    /// What the layers have come to before: bytes of blobs, of tars, of data.
    pub(super) counted: [u64; 3],
    /// What is known of the disk.
    pub(super) writes: Lane,
}

/// A file for a pack, from its front on, beside a part of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Second {
    /// It gets the pack, too. Then the first is written to only as long as there is room in its part, and
    /// its disk is fast enough for what it is for.
    Copy,
    /// It gets the pack if the part of the first has no room for it.
    Spare,
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
    pub(super) output: PathBuf,
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

/// What a worker has made of a layer.
#[derive(Debug)]
pub(super) struct PackMade {
    pub(super) summary: PackSummary,
    /// Whether all of it is in the first file.
    pub(super) is_placed: bool,
    pub(super) taken: Taken,
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
        is_placed: bool,
        writes: Lane,
        taken: Taken,
    },
    /// Asks for the file of all packs to be cut to these runs. The answer is [`SHIFTED`] or another byte.
    Shift(Vec<Run>),
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
    let phase = Phase::Resolve;
    let mut worker = Worker::start(&Program::own(phase)?, Task::Probe, &[], phase)?;
    drop(worker.stdin.take());
    let given = worker.sandbox.walls();
    let heard = listen(&mut worker.lines, &worker.sandbox, &[], |line| match line {
        Line::Walls(mut walls) => {
            walls.extend_from_slice(given);
            Ok(Said::Last(walls))
        }
        Line::Failed(told) => Err(BuildError::Told(told.checked())),
        Line::Event(_)
        | Line::Tally { .. }
        | Line::Packed { .. }
        | Line::Shift(_)
        | Line::Made { .. } => Ok(Said::Nonsense),
    });
    worker.end(heard)
}

/// Makes the pack of one layer from the chunks of its blob, in the one file that the task has.
///
/// # Errors
/// [`BuildError`], as the worker tells it, or that it ended without a word.
pub(super) fn pack(
    task: PackTask,
    files: &[&File],
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    walls: &[Wall],
    tally: &Tally,
    disk: &Disk,
) -> Result<(PackSummary, Taken), BuildError> {
    let made = pack_by(&Program::own(Phase::Layers)?, task, files, chunks, walls, tally, disk)?;
    Ok((made.summary, made.taken))
}

/// As [`pack`], by a worker that runs `program`, and in two files if the task has them.
///
/// # Errors
/// As [`pack`].
pub(super) fn pack_by(
    program: &Program,
    task: PackTask,
    files: &[&File],
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    walls: &[Wall],
    tally: &Tally,
    disk: &Disk,
) -> Result<PackMade, BuildError> {
    let (layer, digest) = (task.layer, task.digest);
    let mut packing = Packing::of(&task, tally, disk);
    let task = Task::Pack(Box::new(task));
    let files: Vec<Handed<'_>> = files.iter().map(|file| Handed::ToWrite(file)).collect();
    let mut worker = Worker::start(program, task, &files, Phase::Layers)?;
    let stdin = worker.stdin.take();
    let (heard, fed) = std::thread::scope(|scope| {
        let sandbox = &worker.sandbox;
        let feeding = scope.spawn(move || feed(chunks, stdin, sandbox));
        let heard = listen(&mut worker.lines, sandbox, walls, |line| packing.take(line));
        (heard, feeding.join())
    });
    let packed = worker.end(heard);
    match fed {
        Ok(Err((blob_bytes, source))) if packed.is_err() => {
            // That it was ended for want of its blob is no word of its own.
            let source = PackError::Blob { blob_bytes, source };
            Err(BuildError::Pack { layer, digest, source })
        }
        Ok(_) => packed,
        Err(_) => Err(BuildError::WorkerLost { phase: Phase::Layers }),
    }
}

/// What lines mean of a worker that packs a layer.
struct Packing<'a> {
    layer: usize,
    digest: oci::Digest,
    limits: Limits,
    counted: [u64; 3],
    tally: &'a Tally,
    disk: &'a Disk,
}

impl<'a> Packing<'a> {
    fn of(task: &PackTask, tally: &'a Tally, disk: &'a Disk) -> Self {
        let (layer, digest, limits) = (task.layer, task.digest, task.limits.clone());
        Self { layer, digest, limits, counted: task.counted, tally, disk }
    }

    fn take(&mut self, line: Line) -> Result<Said<PackMade>, BuildError> {
        match line {
            Line::Tally { blob_bytes, tar_bytes, data_bytes } => {
                let now = [blob_bytes, tar_bytes, data_bytes];
                let [blob, tar, data] = grown(&mut self.counted, now);
                let (layer, digest) = (self.layer, self.digest);
                let refused = |source| BuildError::Pack { layer, digest, source };
                let added = self.tally.add(blob, tar, data, &self.limits);
                added.map_err(refused).map(|()| Said::More)
            }
            Line::Packed { summary, is_placed, writes, taken } => {
                self.disk.learn(&writes);
                Ok(Said::Last(PackMade { summary, is_placed, taken: taken.bounded() }))
            }
            Line::Failed(told) => Err(BuildError::Told(told.checked())),
            Line::Walls(_) => Ok(Said::More),
            Line::Event(_) | Line::Shift(_) | Line::Made { .. } => Ok(Said::Nonsense),
        }
    }
}

/// By how much each sum has grown; none shrinks.
fn grown(counted: &mut [u64; 3], now: [u64; 3]) -> [u64; 3] {
    let mut more = [0; 3];
    for ((more, counted), now) in more.iter_mut().zip(counted).zip(now) {
        *more = now.saturating_sub(*counted);
        *counted = now.max(*counted);
    }
    more
}

/// Hands the blob on. A worker that does not want more is no concern of this side; one whose blob
/// will not come must not take what it has for all of it.
///
/// # Errors
/// That it does not come, and how many bytes came before.
fn feed(
    mut chunks: mpsc::Receiver<io::Result<Bytes>>,
    stdin: Option<PipeWriter>,
    sandbox: &Sandbox,
) -> Result<(), (u64, io::Error)> {
    let Some(mut stdin) = stdin else { return Ok(()) };
    // Refused beyond the user's share of pipe memory; then it is as large as it was.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdin, PIPE_BYTES);
    let mut blob_bytes = 0;
    while let Some(chunk) = chunks.blocking_recv() {
        match chunk {
            Ok(chunk) => {
                blob_bytes += chunk.len() as u64;
                if stdin.write_all(&chunk).is_err() {
                    return Ok(());
                }
            }
            Err(source) => {
                sandbox.kill();
                return Err((blob_bytes, source));
            }
        }
    }
    Ok(())
}

/// Makes the image from its packs. With `is_summed_here` its sums are those of the finished files,
/// and the worker is not asked for any.
///
/// # Errors
/// As [`pack`].
pub(super) fn image(
    task: ImageTask,
    files: &[&File],
    walls: &[Wall],
    observer: &dyn Observer,
    is_summed_here: bool,
) -> Result<(ImageMade, Taken), BuildError> {
    image_by(&Program::own(Phase::Flatten)?, task, files, walls, observer, is_summed_here)
}

fn image_by(
    program: &Program,
    task: ImageTask,
    files: &[&File],
    walls: &[Wall],
    observer: &dyn Observer,
    is_summed_here: bool,
) -> Result<(ImageMade, Taken), BuildError> {
    let (wanted, output) = (Wanted::by(&task), task.output.clone());
    let slabs = task.slabs.and_then(|slabs| files.get(slabs).copied());
    let handed = files.iter().enumerate().map(|(number, &file)| match wanted.makes(number) {
        true => Handed::ToWrite(file),
        // Others use the same packs.
        false => Handed::ToRead(file),
    });
    let handed: Vec<Handed<'_>> = handed.collect();
    let task = Task::Image(Box::new(task));
    let events = Events::new(observer);
    let mut worker = Worker::start(program, task, &handed, events.phase())?;
    let (shift, answers) = (Shift::of(slabs), worker.stdin.take());
    let sandbox = Some(&worker.sandbox);
    let mut imaging = Imaging { events, shift, answers, sandbox, output: &output };
    let heard = listen(&mut worker.lines, &worker.sandbox, walls, |line| imaging.take(line));
    let phase = imaging.events.phase();
    worker.phase = phase;
    let (made, taken) = worker.end(heard)?;
    // It has ended: what is looked at from here on is what will be published.
    let mut made = wanted.checked(files, made).ok_or_else(|| BuildError::WorkerStopped {
        phase,
        problem: "lied about what it had made",
        complaint: String::new(),
    })?;
    if is_summed_here {
        claims::sum(files, &mut made).map_err(|source| BuildError::Output {
            action: "read back",
            path: output,
            source,
        })?;
    }
    Ok((made, taken))
}

/// What lines mean of a worker that makes an image.
struct Imaging<'a> {
    events: Events<'a>,
    shift: Shift<'a>,
    /// The worker's standard input.
    answers: Option<PipeWriter>,
    /// The worker itself; none where there is no process.
    sandbox: Option<&'a Sandbox>,
    /// For messages.
    output: &'a Path,
}

impl Imaging<'_> {
    fn take(&mut self, line: Line) -> Result<Said<(ImageMade, Taken)>, BuildError> {
        match line {
            Line::Event(event) => match self.events.pass_on(event) {
                true => Ok(Said::More),
                false => Ok(Said::Nonsense),
            },
            Line::Shift(runs) => self.cut(&runs),
            Line::Made { made, taken } => Ok(Said::Last((*made, taken.bounded()))),
            Line::Failed(told) => Err(BuildError::Told(told.checked())),
            Line::Walls(_) => Ok(Said::More),
            Line::Tally { .. } | Line::Packed { .. } => Ok(Said::Nonsense),
        }
    }

    fn cut<T>(&mut self, runs: &[Run]) -> Result<Said<T>, BuildError> {
        let failed = |source| BuildError::Output {
            action: "arrange the data of",
            path: self.output.to_owned(),
            source,
        };
        let shift = &mut self.shift;
        let shifted = match self.sandbox {
            Some(sandbox) => sandbox.while_held(|| shift.take(runs)).map_err(failed)?,
            None => shift.take(runs),
        };
        let Some(shifted) = shifted else { return Ok(Said::Nonsense) };
        let shifted = shifted.map_err(failed)?;
        if let Some(mut answers) = self.answers.take() {
            // That it has ended is told by its end.
            let _ = answers.write_all(if shifted { &SHIFTED } else { &NOT_SHIFTED });
        }
        Ok(Said::More)
    }
}

#[cfg(test)]
mod tests;
