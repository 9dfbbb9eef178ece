//! What stands beside the image: `rootfs.ext4.metadata.json` and the `.sha256` file.
//!
//! The first six fields are those that Unkey's builderd wrote, in its spelling and
//! with its omission of empty ones (Go's `omitempty`); the rest is ours. Nothing
//! here depends on when, where or by whom the image was built.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::LazyLock;

use oci::Image;
use serde::Serialize;

use super::{BuildSpec, Compression};

/// The facts about an image that whoever boots it needs.
#[derive(Clone, Debug, Serialize)]
pub struct ImageMetadata {
    /// The source as it was named.
    pub original_image: String,
    /// The config's `Cmd`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// The config's `Entrypoint`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The config's `WorkingDir`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// The config's `Env`; an entry without `=` has the empty value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Port numbers of the config's `ExposedPorts`, without the protocol.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,

    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Digest of the index it was chosen from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index_digest: Option<String>,
    /// Digest of the image's config: Docker's image id.
    pub config_digest: String,
    /// Digests of the layer blobs, bottom first.
    pub layers: Vec<String>,
    /// Digests of the layers' uncompressed tars, bottom first.
    pub diff_ids: Vec<String>,
    /// `os/architecture[/variant]`.
    pub platform: String,
    /// The config's `User`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// The config's `Volumes`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// The config's `Labels`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The config's `ExposedPorts` as they stand there (`53/udp`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports_with_protocol: Vec<String>,
    /// The config's `StopSignal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,

    /// The file system.
    pub filesystem: FilesystemMetadata,
    /// The image file.
    pub artifact: ArtifactMetadata,
    /// Name and version of the engine.
    pub engine: String,
}

/// The facts about the file system inside.
#[derive(Clone, Debug, Serialize)]
pub struct FilesystemMetadata {
    /// `ext4`.
    pub r#type: &'static str,
    /// Its UUID.
    pub uuid: String,
    /// Its size, holes included; the file is longer where a last group is too short to be of use.
    pub size_bytes: u64,
    /// Free space for the guest.
    pub free_bytes: u64,
    /// Content of files, as stored.
    pub data_bytes: u64,
    /// Inodes in use.
    pub inodes_used: u64,
    /// Inodes in all.
    pub inodes_total: u64,
    /// Whether it has a journal.
    pub journal: bool,
}

/// The facts about the file that was written.
#[derive(Clone, Debug, Serialize)]
pub struct ArtifactMetadata {
    /// Its size as stored, holes included.
    pub size_bytes: u64,
    /// `none`, `gzip` or `zstd`.
    pub compression: &'static str,
    /// SHA-256 of the file as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Size of the image after decompression, holes included; only of a compressed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncompressed_size_bytes: Option<u64>,
    /// SHA-256 of the image after decompression, where that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncompressed_sha256: Option<String>,
}

impl Compression {
    /// The word used on the command line and in metadata.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// The engine, as recorded in images and metadata, and as part of what artifacts are found by. Its
/// numbers change with the bytes of images (of packs, of trees, of file systems), which the program's
/// version does not say.
pub(crate) static ENGINE: LazyLock<String> = LazyLock::new(|| {
    let (packs, trees) = (rootfs::PACK_VERSION, rootfs::TREE_REVISION);
    format!("builderd engine {packs}.{trees}.{}", ext4::REVISION)
});

impl ImageMetadata {
    pub(super) fn new(
        image: &Image,
        filesystem: FilesystemMetadata,
        artifact: ArtifactMetadata,
    ) -> Self {
        let config = &image.config;
        let digests = |digest: &oci::Digest| digest.to_string();
        let ports: BTreeSet<&str> = config
            .exposed_ports
            .iter()
            .map(|port| port.split('/').next().unwrap_or(port))
            .collect();
        Self {
            original_image: image.name.clone(),
            command: config.cmd.clone(),
            entrypoint: config.entrypoint.clone(),
            working_dir: config.working_dir.clone(),
            env: config.env.iter().map(|entry| split_env(entry)).collect(),
            exposed_ports: ports.into_iter().map(str::to_owned).collect(),
            image_digest: digests(&image.manifest_digest),
            index_digest: image.index_digest.as_ref().map(digests),
            config_digest: digests(&image.config_digest),
            layers: image.layers.iter().map(|layer| digests(&layer.digest)).collect(),
            diff_ids: image.layers.iter().map(|layer| digests(&layer.diff_id)).collect(),
            platform: image.platform.to_string(),
            user: config.user.clone(),
            volumes: config.volumes.iter().cloned().collect(),
            labels: config.labels.clone(),
            exposed_ports_with_protocol: config.exposed_ports.iter().cloned().collect(),
            stop_signal: config.stop_signal.clone(),
            filesystem,
            artifact,
            engine: ENGINE.clone(),
        }
    }
}

fn split_env(entry: &str) -> (String, String) {
    let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
    (key.to_owned(), value.to_owned())
}

/// The line `sha256sum -c` reads, for a file of that name in the same directory.
///
/// A name with a backslash or a line break is escaped as coreutils does it.
pub(super) fn checksum_line(sha256: &str, name: &str) -> String {
    if name.contains(['\\', '\n', '\r']) {
        let name = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
        return format!("\\{sha256}  {name}\n");
    }
    format!("{sha256}  {name}\n")
}

/// The directory a file lies in.
pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl BuildSpec {
    /// The directory the output goes to.
    pub(super) fn output_directory(&self) -> &Path {
        directory_of(&self.output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_entry_splits_at_its_first_equals_sign() {
        assert_eq!(split_env("A=b=c"), ("A".into(), "b=c".into()));
        assert_eq!(split_env("ALONE"), ("ALONE".into(), String::new()));
    }

    #[test]
    fn a_checksum_line_is_what_coreutils_writes() {
        assert_eq!(checksum_line("ab", "x.ext4"), "ab  x.ext4\n");
        assert_eq!(checksum_line("ab", "a\nb"), "\\ab  a\\nb\n");
    }
}
