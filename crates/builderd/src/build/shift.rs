//! A file in which all packs of an image lie, cut to shape: it becomes the image, and no byte is moved
//! (fallocate(2), `FALLOC_FL_COLLAPSE_RANGE` and `FALLOC_FL_INSERT_RANGE`).
//!
//! The worker that makes an image knows where data belongs, and asks for it; its parent cuts. Behind its
//! walls a worker cannot: to move blocks out of the way gives a file more of them than `RLIMIT_FSIZE` does.

use std::cmp::Ordering;
use std::fs::File;
use std::io;

use ext4::{BLOCK_SIZE, Layout};
use rustix::fs::FallocateFlags;
use rustix::process::Resource;
use serde::{Deserialize, Serialize};

use super::output::magic;
use crate::packs::OpenPack;

/// Runs that are shifted at most. Each moves what the file system knows of all behind it, so the work grows
/// with the square of their number.
const RUNS_MAX: usize = 4096;

/// Data that stays together, in blocks of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    /// Where it is,
    from: u64,
    /// and where it belongs.
    to: u64,
    blocks: u64,
}

impl Run {
    fn from_end(&self) -> Option<u64> {
        self.from.checked_add(self.blocks)
    }

    fn to_end(&self) -> Option<u64> {
        self.to.checked_add(self.blocks)
    }
}

/// The runs of an image whose packs lie in one file, in their order; none if there are too many, or
/// nothing to be shifted.
///
/// # Errors
/// When the layout has more layers than there are packs.
pub(super) fn runs(layout: &Layout, packs: &[OpenPack]) -> io::Result<Option<Vec<Run>>> {
    let mut runs: Vec<Run> = Vec::new();
    for run in layout.moves() {
        let pack = usize::try_from(run.region).ok().and_then(|region| packs.get(region));
        let base = pack.ok_or_else(|| io::Error::other("a layer without a pack"))?.base;
        let next = Run {
            from: base / BLOCK_SIZE + run.region_block,
            to: run.image_block,
            blocks: run.blocks,
        };
        if runs.len() == RUNS_MAX {
            return Ok(None);
        }
        runs.push(next);
    }
    Ok(Some(runs).filter(|runs| !runs.is_empty()))
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
    /// # Errors
    /// When it stops half-way; there is no image then.
    pub(super) fn take(&mut self, runs: &[Run]) -> Option<io::Result<bool>> {
        let file = self.file.take()?;
        let file_bytes = match file.metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) => return Some(Err(error)),
        };
        let is_sound =
            are_sound(runs, file_bytes.div_ceil(BLOCK_SIZE), file_bytes_max() / BLOCK_SIZE);
        is_sound.then(|| cut(runs, file))
    }
}

/// Whether the runs come one behind the other, within a file of so many blocks, and stay within one of
/// so many at most.
fn are_sound(runs: &[Run], blocks: u64, blocks_max: u64) -> bool {
    let (mut from_end, mut to_end) = (0, 0);
    let follows = |run: &Run| {
        let is_behind = run.blocks > 0 && run.from >= from_end && run.to >= to_end;
        let (Some(from), Some(to)) = (run.from_end(), run.to_end()) else { return false };
        (from_end, to_end) = (from, to);
        is_behind && from <= blocks && to <= blocks_max
    };
    !runs.is_empty() && runs.len() <= RUNS_MAX && runs.iter().all(follows)
}

/// Of runs that are sound.
fn cut(runs: &[Run], file: &File) -> io::Result<bool> {
    let Some(last) = runs.last() else { return Ok(false) };
    file.set_len((last.from + last.blocks) * BLOCK_SIZE)?;
    let mut is_begun = false;
    // From the end to the front, so that what is still to do has not moved yet.
    for (index, run) in runs.iter().enumerate().rev() {
        let (from_end, to_end) = match index.checked_sub(1).map(|before| &runs[before]) {
            Some(before) => (before.from + before.blocks, before.to + before.blocks),
            None => (0, 0),
        };
        let (is, wanted) = (run.from - from_end, run.to - to_end);
        let at = |block: u64| block * BLOCK_SIZE;
        if is.min(wanted) > 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, at(from_end), at(is.min(wanted)))?;
        }
        let gap = at(from_end + is.min(wanted));
        let result = match is.cmp(&wanted) {
            Ordering::Equal => continue,
            Ordering::Greater => {
                rustix::fs::fallocate(file, FallocateFlags::COLLAPSE_RANGE, gap, at(is - wanted))
            }
            Ordering::Less => {
                rustix::fs::fallocate(file, FallocateFlags::INSERT_RANGE, gap, at(wanted - is))
            }
        };
        match result {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) if !is_begun => {
                return Ok(false);
            }
            other => other?,
        }
        is_begun = true;
    }
    Ok(true)
}

/// Bytes of the largest file that this process may write. Beyond them a write is no error but a signal
/// that kills.
pub(super) fn file_bytes_max() -> u64 {
    rustix::process::getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)
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
    fn more_runs_than_are_worth_it_are_not_shifted() {
        let every_other = |runs: usize| -> Vec<Run> {
            let starts = (0..runs as u64).map(|number| 2 * number);
            starts.map(|from| Run { from, to: from + 1, blocks: 1 }).collect()
        };
        let blocks = 3 * RUNS_MAX as u64;
        assert!(are_sound(&every_other(RUNS_MAX), blocks, blocks));
        assert!(!are_sound(&every_other(RUNS_MAX + 1), blocks, blocks));
        assert!(!are_sound(&every_other(3), 4, blocks), "beyond the file");
        assert!(!are_sound(&every_other(3), blocks, 5), "beyond what a file may be");
    }
}
