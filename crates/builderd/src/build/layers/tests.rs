//! What becomes of files that workers have written, whatever they say of them.

use std::io::Write as _;

use rootfs::Limits;
use rustix::fs::FallocateFlags;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::packs::SharingDomain;

/// A layer with one file of that name, and its pack.
fn layer(name: &str) -> (Layer, Vec<u8>) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, &b"data"[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let mut pack = Vec::new();
    rootfs::make_pack(tar.as_slice(), &mut pack, &Limits::default()).unwrap();
    let digest = format!("sha256:{}", hex(&Sha256::digest(&tar))).parse().unwrap();
    let size_bytes = tar.len() as u64;
    let (media_type, compression) = (String::new(), oci::Compression::None);
    (Layer { digest, size_bytes, media_type, compression, diff_id: digest }, pack)
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
