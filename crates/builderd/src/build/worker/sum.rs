//! The sum of an artifact, as the service itself finds it: artifacts are filed, and shared, under it,
//! so the word of the process that made the file does not count.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use crate::build::output::ImageSum;

/// Bytes between two looks whether anybody waits still.
const PIECE_BYTES: u64 = 32 << 20;

/// SHA-256 of the first `size_bytes` of the file at `path`, in hex. May be dropped at any point: it
/// goes on for no longer than one piece takes.
///
/// # Errors
/// When the file cannot be read, or is shorter.
pub(super) async fn of_file(path: &Path, size_bytes: u64) -> io::Result<String> {
    let wanted = Arc::new(());
    let (path, waits) = (path.to_owned(), Arc::downgrade(&wanted));
    let sum = tokio::task::spawn_blocking(move || read(path, size_bytes, &waits)).await;
    drop(wanted);
    sum.map_err(io::Error::other)?
}

fn read(path: PathBuf, size_bytes: u64, waits: &Weak<()>) -> io::Result<String> {
    let file = File::open(path)?;
    let mut sum = ImageSum::new();
    let mut end = 0;
    while end < size_bytes {
        if waits.strong_count() == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        end = size_bytes.min(end + PIECE_BYTES);
        sum.file(&file, end)?;
    }
    Ok(sum.finish())
}

/// Writes the sum where the metadata that lies beside an artifact has it.
pub(super) fn tell(metadata: &mut serde_json::Value, sha256: &str) {
    let artifact = metadata.get_mut("artifact").and_then(serde_json::Value::as_object_mut);
    if let Some(artifact) = artifact {
        artifact.insert("sha256".into(), sha256.into());
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::build::hex;

    #[tokio::test]
    async fn the_sum_of_a_file_is_that_of_all_its_bytes_holes_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made");
        let mut bytes = vec![0; usize::try_from(PIECE_BYTES).unwrap() + 5000];
        bytes[4096] = 1;
        *bytes.last_mut().unwrap() = 2;
        let file = File::create(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for at in [4096, bytes.len() - 1] {
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..=at], at as u64).unwrap();
        }
        let sum = of_file(&path, bytes.len() as u64).await.unwrap();
        assert_eq!(sum, hex(&Sha256::digest(&bytes)));
        assert_eq!(of_file(&path, 0).await.unwrap(), hex(&Sha256::digest(b"")));
        of_file(&directory.path().join("other"), 1).await.unwrap_err();
    }

    #[test]
    fn a_sum_that_nobody_waits_for_is_not_computed_to_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made");
        // Hashing it takes years.
        File::create(&path).unwrap().set_len(1 << 43).unwrap();
        let wanted = Arc::new(());
        let waits = Arc::downgrade(&wanted);
        let work = std::thread::spawn(move || read(path, 1 << 43, &waits));
        drop(wanted);
        let error = work.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn metadata_that_is_none_is_left_as_it_is() {
        for mut odd in [serde_json::json!(5), serde_json::json!({"artifact": []})] {
            let before = odd.clone();
            tell(&mut odd, "ab");
            assert_eq!(odd, before);
        }
        let mut made = serde_json::json!({"artifact": {"sha256": "lie", "size_bytes": 5}});
        tell(&mut made, "ab");
        assert_eq!(made, serde_json::json!({"artifact": {"sha256": "ab", "size_bytes": 5}}));
    }
}
