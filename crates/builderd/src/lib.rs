//! builderd: container image → optimised, bootable root filesystem for a microVM.
//!
//! | where | what |
//! |---|---|
//! | [`command`] | the command line: what the user wrote, how it is shown |
//! | [`build`] | the pipeline: resolve → layers → flatten → layout → write → publish |
//! | [`packs`] | the layer-pack cache |
//!
//! The formats live in crates of their own: `oci` (images), `rootfs` (layers and
//! trees), `ext4` (bytes on disk).

mod accepting;
pub mod api;
pub mod artifact;
pub mod build;
mod causes;
pub mod clock;
pub mod command;
mod config;
mod keys;
pub mod packs;
mod parts;
mod private;
mod seal;
mod serve;
mod staged;
pub mod store;
mod telemetry;
pub mod tenant;
#[cfg(feature = "testing")]
pub mod testing;
mod tls;
