//! What workers claim, held against what can be. One that was taken over may say anything; what
//! is passed on from here can be added up, shown and stored.

use std::fs::File;
use std::time::Instant;

use super::{ImageMade, ImageTask, Taken};
use crate::build::{BuildEvent, Observer, Phase, output};

/// Beyond every sum of bytes, milliseconds or inodes that a build can come to, and still to be
/// multiplied.
pub(in crate::build) const NUMBER_MAX: u64 = 1 << 48;
/// The phases of an image, in their order.
const PHASES: [Phase; 4] = [Phase::Flatten, Phase::Layout, Phase::Write, Phase::Compress];
/// Warnings of one worker, and letters of each.
const WARNINGS_MAX: u32 = 16;
const WARNING_LETTERS_MAX: usize = 500;
/// Directories of the closing summary, and letters of their names.
const DIRECTORIES_MAX: usize = 8;
const PATH_LETTERS_MAX: usize = 4096;

/// The first letters of a text; what would steer a terminal is spelt out.
pub(super) fn plain(text: &str, letters_max: usize) -> String {
    let letters = text.chars().take(letters_max);
    letters.fold(String::new(), |mut plain, letter| {
        match letter.is_control() {
            true => plain.extend(letter.escape_default()),
            false => plain.push(letter),
        }
        plain
    })
}

/// A time that is said to have passed since `began`: no longer than what has.
pub(in crate::build) fn passed(began: Instant, secs: f64) -> f64 {
    secs.clamp(0.0, began.elapsed().as_secs_f64())
}

impl Taken {
    /// At most what can be.
    pub(super) fn bounded(self) -> Self {
        Self {
            cpu_ms: self.cpu_ms.min(NUMBER_MAX),
            memory_peak_bytes: self.memory_peak_bytes.min(NUMBER_MAX),
        }
    }
}

/// Events of the worker that makes an image, on their way to who watches the build.
pub(super) struct Events<'a> {
    observer: &'a dyn Observer,
    /// Which of [`PHASES`] began last, and when.
    began: Option<(usize, Instant)>,
    is_over: bool,
    /// Bytes, and those in all.
    written: Option<(u64, u64)>,
    warnings: u32,
}

impl<'a> Events<'a> {
    pub(super) fn new(observer: &'a dyn Observer) -> Self {
        Self { observer, began: None, is_over: true, written: None, warnings: 0 }
    }

    /// Where the worker is.
    pub(super) fn phase(&self) -> Phase {
        self.began.map_or(Phase::Flatten, |(phase, _)| PHASES[phase])
    }

    /// Passes an event on; false if no worker says that.
    pub(super) fn pass_on(&mut self, event: BuildEvent) -> bool {
        let Some(event) = self.checked(event) else { return false };
        self.observer.event(&event);
        true
    }

    fn checked(&mut self, event: BuildEvent) -> Option<BuildEvent> {
        match event {
            BuildEvent::PhaseStarted { phase } => {
                let place = PHASES.iter().position(|known| *known == phase)?;
                let is_next = self.is_over && self.began.is_none_or(|(last, _)| place > last);
                (self.began, self.is_over) = (Some((place, Instant::now())), false);
                is_next.then_some(event)
            }
            BuildEvent::PhaseFinished { phase, secs } => {
                let began = self.began.filter(|_| !self.is_over && phase == self.phase())?.1;
                self.is_over = true;
                Some(BuildEvent::PhaseFinished { phase, secs: passed(began, secs) })
            }
            BuildEvent::WriteProgress { bytes, total_bytes } => {
                let (before, total_bytes) =
                    self.written.unwrap_or((0, total_bytes.min(NUMBER_MAX)));
                let bytes = bytes.clamp(before, total_bytes);
                self.written = Some((bytes, total_bytes));
                Some(BuildEvent::WriteProgress { bytes, total_bytes })
            }
            BuildEvent::Warning { message } => {
                self.warnings += 1;
                let message = plain(&message, WARNING_LETTERS_MAX);
                (self.warnings <= WARNINGS_MAX).then_some(BuildEvent::Warning { message })
            }
            BuildEvent::Resolved { .. }
            | BuildEvent::LayerWaiting { .. }
            | BuildEvent::LayerStarted { .. }
            | BuildEvent::LayerProgress { .. }
            | BuildEvent::LayerReady { .. }
            | BuildEvent::CommandStarted { .. }
            | BuildEvent::CommandOutput { .. } => None,
        }
    }
}

/// What of a task decides what its result can be.
pub(super) struct Wanted {
    image: usize,
    slabs: Option<usize>,
    compressed: Option<usize>,
    bytes_max: Option<u64>,
    is_summed: bool,
}

impl Wanted {
    pub(super) fn by(task: &ImageTask) -> Self {
        Self {
            image: task.image,
            slabs: task.slabs,
            compressed: task.compressed,
            bytes_max: task.options.bytes_max,
            is_summed: task.hash,
        }
    }

    /// Whether the file of this number becomes what is wanted; the others are read.
    pub(super) fn makes(&self, number: usize) -> bool {
        [Some(self.image), self.slabs, self.compressed].contains(&Some(number))
    }

    /// What a worker that has ended says it made of `files`; none if that cannot be. Its files must
    /// be the right ones, or one would be summed and another published.
    pub(super) fn checked(&self, files: &[&File], made: ImageMade) -> Option<ImageMade> {
        let has = |number: usize, bytes: u64| {
            let file = files.get(number).and_then(|file| file.metadata().ok());
            file.is_some_and(|file| file.len() == bytes)
        };
        let sum = |sum: &Option<String>, is_wanted: bool| match sum {
            None => !is_wanted,
            Some(sum) => is_wanted && is_hex(sum, 64),
        };
        let is_compressed = self.compressed.is_some();
        let is_it = (made.image == self.image || Some(made.image) == self.slabs)
            && made.file == self.compressed.unwrap_or(made.image)
            && made.compressed_bytes.is_some() == is_compressed
            && has(made.image, made.image_bytes)
            && made.compressed_bytes.is_none_or(|bytes| has(made.file, bytes))
            && sum(&made.image_sha256, self.is_summed)
            && sum(&made.compressed_sha256, self.is_summed && is_compressed);
        let is_sound = self.bytes_max.is_none_or(|most| made.image_bytes <= most)
            && made.filesystem_bytes <= made.image_bytes
            && made.free_bytes <= made.filesystem_bytes
            && made.data_bytes <= NUMBER_MAX
            && made.inodes_used <= made.inodes_total
            && made.inodes_total <= NUMBER_MAX
            && made.uuid.split('-').map(str::len).eq([8, 4, 4, 4, 12])
            && is_hex(&made.uuid.replace('-', ""), 32);
        (is_it && is_sound).then(|| {
            let biggest = made.biggest_directories.into_iter().take(DIRECTORIES_MAX);
            let biggest = biggest.map(|(path, bytes, files)| {
                (plain(&path, PATH_LETTERS_MAX), bytes.min(NUMBER_MAX), files.min(NUMBER_MAX))
            });
            ImageMade { biggest_directories: biggest.collect(), ..made }
        })
    }
}

fn is_hex(text: &str, length: usize) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == length && text.bytes().all(is_digit)
}

/// The sums of what was made, from the files themselves.
///
/// # Errors
/// When a file cannot be read.
pub(super) fn sum(files: &[&File], made: &mut ImageMade) -> std::io::Result<()> {
    let of = |number: usize, bytes: u64| {
        let file = files.get(number).ok_or(std::io::ErrorKind::NotFound)?;
        output::sum(file, bytes).map(Some)
    };
    made.image_sha256 = of(made.image, made.image_bytes)?;
    if let Some(bytes) = made.compressed_bytes {
        made.compressed_sha256 = of(made.file, bytes)?;
    }
    Ok(())
}
