//! Layer blobs → layer packs.
//!
//! One network thread (the caller's, on a current-thread runtime) fetches blobs and
//! hashes them while they stream; a confined process per layer inflates and packs. That
//! one is a pure function of the blob: it gets bytes and writes one file. A pack
//! is filed only after size, blob digest and `diff_id` all matched, so a half-read
//! or lying layer never reaches the cache.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ext4::BLOCK_SIZE;
use futures_util::{StreamExt, TryStreamExt, stream};
use oci::{Fetcher, Image, Layer};
use rootfs::{PackError, PackSummary, Tally};
use sandbox::Wall;
use tokio::sync::{mpsc, oneshot};

use super::confined::{self, PackTask, Taken};
use super::disk::{Disk, Liking, lock};
use super::output;
use super::{BuildError, BuildEvent, BuildSpec, LayerOrigin, Observer, PackStorage, Phase};
use crate::packs::{Lookup, OpenPack, PackCache, PackKey, PackLock};
use crate::staged::Staged;

/// Chunks of a blob that may wait for the worker; hyper's are 8 to 64 KiB each.
const CHUNKS_IN_FLIGHT: usize = 32;
/// Least progress between two events of one layer.
const PROGRESS_STEP_BYTES: u64 = 1 << 20;
/// How often it is looked at what workers write.
const LOOK_AT_DISK: Duration = Duration::from_millis(100);

/// The packs of an image, bottom first, and what it cost to get them.
pub(super) struct LayerPacks {
    pub(super) packs: Vec<OpenPack>,
    pub(super) cached: usize,
    pub(super) packed: usize,
    pub(super) fetched_bytes: u64,
    /// The file all packs lie in, each in its own stretch, when it can become the image.
    pub(super) slabs: Option<Staged>,
    /// What the workers took, one entry each.
    pub(super) taken: Vec<Taken>,
}

/// Bytes of a file that the stretches of all layers may span; ext4 ends files at 16 TiB.
const SLABS_BYTES: u64 = 8 << 40;

struct Job<'a> {
    spec: &'a BuildSpec,
    fetcher: &'a Fetcher,
    image: &'a Image,
    disk: &'a Arc<Disk>,
    slabs: Option<Arc<File>>,
    observer: &'a dyn Observer,
    fetched_bytes: AtomicU64,
    /// What the layers come to, those of the cache too.
    tally: Arc<Tally>,
    taken: Mutex<Vec<Taken>>,
    written: Mutex<Written>,
}

/// One layer's pack.
struct Packed {
    pack: OpenPack,
    /// The same in its stretch of the file that can become the image.
    placed: Option<OpenPack>,
}

/// A blob and the layers that name it, by their place, ascending.
type Mentions = Vec<usize>;

/// Gets every layer's pack, from the cache or by fetching it, the largest blobs first. A blob that
/// several layers name is fetched and packed once.
pub(super) async fn fetch(
    spec: &BuildSpec,
    fetcher: &Fetcher,
    image: &Image,
    disk: &Arc<Disk>,
    observer: &dyn Observer,
) -> Result<LayerPacks, BuildError> {
    // What is in the cache already lies elsewhere: it can only be copied.
    let is_known = |layer: &Layer| match &spec.packs {
        PackStorage::Cache { cache, domain, .. } => {
            let key = PackKey { domain: domain.clone(), digest: layer.digest };
            cache.pack_path(&key).exists()
        }
        PackStorage::Temporary => false,
    };
    let fits = slab_bytes(image) >= spec.layer_limits.data_bytes_max;
    let slabs = match fits && !image.layers.iter().any(is_known) {
        true => stage_slabs(spec)?,
        false => None,
    };
    let copies = slabs.is_some() && matches!(spec.packs, PackStorage::Cache { .. });
    let job = Job {
        spec,
        fetcher,
        image,
        disk,
        slabs: slabs.as_ref().map(|slabs| shared(slabs.file())).transpose()?,
        observer,
        fetched_bytes: AtomicU64::new(0),
        tally: Arc::default(),
        taken: Mutex::default(),
        written: Mutex::new(Written::of(&spec.layer_limits, copies)),
    };
    let packed = stream::iter(by_blob(image))
        .map(|mentions| job.blob(mentions))
        .buffer_unordered(spec.jobs.max(1))
        .try_collect();
    let packed: Vec<(Mentions, LayerOrigin, Packed)> = tokio::select! {
        packed = packed => packed?,
        layer = outgrown(&job.written) => return Err(job.too_much(layer)),
    };
    // Of a stretch of the file that is in the image twice, only copies can be made.
    let twice =
        packed.iter().any(|(mentions, _, it)| mentions.len() > 1 && it.pack.data_blocks > 0);
    let are_placed = !twice && packed.iter().all(|(.., it)| it.placed.is_some());
    let slabs = slabs.filter(|_| are_placed);
    let mut found: Vec<(usize, LayerOrigin, OpenPack)> = Vec::new();
    for (mentions, origin, Packed { pack, placed }) in packed {
        let pack = placed.filter(|_| slabs.is_some()).unwrap_or(pack);
        found.extend(mentions.into_iter().map(|layer| (layer, origin, pack.clone())));
    }
    found.sort_by_key(|&(layer, ..)| layer);
    let cached = found.iter().filter(|(_, origin, _)| *origin == LayerOrigin::Cached).count();
    Ok(LayerPacks {
        cached,
        packed: found.len() - cached,
        fetched_bytes: job.fetched_bytes.into_inner(),
        taken: std::mem::take(&mut lock(&job.taken)),
        slabs,
        packs: found.into_iter().map(|(.., pack)| pack).collect(),
    })
}

/// What the workers of a build have written so far, whatever they say of it. The kernel holds each
/// to the disk of its build; this holds them to it together.
#[derive(Debug)]
struct Written {
    bytes_max: u64,
    /// Layers and the files that they are being written to.
    open: Vec<(usize, Arc<File>)>,
    /// Of those that are whole.
    whole_bytes: u64,
}

impl Written {
    /// All data together, and the names of one layer, perhaps twice: more than this only somebody
    /// writes who does not keep to the limits.
    fn of(limits: &rootfs::Limits, copies: bool) -> Self {
        let bytes_max = limits.image_data_bytes_max.saturating_add(limits.toc_bytes_max);
        let bytes_max = bytes_max.saturating_mul(if copies { 2 } else { 1 });
        Self { bytes_max, open: Vec::new(), whole_bytes: 0 }
    }

    /// The file is about to be written to; the first layer in it answers for it.
    fn begin(&mut self, layer: usize, file: &Arc<File>) {
        if !self.open.iter().any(|(_, open)| Arc::ptr_eq(open, file)) {
            self.open.push((layer, Arc::clone(file)));
        }
    }

    /// Nobody writes to the file any more.
    fn end(&mut self, file: &Arc<File>) {
        let ended = self.open.extract_if(.., |(_, open)| Arc::ptr_eq(open, file));
        let bytes: u64 = ended.map(|(_, file)| used_bytes(&file)).sum();
        self.whole_bytes = self.whole_bytes.saturating_add(bytes);
    }

    /// The layer with the largest file, if all are larger than they may be.
    fn outgrown(&self) -> Option<usize> {
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
async fn outgrown(written: &Mutex<Written>) -> usize {
    loop {
        tokio::time::sleep(LOOK_AT_DISK).await;
        if let Some(layer) = lock(written).outgrown() {
            return layer;
        }
    }
}

/// The layers by the blob they name, the largest blobs first. A size that is not the blob's makes
/// it another, which cannot be fetched.
fn by_blob(image: &Image) -> Vec<Mentions> {
    let mut mentions: Vec<Mentions> = Vec::new();
    let mut known = HashMap::new();
    for (index, layer) in image.layers.iter().enumerate() {
        let blob = *known.entry((layer.digest, layer.size_bytes)).or_insert(mentions.len());
        match mentions.get_mut(blob) {
            Some(mentions) => mentions.push(index),
            None => mentions.push(vec![index]),
        }
    }
    mentions.sort_by_key(|mentions| std::cmp::Reverse(image.layers[mentions[0]].size_bytes));
    mentions
}

/// The same file, for several who keep it open with one descriptor.
pub(super) fn shared(file: &File) -> Result<Arc<File>, BuildError> {
    file.try_clone().map(Arc::new).map_err(reopening)
}

/// The stretch of each layer.
fn slab_bytes(image: &Image) -> u64 {
    SLABS_BYTES / image.layers.len().max(1) as u64 / BLOCK_SIZE * BLOCK_SIZE
}

pub(super) fn stage(spec: &BuildSpec) -> Result<Staged, BuildError> {
    let directory = spec.output_directory();
    Staged::create_in(directory).map_err(|source| BuildError::Output {
        action: "create a temporary file in",
        path: directory.to_owned(),
        source,
    })
}

/// A file for all packs, where the file system can later shift them to their places.
fn stage_slabs(spec: &BuildSpec) -> Result<Option<Staged>, BuildError> {
    let staged = stage(spec)?;
    Ok(output::can_shift(staged.file(), SLABS_BYTES).then_some(staged))
}

impl Job<'_> {
    async fn blob(
        &self,
        mentions: Mentions,
    ) -> Result<(Mentions, LayerOrigin, Packed), BuildError> {
        let index = mentions[0];
        let layer = &self.image.layers[index];
        let (origin, packed) = match &self.spec.packs {
            PackStorage::Cache { cache, domain, .. } => {
                let key = PackKey { domain: domain.clone(), digest: layer.digest };
                self.through_cache(index, layer, cache, key).await?
            }
            PackStorage::Temporary => (LayerOrigin::Packed, self.temporary(index, layer).await?),
        };
        for &index in &mentions {
            check_diff_id(index, &self.image.layers[index], &packed.pack.diff_id)?;
            let digest = layer.digest.to_string();
            self.observer.event(&BuildEvent::LayerReady { layer: index, digest, origin });
        }
        Ok((mentions, origin, packed))
    }

    async fn temporary(&self, index: usize, layer: &Layer) -> Result<Packed, BuildError> {
        if self.slabs.is_some() {
            let pack = self.placed(index, layer, None).await?;
            return Ok(Packed { placed: Some(pack.clone()), pack });
        }
        // The file stays nameless and goes with its descriptor.
        let staged = stage(self.spec)?;
        let file = shared(staged.file())?;
        let summary = self.fetch_and_pack(index, layer, (&file, 0..u64::MAX), None).await?;
        let pack = open_pack(index, layer, file, 0, summary.pack_bytes)?;
        Ok(Packed { pack, placed: None })
    }

    /// Makes the pack in its stretch of the file of all, and perhaps in a file of its own.
    async fn placed(
        &self,
        index: usize,
        layer: &Layer,
        copy: Option<&Arc<File>>,
    ) -> Result<OpenPack, BuildError> {
        let slabs = self.slabs.as_ref().ok_or(BuildError::WorkerLost { phase: Phase::Layers })?;
        let slab = slab_bytes(self.image);
        let base = index as u64 * slab;
        let summary = self.fetch_and_pack(index, layer, (slabs, base..base + slab), copy).await?;
        open_pack(index, layer, Arc::clone(slabs), base, summary.pack_bytes)
    }

    async fn through_cache(
        &self,
        index: usize,
        layer: &Layer,
        cache: &PackCache,
        key: PackKey,
    ) -> Result<(LayerOrigin, Packed), BuildError> {
        if let Some(pack) = self.cached(index, cache, &key).await? {
            return Ok((LayerOrigin::Cached, Packed { pack, placed: None }));
        }
        let lock = self.lock(index, layer, cache, &key).await?;
        // Another process may have made it while we waited for the lock.
        if let Some(pack) = self.cached(index, cache, &key).await? {
            return Ok((LayerOrigin::Cached, Packed { pack, placed: None }));
        }
        let staged = cache.stage(&key)?;
        let file = shared(staged.file())?;
        let (placed, pack_bytes) = match &self.slabs {
            // Written to both places at once, nothing has to be read back for the image.
            Some(_) => {
                let placed = self.placed(index, layer, Some(&file)).await?;
                let pack_bytes = placed.length();
                (Some(placed), pack_bytes)
            }
            None => {
                let part = (&file, 0..u64::MAX);
                (None, self.fetch_and_pack(index, layer, part, None).await?.pack_bytes)
            }
        };
        drop(file);
        let pack = commit(index, layer, cache, &key, staged, pack_bytes)?;
        drop(lock);
        Ok((LayerOrigin::Packed, Packed { pack, placed }))
    }

    /// Says so before it waits for whoever makes the pack.
    async fn lock(
        &self,
        index: usize,
        layer: &Layer,
        cache: &PackCache,
        key: &PackKey,
    ) -> Result<PackLock, BuildError> {
        let at_once = {
            let (cache, key) = (cache.clone(), key.clone());
            blocking(move || cache.try_lock(&key)).await??
        };
        if let Some(lock) = at_once {
            return Ok(lock);
        }
        let digest = layer.digest.to_string();
        self.observer.event(&BuildEvent::LayerWaiting { layer: index, digest });
        let (cache, key) = (cache.clone(), key.clone());
        Ok(blocking(move || cache.lock(&key)).await??)
    }

    async fn cached(
        &self,
        index: usize,
        cache: &PackCache,
        key: &PackKey,
    ) -> Result<Option<OpenPack>, BuildError> {
        let digest = key.digest;
        let found = {
            let (cache, key) = (cache.clone(), key.clone());
            blocking(move || cache.lookup(&key)).await??
        };
        Ok(match found {
            Lookup::Hit(open) => {
                open.count(&self.tally, &self.spec.layer_limits)
                    .map_err(|source| BuildError::Pack { layer: index, digest, source })?;
                Some(open)
            }
            Lookup::Miss => None,
            Lookup::Damaged(error) => {
                let message =
                    format!("the cached pack of {digest} was damaged and is made anew: {error}");
                self.observer.event(&BuildEvent::Warning { message });
                None
            }
        })
    }

    /// Streams the blob through a worker into a part of `file`, and into all of `copy`; all three
    /// digests match when it returns.
    async fn fetch_and_pack(
        &self,
        index: usize,
        layer: &Layer,
        (file, part): (&Arc<File>, Range<u64>),
        copy: Option<&Arc<File>>,
    ) -> Result<PackSummary, BuildError> {
        self.observer.event(&BuildEvent::LayerStarted {
            layer: index,
            digest: layer.digest.to_string(),
            size_bytes: layer.size_bytes,
        });
        let (chunks, blob) = mpsc::channel(CHUNKS_IN_FLIGHT);
        // Blocks that are to be shared or shifted must be on the disk first.
        let stays = self.slabs.is_some() || output::can_share(file);
        let (blob_bytes, tar_bytes, data_bytes) = self.tally.totals();
        let packer = Packer {
            chunks: blob,
            files: std::iter::once(file).chain(copy).cloned().collect(),
            task: PackTask {
                layer: index,
                digest: layer.digest,
                part,
                liking: if stays { Liking::Direct } else { Liking::Faster },
                is_copied: copy.is_some(),
                limits: self.spec.layer_limits.clone(),
                counted: [blob_bytes, tar_bytes, data_bytes],
                writes: self.disk.writes().without_bytes(),
            },
            walls: self.spec.walls.clone(),
            disk: Arc::clone(self.disk),
            tally: Arc::clone(&self.tally),
        };
        for file in std::iter::once(file).chain(copy) {
            lock(&self.written).begin(index, file);
        }
        let worker = packer.spawn()?;
        let fed = self.feed(index, layer, chunks).await;
        let packed = worker.await.map_err(|_| BuildError::WorkerLost { phase: Phase::Layers })?;
        // A pull that failed explains a pack that failed, not the other way round.
        fed?;
        let (summary, taken) = packed?;
        lock(&self.taken).push(taken);
        self.wrote(file, copy)?;
        check_diff_id(index, layer, &summary.diff_id)?;
        Ok(summary)
    }

    /// A worker has ended. That of another layer may still write to the file of all.
    fn wrote(&self, file: &Arc<File>, copy: Option<&Arc<File>>) -> Result<(), BuildError> {
        let mut written = lock(&self.written);
        if let Some(layer) = written.outgrown() {
            return Err(self.too_much(layer));
        }
        let is_whole = self.slabs.is_none().then_some(file);
        is_whole.into_iter().chain(copy).for_each(|file| written.end(file));
        Ok(())
    }

    fn too_much(&self, layer: usize) -> BuildError {
        let source = PackError::ImageDataBytes(self.spec.layer_limits.image_data_bytes_max);
        BuildError::Pack { layer, digest: self.image.layers[layer].digest, source }
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
        let pull = |source| self.pull_failed(source);
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

    fn pull_failed(&self, source: oci::PullError) -> BuildError {
        BuildError::pull(&self.spec.source, source)
    }
}

fn check_diff_id(index: usize, layer: &Layer, found: &[u8; 32]) -> Result<(), BuildError> {
    let found = hex(found);
    if found == layer.diff_id.hex() {
        return Ok(());
    }
    Err(BuildError::DiffId { layer: index, digest: layer.digest, claimed: layer.diff_id, found })
}

/// Gives a pack its name, if it is the one that others will look for: what gets a name is for them,
/// too. `pack_bytes` is what its worker says.
fn commit(
    index: usize,
    layer: &Layer,
    cache: &PackCache,
    key: &PackKey,
    staged: Staged,
    pack_bytes: u64,
) -> Result<OpenPack, BuildError> {
    let file = shared(staged.file())?;
    // They look at its end, wherever its worker says that it is.
    let whole_bytes = file.metadata().map_err(reopening)?.len();
    let mut open = open_pack(index, layer, file, 0, pack_bytes.max(whole_bytes))?;
    check_diff_id(index, layer, &open.diff_id)?;
    open.file = Arc::new(cache.commit(key, staged)?);
    Ok(open)
}

type PackResult = Result<(PackSummary, Taken), BuildError>;

/// The worker that makes one pack, and the thread that looks after it.
struct Packer {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    files: Vec<Arc<File>>,
    task: PackTask,
    walls: Vec<Wall>,
    disk: Arc<Disk>,
    tally: Arc<Tally>,
}

impl Packer {
    fn spawn(self) -> Result<oneshot::Receiver<PackResult>, BuildError> {
        let (answer, result) = oneshot::channel();
        std::thread::Builder::new()
            .name(format!("layer-{}", self.task.layer))
            .spawn(move || {
                let Self { chunks, files, task, walls, disk, tally } = self;
                let files: Vec<&File> = files.iter().map(|file| &**file).collect();
                let packed = confined::pack(task, &files, chunks, &walls, &tally, &disk);
                // The build may have given up meanwhile; then nobody wants the answer.
                let _ = answer.send(packed);
            })
            .map_err(|source| BuildError::Worker { phase: Phase::Layers, source })?;
        Ok(result)
    }
}

fn open_pack(
    index: usize,
    layer: &Layer,
    file: Arc<File>,
    base: u64,
    length: u64,
) -> Result<OpenPack, BuildError> {
    let digest = layer.digest;
    OpenPack::new(file, base, length).map_err(|source| BuildError::PackUnread {
        layer: index,
        digest,
        source,
    })
}

fn reopening(source: io::Error) -> BuildError {
    BuildError::Output { action: "reopen", path: "the layer pack just made".into(), source }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| BuildError::WorkerLost { phase: Phase::Layers })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
