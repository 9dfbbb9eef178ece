//! What becomes of files that workers have written, whatever they say of them.

use std::ffi::CString;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use rootfs::{Limits, PackSummary, TreeLimits};
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, OFlags};
use serde_json::json;

use super::slabs::bounds;
use super::ways::{commit, open_placed};
use super::*;
use crate::build::disk::direct_twin;
use crate::build::shift::can_shift;
use crate::build::{Checksum, Compression, ImageOptions, SumBy};
use crate::packs::{Lookup, PackCache, SharingDomain};

/// Much longer than any of this takes, on the slowest machine,
const PATIENCE: Duration = Duration::from_secs(60);
/// and much longer than that: how long a worker stays that is not ended.
const STAYS: &str = "sleep 100";

/// A layer with one file of that name, and its pack.
fn layer(name: &str) -> (Layer, Vec<u8>) {
    let (tar, pack, _) = made(name);
    let digest = oci::Digest::of(&tar);
    let size_bytes = tar.len() as u64;
    let (media_type, compression) = (String::new(), oci::Compression::None);
    (Layer { digest, size_bytes, media_type, compression, diff_id: digest }, pack)
}

/// The tar and the pack of a layer with one file of that name, and what is told of making it.
fn made(name: &str) -> (Vec<u8>, Vec<u8>, PackSummary) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, &b"data"[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let mut pack = Vec::new();
    let summary = rootfs::make_pack(tar.as_slice(), &mut pack, &Limits::default()).unwrap();
    (tar, pack, summary)
}

/// What comes of a file that a worker has made for `layer`, saying so of its length, and whether
/// others find it afterwards.
fn committed(layer: &Layer, content: &[u8], said_bytes: usize) -> (Result<u64, BuildError>, bool) {
    let directory = tempfile::tempdir_in(".").unwrap();
    let cache = PackCache::open(directory.path()).unwrap();
    let key = PackKey { domain: SharingDomain::local(), digest: layer.digest };
    let staged = cache.stage(&key).unwrap();
    staged.file().write_all(content).unwrap();
    let open = commit(0, layer, &cache, &key, staged, said_bytes as u64);
    let is_found = !matches!(cache.lookup(&key).unwrap(), Lookup::Miss);
    (open.map(|open| open.length()), is_found)
}

#[test]
fn a_worker_that_made_another_pack_than_it_says_has_made_none() {
    let (wanted, pack) = layer("wanted");
    let (_, other) = layer("other");
    let (open, is_found) = committed(&wanted, &pack, pack.len());
    assert_eq!((open.unwrap(), is_found), (pack.len() as u64, true));
    let both = [pack.as_slice(), &other].concat();
    for (content, said_bytes) in [
        (&other, other.len()),
        // Its worker shows the first, others would find the second.
        (&both, pack.len()),
        (&both, both.len()),
        (&pack, pack.len() + 1),
        (&Vec::new(), 0),
    ] {
        let (open, is_found) = committed(&wanted, content, said_bytes);
        assert!(open.is_err() && !is_found, "{said_bytes} of {}: {open:?}", content.len());
    }
}

fn file(bytes: usize) -> Arc<File> {
    let mut file = tempfile::tempfile_in(".").unwrap();
    file.write_all(&vec![1; bytes]).unwrap();
    file.sync_all().unwrap();
    Arc::new(file)
}

fn written() -> Written {
    let (image_data_bytes_max, toc_bytes_max) = (1 << 20, 0);
    Written::of(&Limits { image_data_bytes_max, toc_bytes_max, ..Limits::default() }, false)
}

#[test]
fn what_workers_write_together_has_an_end() {
    let mut written = written();
    let (first, second) = (file(500 << 10), file(600 << 10));
    written.begin(3, &first);
    // Two that write to one file.
    written.begin(4, &first);
    assert_eq!(written.outgrown(), None);
    written.begin(7, &second);
    assert_eq!(written.outgrown(), Some(7));
    written.end(&second);
    assert_eq!(written.outgrown(), Some(3), "what is whole counts still");
    assert_eq!(Arc::strong_count(&second), 1, "but is not kept open");
}

#[test]
fn neither_holes_nor_what_is_put_by_behind_its_end_counts_as_written() {
    let mut written = written();
    let (holes, put_by) = (file(4096), file(4096));
    holes.set_len(1 << 30).unwrap();
    let kept = rustix::fs::fallocate(&put_by, FallocateFlags::KEEP_SIZE, 0, 8 << 20);
    for file in [&holes, &put_by] {
        written.begin(0, file);
    }
    assert_eq!(written.outgrown(), None);
    assert!(kept.is_err() || put_by.metadata().unwrap().blocks() >= 8 << 11);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_outgrows_the_build_is_noticed_while_its_worker_writes() {
    let (file, written) = (file(0), Mutex::new(written()));
    lock(&written).begin(5, &file);
    let write = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        (&*file).write_all(&vec![1; 2 << 20]).unwrap();
        file.sync_all().unwrap();
    };
    let look = tokio::time::timeout(Duration::from_secs(2), outgrown(&written));
    assert_eq!(tokio::join!(look, write).0, Ok(5));
}

/// An image of one layer, with one file of that name.
fn image_of(name: &str) -> Image {
    let (layer, _) = layer(name);
    Image {
        name: "test".to_owned(),
        manifest_digest: layer.digest,
        index_digest: None,
        config_digest: layer.digest,
        config: oci::ImageConfig::default(),
        platform: oci::Platform::of_this_machine(),
        layers: vec![layer],
        anonymous: false,
    }
}

/// A build of [`image_of`] `name`, with a cache.
fn spec_of(name: &str, directory: &Path) -> BuildSpec {
    let (tar, ..) = made(name);
    let blobs = directory.join("image/blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(oci::Digest::of(&tar).hex()), tar).unwrap();
    let (layout, index) =
        (r#"{"imageLayoutVersion":"1.0.0"}"#, r#"{"schemaVersion":2,"manifests":[]}"#);
    std::fs::write(directory.join("image/oci-layout"), layout).unwrap();
    std::fs::write(directory.join("image/index.json"), index).unwrap();
    BuildSpec {
        source: format!("oci:{}", directory.join("image").display()).parse().unwrap(),
        platform: oci::Platform::of_this_machine(),
        client: oci::ClientOptions::default(),
        output: directory.join("out"),
        metadata_file: directory.join("out.json"),
        image: ImageOptions::default(),
        compression: Compression::None,
        checksum: Checksum::None,
        sum_by: SumBy::Worker,
        packs: PackStorage::Cache {
            cache: PackCache::open(&directory.join("cache")).unwrap(),
            domain: SharingDomain::local(),
            limit_bytes: u64::MAX,
        },
        commands: None,
        jobs: 1,
        layer_limits: Limits::default(),
        tree_limits: TreeLimits::default(),
        walls: Vec::new(),
    }
}

/// What comes of a layer whose worker is a shell that runs `script`. It knows the descriptors of
/// the slabs and of the file beside them as `$slabs` and `$copy`, that of a file of its own as `$copy`, and
/// the packs of the layers `wanted` and `others` by their names.
fn packed_by(script: &str, spec: &BuildSpec, directory: &Path) -> Result<LayerPacks, BuildError> {
    for name in ["wanted", "others"] {
        std::fs::write(directory.join(name), made(name).1).unwrap();
    }
    let probe = tempfile::tempfile_in(directory).unwrap();
    let step = 1 + usize::from(direct_twin(&probe).is_some());
    let copies = can_all_be_placed(spec, &image_of("wanted")) && can_shift(&probe, 1 << 30);
    let copy = if copies { 3 + step } else { 3 };
    let at = directory.canonicalize().unwrap();
    let script = format!("slabs=3; copy={copy}; cd {}; {script}", at.display());
    let arguments = ["sh", "-c", &script].map(|word| CString::new(word).unwrap());
    let program = Program::new(File::open("/bin/sh").unwrap(), arguments.into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(async {
        let fetcher = Fetcher::open(&spec.source, &spec.client, directory).await.unwrap();
        let (image, disk) = (image_of("wanted"), Arc::default());
        let fetching = fetch_by(program, spec, &fetcher, &image, &disk, &Deaf);
        tokio::time::timeout(PATIENCE, fetching).await.expect("nobody waits for it")
    });
    runtime.shutdown_background();
    result
}

struct Deaf;

impl Observer for Deaf {
    fn event(&self, _: &BuildEvent) {}
}

/// What a worker says that has made the pack of the layer `name`.
fn packed_line(name: &str, is_placed: bool) -> String {
    let line = json!({"Packed": {
        "summary": made(name).2,
        "is_placed": is_placed,
        "writes": Disk::default().writes(),
        "taken": {"cpu_ms": 1, "memory_peak_bytes": 1},
    }});
    format!("echo '{line}'")
}

/// A directory where packs can be shifted, or none is said of.
fn shifting_directory() -> Option<tempfile::TempDir> {
    let directory = tempfile::tempdir_in(".").unwrap();
    let probe = tempfile::tempfile_in(directory.path()).unwrap();
    if can_shift(&probe, 1 << 40) {
        return Some(directory);
    }
    eprintln!("skipped: the file system here cannot shift");
    None
}

#[test]
fn a_build_whose_workers_outgrow_it_does_not_wait_for_them() {
    let directory = tempfile::tempdir_in(".").unwrap();
    let mut spec = spec_of("wanted", directory.path());
    spec.layer_limits.image_data_bytes_max = 1 << 20;
    spec.layer_limits.toc_bytes_max = 0;
    let alive = directory.path().join("alive");
    rustix::fs::mknodat(CWD, &alive, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    rustix::fs::chmod(&alive, Mode::from_raw_mode(0o666)).unwrap();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let alive = rustix::fs::open(&alive, flags, Mode::empty()).unwrap();
    let script = format!("exec 8>alive; echo x >&8; head -c 3000000 /dev/zero >&$copy; {STAYS}");
    let error = packed_by(&script, &spec, directory.path()).err().expect("it was told");
    assert!(matches!(error, BuildError::Pack { .. }), "{error}");
    let read = || rustix::io::read(&alive, &mut [0; 8][..]);
    assert_eq!(read(), Ok(2), "it has lived");
    assert_eq!(read(), Ok(0), "and does no more");
}

#[test]
fn a_pack_goes_to_the_cache_and_into_what_becomes_the_image_in_one_breath() {
    let Some(directory) = shifting_directory() else { return };
    let spec = spec_of("wanted", directory.path());
    let script =
        format!("cat wanted >&$slabs; cat wanted >&$copy; {}", packed_line("wanted", true));
    let fetched = packed_by(&script, &spec, directory.path()).unwrap();
    assert!(fetched.slabs.is_some(), "there is nothing to be shifted");
    assert_eq!(fetched.packs[0].file.metadata().unwrap().nlink(), 0, "the pack is read elsewhere");
    assert!(!can_all_be_placed(&spec, &image_of("wanted")), "it is not in the cache");
}

#[test]
fn what_is_not_whole_in_what_becomes_the_image_is_taken_from_the_cache() {
    let Some(directory) = shifting_directory() else { return };
    let spec = spec_of("wanted", directory.path());
    let script = format!("cat wanted >&$copy; {}", packed_line("wanted", false));
    let fetched = packed_by(&script, &spec, directory.path()).unwrap();
    assert!(fetched.slabs.is_none());
    assert_eq!(fetched.packs[0].file.metadata().unwrap().nlink(), 1);
}

#[test]
fn a_worker_that_puts_another_pack_into_the_image_than_into_the_cache_has_made_none() {
    let Some(directory) = shifting_directory() else { return };
    let spec = spec_of("wanted", directory.path());
    let both =
        |slabs: &str, line: &str| format!("cat {slabs} >&$slabs; cat wanted >&$copy; {line}");
    let honest = packed_line("wanted", true);
    for script in [both("others", &honest), both("/dev/null", &honest)] {
        let error = packed_by(&script, &spec, directory.path()).err().expect(&script);
        let is_it = matches!(error, BuildError::DiffId { .. } | BuildError::PackUnread { .. });
        assert!(is_it, "{script}: {error}");
        assert!(can_all_be_placed(&spec, &image_of("wanted")), "{script}: it is in the cache");
    }
}

#[test]
fn no_pack_lies_in_the_stretch_of_another_layer() {
    let Some(directory) = shifting_directory() else { return };
    let spec = spec_of("wanted", directory.path());
    let (layer, pack) = layer("wanted");
    let layers = vec![Layer { size_bytes: 1, ..layer.clone() }; 16];
    // Of two blocks and of one.
    for (blocks, fits) in [(2, true), (1, false)] {
        let bytes_max = 2 * 16 * blocks * ext4::BLOCK_SIZE;
        let slabs = Slabs::stage_within(&spec, &layers, bytes_max).unwrap().unwrap();
        slabs.file().write_all_at(&pack, slabs.stretch(7).start).unwrap();
        let open = open_placed(7, &layer, &slabs, pack.len() as u64);
        assert_eq!(open.is_ok(), fits, "{open:?}");
    }
}

#[test]
fn stretches_lie_one_behind_the_other_and_the_larger_blobs_have_the_longer_ones() {
    let (layer, _) = layer("wanted");
    let sized = |sizes: &[u64]| -> Vec<Layer> {
        sizes.iter().map(|&size_bytes| Layer { size_bytes, ..layer.clone() }).collect()
    };
    let block = ext4::BLOCK_SIZE;
    // Ten gibibytes, as a build of the service may have.
    let found = bounds(&sized(&[300 << 20, 0, 100 << 20]), 10 << 30).unwrap();
    let lengths: Vec<u64> = found.windows(2).map(|pair| (pair[1] - pair[0]) * block).collect();
    let half = 5 << 30;
    for (length, wanted) in
        lengths.iter().zip([half / 3 + half / 4 * 3, half / 3, half / 3 + half / 4])
    {
        assert!(length.abs_diff(wanted) <= 2 * block, "{lengths:?}");
    }
    assert!(found.last().unwrap() * block <= 10 << 30);
    // What a manifest says of sizes is no number to be trusted.
    let most = bounds(&sized(&[u64::MAX, u64::MAX, 1]), u64::MAX);
    assert!(most.is_none_or(|found| found.is_sorted()));
    assert_eq!(bounds(&sized(&[3 << 30]), 10 << 30), None, "it would be written for nothing");
    assert_eq!(bounds(&[], 10 << 30), Some(vec![0]));
    assert_eq!(bounds(&sized(&[1]), 0), None);
}

#[test]
fn a_pack_that_its_stretch_has_no_room_for_is_taken_from_a_file_of_its_own() {
    let Some(directory) = shifting_directory() else { return };
    let mut spec = spec_of("wanted", directory.path());
    spec.packs = PackStorage::Temporary;
    let script = format!("cat wanted >&$copy; {}", packed_line("wanted", false));
    let fetched = packed_by(&script, &spec, directory.path()).unwrap();
    assert!(fetched.slabs.is_none());
    assert_eq!((fetched.packs[0].base, fetched.packed), (0, 1));
    let script = format!("cat wanted >&$slabs; {}", packed_line("wanted", true));
    let fetched = packed_by(&script, &spec, directory.path()).unwrap();
    assert!(fetched.slabs.is_some());
}
