//! Limits of one process: setrlimit(2), never above what the process itself may.

use std::io;

use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

/// The stack of the first thread; the usual limit of a login.
const STACK_BYTES_MAX: u64 = 8 << 20;
/// Signals that wait to be delivered.
const SIGNALS_MAX: u64 = 64;

/// What a confined process may take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxPolicy {
    /// Bytes of data and private mappings, `RLIMIT_DATA`. None: no limit of its own.
    pub memory_bytes_max: Option<u64>,
    /// Bytes of the largest file it may write, `RLIMIT_FSIZE`. None: no limit of its own.
    pub file_bytes_max: Option<u64>,
    /// Open files, `RLIMIT_NOFILE`.
    pub files_max: u64,
    /// Threads, `RLIMIT_NPROC`: counted for the process alone when its user is its own.
    pub threads_max: u64,
}

impl SandboxPolicy {
    /// Sets the limits; none can be raised again afterwards.
    pub(crate) fn apply(&self) -> io::Result<()> {
        limit(Resource::Core, Some(0))?;
        limit(Resource::Data, self.memory_bytes_max)?;
        limit(Resource::Fsize, self.file_bytes_max)?;
        limit(Resource::Nofile, Some(self.files_max))?;
        limit(Resource::Nproc, Some(self.threads_max))?;
        // What grows like a stack is no data to the kernel.
        limit(Resource::Stack, Some(STACK_BYTES_MAX))?;
        // No locked memory, no message queues, no pending signals beyond a few.
        limit(Resource::Memlock, Some(0))?;
        limit(Resource::Sigpending, Some(SIGNALS_MAX))?;
        limit(Resource::Msgqueue, Some(0))
    }
}

/// Lowers soft and hard limit to `wanted`, or to the hard limit if that is lower.
fn limit(resource: Resource, wanted: Option<u64>) -> io::Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    let most = rustix::process::getrlimit(resource).maximum;
    let limit = Some(most.map_or(wanted, |most| most.min(wanted)));
    Ok(rustix::process::setrlimit(resource, Rlimit { current: limit, maximum: limit })?)
}
