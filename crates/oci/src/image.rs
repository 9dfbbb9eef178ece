//! A resolved image: one platform, its config and its layers, all digests verified or
//! verifiable.
//!
//! It does not know where the bytes of a layer are; the `Fetcher` that resolved it does.

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::manifest::{Descriptor, Manifest, ManifestError, media_type, shown};
use crate::platform::Platform;

/// One image of one platform, as [`crate::Fetcher::resolve`] found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The source as the user wrote it, normalised.
    pub name: String,
    /// The digest of the image's manifest. A `docker save` archive without one is identified
    /// by its config: there it equals `config_digest`.
    pub manifest_digest: Digest,
    /// The digest of the (outermost) index the manifest was chosen from.
    pub index_digest: Option<Digest>,
    /// The digest of the config.
    pub config_digest: Digest,
    /// The config.
    pub config: ImageConfig,
    /// The platform that was chosen.
    pub platform: Platform,
    /// The layers, lowest first. There may be none.
    pub layers: Vec<Layer>,
    /// Whether a registry gave it all so far to a client without credentials. Never true for
    /// archives and layouts: having the file says nothing about who else may read it.
    pub anonymous: bool,
}

/// One layer of an [`Image`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest of the blob, compressed as it is.
    pub digest: Digest,
    /// The size of the blob.
    pub size_bytes: u64,
    /// The media type as the manifest gives it.
    pub media_type: String,
    /// What the media type says about compression. Whoever inflates should look at the bytes.
    pub compression: Compression,
    /// What the config claims the uncompressed layer's digest to be: a claim to be checked.
    pub diff_id: Digest,
}

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip, also eStargz.
    Gzip,
    /// zstd, also zstd:chunked.
    Zstd,
}

const FAMILIES: [&str; 4] = [
    media_type::OCI_LAYER,
    media_type::OCI_FOREIGN_LAYER,
    media_type::DOCKER_LAYER,
    media_type::DOCKER_FOREIGN_LAYER,
];

/// Whether the media type marks a layer that registries need not have.
pub(crate) fn is_foreign(media_type: &str) -> bool {
    media_type.starts_with(media_type::OCI_FOREIGN_LAYER)
        || media_type.starts_with(media_type::DOCKER_FOREIGN_LAYER)
}

/// The compression a layer's media type stands for.
fn compression(descriptor: &Descriptor) -> Result<Compression, ManifestError> {
    let media_type = descriptor.media_type.as_str();
    if media_type.ends_with("+encrypted") {
        return Err(ManifestError::Encrypted(descriptor.digest));
    }
    for family in FAMILIES {
        // OCI appends `+gzip`, Docker `.gzip`; each family keeps to its own.
        let separator = if family.contains(".oci.") { '+' } else { '.' };
        let Some(suffix) = media_type.strip_prefix(family) else { continue };
        match suffix.strip_prefix(separator) {
            None if suffix.is_empty() => return Ok(Compression::None),
            Some("gzip") => return Ok(Compression::Gzip),
            Some("zstd") => return Ok(Compression::Zstd),
            None | Some(_) => {}
        }
    }
    Err(ManifestError::Layer { digest: descriptor.digest, media_type: shown(media_type) })
}

impl Layer {
    fn new(descriptor: &Descriptor, diff_id: Digest) -> Result<Layer, ManifestError> {
        Ok(Layer {
            digest: descriptor.digest,
            size_bytes: descriptor.size_bytes,
            media_type: descriptor.media_type.clone(),
            compression: compression(descriptor)?,
            diff_id,
        })
    }

    /// The layers of a manifest, each with its `diff_id`; the caller has compared the counts.
    pub(crate) fn all(
        manifest: &Manifest,
        diff_ids: &[Digest],
    ) -> Result<Vec<Layer>, ManifestError> {
        manifest.layers.iter().zip(diff_ids).map(|(layer, id)| Layer::new(layer, *id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(media_type: &str) -> Result<Compression, ManifestError> {
        compression(&Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(b""),
            size_bytes: 0,
            platform: None,
            annotations: Default::default(),
        })
    }

    #[test]
    fn layer_media_types_of_both_families_are_known() {
        use Compression::{Gzip, None, Zstd};
        for (media_type, expected) in [
            ("application/vnd.oci.image.layer.v1.tar", None),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Gzip),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Zstd),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", None),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Gzip),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", Zstd),
            ("application/vnd.docker.image.rootfs.diff.tar", None),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Gzip),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", Zstd),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar", None),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Gzip),
        ] {
            assert_eq!(of(media_type).unwrap(), expected, "{media_type}");
            assert_eq!(
                is_foreign(media_type),
                media_type.contains("nondis") || media_type.contains("foreign")
            );
        }
    }

    #[test]
    fn encrypted_and_unknown_layers_are_refused() {
        for media_type in [
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.oci.image.layer.v1.tar+encrypted",
        ] {
            assert!(matches!(of(media_type), Err(ManifestError::Encrypted(_))));
        }
        for media_type in [
            "",
            "application/octet-stream",
            "application/vnd.in-toto+json",
            "application/vnd.oci.image.layer.v1.tar+br",
            "application/vnd.oci.image.layer.v1.tarx",
            "application/vnd.oci.image.layer.v1.tar.gzip",
            "application/vnd.docker.image.rootfs.diff.tar+gzip",
        ] {
            assert!(matches!(of(media_type), Err(ManifestError::Layer { .. })), "{media_type}");
        }
    }
}
