//! Commands on real trees, by a real runtime. They need root, runc and loop devices; where a host
//! has none, that is said and counted.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests too")]
#![expect(clippy::disallowed_methods, reason = "tests start programs")]
#![expect(clippy::wildcard_enum_match_arm, reason = "whatever else comes is no output")]

mod changes;
mod debian;
mod failures;
mod hostile;
mod network;
mod overseer;
mod runtime;
mod support;
mod watched;
