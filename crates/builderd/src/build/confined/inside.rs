//! What runs in a worker: shut in, take the order, do the one task, tell.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rootfs::Tally;

use super::{Line, Order, PackTask, SHIFTED, Second, Taken, Task, ToldError};
use crate::build::disk::{Beside, Disk, DiskWriter, Liking, lock};
use crate::build::process::status_bytes;
use crate::build::shift::Run;
use crate::build::{BuildError, BuildEvent, Observer, image};

/// Bytes of a blob, or of a pack, between two words about what a layer has come to.
const TALLY_STEP_BYTES: u64 = 16 << 20;

/// The whole life of a worker.
///
/// # Errors
/// When its pipes are of no use, or it cannot be shut in; a failed task is a line and no error.
pub(crate) fn main() -> io::Result<()> {
    let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut length = [0; 4];
    stdin.read_exact(&mut length)?;
    let mut order = Vec::new();
    (&mut stdin).take(u64::from(u32::from_le_bytes(length))).read_to_end(&mut order)?;
    let Order { policy, has_twin, task } = serde_json::from_slice(&order)?;
    drop(order);
    let status = File::open("/proc/self/status")?;
    let (files, disk) = files(&has_twin)?;
    let walls = sandbox::confine(&policy).map_err(io::Error::other)?;
    let (out, told_bytes) = (Mutex::new(io::stdout()), AtomicU64::new(0));
    let speaker = Speaker { out, told_bytes, status };
    speaker.say(&Line::Walls(walls))?;
    let line = match task {
        Task::Probe => return Ok(()),
        Task::Pack(task) => pack(*task, stdin, &files, &disk, &speaker),
        Task::Image(task) => {
            let cut = |runs: &[Run]| speaker.cut(runs, &stdin);
            image::make(&task, &files, &disk, &cut, &speaker)
                .map(|made| Line::Made { made: Box::new(made), taken: speaker.taken() })
        }
    };
    speaker.say(&line.unwrap_or_else(|error| Line::Failed(ToldError::of(&error))))
}

/// The files that were handed over, and their twins past the page cache.
fn files(has_twin: &[bool]) -> io::Result<(Vec<Arc<File>>, Disk)> {
    let twins = has_twin.iter().filter(|has| **has).count();
    let handed = sandbox::take_files(has_twin.len() + twins)
        .ok_or_else(|| io::Error::other("files that were ordered were not handed over"))?;
    let mut handed = handed.into_iter();
    let (mut files, mut known) = (Vec::new(), Vec::new());
    for has in has_twin {
        let file = handed.next().ok_or(io::ErrorKind::UnexpectedEof)?;
        if *has {
            known.push((file.as_fd().as_raw(), handed.next().ok_or(io::ErrorKind::UnexpectedEof)?));
        }
        files.push(Arc::new(file));
    }
    Ok((files, Disk::knowing(known)))
}

trait RawNumber {
    fn as_raw(&self) -> std::os::fd::RawFd;
}

impl RawNumber for std::os::fd::BorrowedFd<'_> {
    fn as_raw(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(self)
    }
}

fn pack(
    task: PackTask,
    blob: File,
    files: &[Arc<File>],
    disk: &Disk,
    speaker: &Speaker,
) -> Result<Line, BuildError> {
    let PackTask { layer, digest, part, liking, second, limits, counted, writes } = task;
    let file = |number: usize| {
        files.get(number).ok_or(BuildError::WorkerLost { phase: crate::build::Phase::Layers })
    };
    disk.learn(&writes.without_bytes());
    // The image is made of the other file: how much of that is on the disk is the question.
    let aside = Disk::default();
    aside.learn(&writes.without_bytes());
    let out = disk.attach(file(0)?, liking);
    let beside = match second {
        None => Beside::Nothing,
        Some(second) => {
            let other = disk.attach(file(1)?, Liking::Faster).counted_by(&aside);
            match second {
                Second::Copy => Beside::Copy(other),
                Second::Spare => Beside::Spare(other),
            }
        }
    };
    let tally = Tally::of(counted);
    let teller = Teller { tally: &tally, speaker };
    let (summary, is_placed) = DiskWriter::run(out, beside, part, |out| {
        let blob = Telling { inner: blob, teller: &teller, bytes: 0 };
        let mut telling = Telling { inner: &mut *out, teller: &teller, bytes: 0 };
        let summary = rootfs::make_pack_of(blob, &mut telling, &limits, &tally);
        (summary, !out.is_given_up())
    });
    let summary = summary.map_err(|source| BuildError::Pack { layer, digest, source })?;
    teller.tell();
    Ok(Line::Packed { summary, is_placed, writes: disk.writes(), taken: speaker.taken() })
}

/// Says what the layer has come to.
struct Teller<'a> {
    tally: &'a Tally,
    speaker: &'a Speaker,
}

impl Teller<'_> {
    fn tell(&self) {
        let (blob_bytes, tar_bytes, data_bytes) = self.tally.totals();
        // A parent that is gone has ended this process already.
        let _ = self.speaker.say(&Line::Tally { blob_bytes, tar_bytes, data_bytes });
    }
}

/// Reads or writes, and tells every so many bytes.
struct Telling<'a, T> {
    inner: T,
    teller: &'a Teller<'a>,
    bytes: u64,
}

impl<T> Telling<'_, T> {
    fn count(&mut self, count: usize) -> usize {
        self.bytes += count as u64;
        if self.bytes >= TALLY_STEP_BYTES {
            self.bytes = 0;
            self.teller.tell();
        }
        count
    }
}

impl<T: Read> Read for Telling<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map(|count| self.count(count))
    }
}

impl<T: Write> Write for Telling<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes).map(|count| self.count(count))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Parts of the image between two words about how much of it is written.
const PROGRESS_PARTS: u64 = 500;

/// Writes lines to the parent.
struct Speaker {
    out: Mutex<io::Stdout>,
    /// Bytes of the image that were told last.
    told_bytes: AtomicU64,
    /// Opened before the walls stood.
    status: File,
}

impl Speaker {
    fn say(&self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let mut out = lock(&self.out);
        out.write_all(&text)?;
        out.flush()
    }

    /// Asks the parent to cut the file of all packs, and waits for the answer.
    fn cut(&self, runs: &[Run], mut parent: &File) -> io::Result<bool> {
        self.say(&Line::Shift(runs.to_vec()))?;
        let mut answer = [0];
        // One that could not end what it began says nothing any more.
        parent.read_exact(&mut answer)?;
        Ok(answer == SHIFTED)
    }

    fn taken(&self) -> Taken {
        let mut status = String::new();
        let _ = (&self.status).read_to_string(&mut status);
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let time = Duration::try_from(time).unwrap_or_default();
        Taken {
            cpu_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            memory_peak_bytes: status_bytes(&status, "VmHWM:"),
        }
    }
}

impl Observer for Speaker {
    fn event(&self, event: &BuildEvent) {
        if let BuildEvent::WriteProgress { bytes, total_bytes } = *event {
            let told_bytes = self.told_bytes.load(Ordering::Relaxed);
            let is_news = bytes.saturating_sub(told_bytes) > total_bytes / PROGRESS_PARTS;
            if !is_news && bytes != total_bytes {
                return;
            }
            self.told_bytes.store(bytes, Ordering::Relaxed);
        }
        let _ = self.say(&Line::Event(event.clone()));
    }
}
