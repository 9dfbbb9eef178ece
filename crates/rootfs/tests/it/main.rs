//! Stories about layers: crafted tars go in, the tree that comes out is looked at.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on says so")]
#![expect(clippy::disallowed_methods, reason = "tests start programs")]

mod compression;
mod golden;
mod hostile;
mod model;
mod oracle;
mod overlay;
mod pack_format;
mod support;
mod tar_format;
