//! The file in which all packs of an image lie, each in a stretch of its own: where the file system
//! can later shift them to their places, it becomes the image.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ext4::BLOCK_SIZE;

use super::{shared, stage};
use crate::build::{BuildError, BuildSpec, output};
use crate::staged::Staged;

/// Bytes of a file that the stretches of all layers may span; ext4 ends files at 16 TiB.
const SLABS_BYTES: u64 = 8 << 40;

/// See the module.
pub(super) struct Slabs {
    staged: Staged,
    file: Arc<File>,
    stretch_bytes: u64,
    /// Not every pack will be in it, or the disk is too slow: it would be written for nothing.
    is_given_up: AtomicBool,
}

impl Slabs {
    /// An empty one for so many layers; none where it could never become an image.
    ///
    /// # Errors
    /// When no file can be made beside the output.
    pub(super) fn stage(spec: &BuildSpec, layers: usize) -> Result<Option<Self>, BuildError> {
        let stretch_bytes = SLABS_BYTES / layers.max(1) as u64 / BLOCK_SIZE * BLOCK_SIZE;
        if stretch_bytes < spec.layer_limits.data_bytes_max {
            return Ok(None);
        }
        let staged = stage(spec)?;
        if !output::can_shift(staged.file(), SLABS_BYTES) {
            return Ok(None);
        }
        let file = shared(staged.file())?;
        Ok(Some(Self { staged, file, stretch_bytes, is_given_up: AtomicBool::new(false) }))
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where the pack of a layer lies.
    pub(super) fn stretch(&self, layer: usize) -> Range<u64> {
        let start = layer as u64 * self.stretch_bytes;
        start..start + self.stretch_bytes
    }

    /// No image comes of it: nobody begins to write to it any more who makes its pack elsewhere, too.
    pub(super) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    /// The file, if an image can come of it.
    pub(super) fn into_staged(self) -> Option<Staged> {
        (!self.is_given_up()).then_some(self.staged)
    }
}
