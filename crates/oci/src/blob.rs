//! A blob as a stream of bytes whose end is only reached if size and digest are right.
//!
//! From a registry a broken stream is continued with a `Range` request, the running hash kept;
//! a server that ignores ranges is read from the start and the known part skipped. It does not
//! know what the bytes mean.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE};
use sha2::{Digest as _, Sha256};
use tokio::sync::OwnedSemaphorePermit;

use crate::auth::secrets::Secrets;
use crate::client::{Ask, Endpoint, Repository};
use crate::digest::Digest;
use crate::error::PullError;
use crate::retry::Attempts;
use crate::transport::Answer;

/// Bytes read from a file at a time.
const FILE_CHUNK_BYTES: usize = 512 << 10;

/// A blob on its way. Bytes handed out are unverified until [`BlobStream::next`] said `None`.
#[derive(Debug)]
pub struct BlobStream {
    verifier: Verifier,
    done: bool,
    from: Origin,
}

#[derive(Debug)]
enum Origin {
    Registry(Box<Download>),
    File(FilePart),
}

/// What a stream must turn out to be.
#[derive(Debug, Clone)]
pub(crate) struct Verifier {
    what: String,
    expected: Digest,
    size_bytes: u64,
    seen_bytes: u64,
    hash: Sha256,
}

impl Verifier {
    pub(crate) fn new(expected: Digest, size_bytes: u64) -> Verifier {
        let what = format!("blob {expected}");
        Verifier { what, expected, size_bytes, seen_bytes: 0, hash: Sha256::new() }
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), PullError> {
        self.seen_bytes += bytes.len() as u64;
        if self.seen_bytes > self.size_bytes {
            return Err(self.wrong_size());
        }
        self.hash.update(bytes);
        Ok(())
    }

    fn remaining(&self) -> u64 {
        self.size_bytes - self.seen_bytes.min(self.size_bytes)
    }

    fn wrong_size(&self) -> PullError {
        PullError::SizeMismatch {
            what: self.what.clone(),
            expected_bytes: self.size_bytes,
            actual_bytes: self.seen_bytes,
        }
    }

    fn finish(&self) -> Result<(), PullError> {
        if self.seen_bytes != self.size_bytes {
            return Err(self.wrong_size());
        }
        let actual = Digest::from_bytes(self.hash.clone().finalize().into());
        if actual == self.expected {
            return Ok(());
        }
        let what = self.what.clone();
        Err(PullError::DigestMismatch { what, expected: self.expected, actual })
    }
}

impl BlobStream {
    /// A blob from a registry; resolves when its first answer is there.
    pub(crate) async fn download(
        repository: Arc<Repository>,
        digest: Digest,
        size_bytes: u64,
        is_foreign: bool,
    ) -> Result<BlobStream, PullError> {
        let verifier = Verifier::new(digest, size_bytes);
        let slot = repository.client.slot(repository.reference.registry()).await;
        let at = repository.first_good();
        let attempts = repository.endpoints.get(at).map(|endpoint| repository.attempts(endpoint));
        let mut download = Download {
            repository,
            digest,
            is_foreign,
            at,
            attempts,
            answer: None,
            skip: 0,
            ranges: true,
            unforgiven_bytes: 0,
            _slot: slot,
        };
        download.open(&verifier).await?;
        Ok(BlobStream { verifier, done: false, from: Origin::Registry(Box::new(download)) })
    }

    /// A blob that is a part of a file.
    pub(crate) fn file(part: FilePart, digest: Digest) -> BlobStream {
        let verifier = Verifier::new(digest, part.size_bytes);
        BlobStream { verifier, done: false, from: Origin::File(part) }
    }

    /// The blob's digest, as promised.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.verifier.expected
    }

    /// The blob's size, as promised.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.verifier.size_bytes
    }

    /// How many bytes have been handed out.
    #[must_use]
    pub fn position_bytes(&self) -> u64 {
        self.verifier.seen_bytes
    }

    /// The next bytes, never empty; `None` only after size and digest have proved right.
    ///
    /// Dropping the future loses at most bytes that were not handed out; do not call again
    /// after that, nor after an error.
    ///
    /// # Errors
    /// When the bytes cannot be had any more, or are not the ones the digest names.
    pub async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        if self.done {
            return Ok(None);
        }
        let chunk = match &mut self.from {
            Origin::Registry(download) => download.next(&mut self.verifier).await?,
            Origin::File(part) => part.next(&mut self.verifier).await?,
        };
        if chunk.is_none() {
            self.verifier.finish()?;
            self.done = true;
        }
        Ok(chunk)
    }

    /// The whole blob, for the small ones; the caller has looked at the size.
    pub(crate) async fn collect(mut self) -> Result<Vec<u8>, PullError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

/// A part of an open file.
#[derive(Debug, Clone)]
pub(crate) struct FilePart {
    pub(crate) file: Arc<File>,
    /// For errors.
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
    pub(crate) size_bytes: u64,
}

impl FilePart {
    /// Reads and hashes on a thread that may block.
    async fn next(&self, verifier: &mut Verifier) -> Result<Option<Bytes>, PullError> {
        let wanted = verifier.remaining().min(FILE_CHUNK_BYTES as u64);
        if wanted == 0 {
            return Ok(None);
        }
        let (part, mut moved) = (self.clone(), verifier.clone());
        let read = tokio::task::spawn_blocking(move || {
            let bytes = part.read(moved.seen_bytes, usize::try_from(wanted).unwrap_or_default())?;
            moved.add(&bytes)?;
            Ok((bytes, moved))
        });
        let failed = |error: tokio::task::JoinError| self.io(std::io::Error::other(error));
        let (bytes, moved) = read.await.map_err(failed)??;
        *verifier = moved;
        Ok(Some(bytes))
    }

    /// Reads exactly this many bytes at a position of the part.
    pub(crate) fn read(&self, position: u64, bytes: usize) -> Result<Bytes, PullError> {
        let mut buffer = vec![0; bytes];
        let at = self.offset + position;
        self.file.read_exact_at(&mut buffer, at).map_err(|source| self.io(source))?;
        Ok(Bytes::from(buffer))
    }

    fn io(&self, source: std::io::Error) -> PullError {
        PullError::Io { path: self.path.clone(), source }
    }
}

/// A blob from a registry, over as many answers as it takes.
#[derive(Debug)]
struct Download {
    repository: Arc<Repository>,
    digest: Digest,
    is_foreign: bool,
    /// The endpoint in use.
    at: usize,
    attempts: Option<Attempts>,
    answer: Option<Answer>,
    /// Bytes of the current answer that have been handed out before.
    skip: u64,
    /// Whether ranges are asked for; not any more once a server refused one.
    ranges: bool,
    /// Progress since the last failure.
    unforgiven_bytes: u64,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Download {
    async fn next(&mut self, verifier: &mut Verifier) -> Result<Option<Bytes>, PullError> {
        loop {
            match self.next_of_answer(verifier).await {
                Ok(Some(chunk)) => {
                    let Some(chunk) = self.unskipped(chunk) else { continue };
                    verifier.add(&chunk)?;
                    self.progress(chunk.len() as u64);
                    return Ok(Some(chunk));
                }
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.answer = None;
                    self.pause_or_move_on(error, verifier).await?;
                    self.open(verifier).await?;
                }
            }
        }
    }

    /// The next bytes of the current answer; `None` when the blob is complete.
    async fn next_of_answer(&mut self, verifier: &Verifier) -> Result<Option<Bytes>, PullError> {
        let Some(answer) = &mut self.answer else { return Ok(None) };
        let transport = self.repository.client.transport();
        let complete = verifier.remaining() == 0;
        let seen = verifier.seen_bytes;
        let chunk = transport.chunk(&mut answer.response, &answer.host, &verifier.what, seen).await;
        match chunk {
            Ok(Some(chunk)) => Ok(Some(chunk)),
            // All bytes are here: how the connection ends does not matter.
            Ok(None) | Err(_) if complete => Ok(None),
            Ok(None) => Err(PullError::Cut {
                host: answer.host.clone(),
                what: verifier.what.clone(),
                received_bytes: seen,
                source: None,
            }),
            Err(error) => Err(error),
        }
    }

    fn unskipped(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        let known = usize::try_from(self.skip).unwrap_or(usize::MAX).min(chunk.len());
        let rest = chunk.split_off(known);
        self.skip -= known as u64;
        (!rest.is_empty()).then_some(rest)
    }

    fn progress(&mut self, bytes: u64) {
        self.unforgiven_bytes += bytes;
        if self.unforgiven_bytes >= self.repository.client.options().retry.progress_bytes {
            self.unforgiven_bytes = 0;
            if let Some(attempts) = &mut self.attempts {
                attempts.forgive();
            }
        }
    }

    /// Waits for another attempt at this endpoint, or turns to the next one.
    async fn pause_or_move_on(
        &mut self,
        error: PullError,
        verifier: &Verifier,
    ) -> Result<(), PullError> {
        self.unforgiven_bytes = 0;
        let refused_range = matches!(error, PullError::Status { status: 416, .. });
        if refused_range && self.ranges && verifier.seen_bytes > 0 {
            self.ranges = false;
            return Ok(());
        }
        let Some(attempts) = &mut self.attempts else { return Err(error) };
        let Err(error) = attempts.wait_or_give_up(error).await else { return Ok(()) };
        let Some(next) = self.repository.endpoints.get(self.at + 1) else {
            return Err(self.explained(error));
        };
        if let Some(mirror) = self.repository.endpoints.get(self.at) {
            self.repository.note(&mirror.host(), &error);
        }
        self.attempts = Some(self.repository.attempts(next));
        self.at += 1;
        self.ranges = true;
        Ok(())
    }

    fn explained(&self, error: PullError) -> PullError {
        if self.is_foreign
            && let PullError::NotFound { host, .. } = error
        {
            return PullError::ForeignLayer { digest: self.digest, host };
        }
        error
    }

    /// Gets an answer that continues where the verifier stands.
    async fn open(&mut self, verifier: &Verifier) -> Result<(), PullError> {
        loop {
            match self.open_once(verifier).await {
                Ok((answer, skip)) => {
                    self.answer = Some(answer);
                    self.skip = skip;
                    return Ok(());
                }
                Err(error) => self.pause_or_move_on(error, verifier).await?,
            }
        }
    }

    async fn open_once(&self, verifier: &Verifier) -> Result<(Answer, u64), PullError> {
        let repository = Arc::clone(&self.repository);
        let Some(endpoint) = repository.endpoints.get(self.at) else {
            return Err(verifier.wrong_size());
        };
        let from_byte = if self.ranges { verifier.seen_bytes } else { 0 };
        let tail = format!("blobs/{}", self.digest);
        let ask = Ask { tail: &tail, what: &verifier.what, from_byte, is_manifest: false };
        let answer = repository.get(endpoint, ask).await?;
        let secrets = repository.client.transport().secrets();
        let skip = checked_start(&answer, endpoint, verifier, from_byte, secrets)?;
        Ok((answer, skip))
    }
}

/// Checks what an answer says about itself, and tells how many of its bytes are known already.
fn checked_start(
    answer: &Answer,
    endpoint: &Endpoint,
    verifier: &Verifier,
    from_byte: u64,
    secrets: &Secrets,
) -> Result<u64, PullError> {
    let headers = answer.response.headers();
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let senseless = |reason: String| PullError::Protocol {
        host: endpoint.host(),
        what: verifier.what.clone(),
        reason,
    };
    if let Some(encoding) = header(CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity"))
    {
        let encoding = crate::manifest::shown(&secrets.blotted(encoding));
        return Err(senseless(format!(
            "the blob comes encoded as {encoding:?}, which nobody asked for"
        )));
    }
    let is_partial = answer.response.status().as_u16() == 206;
    let start = match header(CONTENT_RANGE).filter(|_| is_partial) {
        Some(range) => {
            let known = content_range(range).filter(|(start, total)| {
                *start == from_byte && total.is_none_or(|total| total == verifier.size_bytes)
            });
            known.ok_or_else(|| senseless("the range is not the one asked for".to_owned()))?.0
        }
        None if is_partial => return Err(senseless("a part without its range".to_owned())),
        None => 0,
    };
    let length = answer.response.content_length();
    if let Some(length) =
        length.filter(|length| start.saturating_add(*length) != verifier.size_bytes)
    {
        return Err(PullError::SizeMismatch {
            what: verifier.what.clone(),
            expected_bytes: verifier.size_bytes,
            actual_bytes: start.saturating_add(length),
        });
    }
    Ok(verifier.seen_bytes - start.min(verifier.seen_bytes))
}

/// `bytes first-last/total` or `bytes first-last/*` (RFC 9110, 14.4) as (first, total).
pub(crate) fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "5-9/10", "bytes 9-5/10", "bytes 5-10/10", "bytes */10", "bytes a-b/c"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_verifier_accepts_only_the_right_bytes() {
        let right = |size, bytes: &[u8]| {
            let mut verifier = Verifier::new(Digest::of(b"hello"), size);
            verifier.add(bytes)?;
            verifier.finish()
        };
        assert!(right(5, b"hello").is_ok());
        assert!(matches!(right(5, b"hullo"), Err(PullError::DigestMismatch { .. })));
        assert!(matches!(right(5, b"hell"), Err(PullError::SizeMismatch { .. })));
        assert!(matches!(right(4, b"hello"), Err(PullError::SizeMismatch { .. })));
    }
}
