//! What a caller may choose about an image. There is no clock and no randomness here:
//! everything that would need one is a field.

use crate::tree::Timestamp;

/// How large the image becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The smallest image in which, after the content, at least this many bytes are free for
    /// an unprivileged user, as `statfs(2)` counts them in `f_bavail`. With 0 the image ends
    /// where the content ends.
    FreeSpace {
        /// Bytes, rounded up to whole blocks.
        bytes: u64,
    },
    /// Exactly this many bytes.
    Exact {
        /// A multiple of 4096.
        bytes: u64,
    },
}

/// Everything that shapes an image beside its tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Identity of the file system; every checksum is seeded with it.
    pub uuid: [u8; 16],
    /// Seed of the directory hash.
    pub hash_seed: [u8; 16],
    /// Volume label, padded with NUL.
    pub label: [u8; 16],
    /// Whether the image has a journal.
    pub journal: bool,
    /// How large the image becomes.
    pub size: Size,
    /// Time of creation: in the superblock, on the hidden inodes and on `lost+found`.
    pub created: Timestamp,
    /// Times after this second become this second (the meaning of `SOURCE_DATE_EPOCH`).
    pub clamp_mtime: Option<i64>,
    /// Up to 1,024 bytes that come before the superblock, where a boot sector would lie.
    pub boot_area: Vec<u8>,
    /// `resize2fs` can grow the image at least this many times, offline and online; but by no
    /// more than 8 TiB and to no more than 16 TiB, which is what a resize inode can reach.
    pub growth_factor: u32,
    /// At least one inode for this many bytes of the image.
    pub bytes_per_inode: u32,
}

impl Options {
    /// Bytes before the superblock.
    pub const BOOT_AREA_BYTES_MAX: usize = 1024;

    /// Options with the usual choices: a journal, growth by 16, one inode per 16 KiB, no
    /// label, created in 1970.
    pub fn new(uuid: [u8; 16], hash_seed: [u8; 16], size: Size) -> Self {
        Self {
            uuid,
            hash_seed,
            label: [0; 16],
            journal: true,
            size,
            created: Timestamp::default(),
            clamp_mtime: None,
            boot_area: Vec::new(),
            growth_factor: 16,
            bytes_per_inode: 16384,
        }
    }

    /// `time`, no later than [`clamp_mtime`](Self::clamp_mtime).
    pub(crate) fn clamped(&self, time: Timestamp) -> Timestamp {
        let limit = self.clamp_mtime.map(|secs| Timestamp { secs, nanos: 0 });
        limit.map_or(time, |limit| time.min(limit))
    }
}
