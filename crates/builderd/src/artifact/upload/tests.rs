//! What becomes of uploads that end early, on a store that counts them.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, UploadPart,
};
use tempfile::TempDir;
use tokio::sync::Notify;

use super::*;
use crate::artifact::{ArtifactStore, ObjectArtifacts};

type Answer<T> = object_store::Result<T>;

/// What happened to uploads.
#[derive(Debug, Default)]
struct Tally {
    begun: AtomicU32,
    parts_running: AtomicU32,
    completed: AtomicU32,
    /// Aborted while no part was on its way.
    aborted: AtomicU32,
    are_parts_stuck: AtomicBool,
    fails_after: AtomicU32,
    changed: Notify,
}

/// Memory, with uploads that are counted.
#[derive(Debug, Default)]
struct Counted {
    inner: InMemory,
    tally: Arc<Tally>,
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("counted")
    }
}

#[async_trait]
impl ObjectStore for Counted {
    async fn put_opts(&self, at: &Key, data: PutPayload, opts: PutOptions) -> Answer<PutResult> {
        self.inner.put_opts(at, data, opts).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Key,
        opts: PutMultipartOptions,
    ) -> Answer<Box<dyn MultipartUpload>> {
        self.tally.begun.fetch_add(1, Ordering::SeqCst);
        let inner = self.inner.put_multipart_opts(at, opts).await?;
        Ok(Box::new(CountedUpload { inner, tally: Arc::clone(&self.tally) }))
    }

    async fn get_opts(&self, at: &Key, options: GetOptions) -> Answer<GetResult> {
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Answer<Key>>,
    ) -> BoxStream<'static, Answer<Key>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Answer<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Answer<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Key, to: &Key, options: CopyOptions) -> Answer<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct CountedUpload {
    inner: Box<dyn MultipartUpload>,
    tally: Arc<Tally>,
}

/// A part on its way; also one that is given up arrives no more.
struct Running(Arc<Tally>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.parts_running.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl MultipartUpload for CountedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (sent, tally) = (self.inner.put_part(data), Arc::clone(&self.tally));
        async move {
            tally.parts_running.fetch_add(1, Ordering::SeqCst);
            let running = Running(Arc::clone(&tally));
            tally.changed.notify_waiters();
            if tally.are_parts_stuck.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            drop(running);
            if tally.fails_after.fetch_sub(1, Ordering::SeqCst) == 0 {
                let source = "the bucket is gone".into();
                return Err(object_store::Error::Generic { store: "counted", source });
            }
            sent.await
        }
        .boxed()
    }

    async fn complete(&mut self) -> Answer<PutResult> {
        self.tally.completed.fetch_add(1, Ordering::SeqCst);
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Answer<()> {
        if self.tally.parts_running.load(Ordering::SeqCst) == 0 {
            self.tally.aborted.fetch_add(1, Ordering::SeqCst);
        }
        self.inner.abort().await
    }
}

struct Story {
    tally: Arc<Tally>,
    artifacts: ObjectArtifacts,
    staged: PathBuf,
    _directory: TempDir,
}

impl Story {
    /// A file of so many bytes is to be stored.
    fn new(bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Counted::default();
        store.tally.fails_after.store(u32::MAX, Ordering::SeqCst);
        let tally = Arc::clone(&store.tally);
        let artifacts =
            ObjectArtifacts::open(Arc::new(store), "s3://b", "p", directory.path()).unwrap();
        let staged = artifacts.staging().join("made");
        std::fs::write(&staged, content(bytes)).unwrap();
        Self { tally, artifacts, staged, _directory: directory }
    }

    async fn stored(&self) -> Option<Vec<u8>> {
        use futures_util::TryStreamExt as _;
        let open = self.artifacts.open("public/ab").await.unwrap()?;
        let size = open.size_bytes;
        let pieces: Vec<bytes::Bytes> = open.read(0..size).try_collect().await.unwrap();
        Some(pieces.concat())
    }

    fn counts(&self) -> (u32, u32, u32) {
        let count = |count: &AtomicU32| count.load(Ordering::SeqCst);
        (count(&self.tally.begun), count(&self.tally.completed), count(&self.tally.aborted))
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..=250u8).cycle().take(bytes).collect()
}

#[tokio::test]
async fn files_of_every_size_arrive_whole() {
    let whole = PIECE_BYTES;
    for bytes in [1, whole - 1, whole, whole + 1, 3 * whole, 3 * whole + 7] {
        let story = Story::new(bytes);
        story.artifacts.publish(&story.staged, "public/ab").await.unwrap();
        assert!(story.stored().await == Some(content(bytes)), "{bytes} bytes");
        let in_parts = u32::from(bytes >= whole);
        assert_eq!(story.counts(), (in_parts, in_parts, 0), "{bytes} bytes");
        assert!(!story.staged.exists());
    }
}

#[tokio::test]
async fn an_upload_whose_build_is_cancelled_is_aborted() {
    let story = Story::new(5 * PIECE_BYTES);
    story.tally.are_parts_stuck.store(true, Ordering::SeqCst);
    {
        let publish = story.artifacts.publish(&story.staged, "public/ab");
        let under_way = async {
            while story.tally.parts_running.load(Ordering::SeqCst) < 2 {
                story.tally.changed.notified().await;
            }
        };
        // As a worker does it that hears of a cancel: what loses is dropped.
        tokio::select! {
            published = publish => panic!("{published:?}"),
            () = under_way => {}
        }
    }
    story.artifacts.settle().await;
    assert_eq!(story.counts(), (1, 0, 1));
    assert_eq!(story.stored().await, None);
}

#[tokio::test]
async fn an_upload_that_fails_is_aborted_and_says_why() {
    let story = Story::new(5 * PIECE_BYTES);
    story.tally.fails_after.store(2, Ordering::SeqCst);
    let error = story.artifacts.publish(&story.staged, "public/ab").await.unwrap_err();
    assert!(format!("{error:?}").contains("the bucket is gone"), "{error:?}");
    assert_eq!(story.counts(), (1, 0, 1));
    assert!(story.staged.exists(), "it can be tried again");
}
