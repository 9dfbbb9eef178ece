//! A forged layer pack: the table of contents is the fuzzer's, all checksums are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rootfs::{PACK_VERSION, Pack};

/// Offsets as in the table of `crates/rootfs/src/pack.rs`.
const FOOTER_BYTES: usize = 128;

fuzz_target!(|input: &[u8]| {
    let _ = Pack::open(input, input.len() as u64);
    let [blocks, entries, toc @ ..] = input else { return };
    let data = vec![b'x'; usize::from(blocks % 16) * rootfs::BLOCK_BYTES as usize];
    let chunks: Vec<u8> =
        data.chunks(512 * 1024).flat_map(|chunk| crc32c::crc32c(chunk).to_le_bytes()).collect();
    let mut footer = vec![0; FOOTER_BYTES];
    footer[..8].copy_from_slice(b"bldrpack");
    footer[8..12].copy_from_slice(&PACK_VERSION.to_le_bytes());
    footer[12..16].copy_from_slice(&crc32c::crc32c(toc).to_le_bytes());
    footer[16..20].copy_from_slice(&crc32c::crc32c(&chunks).to_le_bytes());
    footer[24..32].copy_from_slice(&(data.len() as u64).to_le_bytes());
    footer[32..40].copy_from_slice(&(toc.len() as u64).to_le_bytes());
    footer[40..48].copy_from_slice(&u64::from(*entries).to_le_bytes());
    let sum = crc32c::crc32c(&footer);
    footer[20..24].copy_from_slice(&sum.to_le_bytes());
    let bytes = [&data[..], toc, &chunks, &footer].concat();
    let length = bytes.len() as u64;
    let pack = Pack::open(&bytes, length).expect("a forged pack with right sums opens");
    let mut table = pack.entries();
    while let Ok(Some(_)) = table.next_entry() {}
    fuzz::image_of(&[(pack, bytes)]);
});
