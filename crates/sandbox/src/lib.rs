//! Confined child processes for work on bytes that strangers wrote.
//!
//! Two halves make one sandbox. The parent starts its own program again in new
//! namespaces ([`Sandbox::spawn`]); the first thing that does is to shut itself in
//! ([`confine()`]): an empty root directory, no capabilities, no way to gain any,
//! clamped limits, landlock, and an allow-list of system calls. What it may work on
//! are the files it was handed as descriptors, and its pipes. A group of processes
//! (a build) is held to its memory, CPU and number by a [`Cgroup`].
//!
//! Two variations: a worker that keeps one directory in reach, for users of its own
//! ([`confine_to`]), and a keeper, which is not confined itself but with which all ends that it
//! has started and mounted ([`Sandbox::spawn_keeper`]).
//!
//! What a host cannot give is told by name ([`Wall`]), never passed over in silence:
//! who starts the child decides what it can do without.
//!
//! This crate does not know images, builds or tenants. It is the only one in which
//! `unsafe` is allowed: clone3(2) and execveat(2) have no safe form.

#![expect(
    unsafe_code,
    reason = "clone3(2), execveat(2) and what runs between them have no safe form"
)]
#![warn(clippy::undocumented_unsafe_blocks, unsafe_op_in_unsafe_fn)]

mod account;
mod apart;
mod cgroup;
mod confine;
mod limits;
mod loopback;
mod namespace;
mod outcome;
mod seccomp;
mod spawn;
mod users;
mod view;
mod wall;

pub use cgroup::{Cgroup, CgroupLimits, CgroupRoot, CgroupUsage};
pub use confine::{Access, confine, confine_to};
pub use limits::SandboxPolicy;
pub use loopback::LoopDevice;
pub use namespace::UserNamespace;
pub use outcome::Outcome;
pub use spawn::{Ender, Pipes, Sandbox, can_isolate, take_files};
pub use users::{HeldUsers, Users};
pub use view::{Processes, narrow, without_parent};
pub use wall::Wall;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct SandboxError {
    /// What was tried, in words that go on after "cannot".
    pub action: String,
    /// What the system says.
    pub source: std::io::Error,
}

impl SandboxError {
    pub(crate) fn new(action: &str, source: impl Into<std::io::Error>) -> Self {
        Self { action: action.to_owned(), source: source.into() }
    }
}
