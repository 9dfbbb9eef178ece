//! The build, top to bottom: resolve → layers → flatten → layout → write → publish.

use std::fs::{File, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ext4::Layout;
use oci::{Fetcher, Image};
use rootfs::{FileTree, Folder};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;

use super::disk::Disk;
use super::layers::{self, LayerPacks};
use super::metadata::{
    ArtifactMetadata, ENGINE, FilesystemMetadata, ImageMetadata, checksum_line, directory_of,
};
use super::output::{self, ImageFile};
use super::{
    BuildError, BuildEvent, BuildReport, BuildSpec, Checksum, Compression, ImageOptions, Observer,
    PackStorage, Phase,
};
use crate::staged::Staged;

/// How many directories the closing summary names.
const BIGGEST_DIRECTORIES: usize = 8;
/// How often the fetcher is asked what went wrong meanwhile.
const NOTES_EVERY: Duration = Duration::from_millis(250);
/// From this size on it is told beforehand how long the sum takes.
const LONG_SUM_BYTES: u64 = 64 << 30;
/// Bytes that are hashed to find out how long the sum takes.
const SAMPLE_BYTES: usize = 16 << 20;
/// Room before the superblock (kernel: Documentation/filesystems/ext4, "Layout").
const BOOT_AREA_BYTES: usize = 1024;

/// Builds the image that `spec` describes.
///
/// On an error before the publishing nothing has appeared under the output names, and what stood
/// there stands; files get their names in the last step, whole, the image last.
///
/// # Errors
/// [`BuildError`], with the step, the cause and a remedy.
pub fn run(spec: &BuildSpec, observer: &dyn Observer) -> Result<BuildReport, BuildError> {
    let started = Instant::now();
    check_names(spec)?;
    let mut phases = Phases { observer, secs: Vec::new() };
    let disk = Arc::new(Disk::default());
    let (image, mut packs) = pull(spec, &disk, &mut phases)?;
    let tree = phases.time(Phase::Flatten, || flatten(spec, &image, &packs))?;
    let (options, layout) = phases.time(Phase::Layout, || {
        let options = filesystem_options(&spec.image, &image);
        let regions: Vec<u64> = packs.packs.iter().map(|open| open.data_blocks).collect();
        let layout = Layout::plan(&tree, &options, &regions)
            .map_err(|source| BuildError::layout(source, &tree))?;
        let (size_bytes, bytes_max) = (layout.size_bytes(), spec.image.bytes_max);
        match bytes_max.filter(|&bytes_max| size_bytes > bytes_max) {
            Some(bytes_max) => Err(BuildError::TooLarge { size_bytes, bytes_max }),
            None => Ok((options, layout)),
        }
    })?;
    tell_of_long_sum(spec.checksum, layout.size_bytes(), observer);
    let written = write_image(spec, &layout, &tree, &mut packs, &disk, &mut phases)?;
    let biggest_directories = tree.biggest_directories(BIGGEST_DIRECTORIES);
    let metadata = describe(spec, &image, &options, &layout, &written);
    // Not part of the phase: whoever interrupts a build that waits here has got no output.
    let turns = take_turns(&[spec.output_directory(), directory_of(&spec.metadata_file)], observer);
    phases.time(Phase::Publish, || publish(spec, written.staged, &metadata))?;
    drop(turns);
    prune(spec, observer);
    Ok(BuildReport {
        output: spec.output.clone(),
        metadata,
        layers_cached: packs.cached,
        layers_packed: packs.packed,
        fetched_bytes: packs.fetched_bytes,
        phase_secs: phases.secs,
        total_secs: started.elapsed().as_secs_f64(),
        biggest_directories: biggest_directories
            .into_iter()
            .map(|usage| {
                (String::from_utf8_lossy(&usage.path).into_owned(), usage.bytes, usage.files)
            })
            .collect(),
    })
}

/// Folds the layers, bottom first; one table of contents is in memory at a time.
fn flatten(spec: &BuildSpec, image: &Image, packs: &LayerPacks) -> Result<FileTree, BuildError> {
    let mut folder = Folder::new(&spec.tree_limits);
    for (index, (open, layer)) in packs.packs.iter().zip(&image.layers).enumerate() {
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

struct Phases<'a> {
    observer: &'a dyn Observer,
    secs: Vec<(Phase, f64)>,
}

impl Phases<'_> {
    fn time<T>(
        &mut self,
        phase: Phase,
        work: impl FnOnce() -> Result<T, BuildError>,
    ) -> Result<T, BuildError> {
        self.observer.event(&BuildEvent::PhaseStarted { phase });
        let started = Instant::now();
        let result = work()?;
        let secs = started.elapsed().as_secs_f64();
        self.secs.push((phase, secs));
        self.observer.event(&BuildEvent::PhaseFinished { phase, secs });
        Ok(result)
    }
}

/// Resolves the image and gets its layers; this thread is the network thread meanwhile.
fn pull(
    spec: &BuildSpec,
    disk: &Arc<Disk>,
    phases: &mut Phases<'_>,
) -> Result<(Image, LayerPacks), BuildError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| BuildError::Worker { phase: Phase::Resolve, source })?;
    let pulled = pull_on(&runtime, spec, disk, phases);
    // A failed build does not wait for what others hold up: a layer's lock, a name server. Who still
    // waits there writes nothing that has a name, but for the cache's own upkeep of whole files.
    runtime.shutdown_background();
    pulled
}

fn pull_on(
    runtime: &Runtime,
    spec: &BuildSpec,
    disk: &Arc<Disk>,
    phases: &mut Phases<'_>,
) -> Result<(Image, LayerPacks), BuildError> {
    let failed = |source| BuildError::pull(&spec.source, source);
    let (spool, observer) = (spec.output_directory(), phases.observer);
    let (fetcher, image) = phases.time(Phase::Resolve, || {
        runtime
            .block_on(async {
                let fetcher = Fetcher::open(&spec.source, &spec.client, spool).await?;
                let image = warning(&fetcher, observer, fetcher.resolve(&spec.platform)).await;
                Ok((fetcher, image?))
            })
            .map_err(failed)
    })?;
    phases.observer.event(&BuildEvent::Resolved {
        image: image.name.clone(),
        manifest_digest: image.manifest_digest.to_string(),
        platform: image.platform.to_string(),
        layers: image.layers.len(),
        compressed_bytes: image.layers.iter().map(|layer| layer.size_bytes).sum(),
    });
    let packs = phases.time(Phase::Layers, || {
        let work = layers::fetch(spec, &fetcher, &image, disk, observer);
        runtime.block_on(warning(&fetcher, observer, work))
    })?;
    Ok((image, packs))
}

/// Passes on what the fetcher notes while it works: a build that runs out of time is ended from
/// outside, and says nothing afterwards.
async fn warning<T>(
    fetcher: &Fetcher,
    observer: &dyn Observer,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    loop {
        let ended = tokio::time::timeout(NOTES_EVERY, &mut work).await;
        for message in fetcher.take_notes() {
            observer.event(&BuildEvent::Warning { message });
        }
        if let Ok(result) = ended {
            return result;
        }
    }
}

/// When the config says the image was made; a text that is no time counts as none.
fn created_secs(image: &Image) -> i64 {
    let created = image.config.created.as_deref();
    created.and_then(|text| text.parse::<jiff::Timestamp>().ok()).map_or(0, |time| time.as_second())
}

/// What is recorded in the image and decides its UUID: everything that decides its bytes.
#[derive(Serialize)]
struct Provenance<'a> {
    engine: &'a str,
    image: String,
    size: Option<u64>,
    free_space: Option<u64>,
    journal: bool,
    source_date_epoch: Option<i64>,
}

fn filesystem_options(options: &ImageOptions, image: &Image) -> ext4::Options {
    let (size, free_space) = match options.size {
        ext4::Size::Exact { bytes } => (Some(bytes), None),
        ext4::Size::FreeSpace { bytes } => (None, Some(bytes)),
    };
    let provenance = Provenance {
        engine: ENGINE,
        image: image.manifest_digest.to_string(),
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
            secs: options.source_date_epoch.unwrap_or_else(|| created_secs(image)),
            nanos: 0,
        },
        clamp_mtime: options.source_date_epoch,
        boot_area,
        ..ext4::Options::new(uuid, hash_seed, options.size)
    }
}

/// Says how long the sum of a large image will take: SHA-256 goes through holes like through data,
/// and nothing is to be seen of it meanwhile.
fn tell_of_long_sum(checksum: Checksum, size_bytes: u64, observer: &dyn Observer) {
    if checksum == Checksum::None || size_bytes < LONG_SUM_BYTES {
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

struct Written {
    staged: Staged,
    size_bytes: u64,
    sha256: Option<String>,
    uncompressed: Option<Uncompressed>,
}

/// The image in a compressed file.
struct Uncompressed {
    size_bytes: u64,
    sha256: Option<String>,
}

fn write_image(
    spec: &BuildSpec,
    layout: &Layout,
    tree: &FileTree,
    packs: &mut LayerPacks,
    disk: &Disk,
    phases: &mut Phases<'_>,
) -> Result<Written, BuildError> {
    let failed =
        |action| move |source| BuildError::Output { action, path: spec.output.clone(), source };
    let hash = spec.checksum == Checksum::Sha256;
    let stage = || Staged::create_in(spec.output_directory()).map_err(failed("create"));
    let observer = phases.observer;
    let (staged, sha256) = phases.time(Phase::Write, || {
        let (staged, in_place) = match packs.slabs.take() {
            Some(slabs)
                if disk.is_nearly_written()
                    && output::shift(layout, &packs.packs, slabs.file())
                        .map_err(failed("arrange the data of"))? =>
            {
                (slabs, true)
            }
            _ => (stage()?, false),
        };
        let file = staged.file();
        file.set_len(layout.size_bytes()).map_err(failed("set the size of"))?;
        layout
            .write(tree, &mut ImageFile(file))
            .map_err(|source| BuildError::Write { path: spec.output.clone(), source })?;
        let sha256 = output::write_data(layout, &packs.packs, file, in_place, hash, disk, observer)
            .map_err(failed("write"))?;
        Ok((staged, sha256))
    })?;
    if spec.compression == Compression::None {
        let size_bytes = layout.size_bytes();
        return Ok(Written { staged, size_bytes, sha256, uncompressed: None });
    }
    phases.time(Phase::Compress, || {
        let packed = stage()?;
        let (image, size) = (staged.file(), layout.size_bytes());
        let compressed =
            output::compress(image, size, packed.file(), spec.compression, hash, spec.jobs)
                .map_err(failed("write"))?;
        Ok(Written {
            staged: packed,
            size_bytes: compressed.size_bytes,
            sha256: compressed.sha256,
            uncompressed: Some(Uncompressed { size_bytes: size, sha256 }),
        })
    })
}

fn describe(
    spec: &BuildSpec,
    image: &Image,
    options: &ext4::Options,
    layout: &Layout,
    written: &Written,
) -> ImageMetadata {
    let summary = layout.summary();
    let filesystem = FilesystemMetadata {
        r#type: "ext4",
        uuid: format_uuid(&options.uuid),
        size_bytes: summary.blocks * ext4::BLOCK_SIZE,
        free_bytes: summary.blocks_free * ext4::BLOCK_SIZE,
        data_bytes: summary.data_bytes,
        inodes_used: summary.inodes_used,
        inodes_total: summary.inodes,
        journal: options.journal,
    };
    let artifact = ArtifactMetadata {
        size_bytes: written.size_bytes,
        compression: spec.compression.as_str(),
        sha256: written.sha256.clone(),
        uncompressed_size_bytes: written.uncompressed.as_ref().map(|image| image.size_bytes),
        uncompressed_sha256: written.uncompressed.as_ref().and_then(|image| image.sha256.clone()),
    };
    ImageMetadata::new(image, filesystem, artifact)
}

/// The usual form of a UUID (RFC 9562, section 4).
pub(crate) fn format_uuid(uuid: &[u8; 16]) -> String {
    let hex = layers::hex(uuid);
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
}

/// Refuses names that cannot become the files of a build, before any work is done.
fn check_names(spec: &BuildSpec) -> Result<(), BuildError> {
    let names = [&spec.output, &spec.metadata_file, &sibling(&spec.output, ".sha256")];
    for (index, path) in names.into_iter().enumerate() {
        let refused =
            |problem, source| BuildError::OutputName { path: path.clone(), problem, source };
        let wrong = |problem| refused(problem, None);
        // A trailing slash or dot means a directory to everybody else.
        let plain = path
            .file_name()
            .is_some_and(|name| path.as_os_str().as_bytes().ends_with(name.as_bytes()));
        if !plain {
            return Err(wrong("it does not name a file"));
        }
        match std::fs::metadata(path) {
            Ok(there) if !there.is_file() => {
                return Err(wrong("what has that name is not a regular file"));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(refused("nothing can have that name", Some(error)));
            }
            _ => {}
        }
        // The only way to know; the file has no name and is gone at once.
        Staged::create_in(directory_of(path))
            .map_err(|error| refused("its directory takes no file", Some(error)))?;
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if names[..index].iter().any(|other| absolute(other) == absolute(path)) {
            return Err(wrong("another file of this build has the same name"));
        }
    }
    Ok(())
}

/// Waits until no other build gives names to files of `directories`, and keeps others waiting:
/// image, checksum and metadata are then of one build. All builds take them in the same order, by
/// device and inode, so that no two wait for each other. Where directories cannot be locked, as
/// on some network file systems, nobody waits.
fn take_turns(directories: &[&Path], observer: &dyn Observer) -> Vec<File> {
    let opened = directories.iter().filter_map(|directory| {
        let file = File::open(directory).ok()?;
        let metadata = file.metadata().ok()?;
        Some(((metadata.dev(), metadata.ino()), *directory, file))
    });
    let mut opened: Vec<_> = opened.collect();
    opened.sort_by_key(|(place, ..)| *place);
    // Of one that has two names only one is taken: it would wait for itself.
    opened.dedup_by_key(|(place, ..)| *place);
    let turns = opened.into_iter().filter_map(|(_, directory, file)| {
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            let message = format!("another build publishes in {}: waiting", directory.display());
            observer.event(&BuildEvent::Warning { message });
        }
        file.lock().is_ok().then_some(file)
    });
    turns.collect()
}

/// Names the finished files, the image last: who sees it finds the others beside it. All are
/// whole before the first gets its name.
fn publish(spec: &BuildSpec, image: Staged, metadata: &ImageMetadata) -> Result<(), BuildError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| BuildError::Output { action, path, source }
    };
    let stage = |path: &Path, bytes: &[u8]| {
        Staged::create_in(directory_of(path))
            .and_then(|staged| {
                staged.file().write_all(bytes)?;
                Ok(staged)
            })
            .map_err(failed("write", path))
    };
    let mut json = serde_json::to_vec_pretty(metadata).unwrap_or_default();
    json.push(b'\n');
    let metadata_file = stage(&spec.metadata_file, &json)?;
    let sum_path = sibling(&spec.output, ".sha256");
    let sum_file = match &metadata.artifact.sha256 {
        Some(sha256) => {
            let name = spec.output.file_name().unwrap_or_default().to_string_lossy();
            Some(stage(&sum_path, checksum_line(sha256, &name).as_bytes())?)
        }
        None => None,
    };
    metadata_file.publish(&spec.metadata_file).map_err(failed("publish", &spec.metadata_file))?;
    match sum_file {
        Some(sum_file) => drop(sum_file.publish(&sum_path).map_err(failed("publish", &sum_path))?),
        // An old sum beside a new image would lie.
        None => match std::fs::remove_file(&sum_path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove the old", &sum_path)(source));
            }
            _ => {}
        },
    }
    image.publish(&spec.output).map(drop).map_err(failed("publish", &spec.output))
}

/// The path with `suffix` appended to its file name.
pub(crate) fn sibling(path: &Path, suffix: &str) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The image is done: a cache that cannot be pruned is a warning.
fn prune(spec: &BuildSpec, observer: &dyn Observer) {
    if let PackStorage::Cache { cache, limit_bytes, .. } = &spec.packs
        && let Err(error) = cache.prune(*limit_bytes)
    {
        let message = format!("the layer cache could not be pruned: {error}");
        observer.event(&BuildEvent::Warning { message });
    }
}
