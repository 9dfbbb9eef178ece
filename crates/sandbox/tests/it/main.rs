//! Confined processes against a real kernel.

mod attacks;
mod cgroups;
mod support;
