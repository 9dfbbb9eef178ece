//! The on-disk structures of ext4: byte offsets, flags, checksums.
//!
//! Source: the kernel's `Documentation/filesystems/ext4/` and `fs/ext4/ext4.h`. Everything is
//! little-endian. This module knows nothing of trees, plans or files; the writer and the
//! reader share it and nothing else.

/// Bytes of one block, of the only block size this crate writes.
pub const BLOCK_SIZE: u64 = 4096;
/// [`BLOCK_SIZE`] for slices.
pub(crate) const BLOCK: usize = 4096;
/// One block of bytes.
pub(crate) type Block = [u8; BLOCK];

pub(crate) const BLOCKS_PER_GROUP: u64 = 32768;
pub(crate) const INODE_SIZE: usize = 256;
pub(crate) const EXTRA_ISIZE: u16 = 32;
/// Where in-inode attributes begin, and how many bytes they may take.
pub(crate) const INLINE_XATTR_OFFSET: usize = 128 + 32;
pub(crate) const INLINE_XATTR_BYTES: usize = INODE_SIZE - INLINE_XATTR_OFFSET;
pub(crate) const DESCRIPTOR_SIZE: usize = 64;
pub(crate) const DESCRIPTORS_PER_BLOCK: u64 = 64;
pub(crate) const INODES_PER_BLOCK: u64 = 16;
pub(crate) const SUPERBLOCK_OFFSET: usize = 1024;
pub(crate) const SUPERBLOCK_SIZE: usize = 1024;
pub(crate) const MAGIC: u16 = 0xEF53;

pub(crate) const ROOT_INO: u32 = 2;
pub(crate) const RESIZE_INO: u32 = 7;
pub(crate) const JOURNAL_INO: u32 = 8;
pub(crate) const FIRST_INO: u32 = 11;

/// Most names one inode may have.
pub(crate) const LINKS_MAX: u32 = 65_000;

pub(crate) mod feature {
    pub(crate) const HAS_JOURNAL: u32 = 0x4;
    pub(crate) const EXT_ATTR: u32 = 0x8;
    pub(crate) const RESIZE_INODE: u32 = 0x10;
    pub(crate) const DIR_INDEX: u32 = 0x20;

    pub(crate) const FILETYPE: u32 = 0x2;
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const EXTENTS: u32 = 0x40;
    pub(crate) const BIT64: u32 = 0x80;
    pub(crate) const FLEX_BG: u32 = 0x200;

    pub(crate) const SPARSE_SUPER: u32 = 0x1;
    pub(crate) const LARGE_FILE: u32 = 0x2;
    pub(crate) const HUGE_FILE: u32 = 0x8;
    pub(crate) const DIR_NLINK: u32 = 0x20;
    pub(crate) const EXTRA_ISIZE: u32 = 0x40;
    pub(crate) const METADATA_CSUM: u32 = 0x400;
}

pub(crate) mod group_flag {
    pub(crate) const INODE_UNINIT: u16 = 1;
    pub(crate) const BLOCK_UNINIT: u16 = 2;
    pub(crate) const INODE_ZEROED: u16 = 4;
}

pub(crate) mod inode_flag {
    pub(crate) const INDEX: u32 = 0x1000;
    pub(crate) const HUGE_FILE: u32 = 0x4_0000;
    pub(crate) const EXTENTS: u32 = 0x8_0000;
    pub(crate) const EA_INODE: u32 = 0x20_0000;
    pub(crate) const INLINE_DATA: u32 = 0x1000_0000;
}

pub(crate) mod mode {
    pub(crate) const TYPE: u16 = 0o170_000;
    pub(crate) const FIFO: u16 = 0o010_000;
    pub(crate) const CHAR: u16 = 0o020_000;
    pub(crate) const DIRECTORY: u16 = 0o040_000;
    pub(crate) const BLOCK: u16 = 0o060_000;
    pub(crate) const FILE: u16 = 0o100_000;
    pub(crate) const SYMLINK: u16 = 0o120_000;
    pub(crate) const SOCKET: u16 = 0o140_000;
}

/// `s_flags`: names are hashed as unsigned bytes.
pub(crate) const FLAG_UNSIGNED_HASH: u32 = 2;
/// `s_def_hash_version` and `dx_root_info.hash_version`: half MD4.
pub(crate) const HASH_HALF_MD4: u8 = 1;
/// `s_default_mount_opts`: `user_xattr`, `acl`.
pub(crate) const MOUNT_XATTR_AND_ACL: u32 = 0x4 | 0x8;
/// `s_errors`: remount read-only.
pub(crate) const ERRORS_REMOUNT_RO: u16 = 2;

pub(crate) const EXTENT_MAGIC: u16 = 0xF30A;
pub(crate) const EXTENT_BLOCKS_MAX: u64 = 32768;
/// Entries in the root within the inode, and in a tree block of its own.
pub(crate) const EXTENTS_IN_INODE: u64 = 4;
pub(crate) const EXTENTS_IN_BLOCK: u64 = 340;

pub(crate) const XATTR_MAGIC: u32 = 0xEA02_0000;
pub(crate) const XATTR_REFS_MAX: u32 = 1024;

/// Bytes of the checksum record that ends every directory block, and its file type.
pub(crate) const DIR_TAIL: usize = 12;
pub(crate) const DIR_TAIL_TYPE: u8 = 0xDE;

/// A length of at most 255, as names have it; longer ones are cut and must not get here.
pub(crate) fn short(length: usize) -> u8 {
    debug_assert!(length < 256, "names have up to 255 bytes");
    (length as u64 & 0xFF) as u8
}

pub(crate) fn lo16(n: u32) -> u16 {
    (n & 0xFFFF) as u16
}

pub(crate) fn hi16(n: u32) -> u16 {
    (n >> 16) as u16
}

pub(crate) fn lo32(n: u64) -> u32 {
    (n & 0xFFFF_FFFF) as u32
}

pub(crate) fn hi32(n: u64) -> u32 {
    (n >> 32) as u32
}

/// A count as an index; more than memory can hold becomes an index that is never valid.
pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Reads two bytes; what lies outside of `bytes` reads as zero.
pub(crate) fn get16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

/// Reads four bytes; what lies outside of `bytes` reads as zero.
pub(crate) fn get32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// A running CRC-32C as ext4 uses it: no inversion, neither before nor after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checksum(u32);

impl Checksum {
    pub(crate) const START: Self = Self(!0);

    /// The seed of every checksum of a file system but the superblock's.
    pub(crate) fn of_file_system(uuid: &[u8; 16]) -> Self {
        Self::START.and(uuid)
    }

    pub(crate) fn and(self, bytes: &[u8]) -> Self {
        Self(!crc32c::crc32c_append(!self.0, bytes))
    }

    pub(crate) fn and32(self, value: u32) -> Self {
        self.and(&value.to_le_bytes())
    }

    /// The seed of everything that belongs to one inode.
    pub(crate) fn of_inode(self, ino: u32, generation: u32) -> Self {
        self.and32(ino).and32(generation)
    }

    pub(crate) fn value(self) -> u32 {
        self.0
    }
}

/// The checksum of an inode record whose two checksum fields count as zero.
pub(crate) fn inode_checksum(seed: Checksum, ino: u32, record: &[u8]) -> u32 {
    let generation = get32(record, 0x64);
    let sum = seed.of_inode(ino, generation).and(&record[..0x7C]).and(&[0; 2]);
    let sum = sum.and(&record[0x7E..0x80]);
    if record.len() <= 0x84 {
        return sum.and(&record[0x80..]).value();
    }
    sum.and(&record[0x80..0x82]).and(&[0; 2]).and(&record[0x84..]).value()
}

/// The checksum of a group descriptor whose checksum field counts as zero.
pub(crate) fn descriptor_checksum(seed: Checksum, group: u32, record: &[u8]) -> u16 {
    let sum = seed.and32(group).and(&record[..0x1E]).and(&[0; 2]).and(&record[0x20..]);
    lo16(sum.value())
}

/// The checksum of an attribute block whose checksum field counts as zero.
pub(crate) fn xattr_checksum(seed: Checksum, block_number: u64, block: &[u8]) -> u32 {
    let sum = seed.and(&block_number.to_le_bytes());
    sum.and(&block[..0x10]).and(&[0; 4]).and(&block[0x14..]).value()
}

/// The checksum of an htree index block: its used entries, then its tail with a zero sum.
pub(crate) fn index_checksum(
    inode_seed: Checksum,
    block: &[u8],
    count_offset: usize,
    count: u16,
    limit: u16,
) -> Option<u32> {
    let used = block.get(..count_offset + usize::from(count) * 8)?;
    let tail = count_offset + usize::from(limit) * 8;
    let reserved = block.get(tail..tail + 4)?;
    Some(inode_seed.and(used).and(reserved).and(&[0; 4]).value())
}

/// The superblock, as far as this crate writes or reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// All inodes, used or not.
    pub inodes_count: u32,
    /// All blocks of the file system.
    pub blocks_count: u64,
    /// Blocks only the super-user may fill.
    pub reserved_blocks: u64,
    /// Blocks nobody uses.
    pub free_blocks: u64,
    /// Inodes nobody uses.
    pub free_inodes: u32,
    /// 0, or 1 with blocks of 1 KiB.
    pub first_data_block: u32,
    /// The block size is `1024 << log_block_size`.
    pub log_block_size: u32,
    /// Blocks of a group.
    pub blocks_per_group: u32,
    /// Inodes of a group.
    pub inodes_per_group: u32,
    /// Last mount, seconds since 1970; 0 for never.
    pub mounted_secs: u64,
    /// Last write, seconds since 1970; 0 for never.
    pub written_secs: u64,
    /// Creation, seconds since 1970.
    pub created_secs: u64,
    /// Bit 0: cleanly unmounted; bit 1: errors seen.
    pub state: u16,
    /// What a kernel does on errors: 1 continue, 2 remount read-only, 3 panic.
    pub errors: u16,
    /// First inode that is not reserved.
    pub first_inode: u32,
    /// Bytes of an inode record.
    pub inode_size: u16,
    /// The group this copy lies in.
    pub block_group: u16,
    /// Features a kernel may ignore.
    pub compat: u32,
    /// Features a kernel must know.
    pub incompat: u32,
    /// Features a kernel must know to write.
    pub ro_compat: u32,
    /// Identity of the file system.
    pub uuid: [u8; 16],
    /// Volume label, padded with NUL.
    pub label: [u8; 16],
    /// Descriptor blocks kept free for growth.
    pub reserved_gdt_blocks: u16,
    /// Inode of the journal, or 0.
    pub journal_inode: u32,
    /// Seed of the directory hash.
    pub hash_seed: [u8; 16],
    /// Default directory hash.
    pub hash_version: u8,
    /// Bytes of a group descriptor.
    pub descriptor_size: u16,
    /// Default mount options.
    pub mount_options: u32,
    /// Copy of the journal inode's block map and size.
    pub journal_backup: [u8; 68],
    /// Hash signedness and the like.
    pub flags: u32,
    /// Groups per flexible group, as a power of two.
    pub log_groups_per_flex: u8,
}

impl Superblock {
    /// The 1,024 bytes of this superblock, checksum included.
    pub(crate) fn encode(&self) -> [u8; SUPERBLOCK_SIZE] {
        let mut b = [0; SUPERBLOCK_SIZE];
        put32(&mut b, 0x00, self.inodes_count);
        put32(&mut b, 0x04, lo32(self.blocks_count));
        put32(&mut b, 0x08, lo32(self.reserved_blocks));
        put32(&mut b, 0x0C, lo32(self.free_blocks));
        put32(&mut b, 0x10, self.free_inodes);
        put32(&mut b, 0x14, self.first_data_block);
        put32(&mut b, 0x18, self.log_block_size);
        put32(&mut b, 0x1C, self.log_block_size);
        put32(&mut b, 0x20, self.blocks_per_group);
        put32(&mut b, 0x24, self.blocks_per_group);
        put32(&mut b, 0x28, self.inodes_per_group);
        put32(&mut b, 0x2C, lo32(self.mounted_secs));
        put32(&mut b, 0x30, lo32(self.written_secs));
        put16(&mut b, 0x36, u16::MAX); // no limit on mounts between checks
        put16(&mut b, 0x38, MAGIC);
        put16(&mut b, 0x3A, self.state);
        put16(&mut b, 0x3C, self.errors);
        put32(&mut b, 0x40, lo32(self.created_secs)); // last check
        put32(&mut b, 0x4C, 1); // revision with dynamic inode sizes
        put32(&mut b, 0x54, self.first_inode);
        put16(&mut b, 0x58, self.inode_size);
        put16(&mut b, 0x5A, self.block_group);
        put32(&mut b, 0x5C, self.compat);
        put32(&mut b, 0x60, self.incompat);
        put32(&mut b, 0x64, self.ro_compat);
        b[0x68..0x78].copy_from_slice(&self.uuid);
        b[0x78..0x88].copy_from_slice(&self.label);
        self.encode_extension(&mut b);
        let sum = Checksum::START.and(&b[..0x3FC]).value();
        put32(&mut b, 0x3FC, sum);
        b
    }

    fn encode_extension(&self, b: &mut [u8; SUPERBLOCK_SIZE]) {
        put16(b, 0xCE, self.reserved_gdt_blocks);
        put32(b, 0xE0, self.journal_inode);
        b[0xEC..0xFC].copy_from_slice(&self.hash_seed);
        b[0xFC] = self.hash_version;
        b[0xFD] = u8::from(self.journal_inode != 0); // the copy below is of the journal's blocks
        put16(b, 0xFE, self.descriptor_size);
        put32(b, 0x100, self.mount_options);
        put32(b, 0x108, lo32(self.created_secs));
        b[0x10C..0x150].copy_from_slice(&self.journal_backup);
        put32(b, 0x150, hi32(self.blocks_count));
        put32(b, 0x154, hi32(self.reserved_blocks));
        put32(b, 0x158, hi32(self.free_blocks));
        put16(b, 0x15C, EXTRA_ISIZE);
        put16(b, 0x15E, EXTRA_ISIZE);
        put32(b, 0x160, self.flags);
        b[0x174] = self.log_groups_per_flex;
        b[0x175] = 1; // checksums are CRC-32C
        b[0x274] = (hi32(self.written_secs) & 0xFF) as u8;
        b[0x275] = (hi32(self.mounted_secs) & 0xFF) as u8;
        b[0x276] = (hi32(self.created_secs) & 0xFF) as u8;
        b[0x277] = (hi32(self.created_secs) & 0xFF) as u8;
    }

    /// Reads the fields; says nothing of whether they make sense.
    pub(crate) fn decode(b: &[u8; SUPERBLOCK_SIZE]) -> Self {
        let wide = |low, high| u64::from(get32(b, low)) | u64::from(get32(b, high)) << 32;
        let time = |low, high: usize| u64::from(get32(b, low)) | u64::from(b[high]) << 32;
        let mut journal_backup = [0; 68];
        journal_backup.copy_from_slice(&b[0x10C..0x150]);
        let sixteen = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&b[at..at + 16]);
            bytes
        };
        Self {
            inodes_count: get32(b, 0x00),
            blocks_count: wide(0x04, 0x150),
            reserved_blocks: wide(0x08, 0x154),
            free_blocks: wide(0x0C, 0x158),
            free_inodes: get32(b, 0x10),
            first_data_block: get32(b, 0x14),
            log_block_size: get32(b, 0x18),
            blocks_per_group: get32(b, 0x20),
            inodes_per_group: get32(b, 0x28),
            mounted_secs: time(0x2C, 0x275),
            written_secs: time(0x30, 0x274),
            created_secs: time(0x108, 0x276),
            state: get16(b, 0x3A),
            errors: get16(b, 0x3C),
            first_inode: get32(b, 0x54),
            inode_size: get16(b, 0x58),
            block_group: get16(b, 0x5A),
            compat: get32(b, 0x5C),
            incompat: get32(b, 0x60),
            ro_compat: get32(b, 0x64),
            uuid: sixteen(0x68),
            label: sixteen(0x78),
            reserved_gdt_blocks: get16(b, 0xCE),
            journal_inode: get32(b, 0xE0),
            hash_seed: sixteen(0xEC),
            hash_version: b[0xFC],
            descriptor_size: get16(b, 0xFE),
            mount_options: get32(b, 0x100),
            journal_backup,
            flags: get32(b, 0x160),
            log_groups_per_flex: b[0x174],
        }
    }
}

/// One 64-byte group descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct GroupDescriptor {
    pub(crate) block_bitmap: u64,
    pub(crate) inode_bitmap: u64,
    pub(crate) inode_table: u64,
    pub(crate) free_blocks: u32,
    pub(crate) free_inodes: u32,
    pub(crate) used_directories: u32,
    pub(crate) flags: u16,
    pub(crate) block_bitmap_checksum: u32,
    pub(crate) inode_bitmap_checksum: u32,
    pub(crate) inodes_untouched: u32,
}

impl GroupDescriptor {
    pub(crate) fn encode(&self, seed: Checksum, group: u32) -> [u8; DESCRIPTOR_SIZE] {
        let mut b = [0; DESCRIPTOR_SIZE];
        let halves = [
            (0x0C, 0x2C, self.free_blocks),
            (0x0E, 0x2E, self.free_inodes),
            (0x10, 0x30, self.used_directories),
            (0x18, 0x38, self.block_bitmap_checksum),
            (0x1A, 0x3A, self.inode_bitmap_checksum),
            (0x1C, 0x32, self.inodes_untouched),
        ];
        let places = [
            (0x00, 0x20, self.block_bitmap),
            (0x04, 0x24, self.inode_bitmap),
            (0x08, 0x28, self.inode_table),
        ];
        for (low, high, value) in halves {
            put16(&mut b, low, lo16(value));
            put16(&mut b, high, hi16(value));
        }
        for (low, high, value) in places {
            put32(&mut b, low, lo32(value));
            put32(&mut b, high, hi32(value));
        }
        put16(&mut b, 0x12, self.flags);
        let sum = descriptor_checksum(seed, group, &b);
        put16(&mut b, 0x1E, sum);
        b
    }

    /// Reads a descriptor of 32 or 64 bytes.
    pub(crate) fn decode(b: &[u8]) -> Self {
        let half = |low, high| u32::from(get16(b, low)) | u32::from(get16(b, high)) << 16;
        let place = |low, high| u64::from(get32(b, low)) | u64::from(get32(b, high)) << 32;
        Self {
            block_bitmap: place(0x00, 0x20),
            inode_bitmap: place(0x04, 0x24),
            inode_table: place(0x08, 0x28),
            free_blocks: half(0x0C, 0x2C),
            free_inodes: half(0x0E, 0x2E),
            used_directories: half(0x10, 0x30),
            flags: get16(b, 0x12),
            block_bitmap_checksum: half(0x18, 0x38),
            inode_bitmap_checksum: half(0x1A, 0x3A),
            inodes_untouched: half(0x1C, 0x32),
        }
    }
}

/// The earliest second an inode can hold: 1901-12-13.
pub(crate) const TIME_MIN: i64 = -(1 << 31);
/// The latest second that is written: 2310-04-03. The format goes on to 2446, but `e2fsck`
/// takes the last of its four epochs for a kernel's old mistake with times before 1970.
pub(crate) const TIME_MAX: i64 = (3 << 32) - (1 << 31) - 1;

/// Seconds and nanoseconds as the two 32-bit fields of an inode.
///
/// What lies outside of [`TIME_MIN`] and [`TIME_MAX`] becomes the nearest bound with no
/// nanoseconds, as the kernel's `timestamp_truncate` does it.
pub(crate) fn encode_time(secs: i64, nanos: u32) -> (u32, u32) {
    let clamped = secs.clamp(TIME_MIN, TIME_MAX);
    let is_inside = TIME_MIN < secs && secs < TIME_MAX;
    let nanos = if is_inside { nanos.min(999_999_999) } else { 0 };
    let low = (clamped & 0xFFFF_FFFF) as u32;
    let signed_low = i64::from(low.cast_signed());
    let epoch = (((clamped - signed_low) >> 32) & 3) as u32;
    (low, nanos << 2 | epoch)
}

/// The inverse of [`encode_time`].
pub(crate) fn decode_time(low: u32, extra: u32) -> (i64, u32) {
    (i64::from(low.cast_signed()) + (i64::from(extra & 3) << 32), extra >> 2)
}

/// A device number as `i_block[0]` and `i_block[1]`: the old form where it fits.
pub(crate) fn encode_device(major: u32, minor: u32) -> (u32, u32) {
    if major < 256 && minor < 256 {
        (major << 8 | minor, 0)
    } else {
        (0, minor & 0xFF | major << 8 | (minor & !0xFF) << 12)
    }
}

/// The inverse of [`encode_device`]: major, minor.
pub(crate) fn decode_device(old: u32, new: u32) -> (u32, u32) {
    if old != 0 {
        (old >> 8 & 0xFF, old & 0xFF)
    } else {
        (new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xF_FF00)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_epoch_bits() {
        for secs in [0, -1, -(1 << 31) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 33) + 5] {
            let (low, extra) = encode_time(secs, 999_999_999);
            assert_eq!(decode_time(low, extra), (secs, 999_999_999));
        }
        let (low, extra) = encode_time(i64::MAX, 5);
        assert_eq!(decode_time(low, extra), (TIME_MAX, 0));
        let (low, extra) = encode_time(i64::MIN, 5);
        assert_eq!(decode_time(low, extra), (TIME_MIN, 0));
    }

    #[test]
    fn devices_survive_both_encodings() {
        for (major, minor) in [(0, 0), (1, 3), (255, 255), (256, 0), (8, 256), (4095, 0xF_FFFF)] {
            let (old, new) = encode_device(major, minor);
            assert_eq!(decode_device(old, new), (major, minor));
        }
    }

    #[test]
    fn a_superblock_and_a_descriptor_read_back_as_written() {
        let mut bytes = [0; SUPERBLOCK_SIZE];
        for (byte, value) in bytes.iter_mut().zip((0..=250).cycle()) {
            *byte = value;
        }
        let first = Superblock::decode(&bytes);
        assert_eq!(Superblock::decode(&first.encode()), first);
        let descriptor = GroupDescriptor::decode(&bytes[..64]);
        let again = descriptor.encode(Checksum::START, 7);
        assert_eq!(GroupDescriptor::decode(&again), descriptor);
    }

    #[test]
    fn the_checksum_is_the_plain_crc32c_without_the_last_inversion() {
        assert_eq!(!Checksum::START.and(b"123456789").value(), 0xE306_9283);
    }
}
