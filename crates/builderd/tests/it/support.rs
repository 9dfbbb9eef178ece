//! Images made in memory, and the command that builds them.

pub(crate) mod postgres;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One layer of a test image: a tar under construction.
pub(crate) struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }

    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_600_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size);
        header
    }

    pub(crate) fn file(mut self, path: &str, content: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, 0o644, content.len() as u64);
        self.tar.append_data(&mut header, path, content).unwrap();
        self
    }

    pub(crate) fn program(mut self, path: &str, content: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, 0o755, content.len() as u64);
        self.tar.append_data(&mut header, path, content).unwrap();
        self
    }

    pub(crate) fn directory(mut self, path: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Directory, 0o755, 0);
        self.tar.append_data(&mut header, path, &[][..]).unwrap();
        self
    }

    pub(crate) fn symlink(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, path, target).unwrap();
        self
    }

    pub(crate) fn hard_link(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Link, 0o644, 0);
        self.tar.append_link(&mut header, path, target).unwrap();
        self
    }

    pub(crate) fn tar(self) -> Vec<u8> {
        self.tar.into_inner().unwrap()
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image of gzip'd layers, with a config that tells the truth unless it is bent.
pub(crate) struct TestImage {
    pub(crate) config: serde_json::Value,
    pub(crate) blobs: Vec<Vec<u8>>,
}

impl TestImage {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        let tars: Vec<Vec<u8>> = layers.into_iter().map(Layer::tar).collect();
        let diff_ids: Vec<String> =
            tars.iter().map(|tar| format!("sha256:{}", sha256(tar))).collect();
        let config = serde_json::json!({
            "os": "linux",
            "architecture": oci::Platform::of_this_machine().architecture,
            "created": "2024-03-01T12:00:00.5+02:00",
            "config": {
                "Env": ["PATH=/bin", "EMPTY="],
                "Cmd": ["serve"],
                "Entrypoint": ["/bin/app"],
                "WorkingDir": "/srv",
                "User": "app",
                "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "53/tcp": {}},
                "Volumes": {"/data": {}},
                "Labels": {"a": "b"},
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        Self { config, blobs: tars.iter().map(|tar| gzip(tar)).collect() }
    }

    pub(crate) fn manifest(&self, config: &[u8]) -> Vec<u8> {
        let layers: Vec<_> = self
            .blobs
            .iter()
            .map(|blob| {
                serde_json::json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": format!("sha256:{}", sha256(blob)),
                    "size": blob.len(),
                })
            })
            .collect();
        serde_json::to_vec(&serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": format!("sha256:{}", sha256(config)),
                "size": config.len(),
            },
            "layers": layers,
        }))
        .unwrap()
    }

    /// Writes the image as an OCI layout; gives the digest of its manifest.
    pub(crate) fn write_layout(&self, directory: &Path) -> String {
        let blobs = directory.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let config = serde_json::to_vec(&self.config).unwrap();
        let manifest = self.manifest(&config);
        for blob in self.blobs.iter().chain([&config, &manifest]) {
            std::fs::write(blobs.join(sha256(blob)), blob).unwrap();
        }
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": format!("sha256:{}", sha256(&manifest)),
                "size": manifest.len(),
            }],
        });
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
        format!("sha256:{}", sha256(&manifest))
    }
}

/// A place to work in: an image layout, a cache and outputs.
pub(crate) struct Workshop {
    pub(crate) directory: TempDir,
}

impl Workshop {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn with(image: &TestImage) -> Self {
        let workshop = Self::new();
        image.write_layout(&workshop.path("image"));
        workshop
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_builderd"));
        command
            .current_dir(self.directory.path())
            .env_clear()
            .env("UNKEY_BUILDERD_CACHE_DIR", self.path("cache"))
            .args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Builds the image layout; the arguments come after `--output`.
    pub(crate) fn build(&self, output: &str, arguments: &[&str]) -> Output {
        let mut all = vec!["build", "oci:image", "--progress", "plain", "-o", output];
        all.extend(arguments);
        self.run(&all)
    }

    pub(crate) fn build_well(&self, output: &str, arguments: &[&str]) -> String {
        let result = self.build(output, arguments);
        let text = String::from_utf8_lossy(&result.stderr).into_owned();
        assert!(result.status.success(), "{text}");
        text
    }

    /// The files of a directory below the workshop, sorted; empty when it does not exist.
    pub(crate) fn names(&self, directory: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(directory)) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub(crate) fn packs(&self) -> Vec<PathBuf> {
        self.names("cache/packs-v3/local")
            .into_iter()
            .filter(|name| name.ends_with(".pack"))
            .map(|name| self.path("cache/packs-v3/local").join(name))
            .collect()
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Bytes that do not compress and differ by `seed`.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}
