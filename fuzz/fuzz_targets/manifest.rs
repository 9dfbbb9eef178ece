//! Manifests, indexes and image configurations.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::{Document, ImageConfig, media_type};

const LAYERS_MAX: usize = 64;

fuzz_target!(|bytes: &[u8]| {
    for announced in [None, Some(media_type::OCI_MANIFEST), Some(media_type::OCI_INDEX)] {
        if let Ok(Document::Manifest(manifest)) = Document::parse(bytes, announced, LAYERS_MAX) {
            assert!(manifest.layers.len() <= LAYERS_MAX);
        }
    }
    if let Ok(config) = ImageConfig::parse(bytes) {
        let _ = config.platform();
    }
});
