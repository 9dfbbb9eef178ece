//! The ways in for fuzz targets: what workers, the processes of builds and callers say, read as it is
//! read in earnest. Nothing is done with it.

pub use crate::api::testing::read_request;
pub use crate::build::confined::testing::{read_image, read_pack};
pub use crate::build::worker::testing::read_build;
