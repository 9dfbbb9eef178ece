//! Stories about `builderd` as its users meet it: the command, on images made here.
#![expect(clippy::disallowed_methods, reason = "tests start programs")]
#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod builds;
mod cache;
mod command_builds;
mod command_service;
mod config;
mod failures;
mod fleet;
mod layers;
mod private;
mod registry;
mod service;
mod store;
mod support;
mod tls;
