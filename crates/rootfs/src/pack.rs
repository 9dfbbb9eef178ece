//! Layer packs: the file that one layer blob becomes, and its reader.
//!
//! Layout, in the order it is written: file contents in 4 KiB blocks; table of contents (see
//! `toc.rs`); a CRC-32C per 512 KiB of the data area; a footer of 128 bytes. Numbers of the
//! footer are little-endian:
//!
//! | byte | what |
//! |---|---|
//! | 0 | magic `bldrpack` |
//! | 8 | version, 4 bytes |
//! | 12 | CRC-32C of the table of contents |
//! | 16 | CRC-32C of the chunk checksums |
//! | 20 | CRC-32C of the footer with these four bytes as zero |
//! | 24 | data area, bytes |
//! | 32 | table of contents, bytes |
//! | 40 | entries |
//! | 48 | uncompressed layer, bytes |
//! | 56 | blob, bytes |
//! | 64 | diff id: SHA-256 of the uncompressed layer |
//! | 96 | reserved, zero |
//!
//! The checksums find damage, not malice: who may write a pack must be settled by where it is
//! kept. A reader still never panics and never reads out of bounds on a forged one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use crate::data::CHUNK;
use crate::{BLOCK_BYTES, Compression, Entries, Limits, Tally, TarError, build};

/// The version this crate writes, and the only one it reads.
pub const PACK_VERSION: u32 = 3;

const MAGIC: [u8; 8] = *b"bldrpack";
const FOOTER: usize = 128;
/// Far beyond what [`Limits`] lets through by default.
const TOC_BYTES_MAX: u64 = 1 << 30;

/// Why a layer blob could not be made a pack.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The reader of the blob failed.
    #[error("cannot read the layer blob on after {blob_bytes} bytes")]
    Blob {
        /// Bytes read before.
        blob_bytes: u64,
        /// The reader's error.
        source: io::Error,
    },
    /// The compressed data is damaged, cut short, or followed by something else.
    #[error(
        "the layer's {compression} data is damaged or cut short (near byte {blob_bytes} of the blob)"
    )]
    Inflate {
        /// How the blob is compressed.
        compression: Compression,
        /// Bytes of the blob read so far.
        blob_bytes: u64,
        /// The decoder's error.
        source: io::Error,
    },
    /// A compression that registries do not use for layers.
    #[error("the layer is compressed with {0}; push it with gzip or zstd, or uncompressed")]
    UnsupportedCompression(&'static str),
    /// `Limits::tar_bytes_max`.
    #[error("the layer is larger than {0} bytes when uncompressed")]
    TarBytes(u64),
    /// `Limits::ratio_max`.
    #[error("the layer looks like a decompression bomb: {blob_bytes} bytes became {tar_bytes}")]
    Ratio {
        /// Uncompressed bytes so far.
        tar_bytes: u64,
        /// Compressed bytes so far.
        blob_bytes: u64,
    },
    /// `Limits::data_bytes_max`.
    #[error("the files of the layer need more than {0} bytes")]
    DataBytes(u64),
    /// `Limits::image_tar_bytes_max`.
    #[error("all layers together are larger than {0} bytes when uncompressed")]
    ImageTarBytes(u64),
    /// `Limits::ratio_max`, over all layers.
    #[error(
        "all layers together look like a decompression bomb: {blob_bytes} bytes became {tar_bytes}"
    )]
    ImageRatio {
        /// Uncompressed bytes of all layers so far.
        tar_bytes: u64,
        /// Compressed bytes of all layers so far.
        blob_bytes: u64,
    },
    /// `Limits::image_data_bytes_max`.
    #[error("the files of all layers together need more than {0} bytes")]
    ImageDataBytes(u64),
    /// `Limits::toc_bytes_max`.
    #[error("names and metadata of the layer need more than {0} bytes")]
    TocBytes(u64),
    /// An entry of the tar.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The output failed.
    #[error("cannot write the layer pack")]
    Write {
        /// The writer's error.
        source: io::Error,
    },
}

/// Why bytes are not a sound pack.
#[derive(Debug, thiserror::Error)]
pub enum PackReadError {
    /// The reader failed.
    #[error("cannot read the layer pack")]
    Read {
        /// The reader's error.
        source: io::Error,
    },
    /// No footer where one should be.
    #[error("the file is not a layer pack, or it is cut short")]
    NotAPack,
    /// Written by another version of this crate.
    #[error("the layer pack has version {0}, not {PACK_VERSION}: make it again from its layer")]
    Version(u32),
    /// Footer, table of contents or chunk checksums are damaged.
    #[error("the {0} of the layer pack is damaged: make it again from its layer")]
    Damaged(&'static str),
    /// A chunk of the data area does not have its checksum.
    #[error("the contents of the layer pack are damaged at byte {0}: make it again from its layer")]
    DamagedData(u64),
    /// A record of the table of contents is malformed.
    #[error("record {0} of the layer pack's table of contents is malformed")]
    Entry(u64),
}

/// What [`make_pack`] has made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PackSummary {
    /// SHA-256 of the uncompressed layer.
    pub diff_id: [u8; 32],
    /// How the blob was compressed.
    pub compression: Compression,
    /// Bytes of the blob.
    pub blob_bytes: u64,
    /// Bytes of the uncompressed layer.
    pub tar_bytes: u64,
    /// Bytes of the data area.
    pub data_bytes: u64,
    /// Bytes of the table of contents.
    pub toc_bytes: u64,
    /// Bytes of the whole pack.
    pub pack_bytes: u64,
    /// Entries of the table of contents.
    pub entries: u64,
}

/// Makes the pack of one layer: reads `blob` to its end, recognises gzip, zstd or a plain tar,
/// and writes the pack to `out` from front to back, contents in writes of 1 MiB.
///
/// Uses two threads: one reads and inflates, the other (the caller's) hashes, parses and
/// writes. Needs about 4 MiB beside the table of contents. What `out` got before an error is
/// to be thrown away.
///
/// # Errors
/// [`PackError`]; errors of the blob and its compression before those of the tar inside.
pub fn make_pack(
    blob: impl Read + Send,
    out: &mut impl Write,
    limits: &Limits,
) -> Result<PackSummary, PackError> {
    make_pack_of(blob, out, limits, &Tally::default())
}

/// As [`make_pack`], for one layer of an image whose layers share a tally.
///
/// # Errors
/// [`PackError`]; also when the layers together are beyond a limit.
pub fn make_pack_of(
    blob: impl Read + Send,
    out: &mut impl Write,
    limits: &Limits,
    tally: &Tally,
) -> Result<PackSummary, PackError> {
    build::make_pack(blob, out, limits, tally)
}

/// What the footer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) data_bytes: u64,
    pub(crate) toc_bytes: u64,
    pub(crate) entries: u64,
    pub(crate) tar_bytes: u64,
    pub(crate) blob_bytes: u64,
    pub(crate) diff_id: [u8; 32],
    pub(crate) toc_crc: u32,
    pub(crate) chunks_crc: u32,
}

impl Footer {
    fn encode(&self) -> [u8; FOOTER] {
        let mut bytes = [0; FOOTER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&PACK_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.toc_crc.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.chunks_crc.to_le_bytes());
        let numbers =
            [self.data_bytes, self.toc_bytes, self.entries, self.tar_bytes, self.blob_bytes];
        for (at, number) in numbers.iter().enumerate() {
            bytes[24 + at * 8..32 + at * 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes[64..96].copy_from_slice(&self.diff_id);
        let crc = crc32c::crc32c(&bytes);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; FOOTER]) -> Result<Self, PackReadError> {
        if bytes[..8] != MAGIC {
            return Err(PackReadError::NotAPack);
        }
        let mut unsummed = *bytes;
        unsummed[20..24].fill(0);
        if crc32c::crc32c(&unsummed) != u32_at(bytes, 20) {
            return Err(PackReadError::Damaged("footer"));
        }
        match u32_at(bytes, 8) {
            PACK_VERSION => {}
            other => return Err(PackReadError::Version(other)),
        }
        let mut diff_id = [0; 32];
        diff_id.copy_from_slice(&bytes[64..96]);
        Ok(Self {
            data_bytes: u64_at(bytes, 24),
            toc_bytes: u64_at(bytes, 32),
            entries: u64_at(bytes, 40),
            tar_bytes: u64_at(bytes, 48),
            blob_bytes: u64_at(bytes, 56),
            diff_id,
            toc_crc: u32_at(bytes, 12),
            chunks_crc: u32_at(bytes, 16),
        })
    }
}

/// Writes what follows the data area. Gives the bytes written.
pub(crate) fn write_tail(
    out: &mut impl Write,
    toc: &[u8],
    chunk_crcs: &[u32],
    footer: &Footer,
) -> io::Result<u64> {
    let chunks = chunk_bytes(chunk_crcs);
    out.write_all(toc)?;
    out.write_all(&chunks)?;
    out.write_all(&footer.encode())?;
    out.flush()?;
    Ok((toc.len() + chunks.len() + FOOTER) as u64)
}

pub(crate) fn chunk_bytes(crcs: &[u32]) -> Vec<u8> {
    crcs.iter().flat_map(|crc| crc.to_le_bytes()).collect()
}

/// Something that can be read at any place.
pub trait ReadAt {
    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// As the reader has them; `UnexpectedEof` when there are fewer bytes.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(buffer.len())?));
        let bytes = range.and_then(|range| self.get(range));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buffer, offset)
    }
}

/// An opened pack: footer checked, table of contents in memory as written. The data area stays
/// in the file; the pack does not keep the reader.
#[derive(Clone, Debug)]
pub struct Pack {
    footer: Footer,
    toc: Vec<u8>,
    chunk_crcs: Vec<u8>,
}

impl Pack {
    /// Opens a pack of `length` bytes. Checks footer, checksums of the table of contents and
    /// that all parts fill the file exactly; does not read the data area.
    ///
    /// # Errors
    /// [`PackReadError`]: for all but `Read` the pack is to be made again.
    pub fn open(file: &(impl ReadAt + ?Sized), length: u64) -> Result<Self, PackReadError> {
        let footer_at = length.checked_sub(FOOTER as u64).ok_or(PackReadError::NotAPack)?;
        let mut bytes = [0; FOOTER];
        read(file, &mut bytes, footer_at)?;
        let footer = Footer::decode(&bytes)?;
        let chunks_bytes = footer.data_bytes.div_ceil(CHUNK as u64) * 4;
        let parts = footer.data_bytes.checked_add(footer.toc_bytes);
        let parts = parts.and_then(|parts| parts.checked_add(chunks_bytes));
        let aligned = footer.data_bytes.is_multiple_of(BLOCK_BYTES);
        if parts != Some(footer_at) || !aligned || footer.toc_bytes > TOC_BYTES_MAX {
            return Err(PackReadError::Damaged("footer"));
        }
        let toc = read_part(file, footer.data_bytes, footer.toc_bytes)?;
        if crc32c::crc32c(&toc) != footer.toc_crc {
            return Err(PackReadError::Damaged("table of contents"));
        }
        let chunk_crcs = read_part(file, footer.data_bytes + footer.toc_bytes, chunks_bytes)?;
        if crc32c::crc32c(&chunk_crcs) != footer.chunks_crc {
            return Err(PackReadError::Damaged("list of checksums"));
        }
        Ok(Self { footer, toc, chunk_crcs })
    }

    /// Reads the whole data area and compares every chunk with its checksum.
    ///
    /// # Errors
    /// [`PackReadError::DamagedData`] names the first damaged chunk.
    pub fn verify_data(&self, file: &(impl ReadAt + ?Sized)) -> Result<(), PackReadError> {
        let mut buffer = vec![0; CHUNK];
        let mut offset = 0;
        for crc in self.chunk_crcs.chunks_exact(4) {
            let length = (self.footer.data_bytes - offset).min(CHUNK as u64);
            let chunk = &mut buffer[..usize::try_from(length).unwrap_or(CHUNK)];
            read(file, chunk, offset)?;
            if crc32c::crc32c(chunk).to_le_bytes() != crc {
                return Err(PackReadError::DamagedData(offset));
            }
            offset += length;
        }
        Ok(())
    }

    /// The entries, in the order of the tar, decoded one by one.
    #[must_use]
    pub fn entries(&self) -> Entries<'_> {
        Entries::new(&self.toc, self.footer.entries, self.data_blocks())
    }

    /// How many entries [`Self::entries`] gives.
    #[must_use]
    pub fn entry_count(&self) -> u64 {
        self.footer.entries
    }

    /// Blocks of 4 KiB in the data area.
    #[must_use]
    pub fn data_blocks(&self) -> u64 {
        self.footer.data_bytes / BLOCK_BYTES
    }

    /// SHA-256 of the uncompressed layer, as the maker of the pack computed it.
    #[must_use]
    pub fn diff_id(&self) -> [u8; 32] {
        self.footer.diff_id
    }

    /// Bytes of the blob the pack was made from.
    #[must_use]
    pub fn blob_bytes(&self) -> u64 {
        self.footer.blob_bytes
    }

    /// Bytes of the uncompressed layer.
    #[must_use]
    pub fn tar_bytes(&self) -> u64 {
        self.footer.tar_bytes
    }

    /// Bytes of the table of contents, which this value holds in memory.
    #[must_use]
    pub fn toc_bytes(&self) -> u64 {
        self.footer.toc_bytes
    }
}

fn read(file: &(impl ReadAt + ?Sized), out: &mut [u8], at: u64) -> Result<(), PackReadError> {
    file.read_exact_at(out, at).map_err(|source| {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            PackReadError::NotAPack
        } else {
            PackReadError::Read { source }
        }
    })
}

fn read_part(
    file: &(impl ReadAt + ?Sized),
    at: u64,
    length: u64,
) -> Result<Vec<u8>, PackReadError> {
    // Bounded by the file's own length, which the caller has compared.
    let length = usize::try_from(length).map_err(|_| PackReadError::NotAPack)?;
    let mut bytes = vec![0; length];
    read(file, &mut bytes, at)?;
    Ok(bytes)
}

fn u32_at(bytes: &[u8; FOOTER], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; FOOTER], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
