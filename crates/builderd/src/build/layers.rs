//! Layer blobs → layer packs.
//!
//! One network thread (the caller's, on a current-thread runtime) fetches blobs and
//! hashes them while they stream; a confined process per layer inflates and packs. That
//! one is a pure function of the blob: it gets bytes and writes them to one file, or to two. A pack
//! is filed only after size, blob digest and `diff_id` all matched, so a half-read
//! or lying layer never reaches the cache.
//!
//! | where | what |
//! |---|---|
//! | here | which blobs there are to get, and what comes of them together |
//! | `ways` | where the pack of one comes from and goes to: cache, slabs, a file of its own |
//! | `packing` | one blob through one worker |
//! | `slabs` | the file of all packs, which can become the image |
//! | `written` | what workers write, whatever they say of it |

mod packing;
mod slabs;
mod ways;
mod written;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt, TryStreamExt, stream};
use oci::{Fetcher, Image, Layer};
use rootfs::{PackError, Tally};

use super::confined::{Program, Taken};
use super::disk::{Disk, lock};
use super::{BuildError, BuildEvent, BuildSpec, LayerOrigin, Observer, PackStorage, Phase};
use crate::packs::{OpenPack, PackKey};
use crate::staged::Staged;
use slabs::Slabs;
use written::{Written, outgrown};

/// The packs of an image, bottom first, and what it cost to get them.
pub(super) struct LayerPacks {
    pub(super) packs: Vec<OpenPack>,
    pub(super) cached: usize,
    pub(super) packed: usize,
    pub(super) fetched_bytes: u64,
    /// The file all packs lie in, each in its own stretch, when it is to become the image.
    pub(super) slabs: Option<Staged>,
    /// What the workers took, one entry each.
    pub(super) taken: Vec<Taken>,
}

struct Job<'a> {
    spec: &'a BuildSpec,
    fetcher: &'a Fetcher,
    image: &'a Image,
    program: Arc<Program>,
    disk: &'a Arc<Disk>,
    slabs: Option<Slabs>,
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
    fetch_by(Program::own(Phase::Layers)?, spec, fetcher, image, disk, observer).await
}

async fn fetch_by(
    program: Program,
    spec: &BuildSpec,
    fetcher: &Fetcher,
    image: &Image,
    disk: &Arc<Disk>,
    observer: &dyn Observer,
) -> Result<LayerPacks, BuildError> {
    let slabs = match can_all_be_placed(spec, image) {
        true => Slabs::stage(spec, &image.layers)?,
        false => None,
    };
    let copies = slabs.is_some();
    let job = Job {
        spec,
        fetcher,
        image,
        program: Arc::new(program),
        disk,
        slabs,
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
    let packed: Result<Vec<_>, BuildError> = tokio::select! {
        packed = packed => packed,
        layer = outgrown(&job.written) => Err(job.too_much(layer)),
    };
    // Of a build that has failed nothing is at work any more when that is told.
    job.program.end_workers();
    Ok(job.together(packed?))
}

/// Whether the packs of all layers can be made in one file that becomes the image. What is in the
/// cache already lies elsewhere: it can only be copied. So can what commands will be run on.
fn can_all_be_placed(spec: &BuildSpec, image: &Image) -> bool {
    let is_known = |layer: &Layer| match &spec.packs {
        PackStorage::Cache { cache, domain, .. } => {
            let key = PackKey { domain: domain.clone(), digest: layer.digest };
            cache.pack_path(&key).exists()
        }
        PackStorage::Temporary => false,
    };
    spec.commands.is_none() && !image.layers.iter().any(is_known)
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

impl Job<'_> {
    /// Gets the pack of one blob, and holds it against what each of its layers claims.
    async fn blob(
        &self,
        mentions: Mentions,
    ) -> Result<(Mentions, LayerOrigin, Packed), BuildError> {
        let index = mentions[0];
        let layer = &self.image.layers[index];
        let (origin, packed) = self.pack(index, layer).await?;
        for &index in &mentions {
            check_diff_id(index, &self.image.layers[index], &packed.pack.diff_id)?;
            let digest = layer.digest.to_string();
            self.observer.event(&BuildEvent::LayerReady { layer: index, digest, origin });
        }
        // Of a stretch of the file that is in the image twice, only copies can be made.
        let is_in_place = packed.placed.is_some() && !is_twice(&mentions, &packed);
        if let Some(slabs) = self.slabs.as_ref().filter(|_| !is_in_place) {
            slabs.give_up();
        }
        Ok((mentions, origin, packed))
    }

    /// The packs of all layers: those in the slabs if these become the image, else the others, and
    /// the slabs are let go.
    fn together(self, packed: Vec<(Mentions, LayerOrigin, Packed)>) -> LayerPacks {
        let is_placed = packed.iter().all(|(.., packed)| packed.placed.is_some());
        let slabs = self.slabs.and_then(Slabs::into_staged);
        let slabs = slabs.filter(|_| is_placed && self.disk.is_nearly_written());
        let mut found: Vec<(usize, LayerOrigin, OpenPack)> = Vec::new();
        for (mentions, origin, Packed { pack, placed }) in packed {
            let pack = placed.filter(|_| slabs.is_some()).unwrap_or(pack);
            found.extend(mentions.into_iter().map(|layer| (layer, origin, pack.clone())));
        }
        found.sort_by_key(|&(layer, ..)| layer);
        let cached = found.iter().filter(|(_, origin, _)| *origin == LayerOrigin::Cached).count();
        LayerPacks {
            cached,
            packed: found.len() - cached,
            fetched_bytes: self.fetched_bytes.into_inner(),
            taken: std::mem::take(&mut lock(&self.taken)),
            slabs,
            packs: found.into_iter().map(|(.., pack)| pack).collect(),
        }
    }

    fn too_much(&self, layer: usize) -> BuildError {
        let source = PackError::ImageDataBytes(self.spec.layer_limits.image_data_bytes_max);
        BuildError::Pack { layer, digest: self.image.layers[layer].digest, source }
    }
}

fn is_twice(mentions: &Mentions, packed: &Packed) -> bool {
    mentions.len() > 1 && packed.pack.data_blocks > 0
}

fn check_diff_id(index: usize, layer: &Layer, found: &[u8; 32]) -> Result<(), BuildError> {
    let found = hex(found);
    if found == layer.diff_id.hex() {
        return Ok(());
    }
    Err(BuildError::DiffId { layer: index, digest: layer.digest, claimed: layer.diff_id, found })
}

/// The same file, for several who keep it open with one descriptor.
pub(super) fn shared(file: &File) -> Result<Arc<File>, BuildError> {
    file.try_clone().map(Arc::new).map_err(reopening)
}

pub(super) fn stage(spec: &BuildSpec) -> Result<Staged, BuildError> {
    let directory = spec.output_directory();
    Staged::create_in(directory).map_err(|source| BuildError::Output {
        action: "create a temporary file in",
        path: directory.to_owned(),
        source,
    })
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

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
