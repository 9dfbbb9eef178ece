//! The first bytes of a sealed file, and the sizes that follow from them.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};

use crate::{HEADER_BYTES, INFO, KEY_BYTES, SealedError, TAG_BYTES};

const MAGIC: &[u8; 8] = b"\x89bldseal";
const VERSION: u8 = 1;
/// What chunks may be: so small that a part costs little, so large that tags do.
const CHUNK_LOG2: std::ops::RangeInclusive<u8> = 10..=22;
/// What is authenticated: all of the header but its tag.
pub(crate) const BOUND_BYTES: usize = HEADER_BYTES - TAG_BYTES;
const SALT_BYTES: usize = 32;
const PREFIX_BYTES: usize = 7;
/// The number that stands for the header, and is none of a chunk.
pub(crate) const HEADER_NUMBER: u32 = u32::MAX;

/// Tells keys apart; not secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; 16]);

/// A text that is no [`KeyId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key's id is 32 digits 0 to 9 and a to f")]
pub struct KeyIdError;

/// 32 hexadecimal digits.
impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

impl FromStr for KeyId {
    type Err = KeyIdError;

    fn from_str(text: &str) -> Result<Self, KeyIdError> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 32 || !text.bytes().all(is_digit) {
            return Err(KeyIdError);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| KeyIdError)?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// What a header says; nothing of it is true before [`Opener::new`](crate::Opener::new) says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub(crate) chunk_log2: u8,
    pub(crate) key: KeyId,
    pub(crate) salt: [u8; SALT_BYTES],
    pub(crate) prefix: [u8; PREFIX_BYTES],
    pub(crate) plain_bytes: u64,
    pub(crate) tag: [u8; TAG_BYTES],
}

impl Header {
    /// A header without its tag, with what is random in it.
    pub(crate) fn new(key: KeyId, plain_bytes: u64, chunk_log2: u8) -> Result<Self, SealedError> {
        let (mut salt, mut prefix) = ([0; SALT_BYTES], [0; PREFIX_BYTES]);
        aws_lc_rs::rand::fill(&mut salt).map_err(|_| SealedError::Cipher)?;
        aws_lc_rs::rand::fill(&mut prefix).map_err(|_| SealedError::Cipher)?;
        let header = Self { chunk_log2, key, salt, prefix, plain_bytes, tag: [0; TAG_BYTES] };
        header.checked()
    }

    /// Reads the first [`HEADER_BYTES`] of a file.
    ///
    /// # Errors
    /// [`SealedError::Header`], [`SealedError::TooLarge`]
    pub fn parse(bytes: &[u8]) -> Result<Self, SealedError> {
        let bytes: &[u8; HEADER_BYTES] =
            bytes.try_into().map_err(|_| SealedError::Header("it is too short"))?;
        if !bytes.starts_with(MAGIC) {
            return Err(SealedError::Header("it does not begin as one"));
        }
        if bytes[8] != VERSION {
            return Err(SealedError::Header("its version is not known"));
        }
        if bytes[10..16] != [0; 6] || bytes[71] != 0 {
            return Err(SealedError::Header("what must be zero is not"));
        }
        let header = Self {
            chunk_log2: bytes[9],
            key: KeyId(part(bytes, 16)),
            salt: part(bytes, 32),
            prefix: part(bytes, 64),
            plain_bytes: u64::from_be_bytes(part(bytes, 72)),
            tag: part(bytes, BOUND_BYTES),
        };
        header.checked()
    }

    fn checked(self) -> Result<Self, SealedError> {
        if !CHUNK_LOG2.contains(&self.chunk_log2) {
            return Err(SealedError::Header("its chunks have a size that is not allowed"));
        }
        match self.chunks() < u64::from(HEADER_NUMBER) {
            true => Ok(self),
            false => Err(SealedError::TooLarge { plain_bytes: self.plain_bytes }),
        }
    }

    /// The key that the file was sealed with.
    pub fn key(&self) -> KeyId {
        self.key
    }

    pub(crate) fn chunk_bytes(&self) -> u64 {
        1 << self.chunk_log2
    }

    /// How many chunks there are: at least one.
    pub(crate) fn chunks(&self) -> u64 {
        self.plain_bytes.div_ceil(self.chunk_bytes()).max(1)
    }

    /// Plain bytes of one chunk.
    pub(crate) fn plain_in(&self, chunk: u64) -> usize {
        let before = chunk * self.chunk_bytes();
        let length = self.plain_bytes.saturating_sub(before).min(self.chunk_bytes());
        // At most 4 MiB.
        usize::try_from(length).unwrap_or(usize::MAX)
    }

    /// Bytes of the sealed file. Never overflows: the chunks are fewer than 2^32, of 4 MiB at most.
    pub(crate) fn sealed_bytes(&self) -> u64 {
        wide(HEADER_BYTES) + self.plain_bytes + self.chunks() * wide(TAG_BYTES)
    }

    /// Where a chunk begins in the sealed file.
    pub(crate) fn offset_of(&self, chunk: u64) -> u64 {
        wide(HEADER_BYTES) + chunk * (self.chunk_bytes() + wide(TAG_BYTES))
    }

    /// The bytes of the header that everything is bound to.
    pub(crate) fn bound(&self) -> [u8; BOUND_BYTES] {
        let mut bytes = [0; BOUND_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8] = VERSION;
        bytes[9] = self.chunk_log2;
        bytes[16..32].copy_from_slice(&self.key.0);
        bytes[32..64].copy_from_slice(&self.salt);
        bytes[64..71].copy_from_slice(&self.prefix);
        bytes[72..80].copy_from_slice(&self.plain_bytes.to_be_bytes());
        bytes
    }

    /// The file's own key.
    pub(crate) fn derive(
        &self,
        key: &[u8; KEY_BYTES],
        name: &str,
    ) -> Result<LessSafeKey, SealedError> {
        let info = [INFO, name.as_bytes()];
        let secret = Salt::new(HKDF_SHA256, &self.salt).extract(key);
        let derived = secret.expand(&info, &AES_256_GCM).map_err(|_| SealedError::Cipher)?;
        Ok(LessSafeKey::new(UnboundKey::from(derived)))
    }

    /// The nonce of the header.
    pub(crate) fn own_nonce(&self) -> Nonce {
        self.nonce(HEADER_NUMBER, 2)
    }

    /// The nonce of a chunk.
    pub(crate) fn chunk_nonce(&self, chunk: u64) -> Result<Nonce, SealedError> {
        let number = u32::try_from(chunk).map_err(|_| SealedError::Chunk { chunk })?;
        Ok(self.nonce(number, u8::from(chunk + 1 == self.chunks())))
    }

    fn nonce(&self, number: u32, kind: u8) -> Nonce {
        let mut bytes = [0; 12];
        bytes[..PREFIX_BYTES].copy_from_slice(&self.prefix);
        bytes[PREFIX_BYTES..11].copy_from_slice(&number.to_be_bytes());
        bytes[11] = kind;
        Nonce::assume_unique_for_key(bytes)
    }
}

/// `N` bytes from `start` on; the header is longer than all that is read of it.
fn part<const N: usize>(bytes: &[u8; HEADER_BYTES], start: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[start + index])
}

/// A length as offsets have it.
pub(crate) fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
