//! Commands run in an image's own file system, as its root, by an OCI runtime; what they changed
//! becomes one more layer.
//!
//! Four kinds of process do it, each this program started again ([`main`]):
//!
//! 1. The **overseer** has the rights with which it was started, so that who started it
//!    ([`Overseer`]) can give them up before it fetches. It listens, holds the commands to their
//!    limits, and believes its parent nothing that is said afterwards.
//! 2. The **keeper** has the host's root rights, but mounts of its own, and is the first process
//!    of a PID namespace: when it ends, however it ends, the kernel ends every process below it,
//!    undoes every mount and frees the loop device. It looks at nothing foreign.
//! 3. The **unpacker** writes the image's tree into a directory of a file system made for this
//!    build alone; the **reader** turns what the commands have changed into a layer's tar. Each
//!    is confined to its one directory, with users of the build's own.
//! 4. The **runtime** (runc) starts each command on an overlay above that tree.
//!
//! Where the host has no loop devices that file system is a directory of the host's, and a
//! **measurer**, confined like the reader, counts what lies there, and the overseer what its
//! processes hold without a name.
//!
//! The commands have no network; whoever lets them out serves the door that the keeper opens.
//! This crate does not know registries, tenants, builds, where a layer goes or what may be reached.

mod bundle;
mod counting;
mod door;
mod drain;
mod error;
mod handing;
mod held;
mod host;
mod judge;
mod keeper;
mod layer;
mod measure;
mod order;
mod output;
mod overseer;
mod run;
mod scratch;
mod syscalls;
mod tar;
#[cfg(feature = "testing")]
pub mod testing;
mod unpack;

pub use error::{CommandEnd, CommandsError, Unable};
pub use host::{Runtime, accepted_names, check};
pub use order::{Base, CommandLimits, Event, Joins, Order, PackPart, Scratch};
pub use overseer::{Overseer, Serve};
pub use run::clear_leftovers;
pub use scratch::remove_tree;

/// The word by which a program is started again as one of the processes: its first argument.
pub const ARGUMENT: &str = "commands-process";

/// What such a process does with its life; `role` is the second argument.
///
/// # Errors
/// When its pipes are of no use; what goes wrong with its work is told to its parent.
pub fn main(role: &str) -> std::io::Result<()> {
    match role {
        run::ROLE => run::main(),
        keeper::ROLE => keeper::main(),
        unpack::ROLE => unpack::main(),
        layer::ROLE => layer::main(),
        measure::ROLE => measure::main(),
        _ => Err(std::io::Error::other(format!("no process of commands is called {role:?}"))),
    }
}
