//! From a source string to verified blob streams.
//!
//! This crate finds out what image a [`Source`] means ([`Fetcher::resolve`]) and hands out
//! the compressed bytes of its layers ([`Fetcher::blob`]), from a registry, an OCI layout
//! directory, an OCI archive or a `docker save` archive. Every digest, media type and
//! document shape is checked before it is used; every read is bounded.
//!
//! What it does not know: how to decompress a layer, what a tar entry in it means, whether a
//! `diff_id` is true (it hands them out, whoever inflates a layer checks them), where blobs
//! are cached, who the tenant is. It never follows a descriptor's `urls`. It reads no clock
//! except a monotonic one (token expiry, time-outs) and no environment except what
//! [`ClientOptions::system_proxy`] asks for.
//!
//! One [`Client`] belongs to one set of credentials: never share it between tenants.

mod archive;
mod auth;
mod blob;
mod client;
mod config;
mod digest;
mod egress;
mod error;
mod fetch;
mod image;
mod layout;
mod manifest;
mod options;
mod platform;
mod reference;
mod resolve;
mod retry;
mod source;
mod spelling;
mod spool;
mod tar;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;

pub use archive::ArchiveError;
pub use auth::docker_config::{CredentialsError, registry_named};
pub use auth::{Credentials, HelperError};
pub use blob::BlobStream;
pub use client::Client;
pub use config::{ConfigError, HistoryEntry, ImageConfig};
pub use digest::{Digest, DigestError};
pub use egress::{
    AllowedName, AllowedPlace, DialError, EgressDenied, EgressPolicy, Lookup, NameError,
    PlaceError, Target,
};
pub use error::{Blame, PullError};
pub use fetch::Fetcher;
pub use image::{Compression, Image, Layer};
pub use manifest::{Descriptor, Document, ImageIndex, Manifest, ManifestError, media_type};
pub use options::{ClientOptions, Limits, RetryPolicy, Sleep, Timeouts};
pub use platform::{Platform, PlatformError};
pub use reference::{Reference, ReferenceError, check_registry, is_mirror};
pub use source::{Source, SourceError};
pub use tar::TarError;
