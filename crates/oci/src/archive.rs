//! Image archives: `docker save` tars and tars of OCI layouts, plain or gzipped.
//!
//! The tar is indexed once and blobs are read from it in place. A `docker save` archive that
//! also holds an OCI manifest for the chosen image (Docker 25 and later) is read through that
//! manifest; one without is identified by its config digest. Formats: moby
//! `image/spec/v1.2.md` ("Combined Image JSON + Filesystem Changeset Format"), OCI
//! `image-layout.md`. It does not know what is in a layer.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use crate::blob::{BlobStream, FilePart};
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::PullError;
use crate::layout::{INDEX_BYTES_MAX, checked_index, same_name, select};
use crate::manifest::{Descriptor, Document, ImageIndex, Manifest, media_type};
use crate::options::Limits;
use crate::source::Source;
use crate::spool::{Counted, SpoolError, spool};
use crate::tar::{Span, TarError, TarIndex};

/// Why an archive cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Not a tar, or a broken one.
    #[error("it is not a sound tar")]
    Tar(#[source] TarError),
    /// Compressed with something else than gzip.
    #[error("it is compressed with {0}, only gzip is read")]
    Compression(&'static str),
    /// A tar, but not of an image.
    #[error("it is a tar, but has neither manifest.json nor index.json")]
    NotAnImage,
    /// A `docker save` archive of before Docker 1.10.
    #[error("it was saved by a Docker before 1.10, without manifest.json")]
    Ancient,
    /// The other kind of archive.
    #[error("it is {actual} archive, not {expected} archive")]
    OtherKind {
        /// What the source says.
        expected: &'static str,
        /// What it is.
        actual: &'static str,
    },
    /// A file that is named is not there.
    #[error("it lacks the file {0:?}")]
    Missing(String),
    /// A file is larger than we accept.
    #[error("{name} is larger than the limit of {bytes_max} bytes")]
    TooLarge {
        /// The file.
        name: String,
        /// The limit.
        bytes_max: u64,
    },
    /// A file is not the JSON it should be.
    #[error("its {name} is not valid")]
    Json {
        /// The file.
        name: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// The OCI layout in it is unusable.
    #[error("its OCI layout is not valid: {0}")]
    Layout(String),
    /// It has no image at all.
    #[error("it lists no image")]
    Empty,
    /// More layers than we accept.
    #[error("{count} layers, at most {max} are accepted")]
    Layers {
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// The file cannot be read.
    #[error("reading it failed")]
    Read(#[source] std::io::Error),
}

impl ArchiveError {
    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            ArchiveError::Compression(_) => Some("decompress it first".to_owned()),
            ArchiveError::Ancient => {
                Some("load and save it again with a current Docker".to_owned())
            }
            ArchiveError::NotAnImage => {
                Some("make it with `docker save` (not `docker export`) or `skopeo copy`".to_owned())
            }
            ArchiveError::OtherKind { actual, .. } => {
                let transport = if *actual == OCI { "oci-archive:" } else { "docker-archive:" };
                Some(format!("write {transport} in front of the file name"))
            }
            ArchiveError::Tar(_)
            | ArchiveError::Missing(_)
            | ArchiveError::TooLarge { .. }
            | ArchiveError::Json { .. }
            | ArchiveError::Layout(_)
            | ArchiveError::Empty
            | ArchiveError::Layers { .. }
            | ArchiveError::Read(_) => None,
        }
    }
}

const OCI: &str = "an OCI";
const DOCKER: &str = "a docker save";

/// An opened archive.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    file: Arc<File>,
    index: TarIndex,
    is_docker: bool,
    limits: Limits,
    /// Blobs of a `docker save` image by the digest we gave them.
    found: Mutex<HashMap<Digest, Span>>,
}

/// What an archive was asked for.
pub(crate) enum Selection {
    /// Entries of its OCI index.
    Descriptors(Vec<Descriptor>),
    /// An image without an OCI manifest.
    Docker(SavedImage),
}

/// An image of a `docker save` archive, as if it had a manifest.
pub(crate) struct SavedImage {
    pub(crate) manifest: Manifest,
    pub(crate) config_digest: Digest,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Archive {
    /// Opens an archive, off the thread that drives the network.
    pub(crate) async fn open(
        source: &Source,
        limits: Limits,
        spool_dir: &Path,
    ) -> Result<Archive, PullError> {
        let (source, dir) = (source.clone(), spool_dir.to_owned());
        blocking(PathBuf::from("archive"), move || Archive::open_now(&source, limits, &dir)).await
    }

    fn open_now(source: &Source, limits: Limits, spool_dir: &Path) -> Result<Archive, PullError> {
        let (path, expects_docker) = match source {
            Source::DockerArchive { file, .. } => (file.clone(), Some(true)),
            Source::OciArchive { file, .. } => (file.clone(), Some(false)),
            Source::Stdin | Source::Registry(_) | Source::Layout { .. } => {
                (PathBuf::from("-"), None)
            }
        };
        let io = |source| PullError::Io { path: path.clone(), source };
        let opened = match expects_docker {
            Some(_) => File::open(&path),
            None => std::io::stdin().as_fd().try_clone_to_owned().map(File::from),
        };
        let file = seekable(opened.map_err(io)?, &path, spool_dir, &limits)?;
        let length = file.metadata().map_err(io)?.len();
        let failed = |source| PullError::Archive { path: path.clone(), source };
        let index = TarIndex::read(&file, length, limits.archive_entries_max)
            .map_err(|error| failed(ArchiveError::Tar(error)))?;
        let is_docker = kind(&index, expects_docker).map_err(failed)?;
        let file = Arc::new(file);
        Ok(Archive { path, file, index, is_docker, limits, found: Mutex::default() })
    }

    /// The image that `tag` names, or the only one there is.
    pub(crate) async fn select(
        self: &Arc<Self>,
        tag: Option<String>,
    ) -> Result<Selection, PullError> {
        let archive = Arc::clone(self);
        let select = move || match archive.is_docker {
            true => archive.select_saved(tag.as_deref()),
            false => archive.select_oci(tag.as_deref()),
        };
        blocking(self.path.clone(), select).await
    }

    fn select_oci(&self, tag: Option<&str>) -> Result<Selection, PullError> {
        let index = self.oci_index().map_err(|error| self.failed(error))?;
        select(&index, tag, &self.path, "oci-archive").map(Selection::Descriptors)
    }

    fn select_saved(&self, tag: Option<&str>) -> Result<Selection, PullError> {
        let failed = |error| self.failed(error);
        let bytes = self.small("manifest.json", INDEX_BYTES_MAX).map_err(failed)?;
        let entries: Vec<SavedEntry> = serde_json::from_slice(&bytes)
            .map_err(|source| failed(ArchiveError::Json { name: "manifest.json", source }))?;
        let entry = self.chosen(&entries, tag)?;
        let config = self.small(&entry.config, self.limits.config_bytes_max).map_err(failed)?;
        let config_digest = Digest::of(&config);
        check_named(&entry.config, config_digest)?;
        if let Some(descriptor) = self.oci_manifest_of(config_digest) {
            return Ok(Selection::Descriptors(vec![descriptor]));
        }
        let parsed = ImageConfig::parse(&config)
            .map_err(|source| PullError::Config { digest: config_digest, source })?;
        let manifest = self.saved_manifest(entry, config_digest, &parsed)?;
        Ok(Selection::Docker(SavedImage { manifest, config_digest }))
    }

    fn chosen<'a>(
        &self,
        entries: &'a [SavedEntry],
        tag: Option<&str>,
    ) -> Result<&'a SavedEntry, PullError> {
        let labels = || {
            let label = |entry: &SavedEntry| match entry.repo_tags.as_deref() {
                Some(tags) if !tags.is_empty() => tags.to_vec(),
                Some(_) | None => vec![entry.config.clone()],
            };
            entries.iter().flat_map(label).collect::<Vec<String>>()
        };
        let path = self.path.clone();
        match (tag, entries) {
            (_, []) => Err(self.failed(ArchiveError::Empty)),
            (None, [only]) => Ok(only),
            (None, _) => {
                let transport = "docker-archive";
                Err(PullError::SeveralImages { path, transport, available: labels() })
            }
            (Some(tag), entries) => {
                let named = |entry: &&SavedEntry| {
                    let mut tags = entry.repo_tags.iter().flatten();
                    entry.config == tag || tags.any(|name| same_name(name, tag))
                };
                let missing =
                    || PullError::NoSuchTag { path, tag: tag.to_owned(), available: labels() };
                entries.iter().find(named).ok_or_else(missing)
            }
        }
    }

    /// Describes a saved image's blobs as a manifest would, and remembers where they are.
    fn saved_manifest(
        &self,
        entry: &SavedEntry,
        config_digest: Digest,
        config: &ImageConfig,
    ) -> Result<Manifest, PullError> {
        let names = entry.layers.as_deref().unwrap_or_default();
        if names.len() > self.limits.layers_max {
            let (count, max) = (names.len(), self.limits.layers_max);
            return Err(self.failed(ArchiveError::Layers { count, max }));
        }
        let mut layers = Vec::new();
        for (position, name) in names.iter().enumerate() {
            layers.push(self.saved_layer(name, config.diff_ids.get(position).copied())?);
        }
        let (_, span) = self.entry(&entry.config).map_err(|error| self.failed(error))?;
        self.remember(config_digest, span);
        let config = descriptor(media_type::DOCKER_CONFIG.to_owned(), config_digest, span);
        Ok(Manifest { config, layers })
    }

    /// A layer's digest is the one its entry is named by; of a plain tar it is the `diff_id`;
    /// otherwise it is found by reading. The first two are checked when it is streamed.
    fn saved_layer(&self, name: &str, diff_id: Option<Digest>) -> Result<Descriptor, PullError> {
        let (real_name, span) = self.entry(name).map_err(|error| self.failed(error))?;
        let compression = self.magic(span)?.suffix();
        let named = real_name.strip_prefix("blobs/sha256/").and_then(Digest::from_hex);
        let digest = match (named, compression, diff_id) {
            (Some(digest), _, _) => digest,
            (None, "", Some(diff_id)) => diff_id,
            (None, _, _) => self.hash(span)?,
        };
        self.remember(digest, span);
        Ok(descriptor(format!("{}{compression}", media_type::DOCKER_LAYER), digest, span))
    }

    fn magic(&self, span: Span) -> Result<Magic, PullError> {
        let part = self.part(span);
        let bytes = part.read(0, usize::try_from(span.size_bytes.min(6)).unwrap_or_default())?;
        Ok(Magic::of(&bytes))
    }

    fn hash(&self, span: Span) -> Result<Digest, PullError> {
        use sha2::Digest as _;
        const STEP_BYTES: u64 = 256 << 10;
        let part = self.part(span);
        let mut hash = sha2::Sha256::new();
        let mut position = 0;
        while position < span.size_bytes {
            let step = STEP_BYTES.min(span.size_bytes - position);
            hash.update(part.read(position, usize::try_from(step).unwrap_or_default())?);
            position += step;
        }
        Ok(Digest::from_bytes(hash.finalize().into()))
    }

    /// The OCI manifest of the image with this config, if the archive holds one completely.
    fn oci_manifest_of(&self, config: Digest) -> Option<Descriptor> {
        let mut stack = self.oci_index().ok()?.manifests;
        for _ in 0..self.limits.documents_max {
            let entry = stack.pop()?;
            let name = format!("blobs/sha256/{}", entry.digest.hex());
            let Ok(bytes) = self.small(&name, self.limits.manifest_bytes_max) else { continue };
            let announced = Some(entry.media_type.as_str());
            match Document::parse(&bytes, announced, self.limits.layers_max) {
                Ok(Document::Index(inner)) => stack.extend(inner.manifests),
                Ok(Document::Manifest(manifest)) if manifest.config.digest == config => {
                    let is_here = |layer: &Descriptor| self.span_of(layer.digest).is_some();
                    return manifest.layers.iter().all(is_here).then_some(entry);
                }
                Ok(Document::Manifest(_)) | Err(_) => {}
            }
        }
        None
    }

    fn oci_index(&self) -> Result<ImageIndex, ArchiveError> {
        let layout = self.small("oci-layout", INDEX_BYTES_MAX)?;
        let index = self.small("index.json", INDEX_BYTES_MAX)?;
        checked_index(&layout, &index).map_err(ArchiveError::Layout)
    }

    pub(crate) fn blob(&self, digest: Digest, size_bytes: u64) -> Result<BlobStream, PullError> {
        let missing = || PullError::MissingBlob { path: self.path.clone(), digest };
        let span = self.span_of(digest).ok_or_else(missing)?;
        if span.size_bytes != size_bytes {
            return Err(PullError::SizeMismatch {
                what: format!("blob {digest}"),
                expected_bytes: size_bytes,
                actual_bytes: span.size_bytes,
            });
        }
        Ok(BlobStream::file(self.part(span), digest))
    }

    fn span_of(&self, digest: Digest) -> Option<Span> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let known = found.get(&digest).copied();
        known.or_else(|| Some(self.index.find(&format!("blobs/sha256/{}", digest.hex()))?.1))
    }

    fn remember(&self, digest: Digest, span: Span) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.insert(digest, span);
    }

    fn entry(&self, name: &str) -> Result<(&str, Span), ArchiveError> {
        let missing = || ArchiveError::Missing(crate::manifest::shown(name));
        self.index.find(name).ok_or_else(missing)
    }

    fn small(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, ArchiveError> {
        let (_, span) = self.entry(name)?;
        if span.size_bytes > bytes_max {
            let name = crate::manifest::shown(name);
            return Err(ArchiveError::TooLarge { name, bytes_max });
        }
        let mut bytes = vec![0; usize::try_from(span.size_bytes).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, span.offset).map_err(ArchiveError::Read)?;
        Ok(bytes)
    }

    fn part(&self, span: Span) -> FilePart {
        let Span { offset, size_bytes } = span;
        FilePart { file: Arc::clone(&self.file), path: self.path.clone(), offset, size_bytes }
    }

    fn failed(&self, source: ArchiveError) -> PullError {
        PullError::Archive { path: self.path.clone(), source }
    }
}

fn descriptor(media_type: String, digest: Digest, span: Span) -> Descriptor {
    let annotations = std::collections::BTreeMap::new();
    Descriptor { media_type, digest, size_bytes: span.size_bytes, platform: None, annotations }
}

/// `<hex>.json` and `blobs/sha256/<hex>` promise a digest.
fn check_named(name: &str, actual: Digest) -> Result<(), PullError> {
    let last = name.rsplit('/').next().unwrap_or_default();
    match Digest::from_hex(last.strip_suffix(".json").unwrap_or(last)) {
        Some(expected) if expected != actual => {
            let what = format!("config {}", crate::manifest::shown(name));
            Err(PullError::DigestMismatch { what, expected, actual })
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether the archive is one of `docker save`, and fits what was expected. One that is both
/// serves as either.
fn kind(index: &TarIndex, expects_docker: Option<bool>) -> Result<bool, ArchiveError> {
    let has = |name: &str| index.find(name).is_some();
    match (has("manifest.json"), has("index.json"), expects_docker) {
        (true, _, None | Some(true)) => Ok(true),
        (_, true, None | Some(false)) => Ok(false),
        (true, false, Some(false)) => {
            Err(ArchiveError::OtherKind { expected: OCI, actual: DOCKER })
        }
        (false, true, Some(true)) => Err(ArchiveError::OtherKind { expected: DOCKER, actual: OCI }),
        (false, false, _) if has("repositories") => Err(ArchiveError::Ancient),
        (false, false, _) => Err(ArchiveError::NotAnImage),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Magic {
    Gzip,
    Zstd,
    Bzip2,
    Xz,
    Other,
}

impl Magic {
    fn of(bytes: &[u8]) -> Magic {
        match bytes {
            [0x1f, 0x8b, ..] => Magic::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Magic::Zstd,
            [b'B', b'Z', b'h', ..] => Magic::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Magic::Xz,
            _ => Magic::Other,
        }
    }

    /// What a layer's media type has appended.
    fn suffix(self) -> &'static str {
        match self {
            Magic::Gzip => ".gzip",
            Magic::Zstd => ".zstd",
            Magic::Bzip2 | Magic::Xz | Magic::Other => "",
        }
    }
}

/// A file that can be read in any order: the original where it can, else a temporary copy.
fn seekable(file: File, path: &Path, spool_dir: &Path, limits: &Limits) -> Result<File, PullError> {
    let io = |source| PullError::Io { path: path.to_owned(), source };
    let at_start = |mut file: &File| {
        use std::io::Seek as _;
        file.stream_position().is_ok_and(|position| position == 0)
    };
    let is_seekable = file.metadata().map_err(io)?.is_file() && at_start(&file);
    let mut head = [0; 6];
    let mut length = 0;
    while let Some(rest) = head.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match (&file).read(rest).map_err(io)? {
            0 => break,
            read => length += read,
        }
    }
    let head = head.get(..length).unwrap_or_default().to_vec();
    let refused = |source| PullError::Archive { path: path.to_owned(), source };
    let compressed = |with| Err(refused(ArchiveError::Compression(with)));
    let magic = Magic::of(&head);
    let read_bytes = Cell::new(0);
    let whole = Counted { inner: Cursor::new(head).chain(&file), bytes: &read_bytes };
    let mut plain: Box<dyn Read + '_> = match magic {
        Magic::Other if is_seekable => return Ok(file),
        Magic::Other => Box::new(whole),
        Magic::Gzip => {
            let buffered = BufReader::with_capacity(256 << 10, whole);
            Box::new(flate2::bufread::MultiGzDecoder::new(buffered))
        }
        Magic::Zstd => return compressed("zstd"),
        Magic::Bzip2 => return compressed("bzip2"),
        Magic::Xz => return compressed("xz"),
    };
    let failed = |source| PullError::Spool { path: path.to_owned(), source };
    let mut first = Vec::with_capacity(512);
    let begun = plain.by_ref().take(512).read_to_end(&mut first);
    begun.map_err(|source| failed(SpoolError::Read(source)))?;
    TarIndex::check_start(&first).map_err(|error| refused(ArchiveError::Tar(error)))?;
    spool(Cursor::new(first).chain(plain), &read_bytes, spool_dir, limits).map_err(failed)
}

/// Runs something slow on a thread that may block.
async fn blocking<T, F>(path: PathBuf, work: F) -> Result<T, PullError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, PullError> + Send + 'static,
{
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|error| PullError::Io { path, source: std::io::Error::other(error) })?
}
