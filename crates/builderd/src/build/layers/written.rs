//! What the workers of a build have written so far, whatever they say of it. The kernel holds each
//! to the disk of its build; this holds them to it together.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::build::disk::lock;

/// How often it is looked at what workers write.
const LOOK_AT_DISK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub(super) struct Written {
    bytes_max: u64,
    /// Layers and the files that they are being written to.
    open: Vec<(usize, Arc<File>)>,
    /// Of those that are whole.
    whole_bytes: u64,
}

impl Written {
    /// All data together, and the names of one layer, perhaps twice: more than this only somebody
    /// writes who does not keep to the limits.
    pub(super) fn of(limits: &rootfs::Limits, copies: bool) -> Self {
        let bytes_max = limits.image_data_bytes_max.saturating_add(limits.toc_bytes_max);
        let bytes_max = bytes_max.saturating_mul(if copies { 2 } else { 1 });
        Self { bytes_max, open: Vec::new(), whole_bytes: 0 }
    }

    /// The file is about to be written to; the first layer in it answers for it.
    pub(super) fn begin(&mut self, layer: usize, file: &Arc<File>) {
        if !self.open.iter().any(|(_, open)| Arc::ptr_eq(open, file)) {
            self.open.push((layer, Arc::clone(file)));
        }
    }

    /// Nobody writes to the file any more.
    pub(super) fn end(&mut self, file: &Arc<File>) {
        let ended = self.open.extract_if(.., |(_, open)| Arc::ptr_eq(open, file));
        let bytes: u64 = ended.map(|(_, file)| used_bytes(&file)).sum();
        self.whole_bytes = self.whole_bytes.saturating_add(bytes);
    }

    /// The layer with the largest file, if all are larger than they may be.
    pub(super) fn outgrown(&self) -> Option<usize> {
        let used = self.open.iter().map(|(layer, file)| (used_bytes(file), *layer));
        let used: Vec<(u64, usize)> = used.collect();
        let sum = used.iter().fold(self.whole_bytes, |sum, (bytes, _)| sum.saturating_add(*bytes));
        let largest = used.into_iter().max().map_or(0, |(_, layer)| layer);
        (sum > self.bytes_max).then_some(largest)
    }
}

/// What a file takes of the disk: neither its holes nor what the file system has put by behind its
/// end.
fn used_bytes(file: &File) -> u64 {
    /// A block of stat(2), whatever the file system's own are.
    const BLOCK_BYTES: u64 = 512;
    file.metadata().map_or(0, |file| file.len().min(file.blocks().saturating_mul(BLOCK_BYTES)))
}

/// Waits until too much is written, and says of which layer.
pub(super) async fn outgrown(written: &Mutex<Written>) -> usize {
    loop {
        tokio::time::sleep(LOOK_AT_DISK).await;
        if let Some(layer) = lock(written).outgrown() {
            return layer;
        }
    }
}
