//! Artifacts in an S3-compatible store or Google Cloud Storage. Keys name content, so that
//! writing one twice writes the same; nothing rests on conditional writes.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt as _};

use super::upload::Uploads;
use super::{ArtifactStore, OpenArtifact, ReadRange, Stored};
use crate::private;

/// Bytes of one part.
pub(super) const PIECE_BYTES: usize = 8 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct ObjectArtifacts {
    store: Arc<dyn ObjectStore>,
    /// Shown before keys: `s3://bucket/prefix`.
    url: String,
    prefix: String,
    staging: PathBuf,
    uploads: Uploads,
}

impl ObjectArtifacts {
    /// Keys go below `prefix`; files are made in `staging` first.
    pub(crate) fn open(
        store: Arc<dyn ObjectStore>,
        url: &str,
        prefix: &str,
        staging: &Path,
    ) -> io::Result<Self> {
        let staging = std::path::absolute(staging)?.join("staging");
        private::make_own_directory(&staging)?;
        let prefix = prefix.trim_matches('/').to_owned();
        Ok(Self { store, url: url.to_owned(), prefix, staging, uploads: Uploads::default() })
    }

    fn key(&self, key: &str) -> Key {
        match self.prefix.is_empty() {
            true => Key::from(format!("artifacts/{key}")),
            false => Key::from(format!("{}/artifacts/{key}", self.prefix)),
        }
    }
}

pub(super) fn failed(error: object_store::Error) -> io::Error {
    let kind = match matches!(error, object_store::Error::NotFound { .. }) {
        true => io::ErrorKind::NotFound,
        false => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

#[async_trait]
impl ArtifactStore for ObjectArtifacts {
    fn staging(&self) -> &Path {
        &self.staging
    }

    async fn publish(&self, staged: &Path, key: &str) -> io::Result<()> {
        let file = tokio::fs::File::open(staged).await?;
        self.uploads.put(Arc::clone(&self.store), self.key(key), file).await?;
        tokio::fs::remove_file(staged).await
    }

    async fn settle(&self) {
        self.uploads.settle().await;
    }

    async fn open(&self, key: &str) -> io::Result<Option<OpenArtifact>> {
        let key = self.key(key);
        match self.store.head(&key).await {
            Ok(found) => {
                let reader = Box::new(ObjectReader { store: Arc::clone(&self.store), key });
                Ok(Some(OpenArtifact { size_bytes: found.size, reader }))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    async fn remove(&self, key: &str) -> io::Result<()> {
        match self.store.delete(&self.key(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    async fn list(&self) -> io::Result<Vec<Stored>> {
        let prefix = self.key("");
        let skip = prefix.as_ref().len() + 1;
        let now = jiff::Timestamp::now().as_second();
        self.store
            .list(Some(&prefix))
            .map_ok(|object| Stored {
                key: object.location.as_ref().get(skip..).unwrap_or_default().to_owned(),
                age_secs: u64::try_from(now - object.last_modified.timestamp()).unwrap_or(0),
                size_bytes: object.size,
            })
            .map_err(failed)
            .try_collect()
            .await
    }

    fn path(&self, key: &str) -> String {
        format!("{}/{}", self.url, self.key(key))
    }

    fn space(&self) -> io::Result<Option<(u64, u64)>> {
        Ok(None)
    }
}

struct ObjectReader {
    store: Arc<dyn ObjectStore>,
    key: Key,
}

impl ReadRange for ObjectReader {
    fn read(&self, range: Range<u64>) -> BoxStream<'static, io::Result<Bytes>> {
        let options = GetOptions { range: Some(range.into()), ..GetOptions::default() };
        let (store, key) = (Arc::clone(&self.store), self.key.clone());
        stream::once(async move {
            let found = store.get_opts(&key, options).await.map_err(failed)?;
            Ok::<_, io::Error>(found.into_stream().map_err(failed))
        })
        .try_flatten()
        .boxed()
    }
}
