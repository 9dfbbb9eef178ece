//! Where finished images lie. Keys name content: `<domain>/<sha256>`, and with `.sealed-<key>`
//! behind it content that lies encrypted; who may read which key is the database's business, never
//! decided here.
//!
//! A file becomes visible whole or not at all. The database row is what makes it count: a file
//! that no row names is removed by the janitor after a grace time.

mod local;
mod metered;
mod object;
mod sealed;
mod upload;

use std::io;
use std::ops::Range;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

pub(crate) use self::sealed::{ArtifactKeys, SealedArtifacts, sealed_name};
pub(crate) use local::LocalArtifacts;
pub(crate) use metered::MeteredArtifacts;
pub(crate) use object::ObjectArtifacts;

/// An artifact, open for reading.
pub struct OpenArtifact {
    /// Its size in bytes.
    pub size_bytes: u64,
    reader: Box<dyn ReadRange>,
}

impl OpenArtifact {
    /// The bytes of `range`, in pieces.
    pub fn read(&self, range: Range<u64>) -> BoxStream<'static, io::Result<Bytes>> {
        self.reader.read(range)
    }
}

impl std::fmt::Debug for OpenArtifact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenArtifact").field("size_bytes", &self.size_bytes).finish()
    }
}

/// What an open artifact can do.
trait ReadRange: Send {
    fn read(&self, range: Range<u64>) -> BoxStream<'static, io::Result<Bytes>>;
}

/// One stored file that may be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its key.
    pub key: String,
    /// Seconds since it was written.
    pub age_secs: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A place for artifacts.
#[async_trait]
pub trait ArtifactStore: Send + Sync {
    /// Where the files that become artifacts are to be made.
    fn staging(&self) -> &Path;
    /// Stores the file at `staged` under `key`; the file is gone afterwards. A key that exists
    /// has the same content and stays.
    async fn publish(&self, staged: &Path, key: &str) -> io::Result<()>;
    /// Waits a moment until nothing is left of what was broken off: for the end of the service.
    async fn settle(&self);
    /// Opens an artifact; none if there is none.
    async fn open(&self, key: &str) -> io::Result<Option<OpenArtifact>>;
    /// Whether whoever read the artifact here found it damaged, and nobody has stored it anew.
    fn was_damaged(&self, _key: &str) -> bool {
        false
    }
    /// Removes an artifact; one that is gone is fine.
    async fn remove(&self, key: &str) -> io::Result<()>;
    /// Everything stored.
    async fn list(&self) -> io::Result<Vec<Stored>>;
    /// The key as users of the machine find it: a path, or a URL.
    fn path(&self, key: &str) -> String;
    /// Free and all bytes of the place, where it has a size.
    fn space(&self) -> io::Result<Option<(u64, u64)>>;
}
