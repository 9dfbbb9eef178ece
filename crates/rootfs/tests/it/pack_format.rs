//! The pack file: what goes in comes out, and damage is seen.

use proptest::prelude::*;
use rootfs::{Entries, Pack, PackReadError, TocKind, TreeLimits};

use crate::support::{Layer, header, pack};

fn sample() -> Vec<u8> {
    let layer = Layer::new()
        .dir("usr")
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("mtime", b"5.25")])
        .file("usr/a", &"abc".repeat(5000))
        .pax(&[("SCHILY.xattr.user.a", b"1")])
        .file("usr/b", "b")
        .pax(&[("GNU.sparse.size", b"81920"), ("GNU.sparse.map", b"0,5,40960,3")])
        .entry(&header("s", b'0').size(8), b"helloabc")
        .symlink("l", "usr/a")
        .hard_link("h", "usr/b")
        .entry(&header("c", b'3').device(1, 3), &[])
        .entry(&header("k", b'4').device(8, 1), &[])
        .entry(&header("p", b'6'), &[])
        .whiteout("usr/gone")
        .opaque("opt");
    pack(&layer.end()).unwrap().1
}

fn open(bytes: &[u8]) -> Result<Pack, PackReadError> {
    Pack::open(bytes, bytes.len() as u64)
}

fn lines(mut entries: Entries<'_>) -> Result<Vec<String>, PackReadError> {
    let mut out = Vec::new();
    while let Some(entry) = entries.next_entry()? {
        let kind = match &entry.kind {
            TocKind::Directory(_) => "dir".to_owned(),
            TocKind::File { size_bytes, blocks, .. } => {
                let runs: Vec<_> = blocks.iter().collect();
                format!("file {size_bytes} at {} {runs:?}", blocks.first())
            }
            TocKind::Symlink { target, .. } => format!("-> {}", target.escape_ascii()),
            TocKind::HardLink { target, .. } => format!("= {}", target.escape_ascii()),
            TocKind::CharDevice { major, minor, .. } => format!("char {major}:{minor}"),
            TocKind::BlockDevice { major, minor, .. } => format!("block {major}:{minor}"),
            TocKind::Fifo(_) => "fifo".to_owned(),
            TocKind::Whiteout => "whiteout".to_owned(),
            TocKind::Opaque => "opaque".to_owned(),
        };
        let xattrs = entry.xattrs().count();
        let mtime = entry.kind.metadata().map_or(0, |it| it.mtime.nanos);
        out.push(format!("{} {kind} {xattrs} {mtime}", entry.path.escape_ascii()));
    }
    Ok(out)
}

#[test]
fn a_pack_tells_what_the_tar_told() {
    let bytes = sample();
    let pack = open(&bytes).unwrap();
    let expected = [
        "usr dir 0 0",
        "usr/a file 15000 at 0 [(0, 4)] 1 250000000",
        "usr/b file 1 at 4 [(0, 1)] 1 0",
        "s file 81920 at 5 [(0, 1), (9, 1)] 0 0",
        "l -> usr/a 0 0",
        "h = usr/b 0 0",
        "c char 1:3 0 0",
        "k block 8:1 0 0",
        "p fifo 0 0",
        "usr/gone whiteout 0 0",
        "opt opaque 0 0",
    ];
    assert_eq!(lines(pack.entries()).unwrap(), expected);
    assert_eq!((pack.data_blocks(), pack.entry_count()), (7, 11));
    pack.verify_data(&bytes).unwrap();
}

#[test]
fn equal_blobs_give_equal_packs() {
    assert_eq!(sample(), sample());
}

#[test]
fn an_entry_takes_few_bytes() {
    let mut layer = Layer::new();
    for n in 0..1000 {
        layer = layer.file(&format!("usr/share/doc/some-package/file-number-{n}.txt"), "x");
    }
    let summary = pack(&layer.end()).unwrap().0;
    assert!(summary.toc_bytes < 30 * 1000, "{} bytes", summary.toc_bytes);
}

#[test]
fn a_pack_with_any_byte_changed_is_found_out() {
    let bytes = sample();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        let result = open(&damaged).and_then(|pack| pack.verify_data(&damaged));
        assert!(result.is_err(), "byte {at} of {}", bytes.len());
    }
}

#[test]
fn a_damaged_chunk_is_named() {
    let layer = Layer::new().file("a", &"0123456789abcdef".repeat(1 << 17)).end();
    let mut bytes = pack(&layer).unwrap().1;
    bytes[(1 << 20) + 77] ^= 1;
    let pack = open(&bytes).unwrap();
    let error = pack.verify_data(&bytes).unwrap_err();
    assert!(matches!(error, PackReadError::DamagedData(1_048_576)), "{error}");
}

#[test]
fn a_pack_cut_anywhere_is_refused() {
    let bytes = sample();
    for cut in 0..bytes.len() {
        assert!(open(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    assert!(open(&[bytes, vec![0]].concat()).is_err());
}

/// Puts right the checksums that guard a table of contents, as a forger would.
fn forge(bytes: &mut [u8], change: impl FnOnce(&mut [u8])) {
    let footer = bytes.len() - 128;
    let number = |at: usize| {
        usize::try_from(u64::from_le_bytes(bytes[footer + at..footer + at + 8].try_into().unwrap()))
            .unwrap()
    };
    let (start, length) = (number(24), number(32));
    change(&mut bytes[start..start + length]);
    let crc = crc32c::crc32c(&bytes[start..start + length]);
    bytes[footer + 12..footer + 16].copy_from_slice(&crc.to_le_bytes());
    bytes[footer + 20..footer + 24].fill(0);
    let crc = crc32c::crc32c(&bytes[footer..]);
    bytes[footer + 20..footer + 24].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn another_version_is_named() {
    let mut bytes = sample();
    let footer = bytes.len() - 128;
    bytes[footer + 8] = 9;
    forge(&mut bytes, |_| {});
    let error = open(&bytes).unwrap_err();
    assert!(matches!(error, PackReadError::Version(9)), "{error}");
}

#[test]
fn a_forged_table_of_contents_never_panics() {
    let bytes = sample();
    let footer = bytes.len() - 128;
    let length =
        usize::try_from(u64::from_le_bytes(bytes[footer + 32..footer + 40].try_into().unwrap()))
            .unwrap();
    let mut refused = 0;
    for at in 0..length {
        for value in [0, 1, 0x2f, 0x7f, 0x80, 0xff] {
            let mut forged = bytes.clone();
            forge(&mut forged, |toc| toc[at] = value);
            let pack = open(&forged).unwrap();
            refused += u32::from(lines(pack.entries()).is_err());
            let _ = rootfs::FileTree::flatten([pack], &TreeLimits::default());
        }
    }
    assert!(refused > 100, "only {refused} forgeries were refused");
}

proptest! {
    #[test]
    fn any_bytes_as_table_of_contents_never_panic(noise in prop::collection::vec(any::<u8>(), 60)) {
        let mut bytes = sample();
        forge(&mut bytes, |toc| toc[..60].copy_from_slice(&noise));
        let pack = open(&bytes).unwrap();
        let _ = lines(pack.entries());
        let _ = rootfs::FileTree::flatten([pack], &TreeLimits::default());
    }

    #[test]
    fn contents_of_any_shape_come_back(
        pieces in prop::collection::vec((any::<u8>(), 0_usize..40_000, any::<bool>()), 0..12),
        name in "[a-z]{1,20}",
    ) {
        let mut content = Vec::new();
        for (byte, length, zero) in pieces {
            let length = if zero { length * 4 } else { length };
            content.resize(content.len() + length, if zero { 0 } else { byte });
        }
        let file = header(&name, b'0').size(content.len() as u64);
        let image = crate::support::flatten(&[Layer::new().entry(&file, &content)]);
        prop_assert!(image.content(image.id(&name)) == content);
    }
}
