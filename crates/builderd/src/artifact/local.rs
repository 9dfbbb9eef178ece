//! Artifacts as files of one directory, `artifacts/<domain>/<name>`; what is being made lies
//! in `staging/` on the same file system, so that publishing is a rename.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use rustix::fs::OFlags;

use super::{ArtifactStore, OpenArtifact, ReadRange, Stored};
use crate::private;

/// Bytes read at once.
const PIECE_BYTES: u64 = 256 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct LocalArtifacts {
    root: PathBuf,
    staging: PathBuf,
}

impl LocalArtifacts {
    /// Uses `root`, which is made if need be.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let root = std::path::absolute(root)?;
        let (artifacts, staging) = (root.join("artifacts"), root.join("staging"));
        private::make_directory(&root)?;
        private::make_directory_below(&root, &artifacts)?;
        private::make_own_directory(&staging)?;
        Ok(Self { root: artifacts, staging })
    }

    /// Makes an artifact younger, if it is there.
    pub(crate) async fn touch(&self, key: &str) -> io::Result<()> {
        let path = self.file(key)?;
        blocking(move || match File::options().append(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            opened => opened?.set_modified(now()),
        })
        .await
    }

    fn file(&self, key: &str) -> io::Result<PathBuf> {
        let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
        match key.split('/').all(plain) {
            true => Ok(self.root.join(key)),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "no key of an artifact")),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[async_trait]
impl ArtifactStore for LocalArtifacts {
    fn staging(&self) -> &Path {
        &self.staging
    }

    async fn publish(&self, staged: &Path, key: &str) -> io::Result<()> {
        let (root, staged, target) = (self.root.clone(), staged.to_owned(), self.file(key)?);
        blocking(move || {
            let directory = target.parent().map(Path::to_owned).unwrap_or_default();
            private::make_directory_below(&root, &directory)?;
            if target.exists() {
                // Younger again, so that a sweep that saw it unused leaves it alone.
                File::options().append(true).open(&target)?.set_modified(now())?;
                return fs::remove_file(&staged);
            }
            // The row that names the file may survive a power failure; so must the file.
            File::open(&staged)?.sync_all()?;
            fs::rename(&staged, &target)?;
            sync_directory(&directory)
        })
        .await
    }

    async fn settle(&self) {}

    async fn open(&self, key: &str) -> io::Result<Option<OpenArtifact>> {
        let path = self.file(key)?;
        blocking(move || {
            // Nothing here is a link, whoever made it.
            let flags = i32::try_from(OFlags::NOFOLLOW.bits()).map_err(io::Error::other)?;
            let file = match File::options().read(true).custom_flags(flags).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            let size_bytes = file.metadata()?.len();
            let reader = Box::new(LocalReader(Arc::new(file)));
            Ok(Some(OpenArtifact { size_bytes, reader }))
        })
        .await
    }

    async fn remove(&self, key: &str) -> io::Result<()> {
        let path = self.file(key)?;
        blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
        .await
    }

    async fn list(&self) -> io::Result<Vec<Stored>> {
        let root = self.root.clone();
        blocking(move || {
            let mut found = Vec::new();
            for domain in fs::read_dir(&root)? {
                let domain = domain?;
                if domain.file_type()?.is_dir() {
                    list_domain(&domain.path(), &domain.file_name().to_string_lossy(), &mut found)?;
                }
            }
            Ok(found)
        })
        .await
    }

    fn path(&self, key: &str) -> String {
        self.root.join(key).to_string_lossy().into_owned()
    }

    fn space(&self) -> io::Result<Option<(u64, u64)>> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(Some((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize)))
    }
}

fn list_domain(directory: &Path, domain: &str, found: &mut Vec<Stored>) -> io::Result<()> {
    for file in fs::read_dir(directory)? {
        let file = file?;
        let metadata = match file.metadata() {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => continue,
            // Removed while it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let age = metadata.modified()?.elapsed().unwrap_or_default();
        found.push(Stored {
            key: format!("{domain}/{}", file.file_name().to_string_lossy()),
            age_secs: age.as_secs(),
            size_bytes: metadata.len(),
        });
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a file's time, which no rule depends on")]
fn now() -> std::time::SystemTime {
    std::time::SystemTime::now()
}

struct LocalReader(Arc<File>);

impl ReadRange for LocalReader {
    fn read(&self, range: Range<u64>) -> BoxStream<'static, io::Result<Bytes>> {
        let file = Arc::clone(&self.0);
        stream::try_unfold(range.start, move |offset| {
            let file = Arc::clone(&file);
            let length = PIECE_BYTES.min(range.end.saturating_sub(offset));
            async move {
                if length == 0 {
                    return Ok(None);
                }
                let piece = blocking(move || {
                    let mut piece = vec![0; usize::try_from(length).map_err(io::Error::other)?];
                    file.read_exact_at(&mut piece, offset)?;
                    Ok(Bytes::from(piece))
                })
                .await?;
                Ok(Some((piece, offset + length)))
            }
        })
        .boxed()
    }
}
