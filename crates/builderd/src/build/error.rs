//! Why a build failed: the step, the cause, whose fault it is, and what to do.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;

use ::commands::CommandsError;
use ext4::{LayoutError, WriteError};
use oci::{Digest, PullError, Source};
use rootfs::{FileTree, FlattenError, PackError, PackReadError};
use sandbox::{CgroupUsage, Wall};
use serde::{Deserialize, Serialize};

use super::admission::MEMORY_BYTES_USUAL;
use super::confined::ToldError;
use super::record::{Failure, FailureCode};
use super::remedy::{remedy, usual_remedy};
use super::{Phase, commands};
use crate::causes::chain;
use crate::packs::CacheError;
use crate::tenant::TenantLimits;

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The request or the image.
    Yours,
    /// The builder or its machine.
    Ours,
    /// A registry or the network.
    Upstream,
}

impl Blame {
    /// The word for people and programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Yours => "yours",
            Self::Ours => "ours",
            Self::Upstream => "upstream",
        }
    }
}

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The image could not be resolved or fetched.
    #[error("cannot pull {image}")]
    Pull {
        /// The source as the user named it.
        image: String,
        /// Whose fault: a file that is at hand has no upstream.
        blame: Blame,
        /// Why.
        source: Box<PullError>,
    },
    /// A layer is not what a layer must be.
    #[error("layer {} ({digest}) cannot be read", .layer + 1)]
    Pack {
        /// Its place from the bottom, from 0.
        layer: usize,
        /// Digest of its blob.
        digest: Digest,
        /// Why.
        source: PackError,
    },
    /// A pack that was just made, or found good, cannot be read: the disk is at fault.
    #[error("the pack of layer {} ({digest}) cannot be read back", .layer + 1)]
    PackUnread {
        /// Its place from the bottom, from 0.
        layer: usize,
        /// Digest of its blob.
        digest: Digest,
        /// Why.
        source: PackReadError,
    },
    /// A layer's content is not what the image's config claims.
    #[error(
        "layer {} ({digest}) unpacks to sha256:{found}, but the image's config claims {claimed}",
        .layer + 1
    )]
    DiffId {
        /// Its place from the bottom, from 0.
        layer: usize,
        /// Digest of its blob.
        digest: Digest,
        /// What the config says.
        claimed: Digest,
        /// What the bytes say, in hex.
        found: String,
    },
    /// The pack cache failed.
    #[error("the layer cache failed")]
    Cache(#[from] CacheError),
    /// The layers do not make a file tree.
    #[error("the layers do not fit together")]
    Flatten(#[from] FlattenError),
    /// The tree does not fit into the image.
    #[error("the image cannot be laid out{}", at(path))]
    Layout {
        /// Which file is at fault, if one is; made printable.
        path: Option<String>,
        /// Why.
        source: LayoutError,
    },
    /// The image would be larger than it may be.
    #[error("the image would have {size_bytes} bytes, but may have {bytes_max}")]
    TooLarge {
        /// What it would have.
        size_bytes: u64,
        /// What it may have.
        bytes_max: u64,
    },
    /// The file system's metadata could not be written.
    #[error("cannot write the file system to {}", path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// Why.
        source: WriteError,
    },
    /// A file to write cannot be one.
    #[error("{} cannot be written: {problem}", path.display())]
    OutputName {
        /// The name.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
        /// What the system says, where it was asked.
        source: Option<io::Error>,
    },
    /// The output could not be written.
    #[error("cannot {action} {}", path.display())]
    Output {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine refused a thread or a runtime.
    #[error("cannot start a worker for the {} step", phase.as_str())]
    Worker {
        /// In which step.
        phase: Phase,
        /// Why.
        source: io::Error,
    },
    /// What a confined worker could not do, in its words.
    #[error(transparent)]
    Told(ToldError),
    /// The commands of the build.
    #[error(transparent)]
    Commands(#[from] CommandsError),
    /// A confined worker needs more memory than the build may have.
    #[error("the {} step needs more memory than the build may have", phase.as_str())]
    OutOfMemory {
        /// In which step.
        phase: Phase,
    },
    /// A confined worker was ended, or ended itself, before it was done.
    #[error(
        "the process of the {} step ended without a result ({outcome}){}",
        phase.as_str(),
        said(complaint)
    )]
    WorkerEnded {
        /// In which step.
        phase: Phase,
        /// Exit code or signal.
        outcome: String,
        /// What it said on standard error.
        complaint: String,
    },
    /// A confined worker was ended for what it did.
    #[error(
        "the process of the {} step {problem}, and was ended{}",
        phase.as_str(),
        said(complaint)
    )]
    WorkerStopped {
        /// In which step.
        phase: Phase,
        /// What it did, in words that go on after its name.
        problem: &'static str,
        /// What it said on standard error.
        complaint: String,
    },
    /// The host does not give a confined worker what the build asks for.
    #[error(
        "this host cannot shut a worker in: no {}",
        missing.iter().map(|wall| wall.as_str()).collect::<Vec<_>>().join(", no ")
    )]
    Walls {
        /// What is missing.
        missing: Vec<Wall>,
    },
    /// A worker of the build ended without an answer: a bug.
    #[error("a worker of the {} step stopped without a result", phase.as_str())]
    WorkerLost {
        /// In which step.
        phase: Phase,
    },
}

fn said(complaint: &str) -> String {
    if complaint.is_empty() { String::new() } else { format!(": {complaint}") }
}

fn at(path: &Option<String>) -> String {
    path.as_ref().map(|path| format!(": {path}")).unwrap_or_default()
}

impl BuildError {
    pub(super) fn layout(source: LayoutError, tree: &FileTree) -> Self {
        let path = source.inode().and_then(|inode| ext4::path_of(tree, inode));
        Self::Layout { path: path.map(|path| path.escape_ascii().to_string()), source }
    }

    pub(super) fn pull(from: &Source, source: PullError) -> Self {
        let blame = match (source.blame(), from) {
            (oci::Blame::Upstream, Source::Registry(_)) => Blame::Upstream,
            (oci::Blame::Yours | oci::Blame::Upstream, _) => Blame::Yours,
            (oci::Blame::Ours, _) => Blame::Ours,
        };
        Self::Pull { image: from.to_string(), blame, source: Box::new(source) }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        if self.is_out_of_memory() {
            return Blame::Yours;
        }
        match self {
            Self::Pull { blame, .. } => *blame,
            Self::Told(told) => told.blame,
            Self::Commands(error) if error.is_theirs() => Blame::Yours,
            Self::Commands(_) => Blame::Ours,
            Self::Pack { source: PackError::Write { .. }, .. } => Blame::Ours,
            Self::Pack { .. }
            | Self::OutputName { .. }
            | Self::DiffId { .. }
            | Self::Flatten(_)
            | Self::TooLarge { .. }
            | Self::OutOfMemory { .. }
            | Self::Layout { .. } => Blame::Yours,
            Self::Cache(_)
            | Self::PackUnread { .. }
            | Self::Write { .. }
            | Self::Output { .. }
            | Self::Worker { .. }
            | Self::WorkerEnded { .. }
            | Self::WorkerStopped { .. }
            | Self::Walls { .. }
            | Self::WorkerLost { .. } => Blame::Ours,
        }
    }

    /// What to do about it where the build is one's own, if there is something to do.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        if self.is_out_of_space() {
            return Some(
                "the disk is full: free space there, prune the cache with `builderd cache prune`, \
                 or choose another place with --output and --cache-dir"
                    .to_owned(),
            );
        }
        if self.is_out_of_memory() {
            return Some(MORE_MEMORY.to_owned());
        }
        match self {
            Self::Pull { source, .. } => source.hint(),
            Self::Told(told) => told.hint.clone(),
            Self::Commands(error) => commands::hint(error),
            Self::OutOfMemory { .. } => Some(MORE_MEMORY.to_owned()),
            Self::Walls { .. } => Some(
                "start the service on a host that has them, or accept their absence by name"
                    .to_owned(),
            ),
            Self::DiffId { .. } => Some(
                "the image is inconsistent: rebuild or push it again; \
                 nothing of it was kept"
                    .to_owned(),
            ),
            Self::TooLarge { .. } => {
                Some("raise the size limit of the request, or make the image smaller".to_owned())
            }
            Self::OutputName { source: Some(_), .. } => Some(
                "make the directory first, or choose another place with --output and \
                 --metadata-file"
                    .to_owned(),
            ),
            Self::Pack { source: PackError::ImageDataBytes(_), .. } => {
                Some("use a smaller image, or allow a build more disk".to_owned())
            }
            Self::WorkerLost { .. } | Self::WorkerEnded { .. } | Self::WorkerStopped { .. } => {
                Some(REPORT_BUG.to_owned())
            }
            Self::Pack { .. }
            | Self::PackUnread { .. }
            | Self::OutputName { source: None, .. }
            | Self::Cache(_)
            | Self::Flatten(_)
            | Self::Layout { .. }
            | Self::Write { .. }
            | Self::Output { .. }
            | Self::Worker { .. } => None,
        }
    }

    /// The failure as data, for a build that runs for somebody else.
    #[must_use]
    pub fn failure(&self, step: Phase) -> Failure {
        Failure {
            code: self.code(),
            step: step.as_str().to_owned(),
            cause: chain(self),
            blame: self.blame().as_str().to_owned(),
            remedy: remedy(self),
        }
    }

    /// The failure in one word.
    pub(super) fn code(&self) -> FailureCode {
        if self.is_out_of_space() {
            return FailureCode::StorageFull;
        }
        if self.is_out_of_memory() {
            return FailureCode::QuotaExceeded;
        }
        match self {
            Self::Pull { source, .. } => pull_code(source),
            Self::Told(told) => told.code,
            Self::Commands(CommandsError::Denied { .. }) => FailureCode::NetworkDenied,
            Self::Commands(CommandsError::Failed { end, .. }) if end.is_limit() => {
                FailureCode::QuotaExceeded
            }
            Self::Commands(error) if error.is_theirs() => FailureCode::InvalidSource,
            Self::Commands(_) => FailureCode::TemporaryResourceError,
            Self::OutOfMemory { .. } => FailureCode::QuotaExceeded,
            Self::Pack { source: PackError::Write { .. }, .. }
            | Self::Cache(_)
            | Self::PackUnread { .. }
            | Self::Write { .. }
            | Self::Output { .. }
            | Self::OutputName { source: Some(_), .. }
            | Self::Walls { .. }
            | Self::WorkerEnded { .. }
            | Self::WorkerStopped { .. }
            | Self::Worker { .. } => FailureCode::TemporaryResourceError,
            Self::Pack { source: PackError::ImageDataBytes(_), .. } => FailureCode::QuotaExceeded,
            Self::Pack { .. }
            | Self::DiffId { .. }
            | Self::Flatten(_)
            | Self::Layout { .. }
            | Self::TooLarge { .. } => FailureCode::InvalidSource,
            Self::OutputName { source: None, .. } | Self::WorkerLost { .. } => {
                FailureCode::Internal
            }
        }
    }

    /// Whether a full disk (or a used-up quota) is the cause.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        if let Self::Told(told) = self {
            return told.is_out_of_space;
        }
        self.has_cause(&[io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded])
    }

    /// Whether the system had no more memory for it.
    fn is_out_of_memory(&self) -> bool {
        self.has_cause(&[io::ErrorKind::OutOfMemory])
    }

    /// Whether it can be what want of memory looks like: a thread is refused then, and a process
    /// that gets no memory ends.
    pub(super) fn may_be_out_of_memory(&self) -> bool {
        if let Self::Worker { source, .. } = self
            && source.kind() == io::ErrorKind::WouldBlock
        {
            return true;
        }
        let has_ended = matches!(self, Self::WorkerEnded { .. } | Self::WorkerLost { .. });
        has_ended || self.is_out_of_memory()
    }

    fn has_cause(&self, kinds: &[io::ErrorKind]) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            let known = error.downcast_ref::<io::Error>();
            if known.is_some_and(|error| kinds.contains(&error.kind())) {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

/// What whoever runs the program himself can do about a bug; whoever asked a service has its operator.
pub(super) const REPORT_BUG: &str = "please report this as a bug of builderd";

const MORE_MEMORY: &str = "use a smaller image, or allow a build more memory";

/// Why a process failed that ended in `step` without a word: what the kernel says, and the process
/// itself on standard error.
pub(super) fn died(
    status: ExitStatus,
    limits: &TenantLimits,
    step: String,
    complaint: &str,
) -> Failure {
    const SIGABRT: i32 = 6;
    const SIGXFSZ: i32 = 25;
    let disk_bytes_max = limits.disk_bytes;
    let (code, cause, blame, remedy) = match status.signal() {
        // What the standard library says and does when it gets no memory, and what follows from
        // that where there is less than a build usually takes.
        Some(SIGABRT)
            if limits.memory_bytes < MEMORY_BYTES_USUAL
                || complaint.contains("memory allocation of") =>
        {
            return out_of_memory(step, limits.memory_bytes);
        }
        Some(SIGXFSZ) => (
            FailureCode::QuotaExceeded,
            format!("the build needs a file larger than {disk_bytes_max} bytes"),
            Blame::Yours,
            "use a smaller image, or a tier with more disk for each build",
        ),
        Some(signal) => (
            FailureCode::TemporaryResourceError,
            format!("the build's process was ended by signal {signal}"),
            Blame::Ours,
            "try again; a build that needs more memory than it may have ends so, too",
        ),
        None => (
            FailureCode::Internal,
            format!("the build's process ended without a result ({status})"),
            Blame::Ours,
            usual_remedy(FailureCode::Internal, Blame::Ours),
        ),
    };
    Failure { code, step, cause, blame: blame.as_str().to_owned(), remedy: remedy.to_owned() }
}

/// Why a build failed that may have only so much memory, and asked for more.
pub(super) fn out_of_memory(step: String, memory_bytes: u64) -> Failure {
    Failure {
        code: FailureCode::QuotaExceeded,
        step,
        cause: format!("the build needs more memory than the {memory_bytes} bytes it may have"),
        blame: Blame::Yours.as_str().to_owned(),
        remedy:
            "use a smaller image, allow the build more memory (`limits.max_memory_bytes`), or use a \
             tier with more memory for each build"
                .to_owned(),
    }
}

/// The same failure, or the kernel's reason for it: whoever was ended because memory ran out, or
/// was refused a thread, cannot say so itself.
pub(super) fn explained(failure: Failure, usage: &CgroupUsage, memory_bytes: u64) -> Failure {
    // Who knows which limit it came to says more than the kernel.
    if failure.code == FailureCode::QuotaExceeded {
        return failure;
    }
    if usage.out_of_memory_kills > 0 {
        return out_of_memory(failure.step, memory_bytes);
    }
    if usage.pids_refused == 0 {
        return failure;
    }
    Failure {
        code: FailureCode::QuotaExceeded,
        step: failure.step,
        cause: "the build needs more processes than it may have".to_owned(),
        blame: Blame::Yours.as_str().to_owned(),
        remedy: "use a smaller image, or one with fewer layers".to_owned(),
    }
}

/// What may pass by itself is told apart from what will not.
fn pull_code(error: &PullError) -> FailureCode {
    if matches!(error, PullError::EgressDenied { .. }) {
        return FailureCode::NetworkDenied;
    }
    if matches!(error, PullError::Unauthorized { .. } | PullError::Credentials { .. }) {
        return FailureCode::AuthenticationFailed;
    }
    if matches!(error, PullError::RateLimited { .. }) {
        return FailureCode::RegistryRateLimit;
    }
    match error.blame() {
        _ if error.is_retryable() => FailureCode::NetworkError,
        oci::Blame::Yours => FailureCode::InvalidSource,
        oci::Blame::Upstream => FailureCode::NetworkError,
        oci::Blame::Ours => FailureCode::TemporaryResourceError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_allows_a_build_too_little_memory_is_told_so_and_not_that_we_are_at_fault() {
        let few = TenantLimits { memory_bytes: 16 << 20, ..crate::tenant::Tier::Free.limits() };
        let many = TenantLimits { memory_bytes: MEMORY_BYTES_USUAL, ..few.clone() };
        let code = |limits, signal, complaint| {
            let died = died(ExitStatus::from_raw(signal), limits, "layers".into(), complaint);
            (died.code, died.blame == "yours")
        };
        assert_eq!(code(&few, 6, ""), (FailureCode::QuotaExceeded, true));
        let words = "memory allocation of 65536 bytes failed";
        assert_eq!(code(&many, 6, words), (FailureCode::QuotaExceeded, true));
        assert_eq!(code(&many, 6, ""), (FailureCode::TemporaryResourceError, false));
        assert_eq!(code(&few, 9, ""), (FailureCode::TemporaryResourceError, false));
        let silent = died(ExitStatus::from_raw(7 << 8), &few, "layers".into(), "");
        assert_eq!(silent.code, FailureCode::Internal);
        assert!(silent.remedy.contains("tell the operator the build's id"), "{silent:?}");
        // What zstd says, and mmap(2).
        let source = io::ErrorKind::OutOfMemory.into();
        let error = BuildError::Output { action: "write", path: "/x".into(), source };
        let failure = error.failure(Phase::Compress);
        assert_eq!((failure.code, &*failure.blame), (FailureCode::QuotaExceeded, "yours"));
        assert!(failure.remedy.contains("more memory"), "{failure:?}");
    }
}
