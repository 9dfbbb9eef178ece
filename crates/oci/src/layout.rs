//! OCI image layout directories (image spec `image-layout.md`), and choosing an image from an
//! `index.json`, which archives share.
//!
//! Blobs are opened beneath the directory, by names made from checked digests; no symbolic
//! link leads out. It does not verify content: `blob` does while streaming.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::Deserialize;

use crate::blob::{BlobStream, FilePart};
use crate::digest::Digest;
use crate::error::PullError;
use crate::manifest::{Descriptor, Document, ImageIndex, media_type};
use crate::reference::Reference;

pub(crate) const INDEX_BYTES_MAX: u64 = 4 << 20;

/// An opened layout directory.
#[derive(Debug)]
pub(crate) struct Layout {
    path: PathBuf,
    dir: OwnedFd,
    index: ImageIndex,
}

impl Layout {
    pub(crate) fn open(path: &Path) -> Result<Layout, PullError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| PullError::Io { path: path.to_owned(), source: errno.into() })?;
        let not_a_layout = |reason: String| PullError::NotALayout { path: path.to_owned(), reason };
        let read = |name: &str| {
            let missing = |source: std::io::Error| not_a_layout(format!("{name}: {source}"));
            let mut bytes = Vec::new();
            let file = open_beneath(&dir, name).map_err(missing)?;
            file.take(INDEX_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(missing)?;
            if bytes.len() as u64 > INDEX_BYTES_MAX {
                return Err(not_a_layout(format!("{name} is larger than {INDEX_BYTES_MAX} bytes")));
            }
            Ok(bytes)
        };
        let index =
            checked_index(&read("oci-layout")?, &read("index.json")?).map_err(not_a_layout)?;
        Ok(Layout { path: path.to_owned(), dir, index })
    }

    /// The entries that `tag` names, or the only image there is.
    pub(crate) fn select(&self, tag: Option<&str>) -> Result<Vec<Descriptor>, PullError> {
        select(&self.index, tag, &self.path, "oci")
    }

    pub(crate) fn blob(&self, digest: Digest, size_bytes: u64) -> Result<BlobStream, PullError> {
        let name = format!("blobs/sha256/{}", digest.hex());
        let path = self.path.join(&name);
        let file = match open_beneath(&self.dir, &name) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(PullError::MissingBlob { path: self.path.clone(), digest });
            }
            Err(source) => return Err(PullError::Io { path, source }),
        };
        let actual_bytes = match file.metadata() {
            Ok(metadata) => metadata.len(),
            Err(source) => return Err(PullError::Io { path, source }),
        };
        if actual_bytes != size_bytes {
            let what = format!("blob {digest}");
            return Err(PullError::SizeMismatch { what, expected_bytes: size_bytes, actual_bytes });
        }
        let part = FilePart { file: Arc::new(file), path, offset: 0, size_bytes };
        Ok(BlobStream::file(part, digest))
    }
}

/// Opens a regular file beneath a directory.
fn open_beneath(dir: &OwnedFd, name: &str) -> std::io::Result<File> {
    // NONBLOCK: opening a fifo must not hang; it is refused right after.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let opened = match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS | Errno::PERM) => open_step_by_step(dir, name, flags)?,
        Err(Errno::XDEV) => {
            return Err(std::io::Error::other("a symbolic link leads out of the directory"));
        }
        opened => opened?,
    };
    let file = File::from(opened);
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    Ok(file)
}

/// For kernels and sandboxes without `openat2`: no symbolic link at all is followed.
fn open_step_by_step(dir: &OwnedFd, name: &str, flags: OFlags) -> std::io::Result<OwnedFd> {
    let mut current = dir.try_clone()?;
    let mut parts = name.split('/').peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        let kind = if last { flags } else { OFlags::DIRECTORY | OFlags::CLOEXEC };
        current = rustix::fs::openat(&current, part, kind | OFlags::NOFOLLOW, Mode::empty())?;
    }
    Ok(current)
}

/// Reads a layout's two documents; the error is the reason why it is none.
pub(crate) fn checked_index(layout: &[u8], index: &[u8]) -> Result<ImageIndex, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Marker {
        image_layout_version: String,
    }
    let marker: Marker =
        serde_json::from_slice(layout).map_err(|error| format!("oci-layout: {error}"))?;
    if marker.image_layout_version != "1.0.0" {
        let version = crate::manifest::shown(&marker.image_layout_version);
        return Err(format!("its layout version is {version:?}, expected \"1.0.0\""));
    }
    match Document::parse(index, Some(media_type::OCI_INDEX), 0) {
        Ok(Document::Index(index)) => Ok(index),
        Ok(Document::Manifest(_)) => Err("index.json is no index".to_owned()),
        Err(error) => {
            use std::error::Error as _;
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            Err(format!("index.json: {error}{cause}"))
        }
    }
}

/// The names an entry of an `index.json` goes by.
fn names(entry: &Descriptor) -> impl Iterator<Item = &str> {
    ["org.opencontainers.image.ref.name", "io.containerd.image.name"]
        .into_iter()
        .filter_map(|key| entry.annotations.get(key).map(String::as_str))
}

/// The entries that `tag` names; without one, the entries of the only name there is. Several
/// entries of one name are taken for the platforms of one image.
pub(crate) fn select(
    index: &ImageIndex,
    tag: Option<&str>,
    path: &Path,
    transport: &'static str,
) -> Result<Vec<Descriptor>, PullError> {
    let usable =
        |entry: &&Descriptor| !entry.is_attestation() && (entry.is_index() || entry.is_manifest());
    let mut entries: Vec<Descriptor> = index.manifests.iter().filter(usable).cloned().collect();
    let available = |entries: &[Descriptor]| {
        let label =
            |e: &Descriptor| names(e).next().map_or_else(|| e.digest.to_string(), str::to_owned);
        let mut labels: Vec<String> = entries.iter().map(label).collect();
        labels.dedup();
        labels
    };
    let path = path.to_owned();
    if let Some(tag) = tag {
        let fits = |entry: &Descriptor| {
            entry.digest.to_string() == tag || names(entry).any(|name| same_name(name, tag))
        };
        let labels = available(&entries);
        entries.retain(fits);
        if entries.is_empty() {
            return Err(PullError::NoSuchTag { path, tag: tag.to_owned(), available: labels });
        }
    }
    let Some(first) = entries.first() else {
        let reason = "index.json lists no image".to_owned();
        return Err(PullError::NotALayout { path, reason });
    };
    let same_image = |entry: &Descriptor| names(entry).next() == names(first).next();
    let platforms = entries.iter().all(|entry| entry.platform.is_some());
    let one_digest = entries.iter().all(|entry| entry.digest == first.digest);
    if one_digest {
        entries.truncate(1);
    } else if !(platforms && entries.iter().all(same_image)) {
        let available = available(&entries);
        return Err(PullError::SeveralImages { path, transport, available });
    }
    Ok(entries)
}

/// Whether two image names are the same, as written or as references.
pub(crate) fn same_name(one: &str, other: &str) -> bool {
    let reference = |text: &str| text.parse::<Reference>().ok();
    one == other || reference(one).is_some_and(|one| Some(one) == reference(other))
}
