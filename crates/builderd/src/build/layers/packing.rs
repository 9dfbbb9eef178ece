//! One blob through one worker: fetched and hashed here, packed there.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use oci::Layer;
use rootfs::Tally;
use sandbox::Wall;
use tokio::sync::{mpsc, oneshot};

use super::slabs::Slabs;
use super::{Job, check_diff_id};
use crate::build::confined::{self, PackMade, PackTask, Program, Second};
use crate::build::disk::{Disk, Liking, lock};
use crate::build::{BuildError, BuildEvent, Phase, output};

/// Chunks of a blob that may wait for the worker; hyper's are 8 to 64 KiB each.
const CHUNKS_IN_FLIGHT: usize = 32;
/// Least progress between two events of one layer.
const PROGRESS_STEP_BYTES: u64 = 1 << 20;

/// Where a pack is written to.
#[derive(Clone, Copy)]
pub(super) enum To<'a> {
    /// A file of its own.
    Own(&'a Arc<File>),
    /// Its stretch of the slabs, or a file of its own if that is too short.
    Slabs(&'a Slabs, &'a Arc<File>),
    /// Both; the stretch while that pays.
    Both(&'a Slabs, &'a Arc<File>),
}

impl To<'_> {
    /// The files, in the order of a [`PackTask`].
    fn files(self) -> Vec<Arc<File>> {
        match self {
            To::Own(file) => vec![Arc::clone(file)],
            To::Slabs(slabs, file) | To::Both(slabs, file) => {
                vec![Arc::clone(slabs.file()), Arc::clone(file)]
            }
        }
    }

    fn second(self) -> Option<Second> {
        match self {
            To::Own(_) => None,
            To::Slabs(..) => Some(Second::Spare),
            To::Both(..) => Some(Second::Copy),
        }
    }

    fn part(self, layer: usize) -> Range<u64> {
        match self {
            To::Own(_) => 0..u64::MAX,
            To::Slabs(slabs, _) | To::Both(slabs, _) => slabs.stretch(layer),
        }
    }

    /// Blocks that are to be shared or shifted must be on the disk first.
    fn liking(self) -> Liking {
        match self {
            To::Own(file) if !output::can_share(file) => Liking::Faster,
            To::Own(_) | To::Slabs(..) | To::Both(..) => Liking::Direct,
        }
    }

    /// What nobody writes to when the worker has ended. That of another layer may still write to the
    /// slabs.
    fn whole(self) -> Arc<File> {
        match self {
            To::Own(file) | To::Slabs(_, file) | To::Both(_, file) => Arc::clone(file),
        }
    }
}

impl Job<'_> {
    /// Streams the blob through a worker; all three digests match when it returns.
    pub(super) async fn fetch_and_pack(
        &self,
        index: usize,
        layer: &Layer,
        to: To<'_>,
    ) -> Result<PackMade, BuildError> {
        self.observer.event(&BuildEvent::LayerStarted {
            layer: index,
            digest: layer.digest.to_string(),
            size_bytes: layer.size_bytes,
        });
        let (chunks, blob) = mpsc::channel(CHUNKS_IN_FLIGHT);
        let (blob_bytes, tar_bytes, data_bytes) = self.tally.totals();
        let packer = Packer {
            program: Arc::clone(&self.program),
            chunks: blob,
            files: to.files(),
            task: PackTask {
                layer: index,
                digest: layer.digest,
                part: to.part(index),
                liking: to.liking(),
                second: to.second(),
                limits: self.spec.layer_limits.clone(),
                counted: [blob_bytes, tar_bytes, data_bytes],
                writes: self.disk.writes().without_bytes(),
            },
            walls: self.spec.walls.clone(),
            disk: Arc::clone(self.disk),
            tally: Arc::clone(&self.tally),
        };
        packer.files.iter().for_each(|file| lock(&self.written).begin(index, file));
        let worker = packer.spawn()?;
        let fed = self.feed(index, layer, chunks).await;
        let packed = worker.await.map_err(|_| BuildError::WorkerLost { phase: Phase::Layers })?;
        // A pull that failed explains a pack that failed, not the other way round.
        fed?;
        let made = packed?;
        lock(&self.taken).push(made.taken);
        self.wrote(to)?;
        check_diff_id(index, layer, &made.summary.diff_id)?;
        Ok(made)
    }

    /// A worker has ended.
    fn wrote(&self, to: To<'_>) -> Result<(), BuildError> {
        let mut written = lock(&self.written);
        if let Some(layer) = written.outgrown() {
            return Err(self.too_much(layer));
        }
        written.end(&to.whole());
        Ok(())
    }

    /// Fetches the blob and hands its bytes to the worker; `Ok` when size and digest matched.
    ///
    /// A worker that stopped early does not stop the download: only the digest tells
    /// whether the layer is bad or its transfer was.
    async fn feed(
        &self,
        index: usize,
        layer: &Layer,
        chunks: mpsc::Sender<io::Result<Bytes>>,
    ) -> Result<(), BuildError> {
        let pull = |source| BuildError::pull(&self.spec.source, source);
        let mut stream = match self.fetcher.blob(self.image, layer).await {
            Ok(stream) => stream,
            Err(error) => {
                let _ = chunks.send(Err(io::Error::other("the download failed"))).await;
                return Err(pull(error));
            }
        };
        let (mut bytes, mut told, mut wanted) = (0u64, 0u64, true);
        loop {
            match stream.next().await {
                Ok(Some(chunk)) => {
                    bytes += chunk.len() as u64;
                    self.fetched_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                    if bytes - told >= PROGRESS_STEP_BYTES || bytes == layer.size_bytes {
                        told = bytes;
                        self.observer.event(&BuildEvent::LayerProgress { layer: index, bytes });
                    }
                    wanted = wanted && chunks.send(Ok(chunk)).await.is_ok();
                }
                Ok(None) => return Ok(()),
                Err(error) => {
                    let _ = chunks.send(Err(io::Error::other("the download failed"))).await;
                    return Err(pull(error));
                }
            }
        }
    }
}

/// The worker that makes one pack, and the thread that looks after it.
struct Packer {
    program: Arc<Program>,
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    files: Vec<Arc<File>>,
    task: PackTask,
    walls: Vec<Wall>,
    disk: Arc<Disk>,
    tally: Arc<Tally>,
}

impl Packer {
    fn spawn(self) -> Result<oneshot::Receiver<Result<PackMade, BuildError>>, BuildError> {
        let (answer, result) = oneshot::channel();
        std::thread::Builder::new()
            .name(format!("layer-{}", self.task.layer))
            .spawn(move || {
                let Self { program, chunks, files, task, walls, disk, tally } = self;
                let files: Vec<&File> = files.iter().map(|file| &**file).collect();
                let packed =
                    confined::pack_by(&program, task, &files, chunks, &walls, &tally, &disk);
                // The build may have given up meanwhile; then nobody wants the answer.
                let _ = answer.send(packed);
            })
            .map_err(|source| BuildError::Worker { phase: Phase::Layers, source })?;
        Ok(result)
    }
}
