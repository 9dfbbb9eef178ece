//! A file on its way into an object store. The parts of an upload that broke off stay in the
//! bucket, seen by nobody and paid for, until somebody aborts the upload; an upload is therefore
//! a task of its own, which outlives whoever asked for it by as long as aborting takes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use object_store::path::Path as Key;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt as _};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::object::{PIECE_BYTES, failed};

/// Parts of one file that are on their way at once.
const PARTS_MAX: usize = 2;
/// How long aborting an upload may take.
const ABORT_MAX: Duration = Duration::from_secs(30);
/// How long the end of the service waits for uploads that are being aborted.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// Uploads that run.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    tasks: Mutex<JoinSet<()>>,
}

impl Uploads {
    /// Stores a file; nothing of it stays when the caller loses interest.
    pub(super) async fn put(
        &self,
        store: Arc<dyn ObjectStore>,
        key: Key,
        file: File,
    ) -> io::Result<()> {
        let (owner, end) = oneshot::channel();
        {
            let mut tasks = self.tasks();
            while tasks.try_join_next().is_some() {}
            tasks.spawn(upload(store, key, file, owner));
        }
        end.await.unwrap_or_else(|_| Err(io::Error::other("the upload was broken off")))
    }

    /// Waits until what was broken off is cleared away, for so long as an end of the service may
    /// take.
    pub(super) async fn settle(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks());
        let settled = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(SETTLE_MAX, settled).await.is_err() {
            tracing::warn!("parts of an upload that was broken off may have stayed in the bucket");
        }
    }

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Uploads a file as long as its owner listens.
async fn upload(
    store: Arc<dyn ObjectStore>,
    key: Key,
    mut file: File,
    mut owner: oneshot::Sender<io::Result<()>>,
) {
    let ended = match piece(&mut file).await {
        Ok(whole) if whole.len() < PIECE_BYTES => {
            tokio::select! {
                put = store.put(&key, whole.into()) => put.map(drop).map_err(failed),
                () = owner.closed() => return,
            }
        }
        // Whether it began is known only when this is answered.
        Ok(first) => match store.put_multipart(&key).await {
            Ok(upload) => {
                Parts { upload, running: JoinSet::new() }.put(&mut file, first, &mut owner).await
            }
            Err(error) => Err(failed(error)),
        },
        Err(error) => Err(error),
    };
    // An owner that has gone does not want to know.
    let _ = owner.send(ended);
}

/// The next bytes of a file: fewer than [`PIECE_BYTES`] at its end.
async fn piece(file: &mut File) -> io::Result<Vec<u8>> {
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    let most = u64::try_from(PIECE_BYTES).map_err(io::Error::other)?;
    file.take(most).read_to_end(&mut piece).await?;
    Ok(piece)
}

/// An upload in parts.
struct Parts {
    upload: Box<dyn MultipartUpload>,
    running: JoinSet<object_store::Result<()>>,
}

impl Parts {
    /// Sends all parts and completes the upload, or aborts it.
    async fn put(
        mut self,
        file: &mut File,
        first: Vec<u8>,
        owner: &mut oneshot::Sender<io::Result<()>>,
    ) -> io::Result<()> {
        let sent = tokio::select! {
            sent = self.send(file, first) => sent,
            () = owner.closed() => Err(io::ErrorKind::Interrupted.into()),
        };
        let ended = match sent {
            // Not broken off: whether it was done would not be known.
            Ok(()) => self.upload.complete().await.map(drop).map_err(failed),
            Err(error) => Err(error),
        };
        if ended.is_err() {
            self.abort().await;
        }
        ended
    }

    async fn send(&mut self, file: &mut File, first: Vec<u8>) -> io::Result<()> {
        let mut bytes = first;
        while !bytes.is_empty() {
            if self.running.len() >= PARTS_MAX {
                self.one_is_sent().await?;
            }
            self.running.spawn(self.upload.put_part(bytes.into()));
            bytes = piece(file).await?;
        }
        while !self.running.is_empty() {
            self.one_is_sent().await?;
        }
        Ok(())
    }

    async fn one_is_sent(&mut self) -> io::Result<()> {
        match self.running.join_next().await {
            Some(sent) => sent.map_err(io::Error::other)?.map_err(failed),
            None => Ok(()),
        }
    }

    async fn abort(mut self) {
        // A part that arrives behind the abort would stay.
        self.running.shutdown().await;
        match tokio::time::timeout(ABORT_MAX, self.upload.abort()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "an upload could not be aborted"),
            Err(_) => tracing::warn!("an upload could not be aborted in time"),
        }
    }
}

#[cfg(test)]
mod tests;
