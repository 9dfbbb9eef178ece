//! The image from its packs: flatten → layout → write → compress. Runs in a worker that has
//! nothing but its files, and knows nothing of registries, caches and names.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use ext4::Layout;
use rootfs::{FileTree, Folder};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::confined::{ImageMade, ImageTask};
use super::disk::Disk;
use super::metadata::ENGINE;
use super::output::{self, Compressed, ImageFile};
use super::pipeline::Phases;
use super::shift::{self, Run};
use super::{BuildError, BuildEvent, Observer, Phase, hex};
use crate::packs::OpenPack;

/// How many directories the closing summary names.
const BIGGEST_DIRECTORIES: usize = 8;
/// From this size on it is told beforehand how long the sum takes.
const LONG_SUM_BYTES: u64 = 64 << 30;
/// Bytes that are hashed to find out how long the sum takes.
const SAMPLE_BYTES: usize = 16 << 20;
/// Room before the superblock (kernel: Documentation/filesystems/ext4, "Layout").
const BOOT_AREA_BYTES: usize = 1024;

/// Has the file of all packs cut to these runs ([`shift`]), or says that it cannot be.
pub(super) type Cut<'a> = dyn Fn(&[Run]) -> io::Result<bool> + 'a;

/// Makes the image that `task` describes from its `files`.
///
/// # Errors
/// [`BuildError`], with the step, the cause and a remedy.
pub(super) fn make(
    task: &ImageTask,
    files: &[Arc<File>],
    disk: &Disk,
    cut: &Cut<'_>,
    observer: &dyn Observer,
) -> Result<ImageMade, BuildError> {
    let mut phases = Phases { observer, secs: Vec::new() };
    let (packs, tree) = phases.time(Phase::Flatten, || {
        let packs = open(task, files)?;
        let tree = flatten(task, &packs)?;
        Ok((packs, tree))
    })?;
    let (options, layout) = phases.time(Phase::Layout, || {
        let options = filesystem_options(task);
        let regions: Vec<u64> = packs.iter().map(|open| open.data_blocks).collect();
        let layout = Layout::plan(&tree, &options, &regions)
            .map_err(|source| BuildError::layout(source, &tree))?;
        let (size_bytes, bytes_max) = (layout.size_bytes(), task.options.bytes_max);
        match bytes_max.filter(|&bytes_max| size_bytes > bytes_max) {
            Some(bytes_max) => Err(BuildError::TooLarge { size_bytes, bytes_max }),
            None => Ok((options, layout)),
        }
    })?;
    tell_of_long_sum(task.hash, layout.size_bytes(), observer);
    let work = Work { task, files, packs: &packs, disk, cut };
    let (image, image_sha256) =
        phases.time(Phase::Write, || work.write(&layout, &tree, observer))?;
    let compressed = match task.compressed {
        None => None,
        Some(target) => {
            Some((target, phases.time(Phase::Compress, || work.compress(&layout, image, target))?))
        }
    };
    let summary = layout.summary();
    let biggest_directories = tree.biggest_directories(BIGGEST_DIRECTORIES).into_iter();
    Ok(ImageMade {
        file: compressed.as_ref().map_or(image, |(target, _)| *target),
        image,
        image_bytes: layout.size_bytes(),
        image_sha256,
        compressed_bytes: compressed.as_ref().map(|(_, made)| made.size_bytes),
        compressed_sha256: compressed.and_then(|(_, made)| made.sha256),
        uuid: format_uuid(&options.uuid),
        filesystem_bytes: summary.blocks * ext4::BLOCK_SIZE,
        free_bytes: summary.blocks_free * ext4::BLOCK_SIZE,
        data_bytes: summary.data_bytes,
        inodes_used: summary.inodes_used,
        inodes_total: summary.inodes,
        biggest_directories: biggest_directories
            .map(|usage| {
                (String::from_utf8_lossy(&usage.path).into_owned(), usage.bytes, usage.files)
            })
            .collect(),
    })
}

/// The packs as they lie in the files.
fn open(task: &ImageTask, files: &[Arc<File>]) -> Result<Vec<OpenPack>, BuildError> {
    let packs = task.layers.iter().enumerate().map(|(layer, part)| {
        let file = file_of(files, part.file)?;
        OpenPack::new(Arc::clone(file), part.base, part.length)
            .map_err(|source| BuildError::PackUnread { layer, digest: part.digest, source })
    });
    packs.collect()
}

/// An order that names a file that was not handed over is a defect of the parent.
fn file_of(files: &[Arc<File>], number: usize) -> Result<&Arc<File>, BuildError> {
    files.get(number).ok_or(BuildError::WorkerLost { phase: Phase::Flatten })
}

/// Folds the layers, bottom first; one table of contents is in memory at a time.
fn flatten(task: &ImageTask, packs: &[OpenPack]) -> Result<FileTree, BuildError> {
    let mut folder = Folder::new(&task.tree_limits);
    for (index, (open, layer)) in packs.iter().zip(&task.layers).enumerate() {
        let digest = layer.digest;
        let pack = open.load().map_err(|source| BuildError::PackUnread {
            layer: index,
            digest,
            source,
        })?;
        folder.add(&pack)?;
    }
    Ok(folder.finish()?)
}

/// What is recorded in the image and decides its UUID: everything that decides its bytes.
#[derive(Serialize)]
struct Provenance<'a> {
    engine: &'a str,
    image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<&'a str>,
    size: Option<u64>,
    free_space: Option<u64>,
    journal: bool,
    source_date_epoch: Option<i64>,
}

fn filesystem_options(task: &ImageTask) -> ext4::Options {
    let options = &task.options;
    let (size, free_space) = match options.size {
        ext4::Size::Exact { bytes } => (Some(bytes), None),
        ext4::Size::FreeSpace { bytes } => (None, Some(bytes)),
    };
    let provenance = Provenance {
        engine: &ENGINE,
        image: task.manifest_digest.clone(),
        changes: task.changes.as_deref(),
        size,
        free_space,
        journal: options.journal,
        source_date_epoch: options.source_date_epoch,
    };
    // Serialising plain strings and numbers cannot fail.
    let mut boot_area = serde_json::to_vec(&provenance).unwrap_or_default();
    boot_area.push(b'\n');
    boot_area.truncate(BOOT_AREA_BYTES);
    let seed: [u8; 32] = Sha256::digest(&boot_area).into();
    let (mut uuid, mut hash_seed) = ([0; 16], [0; 16]);
    uuid.copy_from_slice(&seed[..16]);
    hash_seed.copy_from_slice(&seed[16..]);
    // RFC 9562, section 5.8: version 8, variant 10: the other bits are ours.
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    ext4::Options {
        journal: options.journal,
        created: ext4::Timestamp {
            secs: options.source_date_epoch.unwrap_or(task.created_secs),
            nanos: 0,
        },
        clamp_mtime: options.source_date_epoch,
        boot_area,
        ..ext4::Options::new(uuid, hash_seed, options.size)
    }
}

/// Says how long the sum of a large image will take: SHA-256 goes through holes like through data,
/// and nothing is to be seen of it meanwhile.
fn tell_of_long_sum(hash: bool, size_bytes: u64, observer: &dyn Observer) {
    if !hash || size_bytes < LONG_SUM_BYTES {
        return;
    }
    let sample = vec![0; SAMPLE_BYTES];
    let started = Instant::now();
    let sum: [u8; 32] = Sha256::digest(&sample).into();
    std::hint::black_box(sum);
    let samples = size_bytes.div_ceil(SAMPLE_BYTES as u64);
    let minutes = (started.elapsed().as_secs_f64() * samples as f64 / 60.0).ceil();
    let (size, unit) = match size_bytes >> 40 {
        0 => (size_bytes >> 20, "GiB"),
        _ => (size_bytes >> 30, "TiB"),
    };
    let message = format!(
        "hashing {:.1} {unit}, holes too, takes about {minutes} min; --checksum none skips it",
        size as f64 / 1024.0
    );
    observer.event(&BuildEvent::Warning { message });
}

/// The worker's task while the file data is moved.
struct Work<'a> {
    task: &'a ImageTask,
    files: &'a [Arc<File>],
    packs: &'a [OpenPack],
    disk: &'a Disk,
    cut: &'a Cut<'a>,
}

impl Work<'_> {
    fn failed(&self, action: &'static str) -> impl Fn(std::io::Error) -> BuildError {
        let path = self.task.output.clone();
        move |source| BuildError::Output { action, path: path.clone(), source }
    }

    /// Which file has become the image, and its sum.
    fn write(
        &self,
        layout: &Layout,
        tree: &FileTree,
        observer: &dyn Observer,
    ) -> Result<(usize, Option<String>), BuildError> {
        let runs = match self.task.slabs {
            Some(_) => {
                shift::runs(layout, self.packs).map_err(self.failed("arrange the data of"))?
            }
            None => None,
        };
        let shifted = match runs {
            Some(runs) => (self.cut)(&runs).map_err(self.failed("arrange the data of"))?,
            None => false,
        };
        let shifted = self.task.slabs.filter(|_| shifted);
        let number = shifted.unwrap_or(self.task.image);
        let file = file_of(self.files, number)?;
        file.set_len(layout.size_bytes()).map_err(self.failed("set the size of"))?;
        layout
            .write(tree, &mut ImageFile(file))
            .map_err(|source| BuildError::Write { path: self.task.output.clone(), source })?;
        let (hash, in_place) = (self.task.hash, shifted.is_some());
        let sha256 =
            output::write_data(layout, self.packs, file, in_place, hash, self.disk, observer)
                .map_err(self.failed("write"))?;
        Ok((number, sha256))
    }

    fn compress(
        &self,
        layout: &Layout,
        image: usize,
        target: usize,
    ) -> Result<Compressed, BuildError> {
        let (image, target) = (file_of(self.files, image)?, file_of(self.files, target)?);
        let ImageTask { compression, hash, jobs, .. } = *self.task;
        output::compress(image, layout.size_bytes(), target, compression, hash, jobs)
            .map_err(self.failed("write"))
    }
}

/// The usual form of a UUID (RFC 9562, section 4).
pub(crate) fn format_uuid(uuid: &[u8; 16]) -> String {
    let hex = hex(uuid);
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
}
