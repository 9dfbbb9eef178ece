//! temporary
pub(crate) mod floor;
pub(crate) mod measure;
