//! The wire: the messages and the service of `builder.v1`, generated from `proto/`.
//!
//! It knows how a message is written as bytes and as JSON, and nothing of what it means.

mod names;

/// What the generator wrote.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    rustdoc::all,
    reason = "generated"
)]
mod generated {
    connectrpc::include_generated!();
}

pub use generated::builder::v1;
pub use names::{ENUMS, Enum, Field, Kind, MESSAGES, METHODS, Message, Method, message, words};

/// The descriptors of everything that is served, as a `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The service's full name, as it stands in paths.
pub const SERVICE: &str = "builder.v1.BuilderService";
