//! An artifact store in which artifacts of protected tenants lie encrypted.
//!
//! What an artifact is called says whether it is: `tenant-<id>/<file>.sealed-<key>` is sealed with
//! that key of that tenant (the format is the crate `sealed`'s), under its whole name; all else goes
//! through as it is. So nothing in the store decides how it is read: a plain file under a sealed
//! name does not open, nor does an object that was put in another's place.
//!
//! Sizes and ranges are those of the plain artifact, but for [`ArtifactStore::list`], which tells
//! what lies there. It does not know who may read what, nor where keys come from.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sealed::{HEADER_BYTES, Header, KeyId, Opener, Part, SealedError, Sealer};
use secrecy::ExposeSecret as _;

use super::{ArtifactStore, OpenArtifact, ReadRange, Stored};
use crate::seal::DataKey;
use crate::store::SEALED;
use crate::tenant::TenantId;

/// Chunks of 64 KiB: what a read of one byte costs.
const CHUNK_LOG2: u8 = 16;
/// Bytes that are sealed in one go.
const PIECE_BYTES: usize = 4 << 20;

/// Where keys come from.
#[async_trait]
pub(crate) trait ArtifactKeys: Send + Sync {
    /// A key of a tenant; none if it is not there, or not any more.
    async fn key(&self, tenant: &TenantId, id: KeyId) -> io::Result<Option<DataKey>>;
}

/// What an artifact is called that is sealed with a key.
pub(crate) fn sealed_name(plain: &str, key: KeyId) -> String {
    format!("{plain}{SEALED}{key}")
}

/// Whose key a sealed artifact needs; none if it is not sealed.
fn needed(name: &str) -> io::Result<Option<(TenantId, KeyId)>> {
    let Some((domain, file)) = name.split_once('/') else { return Ok(None) };
    let Some((_, key)) = file.rsplit_once(SEALED) else { return Ok(None) };
    let tenant = domain.strip_prefix("tenant-").and_then(|tenant| tenant.parse().ok());
    match (tenant, key.parse()) {
        (Some(tenant), Ok(key)) => Ok(Some((tenant, key))),
        (_, _) => Err(io::Error::new(io::ErrorKind::InvalidInput, "no key of a sealed artifact")),
    }
}

/// See the module.
pub(crate) struct SealedArtifacts {
    inner: Arc<dyn ArtifactStore>,
    keys: Arc<dyn ArtifactKeys>,
    broken: Arc<Broken>,
}

/// The names of artifacts of which a chunk did not open: their headers are good, so that it is
/// only seen where they are read.
#[derive(Default)]
struct Broken(Mutex<HashSet<String>>);

impl Broken {
    fn names(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        // Nothing is half done in a set whose holder panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SealedArtifacts {
    pub(crate) fn new(inner: Arc<dyn ArtifactStore>, keys: Arc<dyn ArtifactKeys>) -> Self {
        Self { inner, keys, broken: Arc::default() }
    }

    async fn key(&self, tenant: &TenantId, id: KeyId) -> io::Result<DataKey> {
        let key = self.keys.key(tenant, id).await?;
        key.ok_or_else(|| io::Error::other(format!("tenant {tenant} has no key {id} (any more)")))
    }

    async fn open_sealed(
        &self,
        name: &str,
        inner: OpenArtifact,
        key: &DataKey,
    ) -> io::Result<OpenArtifact> {
        let header_bytes = u64::try_from(HEADER_BYTES).map_err(io::Error::other)?;
        if inner.size_bytes < header_bytes {
            return Err(damaged(name, &"it is shorter than a header"));
        }
        let head: Vec<Bytes> = inner.read(0..header_bytes).try_collect().await?;
        let file = Header::parse(&head.concat())
            .and_then(|header| Opener::new(header, key.expose_secret(), name))
            .map_err(|error| damaged(name, &error))?;
        if file.sealed_bytes() != inner.size_bytes {
            return Err(damaged(name, &"its size is not the one that its header tells"));
        }
        let size_bytes = file.plain_bytes();
        let (file, name, broken) = (Arc::new(file), name.to_owned(), Arc::clone(&self.broken));
        let reader = SealedReader { inner, file, name, broken };
        Ok(OpenArtifact { size_bytes, reader: Box::new(reader) })
    }

    /// Whether the artifact is there as it should be; one that is damaged is removed.
    async fn is_whole(&self, name: &str, key: &DataKey, size_bytes: u64) -> io::Result<bool> {
        let Some(inner) = self.inner.open(name).await? else { return Ok(false) };
        match self.open_sealed(name, inner, key).await {
            Ok(open) if open.size_bytes == size_bytes && !self.was_damaged(name) => {
                return Ok(true);
            }
            Err(error) if error.kind() != io::ErrorKind::InvalidData => return Err(error),
            Ok(_) | Err(_) => {}
        }
        self.inner.remove(name).await.map(|()| false)
    }
}

/// For the operator, once, where it is seen first.
fn damaged(name: &str, problem: &dyn std::fmt::Display) -> io::Error {
    tracing::error!(artifact = name, %problem, "a sealed artifact is damaged, or was tampered with");
    io::Error::new(io::ErrorKind::InvalidData, format!("the artifact {name} is damaged: {problem}"))
}

#[async_trait]
impl ArtifactStore for SealedArtifacts {
    fn staging(&self) -> &Path {
        self.inner.staging()
    }

    async fn publish(&self, staged: &Path, key: &str) -> io::Result<()> {
        let Some((tenant, id)) = needed(key)? else {
            return self.inner.publish(staged, key).await;
        };
        let data_key = self.key(&tenant, id).await?;
        let size_bytes = tokio::fs::metadata(staged).await?.len();
        if self.is_whole(key, &data_key, size_bytes).await? {
            return tokio::fs::remove_file(staged).await;
        }
        let sealer = Sealer::new(data_key.expose_secret(), id, key, size_bytes, CHUNK_LOG2);
        let sealed = seal(staged, sealer.map_err(io::Error::other)?).await?;
        tokio::fs::remove_file(staged).await?;
        self.inner.publish(&sealed, key).await?;
        self.broken.names().remove(key);
        Ok(())
    }

    async fn settle(&self) {
        self.inner.settle().await;
    }

    async fn open(&self, key: &str) -> io::Result<Option<OpenArtifact>> {
        let needed = needed(key)?;
        let Some(inner) = self.inner.open(key).await? else { return Ok(None) };
        match needed {
            None => Ok(Some(inner)),
            Some((tenant, id)) => {
                let data_key = self.key(&tenant, id).await?;
                self.open_sealed(key, inner, &data_key).await.map(Some)
            }
        }
    }

    async fn remove(&self, key: &str) -> io::Result<()> {
        self.inner.remove(key).await?;
        self.broken.names().remove(key);
        Ok(())
    }

    fn was_damaged(&self, key: &str) -> bool {
        self.broken.names().contains(key)
    }

    async fn list(&self) -> io::Result<Vec<Stored>> {
        self.inner.list().await
    }

    fn path(&self, key: &str) -> String {
        self.inner.path(key)
    }

    fn space(&self) -> io::Result<Option<(u64, u64)>> {
        self.inner.space()
    }
}

/// A file that is being sealed.
struct Sealing {
    plain: File,
    sealed: File,
    sealer: Sealer,
}

impl Sealing {
    fn begin(from: &Path, to: &Path, sealer: Sealer) -> io::Result<Self> {
        let plain = File::open(from)?;
        let mut sealed = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
        sealed.write_all(&sealer.header())?;
        Ok(Self { plain, sealed, sealer })
    }

    /// Seals some chunks; whether more follow.
    fn go_on(&mut self) -> io::Result<bool> {
        let mut piece = Vec::with_capacity(PIECE_BYTES + PIECE_BYTES / 1024);
        while piece.len() < PIECE_BYTES
            && let Some(length) = self.sealer.wants()
        {
            let mut chunk = vec![0; length];
            self.plain.read_exact(&mut chunk)?;
            self.sealer.seal(&mut chunk).map_err(io::Error::other)?;
            piece.append(&mut chunk);
        }
        self.sealed.write_all(&piece)?;
        match self.sealer.wants() {
            Some(_) => Ok(true),
            None if self.plain.read(&mut [0])? > 0 => {
                Err(io::Error::other("the artifact grew while it was sealed"))
            }
            None => Ok(false),
        }
    }
}

/// Seals a file beside itself, piece by piece: nothing goes on for long when nobody waits any more.
async fn seal(staged: &Path, sealer: Sealer) -> io::Result<PathBuf> {
    let mut name = staged.as_os_str().to_owned();
    name.push(".sealed");
    let (from, to) = (staged.to_owned(), PathBuf::from(name));
    let target = to.clone();
    let mut sealing = blocking(move || Sealing::begin(&from, &target, sealer)).await?;
    loop {
        let (back, more) = blocking(move || {
            let more = sealing.go_on()?;
            Ok((sealing, more))
        })
        .await?;
        if !more {
            return Ok(to);
        }
        sealing = back;
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

struct SealedReader {
    inner: OpenArtifact,
    file: Arc<Opener>,
    name: String,
    broken: Arc<Broken>,
}

/// A part on its way: what comes from the store, and what of it has been opened.
struct Opening {
    pieces: BoxStream<'static, io::Result<Bytes>>,
    part: Part,
    name: String,
    broken: Arc<Broken>,
}

impl Opening {
    /// The next plain bytes; an error, and nothing behind it, where the file is not what was sealed.
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        loop {
            let Some(piece) = self.pieces.next().await else {
                let finished = self.part.finish();
                return finished.map(|()| None).map_err(|error| damaged(&self.name, &error));
            };
            let plain = match self.part.feed(&piece?) {
                Ok(plain) => plain,
                Err(error) => {
                    if matches!(error, SealedError::Chunk { .. }) {
                        self.broken.names().insert(self.name.clone());
                    }
                    return Err(damaged(&self.name, &error));
                }
            };
            if !plain.is_empty() {
                return Ok(Some((plain.into(), self)));
            }
        }
    }
}

impl ReadRange for SealedReader {
    fn read(&self, range: Range<u64>) -> BoxStream<'static, io::Result<Bytes>> {
        let part = Part::new(Arc::clone(&self.file), range);
        let needed = part.sealed();
        if needed.is_empty() {
            return stream::empty().boxed();
        }
        let pieces = self.inner.read(needed);
        let (name, broken) = (self.name.clone(), Arc::clone(&self.broken));
        let opening = Opening { pieces, part, name, broken };
        stream::try_unfold(opening, Opening::next).boxed()
    }
}

#[cfg(test)]
mod tests;
