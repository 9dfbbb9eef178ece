//! Files encrypted in chunks, so that any part of one is read without the rest.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `89 62 6c 64 73 65 61 6c`: `0x89`, then `bldseal` |
//! | 8 | 1 | version: 1 |
//! | 9 | 1 | binary logarithm of the plain bytes of a chunk: 10 to 22 |
//! | 10 | 6 | zero |
//! | 16 | 16 | id of the key |
//! | 32 | 32 | salt, random |
//! | 64 | 7 | beginning of every nonce, random |
//! | 71 | 1 | zero |
//! | 72 | 8 | bytes of the plain file, big endian |
//! | 80 | 16 | tag over the 80 bytes before it |
//! | 96 | … | the chunks, each followed by its tag of 16 bytes; the last one may be short |
//!
//! An empty file has one chunk of no bytes. Each file has a key of its own, HKDF-SHA-256 (RFC 5869)
//! of the caller's key, the salt, and [`INFO`] followed by the file's name. A chunk's nonce is the
//! beginning, its number (4 bytes, big endian) and 1 for the last chunk, else 0; the tag of the
//! header is that of no bytes under the number `ffffffff` and 2. The 80 bytes are the associated
//! data of all of them (AES-256-GCM, NIST SP 800-38D). This is the STREAM construction (Hoang,
//! Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and its Nonce-Reuse
//! Misuse-Resistance), with a key derived per file as Tink's AES-GCM-HKDF streaming has it.
//!
//! So a chunk that was changed, cut, moved, repeated, or taken from another file does not open, nor
//! does a file under another name. This crate does not know files, stores, or whose keys they are.

mod header;
mod open;
mod seal;
#[cfg(test)]
mod tests;

pub use header::{Header, KeyId, KeyIdError};
pub use open::{Opener, Part};
pub use seal::Sealer;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 96;
/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes that each chunk grows by.
pub const TAG_BYTES: usize = 16;
/// Before a file's name, in the derivation of its key.
pub const INFO: &[u8] = b"builderd sealed file, version 1: ";

/// Why a file could not be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealedError {
    /// It does not begin as sealed files do.
    #[error("it is no sealed file: {0}")]
    Header(&'static str),
    /// The header does not open.
    #[error("its header was changed, or it was sealed with another key or under another name")]
    Forged,
    /// A chunk does not open.
    #[error("its chunk {chunk} was changed, cut or moved")]
    Chunk {
        /// Which, counted from 0.
        chunk: u64,
    },
    /// Chunks are missing.
    #[error("it ends before its chunk {chunk} does")]
    Cut {
        /// The first that is missing, counted from 0.
        chunk: u64,
    },
    /// More bytes than numbers for chunks.
    #[error("{plain_bytes} bytes are too many for chunks of that size")]
    TooLarge {
        /// How many.
        plain_bytes: u64,
    },
    /// The caller gave other chunks than it had announced.
    #[error("what was sealed has not the size that was announced")]
    Size,
    /// The cipher, or the source of random numbers, refused.
    #[error("the cipher refused")]
    Cipher,
}
