//! The file in which all packs of an image lie, each in a stretch of its own: where the file system
//! can later shift them to their places, it becomes the image.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ext4::BLOCK_SIZE;
use oci::Layer;
use rustix::fs::FallocateFlags;

use super::{shared, stage};
use crate::build::shift::{can_shift, file_bytes_max};
use crate::build::{BuildError, BuildSpec};
use crate::staged::Staged;

/// Bytes of a file that the stretches of all layers may span; ext4 ends files at 16 TiB.
const SLABS_BYTES_MAX: u64 = 8 << 40;
/// How many times longer than its blob a layer's stretch is at least, or it is not begun with: most packs
/// would be made twice.
const TIMES_LONGER: u64 = 4;

/// See the module.
pub(super) struct Slabs {
    staged: Staged,
    file: Arc<File>,
    /// Where the stretches begin, and where the last one ends; in blocks.
    bounds: Vec<u64>,
    /// Not every pack will be in it, or the disk is too slow: it would be written for nothing.
    is_given_up: AtomicBool,
}

impl Slabs {
    /// An empty one for these layers; none where it could never become an image.
    ///
    /// # Errors
    /// When no file can be made beside the output.
    pub(super) fn stage(spec: &BuildSpec, layers: &[Layer]) -> Result<Option<Self>, BuildError> {
        // A build of the service has no file that is larger than its disk.
        Self::stage_within(spec, layers, SLABS_BYTES_MAX.min(file_bytes_max()))
    }

    /// The same in a file of at most so many bytes.
    pub(super) fn stage_within(
        spec: &BuildSpec,
        layers: &[Layer],
        bytes_max: u64,
    ) -> Result<Option<Self>, BuildError> {
        let Some(bounds) = bounds(layers, bytes_max) else { return Ok(None) };
        let staged = stage(spec)?;
        let bytes = bounds.last().map_or(0, |blocks| blocks * BLOCK_SIZE);
        if !can_shift(staged.file(), bytes) {
            return Ok(None);
        }
        let file = shared(staged.file())?;
        Ok(Some(Self { staged, file, bounds, is_given_up: AtomicBool::new(false) }))
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where the pack of a layer lies.
    pub(super) fn stretch(&self, layer: usize) -> Range<u64> {
        let bound = |index: usize| self.bounds.get(index).map_or(0, |blocks| blocks * BLOCK_SIZE);
        bound(layer)..bound(layer + 1)
    }

    /// No image comes of it: nobody begins to write to it any more who makes its pack elsewhere, too.
    pub(super) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// Gives back what a worker has written of a pack that is elsewhere.
    pub(super) fn clear(&self, layer: usize) {
        let Range { start, end } = self.stretch(layer);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // It goes with the file otherwise.
        let _ = rustix::fs::fallocate(&*self.file, flags, start, end - start);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    /// The file, if an image can come of it.
    pub(super) fn into_staged(self) -> Option<Staged> {
        (!self.is_given_up()).then_some(self.staged)
    }
}

/// The bounds of the layers' stretches in a file of so many bytes, in blocks: one half of it is shared out
/// evenly, for the names in a layer take room, too, the other half by the size of their blobs. None where
/// it is too short for what layers usually come to.
pub(super) fn bounds(layers: &[Layer], bytes: u64) -> Option<Vec<u64>> {
    let half = bytes / 2 / BLOCK_SIZE;
    let even = half / layers.len().max(1) as u64;
    let all_bytes: u64 = layers.iter().fold(1, |sum, layer| layer.size_bytes.saturating_add(sum));
    let by_size = |bytes: u64| u128::from(half) * u128::from(bytes) / u128::from(all_bytes);
    let is_enough = half / TIMES_LONGER >= all_bytes.div_ceil(BLOCK_SIZE);
    is_enough.then(|| {
        let mut end = 0;
        let ends = layers.iter().map(|layer| {
            // No more than the half.
            end += even + u64::try_from(by_size(layer.size_bytes)).unwrap_or(0);
            end
        });
        std::iter::once(0).chain(ends).collect()
    })
}
