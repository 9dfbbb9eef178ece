//! A file in which all packs of an image lie, cut to shape: it becomes the image, and no byte is moved
//! (fallocate(2), `FALLOC_FL_COLLAPSE_RANGE` and `FALLOC_FL_INSERT_RANGE`).
//!
//! The worker that makes an image knows where data belongs, and asks for it; its parent cuts. Behind its
//! walls a worker cannot: to move blocks out of the way gives a file more of them than `RLIMIT_FSIZE` does.
//!
//! It knows neither how packs came to lie in one file (`layers/slabs.rs`) nor what an image is made of: runs
//! are what a worker says, of which it believes nothing but what it has checked.

use std::cmp::Ordering;
use std::fs::File;
use std::io;

use ext4::{BLOCK_SIZE, Layout};
use rustix::fs::FallocateFlags;
use rustix::process::Resource;
use serde::{Deserialize, Serialize};

use super::output::magic;
use crate::packs::OpenPack;

/// Runs that are shifted at most. Each cut moves what the file system knows of all data behind it, so the
/// work grows with their number and with that of the pieces they lie in on the disk.
const RUNS_MAX: usize = 4096;

/// Data that stays together, in blocks of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    /// Where it is,
    from: u64,
    /// and where it belongs.
    to: u64,
    blocks: u64,
}

impl Run {
    /// Where it ends, and where it will; none if that is no number.
    fn ends(&self) -> Option<(u64, u64)> {
        Some((self.from.checked_add(self.blocks)?, self.to.checked_add(self.blocks)?))
    }
}

/// The runs of an image whose packs lie in one file, in their order. None if there is nothing to be
/// shifted, or too much, or the image is larger than the file may be.
///
/// # Errors
/// When the layout has more layers than there are packs.
pub(super) fn runs(layout: &Layout, packs: &[OpenPack]) -> io::Result<Option<Vec<Run>>> {
    let run_of = |run: ext4::Move| {
        let pack = usize::try_from(run.region).ok().and_then(|region| packs.get(region));
        let base = pack.ok_or_else(|| io::Error::other("a layer without a pack"))?.base;
        let from = base / BLOCK_SIZE + run.region_block;
        Ok(Run { from, to: run.image_block, blocks: run.blocks })
    };
    let runs = layout.moves().take(RUNS_MAX + 1).map(run_of).collect::<io::Result<Vec<Run>>>()?;
    let end = runs.last().and_then(Run::ends).map_or(0, |(_, to)| to);
    let can_be = !runs.is_empty() && runs.len() <= RUNS_MAX && end <= file_blocks_max();
    Ok(can_be.then_some(runs))
}

/// What a worker may ask for.
pub(super) struct Shift<'a> {
    /// The file of all packs, if it can become the image and has not been asked for.
    file: Option<&'a File>,
}

impl<'a> Shift<'a> {
    pub(super) fn of(file: Option<&'a File>) -> Self {
        Self { file }
    }

    /// Cuts the file: what lies between the runs goes, and room is made where the image has something
    /// else. None if no worker asks for that. False if the file system refuses: the runs are still where
    /// they were, all else of the packs (dead blocks, the last table of contents) may be gone.
    ///
    /// Nobody may write to the file meanwhile: what lies below the end of files would be moved beyond it.
    ///
    /// # Errors
    /// When it stops half-way; there is no image then.
    pub(super) fn take(&mut self, runs: &[Run]) -> Option<io::Result<bool>> {
        let file = self.file.take()?;
        let file_bytes = match file.metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) => return Some(Err(error)),
        };
        // Behind the last data lies a table of contents.
        let sound = Sound::of(runs, file_bytes / BLOCK_SIZE, file_blocks_max())?;
        Some(sound.cut(file))
    }
}

/// Runs that come one behind the other.
struct Sound<'a>(&'a [Run]);

impl<'a> Sound<'a> {
    /// In a file of so many blocks that may have so many at most.
    fn of(runs: &'a [Run], blocks: u64, blocks_max: u64) -> Option<Self> {
        let mut before = (0, 0);
        let follows = |run: &Run| {
            let Some((from_end, to_end)) = run.ends() else { return false };
            let is_behind = run.blocks > 0 && run.from >= before.0 && run.to >= before.1;
            before = (from_end, to_end);
            is_behind && from_end <= blocks.min(blocks_max) && to_end <= blocks_max
        };
        let is_sound = !runs.is_empty() && runs.len() <= RUNS_MAX && runs.iter().all(follows);
        is_sound.then_some(Self(runs))
    }

    /// What lies before each run, the last one first: where it begins, and how long it is and will be.
    fn gaps(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let before = std::iter::once(Run::default()).chain(self.0.iter().copied());
        let pairs: Vec<(Run, Run)> = before.zip(self.0.iter().copied()).collect();
        pairs.into_iter().rev().filter_map(|(before, run)| {
            let (from_end, to_end) = before.ends()?;
            Some((from_end, run.from - from_end, run.to - to_end))
        })
    }

    /// See [`Shift::take`].
    fn cut(&self, file: &File) -> io::Result<bool> {
        let Some((end, _)) = self.0.last().and_then(Run::ends) else { return Ok(false) };
        file.set_len(end * BLOCK_SIZE)?;
        let mut is_begun = false;
        // From the end to the front, so that what is still to do has not moved yet. In between the file may
        // be longer than any may be, but not by data.
        for (at, is, wanted) in self.gaps() {
            let kept = is.min(wanted);
            let bytes = |blocks: u64| blocks * BLOCK_SIZE;
            if kept > 0 {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, flags, bytes(at), bytes(kept))?;
            }
            let flags = match is.cmp(&wanted) {
                Ordering::Equal => continue,
                Ordering::Greater => FallocateFlags::COLLAPSE_RANGE,
                Ordering::Less => FallocateFlags::INSERT_RANGE,
            };
            match rustix::fs::fallocate(file, flags, bytes(at + kept), bytes(is.abs_diff(wanted))) {
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) if !is_begun => {
                    return Ok(false);
                }
                other => other?,
            }
            is_begun = true;
        }
        Ok(true)
    }
}

/// Bytes of the largest file that this process may write. Beyond them a write is no error but a signal
/// that kills.
pub(super) fn file_bytes_max() -> u64 {
    rustix::process::getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)
}

fn file_blocks_max() -> u64 {
    file_bytes_max() / BLOCK_SIZE
}

/// Whether files can be cut on this file system, and may span `bytes` there.
pub(super) fn can_shift(file: &File, bytes: u64) -> bool {
    /// `EXT4_SUPER_MAGIC` of linux/magic.h.
    const SHIFTING: u64 = 0xef53;
    // Nor can every file of an ext4 be cut: none that is encrypted, nor where blocks lie in clusters.
    let try_it = || {
        file.set_len(bytes)?;
        rustix::fs::fallocate(file, FallocateFlags::COLLAPSE_RANGE, 0, BLOCK_SIZE)?;
        rustix::fs::fallocate(file, FallocateFlags::INSERT_RANGE, 0, BLOCK_SIZE)?;
        file.set_len(0)
    };
    magic(file) == Some(SHIFTING) && bytes <= file_bytes_max() && try_it().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_lie_within_the_file_and_what_a_file_may_be_and_are_so_many_at_most() {
        let every_other = |runs: usize| -> Vec<Run> {
            let starts = (0..runs as u64).map(|number| 2 * number);
            starts.map(|from| Run { from, to: from + 1, blocks: 1 }).collect()
        };
        let is_sound = |runs, blocks, most| Sound::of(&every_other(runs), blocks, most).is_some();
        let blocks = 3 * RUNS_MAX as u64;
        assert!(is_sound(RUNS_MAX, blocks, blocks));
        assert!(!is_sound(RUNS_MAX + 1, blocks, blocks));
        assert!(is_sound(3, 5, 6));
        assert!(!is_sound(3, 4, 6), "beyond the file");
        assert!(!is_sound(3, 5, 5), "beyond what a file may be");
    }
}
