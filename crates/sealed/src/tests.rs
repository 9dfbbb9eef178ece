//! What a sealed file promises, tried on files of a few chunks.

use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::header::wide;

const KEY: [u8; KEY_BYTES] = [7; KEY_BYTES];
const ID: KeyId = KeyId([3; 16]);
const NAME: &str = "tenant-a/00.ext4";
/// Chunks of 1 KiB.
const LOG2: u8 = 10;

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index * 31 % 251).unwrap()).collect()
}

fn narrow(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

fn sealed_by(mut sealer: Sealer, plain: &[u8]) -> Vec<u8> {
    let mut sealed = sealer.header().to_vec();
    let mut rest = plain;
    while let Some(length) = sealer.wants() {
        let (chunk, behind) = rest.split_at(length);
        let mut chunk = chunk.to_vec();
        sealer.seal(&mut chunk).unwrap();
        sealed.extend(chunk);
        rest = behind;
    }
    assert!(rest.is_empty());
    sealed
}

fn sealed(name: &str, plain: &[u8]) -> Vec<u8> {
    sealed_by(Sealer::new(&KEY, ID, name, wide(plain.len()), LOG2).unwrap(), plain)
}

/// Reads a part as a store does: the header, then the bytes that are asked for, in pieces.
fn read(
    file: &[u8],
    key: &[u8; KEY_BYTES],
    name: &str,
    range: Range<u64>,
    piece: usize,
) -> Result<Vec<u8>, SealedError> {
    let header = Header::parse(file.get(..HEADER_BYTES).unwrap_or(file))?;
    let mut part = Part::new(Arc::new(Opener::new(header, key, name)?), range);
    let needed = part.sealed();
    let there = narrow(needed.start)..narrow(needed.end).min(file.len());
    let mut plain = Vec::new();
    for bytes in file.get(there).unwrap_or_default().chunks(piece) {
        plain.extend(part.feed(bytes)?);
    }
    part.finish().map(|()| plain)
}

fn whole(file: &[u8]) -> Result<Vec<u8>, SealedError> {
    read(file, &KEY, NAME, 0..u64::MAX, usize::MAX)
}

proptest! {
    #[test]
    fn every_part_of_every_file_comes_back(
        length in 0usize..5000,
        start in 0u64..5200,
        wanted in 0u64..5200,
        piece in 1usize..3000,
    ) {
        let plain = content(length);
        let file = sealed(NAME, &plain);
        let header = Header::parse(&file[..HEADER_BYTES]).unwrap();
        let opener = Opener::new(header, &KEY, NAME).unwrap();
        prop_assert_eq!(opener.plain_bytes(), wide(length));
        prop_assert_eq!(opener.sealed_bytes(), wide(file.len()));
        let end = start + wanted;
        let part = read(&file, &KEY, NAME, start..end, piece).unwrap();
        let inside = |offset: u64| narrow(offset).min(length);
        prop_assert_eq!(part, &plain[inside(start)..inside(end)]);
    }

    #[test]
    fn a_file_with_any_byte_changed_does_not_open(
        length in 0usize..3000,
        at in any::<prop::sample::Index>(),
        change in 1u8..,
    ) {
        let mut file = sealed(NAME, &content(length));
        let at = at.index(file.len());
        file[at] ^= change;
        prop_assert!(whole(&file).is_err(), "byte {}", at);
    }

    #[test]
    fn a_file_that_was_cut_does_not_open(length in 0usize..3000, kept in any::<prop::sample::Index>()) {
        let file = sealed(NAME, &content(length));
        let kept = kept.index(file.len());
        prop_assert!(whole(&file[..kept]).is_err(), "{} of {} bytes", kept, file.len());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), fixed: bool) {
        let mut file = bytes;
        if fixed {
            let good = sealed(NAME, b"");
            let kept = file.len().min(10);
            file.splice(..kept, good[..kept].iter().copied());
        }
        let _ = whole(&file);
    }
}

#[test]
fn chunks_do_not_change_places_nor_repeat_nor_come_from_elsewhere() {
    let plain = content(4096);
    let (file, other) = (sealed(NAME, &plain), sealed(NAME, &plain));
    assert_ne!(file, other, "the same content twice is not seen to be the same");
    let chunk = |number: usize| {
        let start = HEADER_BYTES + number * (1024 + TAG_BYTES);
        start..start + 1024 + TAG_BYTES
    };
    let with = |number: usize, bytes: &[u8]| {
        let mut changed = file.clone();
        changed[chunk(number)].copy_from_slice(bytes);
        whole(&changed)
    };
    assert_eq!(with(1, &file[chunk(1)]).unwrap(), plain);
    assert_eq!(with(1, &file[chunk(2)]), Err(SealedError::Chunk { chunk: 1 }));
    assert_eq!(with(0, &file[chunk(3)]), Err(SealedError::Chunk { chunk: 0 }));
    assert_eq!(with(2, &other[chunk(2)]), Err(SealedError::Chunk { chunk: 2 }));
    // Three whole chunks of four are not a file of three.
    let cut = &file[..chunk(2).end];
    assert_eq!(whole(cut), Err(SealedError::Cut { chunk: 3 }));
    // What lies before the damage may be read, and nothing behind it.
    let mut damaged = file.clone();
    damaged[chunk(2).start] ^= 1;
    assert_eq!(read(&damaged, &KEY, NAME, 0..2048, 100).unwrap(), plain[..2048]);
    assert!(read(&damaged, &KEY, NAME, 2048..2049, 100).is_err());
}

#[test]
fn a_file_opens_under_its_own_name_and_key_alone() {
    let file = sealed(NAME, b"content");
    assert_eq!(read(&file, &KEY, "tenant-b/00.ext4", 0..9, 9), Err(SealedError::Forged));
    assert_eq!(read(&file, &[8; KEY_BYTES], NAME, 0..9, 9), Err(SealedError::Forged));
    assert_eq!(whole(&file).unwrap(), b"content");
    assert_eq!(Header::parse(&file[..HEADER_BYTES]).unwrap().key(), ID);
    assert_eq!(ID.to_string().parse(), Ok(ID));
    for text in ["", "03", &"+3".repeat(16), &"0G".repeat(16), &"AB".repeat(16)] {
        assert_eq!(text.parse::<KeyId>(), Err(KeyIdError), "{text}");
    }
}

/// The format does not change unseen: these bytes were made by another implementation, along
/// the table of `lib.rs` (HKDF and AESGCM of Python's `cryptography`).
#[test]
fn the_format_is_the_one_that_is_written_down() {
    let header = Header {
        chunk_log2: LOG2,
        key: ID,
        salt: [1; 32],
        prefix: [2; 7],
        plain_bytes: 5,
        tag: [0; TAG_BYTES],
    };
    let file = sealed_by(Sealer::with_header(header, &KEY, NAME).unwrap(), b"hello");
    let hex: String = file[80..].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "0d475218a5d6a1fcdffb6550b5cfdf2a36ebaff17649dd6543ed0651ab76d037\
         6d26e507c2"
    );
    assert_eq!(file.len(), HEADER_BYTES + 5 + TAG_BYTES);
}

#[test]
fn a_file_with_more_chunks_than_numbers_is_refused() {
    let new = |plain_bytes, log2| Sealer::new(&KEY, ID, NAME, plain_bytes, log2).map(|_| ());
    let most = (u64::from(u32::MAX) - 1) << LOG2;
    assert_eq!(new(most, LOG2), Ok(()));
    assert_eq!(new(most + 1, LOG2), Err(SealedError::TooLarge { plain_bytes: most + 1 }));
    assert_eq!(new(u64::MAX, 22), Err(SealedError::TooLarge { plain_bytes: u64::MAX }));
    for log2 in [0, 9, 23, 64, 255] {
        assert!(matches!(new(1, log2), Err(SealedError::Header(_))), "{log2}");
    }
}

#[test]
fn a_file_that_changes_its_size_meanwhile_is_not_sealed() {
    let mut sealer = Sealer::new(&KEY, ID, NAME, 1030, LOG2).unwrap();
    assert_eq!(sealer.seal(&mut vec![0; 1023]), Err(SealedError::Size));
    sealer.seal(&mut vec![0; 1024]).unwrap();
    assert_eq!(sealer.wants(), Some(6));
    sealer.seal(&mut vec![0; 6]).unwrap();
    assert_eq!(sealer.seal(&mut Vec::new()), Err(SealedError::Size));
}
