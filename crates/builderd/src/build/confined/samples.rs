//! Orders of workers, and who watches them: for tests, and for fuzz targets. It does not know what is
//! tried with them.

use std::sync::Mutex;

use rootfs::{Limits, TreeLimits};

use super::{ImageTask, PackTask};
use crate::build::disk::{Lane, Liking, lock};
use crate::build::{BuildEvent, Compression, ImageOptions, Observer};

/// Takes every event.
#[derive(Default)]
pub(super) struct Watcher(Mutex<Vec<BuildEvent>>);

impl Watcher {
    /// Those that came.
    pub(super) fn events(self) -> Vec<BuildEvent> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl Observer for Watcher {
    fn event(&self, event: &BuildEvent) {
        lock(&self.0).push(event.clone());
    }
}

/// A layer in a file of its own.
pub(super) fn pack_task() -> PackTask {
    PackTask {
        layer: 0,
        digest: oci::Digest::of(b""),
        part: 0..u64::MAX,
        liking: Liking::Faster,
        second: None,
        limits: Limits::default(),
        counted: [0; 3],
        writes: Lane::default(),
    }
}

/// An image of no layers in the first file, and its compressed form in the second.
pub(super) fn image_task(hash: bool) -> ImageTask {
    ImageTask {
        layers: Vec::new(),
        tree_limits: TreeLimits::default(),
        options: ImageOptions { bytes_max: Some(1 << 20), ..ImageOptions::default() },
        manifest_digest: String::new(),
        changes: None,
        created_secs: 0,
        hash,
        compression: Compression::Gzip,
        jobs: 1,
        output: "out".into(),
        slabs: None,
        image: 0,
        compressed: Some(1),
    }
}
