//! A build: from a source to an image file with its metadata beside it.
//!
//! [`run`] is the whole pipeline, top to bottom; every door (today the command,
//! later the service) calls it with a [`BuildSpec`] and watches [`BuildEvent`]s.
//! What a build does *not* know: who asked, how progress is shown, where settings
//! come from.

mod admission;
pub(crate) mod child;
mod commands;
pub(crate) mod confined;
mod disk;
mod error;
mod event;
pub(crate) mod host;
mod image;
pub(crate) mod janitor;
mod journal;
pub(crate) mod kept;
mod layers;
mod metadata;
mod meter;
mod output;
mod pipeline;
mod process;
mod progress;
pub mod record;
mod remedy;
pub mod service;
mod shares;
mod shift;
pub mod state;
pub(crate) mod worker;

use std::path::PathBuf;

use oci::{ClientOptions, Platform, Source};
use rootfs::{Limits, TreeLimits};
use sandbox::Wall;
use serde::{Deserialize, Serialize};

pub use commands::{Commands, CommandsSpec, EgressSpec};
pub use confined::ToldError;
pub use error::{Blame, BuildError};
pub use event::{BuildEvent, LayerOrigin, Observer, Phase};
pub(crate) use image::format_uuid;
pub(crate) use layers::hex;
pub(crate) use metadata::ENGINE;
pub use metadata::ImageMetadata;
pub use pipeline::run;
pub(crate) use pipeline::{check_name, sibling};
pub(crate) use progress::step_name;

use crate::packs::{PackCache, SharingDomain};

/// How the image file is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// As it is, holes as holes.
    None,
    /// gzip (RFC 1952), level 6.
    Gzip,
    /// Zstandard (RFC 8878), level 3.
    Zstd,
}

/// Which sum is computed over the finished file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// SHA-256, written to a `.sha256` file that `sha256sum -c` reads.
    Sha256,
    /// None: saves one pass over the image.
    None,
}

/// Who computes the sum of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumBy {
    /// The worker, while it writes: one pass less.
    Worker,
    /// This process, from the finished file: whoever files images by their sum must not take the word
    /// of a worker, which the image's author may have taken over.
    Parent,
}

/// What of the request decides the bytes of the image, beside its digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageOptions {
    /// Exact size or wanted free space.
    #[serde(with = "SizeForm")]
    pub size: ext4::Size,
    /// An image that would be larger is an error. Does not decide any byte.
    pub bytes_max: Option<u64>,
    /// Whether the file system gets a journal.
    pub journal: bool,
    /// `SOURCE_DATE_EPOCH`, in seconds: no time in the image is later.
    pub source_date_epoch: Option<i64>,
}

/// [`ext4::Size`] on its way to another process.
#[derive(Serialize, Deserialize)]
#[serde(remote = "ext4::Size")]
enum SizeForm {
    FreeSpace { bytes: u64 },
    Exact { bytes: u64 },
}

/// Free space where none is asked for: enough to boot and log, and holes cost nothing.
pub const DEFAULT_FREE_SPACE_BYTES: u64 = 64 << 20;

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            size: ext4::Size::FreeSpace { bytes: DEFAULT_FREE_SPACE_BYTES },
            bytes_max: None,
            journal: true,
            source_date_epoch: None,
        }
    }
}

/// Where layer packs are kept.
#[derive(Clone, Debug)]
pub enum PackStorage {
    /// In a cache, for the next build.
    Cache {
        /// The cache.
        cache: PackCache,
        /// Who may share the packs of this build.
        domain: SharingDomain,
        /// What the cache is pruned to after the build, in bytes.
        limit_bytes: u64,
    },
    /// In nameless files beside the output, gone with the build.
    Temporary,
}

/// One build, as the engine sees it.
#[derive(Clone, Debug)]
pub struct BuildSpec {
    /// Where the image comes from.
    pub source: Source,
    /// Which of its platforms.
    pub platform: Platform,
    /// How registries are reached.
    pub client: ClientOptions,
    /// The image file to write.
    pub output: PathBuf,
    /// The metadata file to write.
    pub metadata_file: PathBuf,
    /// What decides the bytes of the image.
    pub image: ImageOptions,
    /// How it is stored.
    pub compression: Compression,
    /// Which sum is computed over it.
    pub checksum: Checksum,
    /// Who computes it.
    pub sum_by: SumBy,
    /// Where layer packs are kept.
    pub packs: PackStorage,
    /// What is run in the image before it is laid out.
    pub commands: Option<Commands>,
    /// Worker threads, at least 1.
    pub jobs: usize,
    /// What a layer may contain.
    pub layer_limits: Limits,
    /// What the flattened tree may contain.
    pub tree_limits: TreeLimits,
    /// What must stand between foreign bytes and this host: without one of these there is no build.
    /// The others stand as well where the host gives them.
    pub walls: Vec<Wall>,
}

/// What a finished build has to tell.
#[derive(Clone, Debug, Serialize)]
pub struct BuildReport {
    /// The image file.
    pub output: PathBuf,
    /// Its metadata.
    pub metadata: ImageMetadata,
    /// Layers that the cache knew.
    pub layers_cached: usize,
    /// Layers that were fetched and packed.
    pub layers_packed: usize,
    /// Bytes fetched for them.
    pub fetched_bytes: u64,
    /// Seconds by phase, in the order they ran.
    pub phase_secs: Vec<(Phase, f64)>,
    /// Seconds from start to end.
    pub total_secs: f64,
    /// The directories with the most content: path, bytes, files.
    pub biggest_directories: Vec<(String, u64, u64)>,
    /// What the confined workers took, beside this process.
    #[serde(skip)]
    pub(crate) workers: confined::Taken,
}
