//! From plain chunks to sealed ones, in order.

use aws_lc_rs::aead::{Aad, LessSafeKey};

use crate::header::{BOUND_BYTES, Header};
use crate::{HEADER_BYTES, KEY_BYTES, KeyId, SealedError};

/// Seals one file, chunk by chunk.
pub struct Sealer {
    header: Header,
    bound: [u8; BOUND_BYTES],
    key: LessSafeKey,
    next: u64,
}

impl Sealer {
    /// Begins a file of `plain_bytes`, to be kept under `name`; its chunks have `2^chunk_log2`
    /// bytes.
    ///
    /// # Errors
    /// [`SealedError::TooLarge`], [`SealedError::Header`] for a size of chunks that is not allowed
    pub fn new(
        key: &[u8; KEY_BYTES],
        id: KeyId,
        name: &str,
        plain_bytes: u64,
        chunk_log2: u8,
    ) -> Result<Self, SealedError> {
        Self::with_header(Header::new(id, plain_bytes, chunk_log2)?, key, name)
    }

    /// The same with what is random given.
    pub(crate) fn with_header(
        mut header: Header,
        key: &[u8; KEY_BYTES],
        name: &str,
    ) -> Result<Self, SealedError> {
        let (key, bound) = (header.derive(key, name)?, header.bound());
        let mut nothing = [];
        let tag =
            key.seal_in_place_separate_tag(header.own_nonce(), Aad::from(&bound), &mut nothing);
        let tag = tag.map_err(|_| SealedError::Cipher)?;
        header.tag = tag.as_ref().try_into().map_err(|_| SealedError::Cipher)?;
        Ok(Self { header, bound, key, next: 0 })
    }

    /// What the sealed file begins with.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..BOUND_BYTES].copy_from_slice(&self.bound);
        bytes[BOUND_BYTES..].copy_from_slice(&self.header.tag);
        bytes
    }

    /// Plain bytes that the next chunk has; none when all is sealed.
    pub fn wants(&self) -> Option<usize> {
        (self.next < self.header.chunks()).then(|| self.header.plain_in(self.next))
    }

    /// Seals the next chunk in its place and puts its tag behind it.
    ///
    /// # Errors
    /// [`SealedError::Size`] if it has another size than [`Self::wants`] says.
    pub fn seal(&mut self, chunk: &mut Vec<u8>) -> Result<(), SealedError> {
        if self.wants() != Some(chunk.len()) {
            return Err(SealedError::Size);
        }
        let nonce = self.header.chunk_nonce(self.next)?;
        self.key
            .seal_in_place_append_tag(nonce, Aad::from(&self.bound), chunk)
            .map_err(|_| SealedError::Cipher)?;
        self.next += 1;
        Ok(())
    }
}
