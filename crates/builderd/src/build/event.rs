//! What a build tells while it runs. The same events feed a terminal, plain lines,
//! `rawjson` and later the log of the service; none of them is known here.
//!
//! In `rawjson` one event more ends a build: `finished` with the [`BuildReport`](super::BuildReport)
//! as `report`, or `failed` with the fields of a [`Failure`](super::record::Failure).

use serde::{Deserialize, Serialize};

/// A step of a build that is timed on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reference to manifest and config.
    Resolve,
    /// Layer blobs to layer packs.
    Layers,
    /// Commands in the image, and their changes to one more pack.
    Commands,
    /// Layer packs to one tree.
    Flatten,
    /// Tree to positions on disk.
    Layout,
    /// Metadata and file data into the image (and its checksum).
    Write,
    /// The image into its compressed form.
    Compress,
    /// Names given to the finished files.
    Publish,
}

impl Phase {
    /// Every phase, in their order.
    pub const ALL: [Self; 8] = [
        Self::Resolve,
        Self::Layers,
        Self::Commands,
        Self::Flatten,
        Self::Layout,
        Self::Write,
        Self::Compress,
        Self::Publish,
    ];

    /// The word shown to people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Layers => "layers",
            Self::Commands => "commands",
            Self::Flatten => "flatten",
            Self::Layout => "layout",
            Self::Write => "write",
            Self::Compress => "compress",
            Self::Publish => "publish",
        }
    }
}

/// Where a layer's pack came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerOrigin {
    /// The cache had it.
    Cached,
    /// It was fetched and packed by this build.
    Packed,
}

/// One thing that happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum BuildEvent {
    /// A phase begins.
    PhaseStarted {
        /// Which.
        phase: Phase,
    },
    /// A phase ended well.
    PhaseFinished {
        /// Which.
        phase: Phase,
        /// How long it took.
        secs: f64,
    },
    /// The image is known.
    Resolved {
        /// As the user named it.
        image: String,
        /// Digest of its manifest.
        manifest_digest: String,
        /// Its platform.
        platform: String,
        /// How many layers.
        layers: usize,
        /// Their compressed size together.
        compressed_bytes: u64,
    },
    /// Another build makes the layer's pack just now; this one waits for it.
    LayerWaiting {
        /// Its place, from the bottom, from 0.
        layer: usize,
        /// Digest of its blob.
        digest: String,
    },
    /// A layer is being fetched.
    LayerStarted {
        /// Its place, from the bottom, from 0.
        layer: usize,
        /// Digest of its blob.
        digest: String,
        /// Size of its blob.
        size_bytes: u64,
    },
    /// So much of a layer's blob has come.
    LayerProgress {
        /// Its place.
        layer: usize,
        /// Bytes so far.
        bytes: u64,
    },
    /// A layer's pack is there.
    LayerReady {
        /// Its place.
        layer: usize,
        /// Digest of its blob.
        digest: String,
        /// Where the pack came from.
        origin: LayerOrigin,
    },
    /// A command begins.
    CommandStarted {
        /// Its place, from 0.
        command: usize,
        /// What is run.
        text: String,
    },
    /// A line that a command has written.
    CommandOutput {
        /// Its place, from 0.
        command: usize,
        /// The line, without control characters.
        line: String,
    },
    /// So much of the image has been written.
    WriteProgress {
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Something that is not an error but should be seen.
    Warning {
        /// What.
        message: String,
    },
}

/// Watches a build; called from several threads.
pub trait Observer: Sync {
    /// Takes one event; must not block for long.
    fn event(&self, event: &BuildEvent);
}
