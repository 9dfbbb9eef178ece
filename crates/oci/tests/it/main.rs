//! Stories about pulling: a real registry on loopback, real files, real faults.
#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]
#![expect(clippy::wildcard_enum_match_arm, reason = "whatever else comes fails the story")]

mod access;
mod archives;
mod blobs;
mod choosing;
mod echoes;
mod egress;
mod judges;
mod layouts;
mod mirrors;
mod redirects;
mod support;
mod tls;
mod trust;
