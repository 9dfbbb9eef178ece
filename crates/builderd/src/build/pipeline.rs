//! The build, top to bottom: resolve → layers → flatten → layout → write → publish.

use std::fs::{File, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use oci::{Fetcher, Image};
use tokio::runtime::Runtime;

use super::commands;
use super::confined::{self, ImageMade, ImageTask, LayerPart, Taken};
use super::disk::{Disk, lock};
use super::layers::{self, LayerPacks};
use super::metadata::{
    ArtifactMetadata, FilesystemMetadata, ImageMetadata, checksum_line, directory_of,
};
use super::{
    BuildError, BuildEvent, BuildReport, BuildSpec, Checksum, Compression, Observer, PackStorage,
    Phase, SumBy,
};
use crate::packs::OpenPack;
use crate::staged::Staged;

/// How often the fetcher is asked what went wrong meanwhile.
const NOTES_EVERY: Duration = Duration::from_millis(250);

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
    let changes = match &spec.commands {
        None => None,
        Some(wanted) => Some(phases.time(Phase::Commands, || {
            commands::run(spec, wanted, &image, &mut packs, &disk, observer)
        })?),
    };
    let written = write(spec, &image, (packs, changes), &mut phases)?;
    let metadata = describe(spec, &image, &written);
    // Not part of the phase: whoever interrupts a build that waits here has got no output.
    let turns = take_turns(&[spec.output_directory(), directory_of(&spec.metadata_file)], observer);
    phases.time(Phase::Publish, || publish(spec, written.staged, &metadata))?;
    drop(turns);
    prune(spec, observer);
    Ok(BuildReport {
        output: spec.output.clone(),
        metadata,
        layers_cached: written.layers_cached,
        layers_packed: written.layers_packed,
        fetched_bytes: written.fetched_bytes,
        phase_secs: phases.secs,
        total_secs: started.elapsed().as_secs_f64(),
        biggest_directories: written.made.biggest_directories,
        workers: written.workers,
    })
}

pub(super) struct Phases<'a> {
    pub(super) observer: &'a dyn Observer,
    pub(super) secs: Vec<(Phase, f64)>,
}

impl Phases<'_> {
    pub(super) fn time<T>(
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

/// The finished file, still without a name.
struct Written {
    staged: Staged,
    made: ImageMade,
    layers_cached: usize,
    layers_packed: usize,
    fetched_bytes: u64,
    workers: Taken,
}

/// Lets a worker make the image from the packs.
fn write(
    spec: &BuildSpec,
    image: &Image,
    (mut packs, changes): (LayerPacks, Option<String>),
    phases: &mut Phases<'_>,
) -> Result<Written, BuildError> {
    let stage = || {
        Staged::create_in(spec.output_directory()).map_err(|source| BuildError::Output {
            action: "create",
            path: spec.output.clone(),
            source,
        })
    };
    let mut staged = vec![stage()?];
    let compressed = match spec.compression {
        Compression::None => None,
        Compression::Gzip | Compression::Zstd => {
            staged.push(stage()?);
            Some(1)
        }
    };
    let slabs = packs.slabs.take().map(|slabs| {
        staged.push(slabs);
        staged.len() - 1
    });
    let mut files: Vec<&File> = staged.iter().map(Staged::file).collect();
    let layers = layer_parts(&packs.packs, image, &mut files);
    let task = ImageTask {
        layers,
        tree_limits: spec.tree_limits.clone(),
        options: spec.image.clone(),
        manifest_digest: image.manifest_digest.to_string(),
        changes,
        created_secs: created_secs(image),
        hash: spec.checksum == Checksum::Sha256 && spec.sum_by == SumBy::Worker,
        compression: spec.compression,
        jobs: spec.jobs,
        output: spec.output.clone(),
        slabs,
        image: 0,
        compressed,
    };
    let timing = Timing { observer: phases.observer, secs: Mutex::default() };
    let is_summed_here = spec.checksum == Checksum::Sha256 && spec.sum_by == SumBy::Parent;
    let (made, taken) = confined::image(task, &files, &spec.walls, &timing, is_summed_here)?;
    drop(files);
    phases.secs.append(&mut lock(&timing.secs));
    packs.taken.push(taken);
    Ok(Written {
        staged: staged.swap_remove(made.file),
        made,
        layers_cached: packs.cached,
        layers_packed: packs.packed,
        fetched_bytes: packs.fetched_bytes,
        workers: taken_together(&packs.taken, spec.jobs),
    })
}

/// Where the packs lie among `files`, to which their own are added, each once.
fn layer_parts<'a>(
    packs: &'a [OpenPack],
    image: &Image,
    files: &mut Vec<&'a File>,
) -> Vec<LayerPart> {
    let others = files.len();
    let mut known: Vec<&Arc<File>> = Vec::new();
    // The changes of commands have no layer of the image; messages about them name it.
    let digests = image.layers.iter().map(|layer| layer.digest);
    let digests = digests.chain(std::iter::repeat(image.manifest_digest));
    let parts = packs.iter().zip(digests).map(|(open, digest)| {
        let file = match known.iter().position(|file| Arc::ptr_eq(file, &open.file)) {
            Some(place) => others + place,
            None => {
                files.push(&open.file);
                known.push(&open.file);
                files.len() - 1
            }
        };
        LayerPart { digest, file, base: open.base, length: open.length() }
    });
    parts.collect()
}

/// What workers took: those of layers ran beside each other, so many at a time.
fn taken_together(taken: &[Taken], jobs: usize) -> Taken {
    let mut peaks: Vec<u64> = taken.iter().map(|taken| taken.memory_peak_bytes).collect();
    peaks.sort_unstable_by_key(|&bytes| std::cmp::Reverse(bytes));
    Taken {
        cpu_ms: taken.iter().map(|taken| taken.cpu_ms).sum(),
        memory_peak_bytes: peaks.iter().take(jobs.max(1)).sum(),
    }
}

/// Notes how long the phases of a worker take, as it tells.
struct Timing<'a> {
    observer: &'a dyn Observer,
    secs: Mutex<Vec<(Phase, f64)>>,
}

impl Observer for Timing<'_> {
    fn event(&self, event: &BuildEvent) {
        if let BuildEvent::PhaseFinished { phase, secs } = event {
            lock(&self.secs).push((*phase, *secs));
        }
        self.observer.event(event);
    }
}

fn describe(spec: &BuildSpec, image: &Image, written: &Written) -> ImageMetadata {
    let made = &written.made;
    let filesystem = FilesystemMetadata {
        r#type: "ext4",
        uuid: made.uuid.clone(),
        size_bytes: made.filesystem_bytes,
        free_bytes: made.free_bytes,
        data_bytes: made.data_bytes,
        inodes_used: made.inodes_used,
        inodes_total: made.inodes_total,
        journal: spec.image.journal,
    };
    let is_compressed = made.compressed_bytes.is_some();
    let artifact = ArtifactMetadata {
        size_bytes: made.compressed_bytes.unwrap_or(made.image_bytes),
        compression: spec.compression.as_str(),
        sha256: if is_compressed { &made.compressed_sha256 } else { &made.image_sha256 }.clone(),
        uncompressed_size_bytes: is_compressed.then_some(made.image_bytes),
        uncompressed_sha256: made.image_sha256.clone().filter(|_| is_compressed),
    };
    ImageMetadata::new(image, filesystem, artifact)
}

/// Refuses names that cannot become the files of a build, before any work is done.
fn check_names(spec: &BuildSpec) -> Result<(), BuildError> {
    let names = [&spec.output, &spec.metadata_file, &sibling(&spec.output, ".sha256")];
    for (index, path) in names.into_iter().enumerate() {
        check_name(path)?;
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if names[..index].iter().any(|other| absolute(other) == absolute(path)) {
            let problem = "another file of this build has the same name";
            return Err(BuildError::OutputName { path: path.clone(), problem, source: None });
        }
    }
    Ok(())
}

/// Whether a file that is made elsewhere can be given the name `path` in the end.
///
/// # Errors
/// [`BuildError::OutputName`]
pub(crate) fn check_name(path: &Path) -> Result<(), BuildError> {
    let refused =
        |problem, source| BuildError::OutputName { path: path.to_owned(), problem, source };
    let wrong = |problem| refused(problem, None);
    // A trailing slash or dot means a directory to everybody else.
    let plain =
        path.file_name().is_some_and(|name| path.as_os_str().as_bytes().ends_with(name.as_bytes()));
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
    // /dev/stdout, where that is a file: not the file would be replaced, but the link.
    if std::fs::read_link(path).is_ok_and(|target| target.starts_with("/proc")) {
        return Err(wrong("it stands for an open file, whatever that is called"));
    }
    // The only way to know; the file has no name and is gone at once.
    Staged::create_in(directory_of(path))
        .map(drop)
        .map_err(|error| refused("its directory takes no file", Some(error)))
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
