//! The journal: how large it is and what its first block says (`fs/jbd2`, big-endian).
//!
//! An unused journal is one superblock and zeroes, so it costs one block of bytes.

use crate::format::BLOCK;

/// The smallest journal jbd2 accepts.
const BLOCKS_MIN: u64 = 1024;
const MAGIC: u32 = 0xC03B_3998;
const SUPERBLOCK_V2: u32 = 4;

/// Blocks of the journal for a file system of `total_blocks`: the steps of e2fsprogs'
/// `ext2fs_default_journal_size`, but never none.
pub(crate) fn blocks_for(total_blocks: u64) -> u64 {
    const STEPS: [(u64, u64); 7] = [
        (32 << 10, BLOCKS_MIN),
        (256 << 10, 4096),
        (512 << 10, 8192),
        (4 << 20, 16384),
        (8 << 20, 32768),
        (16 << 20, 65536),
        (32 << 20, 131_072),
    ];
    STEPS.iter().find(|step| total_blocks < step.0).map_or(262_144, |step| step.1)
}

/// The first block of an empty journal.
pub(crate) fn superblock(blocks: u32, uuid: &[u8; 16]) -> [u8; BLOCK] {
    let mut b = [0; BLOCK];
    let words =
        [(0x00, MAGIC), (0x04, SUPERBLOCK_V2), (0x0C, 4096), (0x10, blocks), (0x14, 1), (0x18, 1)];
    for (at, word) in words {
        b[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    b[0x30..0x40].copy_from_slice(uuid);
    b[0x40..0x44].copy_from_slice(&1_u32.to_be_bytes()); // one user: this file system
    b
}
