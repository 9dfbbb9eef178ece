//! An artifact store that says what it did: each operation with how it ended and how long it
//! took. What is asked and answered goes through as it is; it does not know whose artifacts
//! they are, since one that is shared is nobody's.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};

use super::{ArtifactStore, OpenArtifact, ReadRange, Stored};
use crate::telemetry::Metrics;

/// See the module.
pub(crate) struct MeteredArtifacts {
    inner: Arc<dyn ArtifactStore>,
    teller: Teller,
}

/// Who is told.
#[derive(Clone)]
struct Teller {
    metrics: Arc<Metrics>,
    backend: &'static str,
}

impl Teller {
    fn tell(&self, operation: &'static str, status: &'static str, started: Instant) {
        self.metrics.storage_operation(self.backend, operation, status, started.elapsed());
    }
}

impl MeteredArtifacts {
    /// `backend` is what the settings call it.
    pub(crate) fn new(
        inner: Arc<dyn ArtifactStore>,
        backend: &'static str,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { inner, teller: Teller { metrics, backend } }
    }

    async fn told<T>(
        &self,
        operation: &'static str,
        work: impl Future<Output = io::Result<T>> + Send,
    ) -> io::Result<T> {
        let started = Instant::now();
        let done = work.await;
        self.teller.tell(operation, if done.is_ok() { "ok" } else { "error" }, started);
        done
    }
}

#[async_trait]
impl ArtifactStore for MeteredArtifacts {
    fn staging(&self) -> &Path {
        self.inner.staging()
    }

    async fn publish(&self, staged: &Path, key: &str) -> io::Result<()> {
        self.told("put", self.inner.publish(staged, key)).await
    }

    async fn settle(&self) {
        self.inner.settle().await;
    }

    async fn open(&self, key: &str) -> io::Result<Option<OpenArtifact>> {
        let found = self.told("head", self.inner.open(key)).await?;
        Ok(found.map(|open| {
            let reader = MeteredReader { inner: open.reader, teller: self.teller.clone() };
            OpenArtifact { size_bytes: open.size_bytes, reader: Box::new(reader) }
        }))
    }

    async fn remove(&self, key: &str) -> io::Result<()> {
        self.told("delete", self.inner.remove(key)).await
    }

    async fn list(&self) -> io::Result<Vec<Stored>> {
        self.told("list", self.inner.list()).await
    }

    fn path(&self, key: &str) -> String {
        self.inner.path(key)
    }

    fn space(&self) -> io::Result<Option<(u64, u64)>> {
        self.inner.space()
    }
}

struct MeteredReader {
    inner: Box<dyn ReadRange>,
    teller: Teller,
}

impl ReadRange for MeteredReader {
    fn read(&self, range: Range<u64>) -> BoxStream<'static, io::Result<Bytes>> {
        let left_bytes = range.end.saturating_sub(range.start);
        let transfer = Transfer {
            teller: self.teller.clone(),
            started: Instant::now(),
            left_bytes,
            has_failed: false,
        };
        let pieces = self.inner.read(range);
        stream::unfold((pieces, transfer), |(mut pieces, mut transfer)| async move {
            let piece = pieces.next().await?;
            transfer.note(&piece);
            Some((piece, (pieces, transfer)))
        })
        .boxed()
    }
}

/// Bytes on their way to somebody. Who has all of them does not ask for more, so that it is told
/// when this is dropped.
struct Transfer {
    teller: Teller,
    started: Instant,
    left_bytes: u64,
    has_failed: bool,
}

impl Transfer {
    fn note(&mut self, piece: &io::Result<Bytes>) {
        match piece {
            Ok(bytes) => self.left_bytes = self.left_bytes.saturating_sub(bytes.len() as u64),
            Err(_) => self.has_failed = true,
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let status = match (self.has_failed, self.left_bytes) {
            (true, _) => "error",
            (false, 0) => "ok",
            (false, _) => "cut",
        };
        self.teller.tell("get", status, self.started);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::LocalArtifacts;
    use crate::telemetry::tests::readable;

    #[tokio::test]
    async fn operations_are_counted_where_they_happen_and_as_they_end() {
        let directory = tempfile::tempdir().unwrap();
        let local = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
        let telemetry = readable(false);
        let store = MeteredArtifacts::new(local, "local", telemetry.metrics());
        let staged = store.staging().join("made");
        std::fs::write(&staged, vec![7; 700_000]).unwrap();
        store.publish(&staged, "public/ab").await.unwrap();
        store.publish(&staged, "../ab").await.unwrap_err();

        let whole = store.open("public/ab").await.unwrap().unwrap();
        assert_eq!(whole.size_bytes, 700_000);
        assert_eq!(whole.read(0..700_000).count().await, 3);
        let mut part = store.open("public/ab").await.unwrap().unwrap().read(0..300_000);
        assert!(part.next().await.unwrap().is_ok());
        drop(part);
        // A caller that has all it wanted does not look for the end.
        let mut small = store.open("public/ab").await.unwrap().unwrap().read(0..9);
        assert_eq!(small.next().await.unwrap().unwrap().len(), 9);
        drop(small);
        let behind = store.open("public/ab").await.unwrap().unwrap().read(699_999..700_009);
        assert!(behind.collect::<Vec<_>>().await.iter().any(Result::is_err));

        assert_eq!(store.list().await.unwrap().len(), 1);
        store.remove("public/ab").await.unwrap();
        assert!(store.open("public/ab").await.unwrap().is_none());

        let text = telemetry.metrics().render();
        for (operation, status, count) in [
            ("put", "ok", 1),
            ("put", "error", 1),
            ("head", "ok", 5),
            ("get", "ok", 2),
            ("get", "cut", 1),
            ("get", "error", 1),
            ("list", "ok", 1),
            ("delete", "ok", 1),
        ] {
            let labels = format!(r#"backend="local",operation="{operation}",status="{status}""#);
            let line = format!("builderd_storage_operations_total{{{labels}}} {count}\n");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        let timed = "builderd_storage_operation_duration_seconds_count\
                     {backend=\"local\",operation=\"get\"} 4";
        assert!(text.contains(timed), "{text}");
    }
}
