//! Sealed artifacts over both kinds of store: parts, damage, and what lies on the disk.

use object_store::memory::InMemory;
use tempfile::TempDir;

use super::*;
use crate::artifact::{LocalArtifacts, ObjectArtifacts};

const CANARY: &[u8] = b"canary-8127-of-an-enterprise";

/// Keys of the tenant `a`: all of one kind but one, which is not there.
struct Keys;

const GOOD: KeyId = KeyId([1; 16]);
const OTHER: KeyId = KeyId([2; 16]);
const GONE: KeyId = KeyId([9; 16]);

#[async_trait]
impl ArtifactKeys for Keys {
    async fn key(&self, tenant: &TenantId, id: KeyId) -> io::Result<Option<DataKey>> {
        let is_there = tenant.as_str() == "a" && id != GONE;
        Ok(is_there.then(|| DataKey::new(Box::new([id.0[0]; 32]))))
    }
}

/// A store, and the one below it.
struct Place {
    store: SealedArtifacts,
    below: Arc<dyn ArtifactStore>,
    directory: TempDir,
}

impl Place {
    fn all() -> [Self; 2] {
        let new = |below: &dyn Fn(&Path) -> Arc<dyn ArtifactStore>| {
            let directory = tempfile::tempdir().unwrap();
            let below = below(directory.path());
            let store = SealedArtifacts::new(Arc::clone(&below), Arc::new(Keys));
            Self { store, below, directory }
        };
        let bucket = |path: &Path| {
            ObjectArtifacts::open(Arc::new(InMemory::new()), "s3://b", "p", path).unwrap()
        };
        [
            new(&|path| Arc::new(LocalArtifacts::open(path).unwrap())),
            new(&|path| Arc::new(bucket(path))),
        ]
    }

    fn stage(&self, content: &[u8]) -> PathBuf {
        let staged = self.store.staging().join("made");
        std::fs::write(&staged, content).unwrap();
        staged
    }

    async fn publish(&self, content: &[u8], name: &str) {
        self.store.publish(&self.stage(content), name).await.unwrap();
        assert_eq!(std::fs::read_dir(self.store.staging()).unwrap().count(), 0);
    }

    /// What lies in the store.
    async fn stored(&self, name: &str) -> Vec<u8> {
        let open = self.below.open(name).await.unwrap().unwrap();
        let pieces: Vec<Bytes> = open.read(0..open.size_bytes).try_collect().await.unwrap();
        pieces.concat()
    }

    /// Puts other bytes in the place of what lies there.
    async fn replace(&self, name: &str, content: &[u8]) {
        self.below.remove(name).await.unwrap();
        self.below.publish(&self.stage(content), name).await.unwrap();
    }

    async fn read(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let open = self.store.open(name).await?.expect("it is there");
        let pieces: Vec<Bytes> = open.read(range).try_collect().await?;
        Ok(pieces.concat())
    }
}

/// Several pieces of a read, many chunks, and a multiple of neither.
fn content() -> Vec<u8> {
    let mut content: Vec<u8> = (0..700_001u32).map(|index| index.to_le_bytes()[1]).collect();
    content[300_000..300_000 + CANARY.len()].copy_from_slice(CANARY);
    content
}

fn name(key: KeyId) -> String {
    sealed_name("tenant-a/00.ext4", key)
}

/// Whether a file below `directory` holds the bytes.
fn is_anywhere(directory: &Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => is_anywhere(&path, bytes),
            false => std::fs::read(path).unwrap().windows(bytes.len()).any(|some| some == bytes),
        }
    })
}

#[tokio::test]
async fn a_sealed_artifact_reads_as_the_plain_one_and_lies_nowhere_plain() {
    let content = content();
    for place in Place::all() {
        place.publish(&content, &name(GOOD)).await;
        let open = place.store.open(&name(GOOD)).await.unwrap().unwrap();
        assert_eq!(open.size_bytes, 700_001);
        for range in [
            0..700_001,
            0..1,
            65_535..65_537,
            65_536..131_072,
            300_000..300_010,
            700_000..700_001,
            655_359..655_361,
        ] {
            let inside = [range.start, range.end].map(|offset| usize::try_from(offset).unwrap());
            let part = place.read(&name(GOOD), range.clone()).await.unwrap();
            assert!(part == content[inside[0]..inside[1]], "{range:?}");
        }
        assert!(!is_anywhere(place.directory.path(), CANARY));
        assert!(!place.stored(&name(GOOD)).await.windows(CANARY.len()).any(|some| some == CANARY));
        // The second time it is there.
        let before = place.stored(&name(GOOD)).await;
        place.publish(&content, &name(GOOD)).await;
        assert!(place.stored(&name(GOOD)).await == before);
        assert_eq!(place.store.list().await.unwrap().len(), 1);
        place.publish(b"", &name(OTHER)).await;
        assert_eq!(place.store.open(&name(OTHER)).await.unwrap().unwrap().size_bytes, 0);
        assert_eq!(place.read(&name(OTHER), 0..0).await.unwrap(), b"");
    }
}

#[tokio::test]
async fn what_is_not_sealed_goes_through() {
    for place in Place::all() {
        place.publish(CANARY, "public/00.ext4").await;
        assert_eq!(place.stored("public/00.ext4").await, CANARY);
        assert_eq!(place.read("public/00.ext4", 0..6).await.unwrap(), b"canary");
        assert!(place.store.open("public/01.ext4").await.unwrap().is_none());
        assert!(place.store.open(&name(GOOD)).await.unwrap().is_none());
        for name in ["public/00.sealed-01", "tenant-a/00.sealed-", "public/00.sealed-zz"] {
            assert!(place.store.open(name).await.is_err(), "{name}");
        }
        place.store.remove("public/00.ext4").await.unwrap();
        assert!(place.store.list().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_damaged_artifact_breaks_off_and_is_never_garbage() {
    let content = content();
    for place in Place::all() {
        place.publish(&content, &name(GOOD)).await;
        let whole = place.stored(&name(GOOD)).await;
        let mut changed = whole.clone();
        // In the third chunk.
        changed[HEADER_BYTES + 2 * (65_536 + 16) + 5] ^= 1;
        place.replace(&name(GOOD), &changed).await;
        let open = place.store.open(&name(GOOD)).await.unwrap().unwrap();
        let mut read = Vec::new();
        let mut pieces = open.read(0..700_001);
        let error = loop {
            match pieces.next().await.expect("an error comes before the end") {
                Ok(piece) => read.extend(piece),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        assert!(error.to_string().contains("chunk 2"), "{error}");
        assert!(read.len() <= 131_072 && content.starts_with(&read));
        assert!(pieces.next().await.is_none(), "nothing follows");
        // Parts before it are good still.
        assert!(place.read(&name(GOOD), 0..100).await.unwrap() == content[..100]);
        // A build does not take it, and makes it again though its header is good.
        assert!(place.store.was_damaged(&name(GOOD)) && !place.store.was_damaged(&name(OTHER)));
        place.publish(&content, &name(GOOD)).await;
        assert!(place.read(&name(GOOD), 0..700_001).await.unwrap() == content);
        assert!(!place.store.was_damaged(&name(GOOD)));
        let whole = place.stored(&name(GOOD)).await;

        let cut = &whole[..HEADER_BYTES + 65_536 + 16];
        for broken in [&whole[..whole.len() - 1], cut, &whole[..50], &content, b""] {
            place.replace(&name(GOOD), broken).await;
            let error = place.store.open(&name(GOOD)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
        // A build that makes it again mends it.
        place.publish(&content, &name(GOOD)).await;
        assert!(place.read(&name(GOOD), 0..700_001).await.unwrap() == content);
    }
}

#[tokio::test]
async fn an_artifact_does_not_open_in_the_place_of_another() {
    for place in Place::all() {
        place.publish(b"one", &name(GOOD)).await;
        place.publish(b"two", &name(OTHER)).await;
        let (one, moved) = (place.stored(&name(GOOD)).await, sealed_name("tenant-a/01.ext4", GOOD));
        place.replace(&name(OTHER), &one).await;
        assert!(place.store.open(&name(OTHER)).await.is_err());
        place.replace(&moved, &one).await;
        assert!(place.store.open(&moved).await.is_err());
        // Without its key, or as another tenant's, it does not open either.
        for name in [name(GONE), sealed_name("tenant-b/00.ext4", GOOD)] {
            place.replace(&name, &one).await;
            let error = place.store.open(&name).await.unwrap_err();
            assert!(error.to_string().contains("has no key"), "{error}");
            assert!(place.store.publish(&place.stage(b"x"), &name).await.is_err());
        }
        assert_eq!(place.read(&name(GOOD), 0..3).await.unwrap(), b"one");
    }
}
