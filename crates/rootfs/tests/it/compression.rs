//! How blobs are compressed, and what stands around the compressed data.

use std::io::{self, Read, Write};

use flate2::write::GzEncoder;
use rootfs::{Compression, Limits, PackError, make_pack};

use crate::support::{Layer, full_message, pack, pack_error, pack_with};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn skippable(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [&0x184d_2a53_u32.to_le_bytes()[..], &length.to_le_bytes(), bytes].concat()
}

fn layer() -> Vec<u8> {
    Layer::new().file("a", &"content ".repeat(1000)).dir("b").end()
}

#[test]
fn a_layer_is_the_same_however_it_is_compressed() {
    let tar = layer();
    let plain = pack(&tar).unwrap().0;
    assert_eq!(plain.compression, Compression::None);
    for (blob, compression) in [(gzip(&tar), Compression::Gzip), (zstd(&tar), Compression::Zstd)] {
        let summary = pack(&blob).unwrap().0;
        assert_eq!(summary.compression, compression);
        assert_eq!(summary.diff_id, plain.diff_id);
        assert_eq!((summary.tar_bytes, summary.entries), (tar.len() as u64, 2));
    }
}

#[test]
fn several_members_or_frames_are_one_stream() {
    let tar = layer();
    let (one, two) = tar.split_at(1000);
    let plain = pack(&tar).unwrap().0;
    let blobs = [
        [gzip(one), gzip(two)].concat(),
        [gzip(one), gzip(b""), gzip(two), gzip(b"")].concat(),
        [zstd(one), zstd(two)].concat(),
        [zstd(one), skippable(b"table of contents"), zstd(two), skippable(b"")].concat(),
        [skippable(b"first"), zstd(one), zstd(two)].concat(),
    ];
    for blob in blobs {
        assert_eq!(pack(&blob).unwrap().0.diff_id, plain.diff_id);
    }
}

#[test]
fn zeroes_after_gzip_are_padding_and_anything_else_is_an_error() {
    let good = gzip(&layer());
    assert!(pack(&[good.clone(), vec![0; 1000]].concat()).is_ok());
    for tail in [&b"x"[..], b"\0\0\0x", b"\x1fx", b"\x1f\x8b", &layer()] {
        let message = pack_error(&[&good[..], tail].concat());
        assert!(message.contains("gzip data is damaged or cut short"), "{message}");
    }
}

#[test]
fn bytes_after_zstd_frames_are_an_error() {
    let message = pack_error(&[zstd(&layer()), b"junk".to_vec()].concat());
    assert!(message.contains("zstd data is damaged"), "{message}");
}

#[test]
fn compressed_data_cut_anywhere_is_an_error() {
    let tar = Layer::new().file("a", "some content").end();
    for whole in [gzip(&tar), zstd(&tar)] {
        assert!(pack(&whole).is_ok());
        for cut in 1..whole.len() {
            assert!(pack(&whole[..cut]).is_err(), "cut at {cut} of {}", whole.len());
        }
    }
}

#[test]
fn damaged_compressed_data_is_an_error() {
    let tar = layer();
    for mut whole in [gzip(&tar), zstd::encode_all(&tar[..], 3).unwrap()] {
        let middle = whole.len() / 2;
        whole[middle] ^= 0xff;
        assert!(pack(&whole).is_err());
    }
    let mut bad_crc = gzip(&tar);
    let at = bad_crc.len() - 6;
    bad_crc[at] ^= 1;
    assert!(pack_error(&bad_crc).contains("gzip data is damaged"));
}

#[test]
fn other_compressions_are_named() {
    for (magic, name) in [(&b"BZh91AY&SY"[..], "bzip2"), (b"\xfd7zXZ\0\0", "xz")] {
        let message = pack_error(magic);
        assert!(message.contains(name) && message.contains("gzip or zstd"), "{message}");
    }
}

#[test]
fn a_bomb_is_stopped_by_its_ratio_or_its_size() {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeroes = vec![0; 1 << 20];
    for _ in 0..64 {
        encoder.write_all(&zeroes).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    let limits = Limits { ratio_free_bytes: 1 << 20, ratio_max: 100, ..Limits::default() };
    let error = pack_with(&bomb, &limits).unwrap_err();
    assert!(matches!(error, PackError::Ratio { .. }), "{error}");
    let limits = Limits { tar_bytes_max: 10 << 20, ..Limits::default() };
    let error = pack_with(&bomb, &limits).unwrap_err();
    assert!(matches!(error, PackError::TarBytes(_)), "{error}");
}

#[test]
fn a_zstd_window_beyond_the_limit_is_refused() {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(24).unwrap();
    encoder.write_all(&layer()).unwrap();
    let blob = encoder.finish().unwrap();
    assert!(pack(&blob).is_ok());
    let limits = Limits { zstd_window_log_max: 20, ..Limits::default() };
    let error = pack_with(&blob, &limits).unwrap_err();
    assert!(matches!(error, PackError::Inflate { .. }), "{error}");
}

#[test]
fn thousands_of_empty_gzip_members_are_refused() {
    let message = pack_error(&[gzip(&layer()), gzip(b"").repeat(2000)].concat());
    assert!(message.contains("empty gzip members"), "{message}");
}

/// Gives its bytes in small pieces and then, perhaps, an error.
struct Pieces<'a> {
    bytes: &'a [u8],
    then: Option<io::ErrorKind>,
    interrupt: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.interrupt = !self.interrupt;
        if self.interrupt {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match (self.bytes, self.then) {
            ([], Some(kind)) => Err(kind.into()),
            ([], None) => Ok(0),
            ([first, rest @ ..], _) => {
                out[0] = *first;
                self.bytes = rest;
                Ok(1)
            }
        }
    }
}

#[test]
fn a_reader_may_give_one_byte_at_a_time() {
    let tar = layer();
    for blob in [tar.clone(), gzip(&tar), zstd(&tar)] {
        let reader = Pieces { bytes: &blob, then: None, interrupt: false };
        let summary = make_pack(reader, &mut Vec::new(), &Limits::default()).unwrap();
        assert_eq!(summary, pack(&blob).unwrap().0);
    }
}

#[test]
fn an_error_of_the_reader_is_told_apart_from_a_damaged_blob() {
    let tar = layer();
    for blob in [tar.clone(), gzip(&tar), zstd(&tar)] {
        let bytes = &blob[..blob.len() / 2];
        let then = Some(io::ErrorKind::ConnectionReset);
        let reader = Pieces { bytes, then, interrupt: false };
        let error = make_pack(reader, &mut Vec::new(), &Limits::default()).unwrap_err();
        let PackError::Blob { blob_bytes, source } = error else { panic!("{error}") };
        assert_eq!(
            (blob_bytes, source.kind()),
            (bytes.len() as u64, io::ErrorKind::ConnectionReset)
        );
    }
}

/// Takes so many bytes and no more.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_told_and_ends_both_threads() {
    let big = Layer::new().file("a", &"0123456789abcdef".repeat(1 << 18)).end();
    for room in [0, 1 << 20, 3 << 20, (4 << 20) + 10] {
        let error = make_pack(&big[..], &mut Full(room), &Limits::default()).unwrap_err();
        assert!(matches!(error, PackError::Write { .. }), "{}", full_message(&error));
    }
}

#[test]
fn contents_are_written_in_whole_mebibytes() {
    struct Sizes(Vec<usize>);
    impl Write for Sizes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(bytes.len());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let big = Layer::new().file("a", &"0123456789abcdef".repeat(1 << 17)).file("b", "x").end();
    let mut sizes = Sizes(Vec::new());
    make_pack(&big[..], &mut sizes, &Limits::default()).unwrap();
    assert_eq!(sizes.0[..3], [1 << 20, 1 << 20, 4096]);
}
