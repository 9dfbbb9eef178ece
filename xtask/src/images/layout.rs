//! OCI layouts written by our own hand: tiny, crafted and generated images.
//!
//! Source of the format: OCI image-spec 1.1, `image-layout.md`. Checks nothing.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::tar::Tar;

/// A layout being filled, bottom layer first.
pub(crate) struct LayoutWriter {
    dir: PathBuf,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
}

/// What a layer's tar stream is written to.
pub(crate) type LayerTar<'a> = Tar<&'a mut dyn Write>;

impl LayoutWriter {
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("blobs/sha256"))?;
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self { dir: dir.to_path_buf(), layers: Vec::new(), diff_ids: Vec::new() })
    }

    /// Adds a gzip layer with the entries that `fill` writes.
    pub(crate) fn layer(
        &mut self,
        fill: impl FnOnce(&mut LayerTar<'_>) -> io::Result<()>,
    ) -> Result<()> {
        let part = self.dir.join("part");
        let file = Hashing::new(BufWriter::new(File::create(&part)?));
        let mut plain = Hashing::new(GzEncoder::new(file, Compression::fast()));
        {
            let mut tar: LayerTar<'_> = Tar::new(&mut plain);
            fill(&mut tar)?;
            tar.finish()?;
        }
        let (gzip, diff_id, _) = plain.finish();
        let (mut file, digest, size) = gzip.finish()?.finish();
        file.flush()?;
        std::fs::rename(&part, self.blob(&digest))?;
        self.list("+gzip", &digest, size, diff_id);
        Ok(())
    }

    /// Adds a layer whose compressed and plain bytes are given, whether they fit or not.
    pub(crate) fn raw_layer(&mut self, blob: &[u8], plain: &[u8]) -> Result<()> {
        self.raw_layer_as("+gzip", blob, plain)
    }

    /// The same with a compression's suffix of the media type, such as `+zstd`.
    pub(crate) fn raw_layer_as(&mut self, suffix: &str, blob: &[u8], plain: &[u8]) -> Result<()> {
        let digest = hex(Sha256::new_with_prefix(blob));
        std::fs::write(self.blob(&digest), blob)?;
        self.list(suffix, &digest, blob.len() as u64, hex(Sha256::new_with_prefix(plain)));
        Ok(())
    }

    /// Takes over a layer of another layout with its descriptor.
    pub(crate) fn adopt(&mut self, blob: &Path, layer: &Value, diff_id: &Value) -> Result<()> {
        let digest = layer["digest"].as_str().unwrap_or_default().trim_start_matches("sha256:");
        let target = self.blob(digest);
        if std::fs::hard_link(blob, &target).is_err() {
            std::fs::copy(blob, &target)?;
        }
        self.layers.push(layer.clone());
        let diff_id = diff_id.as_str().unwrap_or_default().trim_start_matches("sha256:");
        self.diff_ids.push(diff_id.to_owned());
        Ok(())
    }

    /// Writes configuration, manifest and index; the image is called `latest`.
    pub(crate) fn finish(self, config: &Value) -> Result<()> {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids.iter()
                .map(|id| format!("sha256:{id}")).collect::<Vec<_>>()},
        });
        let config =
            self.document(&config, "application/vnd.oci.image.config.v1+json", &Value::Null)?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": self.layers,
        });
        let names = json!({"org.opencontainers.image.ref.name": "latest"});
        let manifest =
            self.document(&manifest, "application/vnd.oci.image.manifest.v1+json", &names)?;
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        std::fs::write(self.dir.join("index.json"), index.to_string())?;
        Ok(())
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest)
    }

    fn list(&mut self, suffix: &str, digest: &str, size: u64, diff_id: String) {
        self.layers.push(json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
            "digest": format!("sha256:{digest}"), "size": size,
        }));
        self.diff_ids.push(diff_id);
    }

    fn document(&self, json: &Value, media_type: &str, annotations: &Value) -> Result<Value> {
        let bytes = json.to_string();
        let digest = hex(Sha256::new_with_prefix(&bytes));
        std::fs::write(self.blob(&digest), &bytes)?;
        let mut descriptor = json!({
            "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len(),
        });
        if !annotations.is_null() {
            descriptor["annotations"] = annotations.clone();
        }
        Ok(descriptor)
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Passes bytes on, hashing and counting them.
struct Hashing<W> {
    out: W,
    hash: Sha256,
    count: u64,
}

impl<W> Hashing<W> {
    fn new(out: W) -> Self {
        Self { out, hash: Sha256::new(), count: 0 }
    }

    fn finish(self) -> (W, String, u64) {
        (self.out, hex(self.hash), self.count)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
