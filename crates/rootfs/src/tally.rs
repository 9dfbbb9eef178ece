//! What the layers of one image come to together. A limit of each layer alone lets an image of a
//! thousand layers be a thousand times as large. Knows no layer and no limit of a single one.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Limits, PackError};

/// Bytes of all layers of an image so far; shared by the threads that make their packs.
#[derive(Debug, Default)]
pub struct Tally {
    blob_bytes: AtomicU64,
    tar_bytes: AtomicU64,
    data_bytes: AtomicU64,
}

impl Tally {
    /// One that starts from the totals of another: bytes of blobs, of tars, of data areas.
    #[must_use]
    pub fn of(totals: [u64; 3]) -> Self {
        let [blob_bytes, tar_bytes, data_bytes] = totals.map(AtomicU64::new);
        Self { blob_bytes, tar_bytes, data_bytes }
    }

    /// Bytes of blobs, of tars and of data areas so far.
    #[must_use]
    pub fn totals(&self) -> (u64, u64, u64) {
        let load = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        (load(&self.blob_bytes), load(&self.tar_bytes), load(&self.data_bytes))
    }

    /// Counts a layer whose pack was made before, so that an image has the same limits whether
    /// its layers are known or not.
    ///
    /// # Errors
    /// [`PackError`] when the layers together are beyond a limit.
    pub fn add(
        &self,
        blob_bytes: u64,
        tar_bytes: u64,
        data_bytes: u64,
        limits: &Limits,
    ) -> Result<(), PackError> {
        self.inflated(blob_bytes, tar_bytes, limits)?;
        self.stored(data_bytes, limits)
    }

    /// Counts bytes of a blob that became bytes of a tar.
    pub(crate) fn inflated(
        &self,
        blob_bytes: u64,
        tar_bytes: u64,
        limits: &Limits,
    ) -> Result<(), PackError> {
        let blob_bytes = added(&self.blob_bytes, blob_bytes).max(1);
        let tar_bytes = added(&self.tar_bytes, tar_bytes);
        if tar_bytes > limits.image_tar_bytes_max {
            return Err(PackError::ImageTarBytes(limits.image_tar_bytes_max));
        }
        if tar_bytes > limits.image_ratio_free_bytes && tar_bytes / blob_bytes > limits.ratio_max {
            return Err(PackError::ImageRatio { tar_bytes, blob_bytes });
        }
        Ok(())
    }

    /// Counts bytes of a data area.
    pub(crate) fn stored(&self, data_bytes: u64, limits: &Limits) -> Result<(), PackError> {
        match added(&self.data_bytes, data_bytes) > limits.image_data_bytes_max {
            true => Err(PackError::ImageDataBytes(limits.image_data_bytes_max)),
            false => Ok(()),
        }
    }
}

fn added(sum: &AtomicU64, bytes: u64) -> u64 {
    sum.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes)
}
