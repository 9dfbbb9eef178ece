//! The limits that keep hostile input small. Knows no input, only numbers.

/// Limits of one layer, checked while its pack is made. A limit reached is an error.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Entries of the tar, without the header-only ones (PAX, GNU long names). Default 4 million.
    pub entries_max: u64,
    /// Bytes of one path after cleaning. Default 4096, the `PATH_MAX` of Linux; more is not possible.
    pub path_bytes_max: usize,
    /// Bytes of one component of a path. Default 255, the `NAME_MAX` of Linux.
    pub component_bytes_max: usize,
    /// Components of one path. Default 256.
    pub depth_max: usize,
    /// Bytes of the uncompressed layer. Default 64 GiB.
    pub tar_bytes_max: u64,
    /// Bytes of the pack's data area, which grows faster than the tar when files are tiny.
    /// Default 64 GiB.
    pub data_bytes_max: u64,
    /// Logical size of one file, holes included. Default 16 TiB less one block, the largest
    /// file of ext4 with 4 KiB blocks.
    pub file_bytes_max: u64,
    /// Uncompressed bytes per compressed byte, looked at once `ratio_free_bytes` have come
    /// out. Default 500 (deflate cannot do more than about 1030).
    pub ratio_max: u64,
    /// How much may come out before `ratio_max` is looked at. Default 1 GiB.
    pub ratio_free_bytes: u64,
    /// Uncompressed bytes of all layers of an image that share a [`Tally`](crate::Tally).
    /// Default 256 GiB.
    pub image_tar_bytes_max: u64,
    /// Bytes of the data areas of their packs. Default 256 GiB.
    pub image_data_bytes_max: u64,
    /// How much may come out of all of them before `ratio_max` is looked at over all. Default
    /// 4 GiB.
    pub image_ratio_free_bytes: u64,
    /// Bytes of one PAX header, GNU long name or sparse map. Default 1 MiB.
    pub header_bytes_max: u64,
    /// Bytes of names and values of all extended attributes of one entry. Default 64 KiB, the
    /// `XATTR_SIZE_MAX` of Linux.
    pub xattr_bytes_max: usize,
    /// Extended attributes of one entry. Default 256.
    pub xattrs_max: usize,
    /// Bytes of the table of contents. Default 256 MiB.
    pub toc_bytes_max: u64,
    /// Largest window of a zstd frame, as a power of two. Default 27 (128 MiB).
    pub zstd_window_log_max: u32,
}

impl Limits {
    /// No path is longer, whatever `path_bytes_max` says: readers of packs rely on it.
    pub(crate) const PATH_BYTES_MAX: usize = 4096;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries_max: 4_000_000,
            path_bytes_max: 4096,
            component_bytes_max: 255,
            depth_max: 256,
            tar_bytes_max: 64 << 30,
            data_bytes_max: 64 << 30,
            file_bytes_max: (u32::MAX as u64) * 4096,
            ratio_max: 500,
            ratio_free_bytes: 1 << 30,
            image_tar_bytes_max: 256 << 30,
            image_data_bytes_max: 256 << 30,
            image_ratio_free_bytes: 4 << 30,
            header_bytes_max: 1 << 20,
            xattr_bytes_max: 64 << 10,
            xattrs_max: 256,
            toc_bytes_max: 256 << 20,
            zstd_window_log_max: 27,
        }
    }
}

/// Limits of one tree, checked while layers are folded into it. A limit reached is an error.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TreeLimits {
    /// Layers. Default 1024.
    pub layers_max: u32,
    /// Entries of all layers together, with the directories that only their paths imply; a layer
    /// that is named again counts again. Default 16 million.
    pub entries_max: u64,
    /// Bytes of the tables of contents of all layers together. Default 4 GiB.
    pub toc_bytes_max: u64,
    /// Names looked up, in all layers together: about one for each entry, and one for each
    /// component of a hard link's target or of a path behind a symbolic link. A long name counts
    /// as several. Default 200 million, some twenty seconds.
    pub lookups_max: u64,
    /// Names and inodes the fold may hold, those of overwritten files included. Default 16 million.
    pub inodes_max: u32,
    /// Depth of a directory, after symbolic links in the paths of a layer were followed.
    /// Default 256.
    pub depth_max: u32,
    /// Names of one file. Default 65,000, the limit of ext4.
    pub links_max: u32,
    /// Symbolic links followed for one path. Default 40, the `MAXSYMLINKS` of Linux.
    pub symlinks_max: u32,
    /// Path components looked at behind symbolic links, in all layers together. Default 16
    /// million; real images need some dozens.
    pub symlink_steps_max: u64,
    /// Bytes of names, of link targets, of extended attributes and of the maps of files with
    /// holes, each. Default 256 MiB.
    pub bytes_max: u32,
}

impl Default for TreeLimits {
    fn default() -> Self {
        Self {
            layers_max: 1024,
            entries_max: 16_000_000,
            toc_bytes_max: 4 << 30,
            lookups_max: 200_000_000,
            inodes_max: 16_000_000,
            depth_max: 256,
            links_max: 65_000,
            symlinks_max: 40,
            symlink_steps_max: 16_000_000,
            bytes_max: 256 << 20,
        }
    }
}
