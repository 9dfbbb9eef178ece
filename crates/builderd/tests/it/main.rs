//! Stories about `builderd` as its users meet it: the command, on images made here.
#![expect(clippy::disallowed_methods, reason = "tests start programs")]

mod builds;
mod cache;
mod failures;
mod support;
