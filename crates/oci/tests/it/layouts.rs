//! OCI layout directories.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use oci::testing::descriptor;
use oci::{Digest, PullError, media_type};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{GZIP_LAYER, drain, layer, options, pull_layer, resolve};

/// A layout directory that is being written.
pub(crate) struct LayoutOnDisk {
    pub(crate) dir: TempDir,
    pub(crate) entries: Vec<Value>,
}

impl LayoutOnDisk {
    pub(crate) fn new() -> LayoutOnDisk {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        let marker = json!({"imageLayoutVersion": "1.0.0"}).to_string();
        std::fs::write(dir.path().join("oci-layout"), marker).unwrap();
        LayoutOnDisk { dir, entries: Vec::new() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn blob_path(&self, digest: Digest) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blob_path(digest), bytes).unwrap();
        digest
    }

    /// Adds an image of one layer; its manifest's and its layer's digest.
    pub(crate) fn put_image(
        &mut self,
        name: Option<&str>,
        architecture: &str,
        seed: u64,
    ) -> (Digest, Digest) {
        let (_, blob, diff_id) = layer(seed, 20_000);
        let layer = self.put_blob(&blob);
        let config = json!({"os": "linux", "architecture": architecture,
            "rootfs": {"diff_ids": [diff_id]}});
        let config = config.to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "config": descriptor(media_type::OCI_CONFIG, self.put_blob(config.as_bytes()), config.len()),
            "layers": [descriptor(GZIP_LAYER, layer, blob.len())],
        });
        let manifest = manifest.to_string();
        let digest = self.put_blob(manifest.as_bytes());
        let mut entry = descriptor(media_type::OCI_MANIFEST, digest, manifest.len());
        if let Some(name) = name {
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        self.entries.push(entry);
        self.write_index();
        (digest, layer)
    }

    pub(crate) fn write_index(&self) {
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        std::fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    fn source(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.path().display())
    }
}

async fn chosen(source: &str) -> Result<Digest, PullError> {
    let (_, image) = resolve(source, &options(&[]).0).await?;
    assert!(!image.anonymous);
    assert_eq!(image.name, source.trim_end_matches(':'));
    Ok(image.manifest_digest)
}

#[tokio::test]
async fn the_only_image_needs_no_name() {
    for name in [None, Some("v1")] {
        let mut layout = LayoutOnDisk::new();
        let (digest, _) = layout.put_image(name, "amd64", 1);
        assert_eq!(chosen(&layout.source("")).await.unwrap(), digest);
        let bytes = pull_layer(&layout.source(""), &options(&[]).0).await.unwrap();
        assert_eq!(bytes, layer(1, 20_000).1);
    }
}

#[tokio::test]
async fn several_images_are_told_apart_by_name() {
    let mut layout = LayoutOnDisk::new();
    let (one, _) = layout.put_image(Some("v1"), "amd64", 1);
    let (two, _) = layout.put_image(Some("docker.io/library/app:v2"), "amd64", 2);
    assert_eq!(chosen(&layout.source("v1")).await.unwrap(), one);
    assert_eq!(chosen(&layout.source("docker.io/library/app:v2")).await.unwrap(), two);
    assert_eq!(chosen(&layout.source("app:v2")).await.unwrap(), two);
    assert_eq!(chosen(&layout.source(&two.to_string())).await.unwrap(), two);
    let error = chosen(&layout.source("")).await.unwrap_err();
    assert!(matches!(&error, PullError::SeveralImages { available, .. }
        if *available == ["v1", "docker.io/library/app:v2"]));
    assert!(error.hint().unwrap().ends_with(&layout.source("v1")), "{:?}", error.hint());
    let error = chosen(&layout.source("v3")).await.unwrap_err();
    assert!(matches!(error, PullError::NoSuchTag { .. }));
    assert!(error.hint().unwrap().contains("colon"));
}

#[tokio::test]
async fn entries_of_one_name_are_the_platforms_of_one_image() {
    let mut layout = LayoutOnDisk::new();
    layout.put_image(None, "arm64", 1);
    let (amd64, _) = layout.put_image(None, "amd64", 2);
    layout.put_image(None, "amd64", 3);
    layout.entries[0]["platform"] = json!({"os": "linux", "architecture": "arm64"});
    layout.entries[1]["platform"] = json!({"os": "linux", "architecture": "amd64"});
    layout.entries[2]["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    layout.write_index();
    assert_eq!(chosen(&layout.source("")).await.unwrap(), amd64);
}

#[tokio::test]
async fn a_nested_index_is_followed() {
    let mut layout = LayoutOnDisk::new();
    let (amd64, _) = layout.put_image(None, "amd64", 1);
    let inner = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
        "manifests": layout.entries});
    let inner = inner.to_string();
    let digest = layout.put_blob(inner.as_bytes());
    layout.entries = vec![descriptor(media_type::OCI_INDEX, digest, inner.len())];
    layout.write_index();
    let (_, image) = resolve(&layout.source(""), &options(&[]).0).await.unwrap();
    assert_eq!((image.manifest_digest, image.index_digest), (amd64, Some(digest)));
}

#[tokio::test]
async fn a_changed_or_short_blob_is_noticed() {
    let mut layout = LayoutOnDisk::new();
    let (_, blob) = layout.put_image(None, "amd64", 1);
    let (fetcher, image) = resolve(&layout.source(""), &options(&[]).0).await.unwrap();
    let path = layout.blob_path(blob);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = drain(&mut stream).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { .. }));
    std::fs::write(&path, &bytes[1..]).unwrap();
    let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    assert!(matches!(error, PullError::SizeMismatch { .. }));
    std::fs::remove_file(&path).unwrap();
    let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    assert!(matches!(error, PullError::MissingBlob { digest, .. } if digest == blob));
}

#[tokio::test]
async fn nothing_outside_the_directory_is_read() {
    let mut layout = LayoutOnDisk::new();
    let (_, blob) = layout.put_image(None, "amd64", 1);
    let (fetcher, image) = resolve(&layout.source(""), &options(&[]).0).await.unwrap();
    let path = layout.blob_path(blob);
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::rename(&path, &secret).unwrap();
    // The bytes are right, the place is not.
    for target in
        [secret.clone(), PathBuf::from("../../../").join(secret.strip_prefix("/").unwrap())]
    {
        symlink(target, &path).unwrap();
        let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
        assert!(matches!(error, PullError::Io { .. }), "{error:?}");
        std::fs::remove_file(&path).unwrap();
    }
    std::fs::copy(&secret, layout.path().join("inside")).unwrap();
    symlink("../../inside", &path).unwrap();
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    drain(&mut stream).await.unwrap();
}

#[tokio::test]
async fn a_directory_that_is_no_layout_says_what_is_missing() {
    let layout = LayoutOnDisk::new();
    let path = layout.path().to_owned();
    let reason = || async {
        match chosen(&layout.source("")).await.unwrap_err() {
            PullError::NotALayout { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    };
    assert!(reason().await.starts_with("index.json: No such file"));
    std::fs::write(path.join("index.json"), "{}").unwrap();
    assert!(reason().await.contains("\"manifests\""));
    layout.write_index();
    assert!(reason().await.contains("lists no image"));
    std::fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion": "2.0.0"}"#).unwrap();
    assert!(reason().await.contains("2.0.0"));
    std::fs::remove_file(path.join("oci-layout")).unwrap();
    std::fs::create_dir(path.join("oci-layout")).unwrap();
    assert!(reason().await.contains("not a regular file"));
    let error = chosen("oci:/nonexistent/layout:").await.unwrap_err();
    assert!(matches!(error, PullError::Io { .. }));
}

#[tokio::test]
async fn a_fifo_in_place_of_a_file_does_not_hang() {
    let layout = LayoutOnDisk::new();
    rustix::fs::mkfifoat(rustix::fs::CWD, layout.path().join("index.json"), 0o600.into()).unwrap();
    let error = chosen(&layout.source("")).await.unwrap_err();
    assert!(matches!(error, PullError::NotALayout { .. }));
}
