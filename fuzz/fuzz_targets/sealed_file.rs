//! A sealed file that somebody changed in the store: no byte comes out that was not sealed, and
//! nothing panics.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use sealed::{HEADER_BYTES, Header, KeyId, Opener, Part, Sealer};

const KEY: [u8; 32] = [7; 32];
const NAME: &str = "tenant-a/00.ext4";

/// `content`, sealed in chunks of 1 KiB.
fn sealed(content: &[u8]) -> Vec<u8> {
    let mut sealer = Sealer::new(&KEY, KeyId([3; 16]), NAME, content.len() as u64, 10).unwrap();
    let (mut file, mut rest) = (sealer.header().to_vec(), content);
    while let Some(length) = sealer.wants() {
        let (chunk, behind) = rest.split_at(length);
        let mut chunk = chunk.to_vec();
        sealer.seal(&mut chunk).unwrap();
        file.extend(chunk);
        rest = behind;
    }
    file
}

/// What comes out of a file, up to the first error.
fn read(file: &[u8], start: u64, end: u64, piece: usize) -> Option<Vec<u8>> {
    let header = Header::parse(file.get(..HEADER_BYTES)?).ok()?;
    let mut part = Part::new(Arc::new(Opener::new(header, &KEY, NAME).ok()?), start..end);
    let needed = part.sealed();
    assert!(needed.start <= needed.end);
    let inside = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(file.len());
    let mut plain = Vec::new();
    for bytes in file[inside(needed.start)..inside(needed.end)].chunks(piece) {
        match part.feed(bytes) {
            Ok(sure) => plain.extend(sure),
            Err(_) => break,
        }
    }
    Some(plain)
}

fuzz_target!(|input: (Vec<u8>, Vec<(u16, u8)>, u16, u16, u8, (u64, u8, u64, u64))| {
    let (content, changes, start, length, piece, claim) = input;
    // A true header over what is none of its chunks, of any size and for any part: the sums hold.
    let (plain_bytes, chunk_log2, first, behind) = claim;
    if let Ok(sealer) = Sealer::new(&KEY, KeyId([3; 16]), NAME, plain_bytes, chunk_log2) {
        let file = [&sealer.header()[..], &content].concat();
        let plain = read(&file, first, behind, usize::from(piece) + 1);
        assert!(plain.is_some_and(|plain| plain.is_empty()), "bytes that nobody sealed");
    }
    // As it comes: a header from anyone.
    let _ = read(&content, 0, u64::MAX, usize::from(piece) + 1);
    let mut file = sealed(&content);
    for (at, change) in changes {
        let at = usize::from(at) % file.len();
        file[at] ^= change;
    }
    let (start, end) = (u64::from(start), u64::from(start) + u64::from(length));
    if let Some(plain) = read(&file, start, end, usize::from(piece) + 1) {
        let inside = |offset: u64| (offset as usize).min(content.len());
        assert!(
            content[inside(start)..inside(end)].starts_with(&plain),
            "bytes that nobody sealed"
        );
    }
});
