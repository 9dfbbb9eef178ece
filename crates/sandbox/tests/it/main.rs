//! Confined processes against a real kernel.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]
#![expect(clippy::disallowed_methods, reason = "tests start programs")]

mod attacks;
mod cgroups;
mod reach;
mod support;
mod view;
