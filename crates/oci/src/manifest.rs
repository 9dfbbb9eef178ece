//! Manifests and indexes: parsing with the checks that keep two readers from seeing two images.
//!
//! A document is what its declared media type says, and its own `mediaType` and shape must
//! agree (CVE-2021-41190). This module knows one document at a time: it fetches nothing and
//! chooses no platform. Sources: OCI image spec v1.1 `manifest.md`, `image-index.md`; Docker
//! "Image Manifest V 2, Schema 2".

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::platform::Platform;
use crate::spelling::{self, Shape};

/// The media types this crate knows.
pub mod media_type {
    /// OCI image index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image config.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, uncompressed; `+gzip` and `+zstd` are appended.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// OCI layer that must not be redistributed.
    pub const OCI_FOREIGN_LAYER: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
    /// Docker manifest list.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker schema 2 manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker image config.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Docker layer, uncompressed; `.gzip` and `.zstd` are appended.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Docker layer that must not be redistributed.
    pub const DOCKER_FOREIGN_LAYER: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
    /// Docker schema 1, refused.
    pub(crate) const SCHEMA1_PREFIX: &str = "application/vnd.docker.distribution.manifest.v1+";
}

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not the JSON we expect.
    #[error("not a valid manifest document")]
    Json(#[source] serde_json::Error),
    /// Docker schema 1.
    #[error("the image has a Docker schema 1 manifest, a format that is no longer supported")]
    Schema1,
    /// `schemaVersion` is not 2.
    #[error("schemaVersion is {0}, expected 2")]
    SchemaVersion(i64),
    /// The media type is none of the four we read.
    #[error("media type {0:?} is not an image manifest or index")]
    MediaType(String),
    /// Neither the transport nor the document says what it is.
    #[error("the document has no media type")]
    NoMediaType,
    /// The document contradicts what announced it.
    #[error("the document says it is {document:?} but was announced as {announced:?}")]
    Contradiction {
        /// `Content-Type` or the descriptor's `mediaType`.
        announced: String,
        /// The document's `mediaType`.
        document: String,
    },
    /// The document has the fields of both a manifest and an index.
    #[error("the document could be read as a manifest and as an index")]
    Ambiguous,
    /// A field that the media type demands is missing.
    #[error("the document has no {0:?} field")]
    Missing(&'static str),
    /// The manifest describes something else than a container image.
    #[error("this is not a container image: its config is of type {0:?}")]
    NotAnImage(String),
    /// More entries than we accept.
    #[error("{count} {what} entries, at most {max} are accepted")]
    TooMany {
        /// Which list.
        what: &'static str,
        /// Its length.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A layer is encrypted.
    #[error("layer {0} is encrypted")]
    Encrypted(Digest),
    /// A layer is of an unknown kind.
    #[error("layer {digest} has the unsupported media type {media_type:?}")]
    Layer {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
}

impl ManifestError {
    /// Puts `changed` in place of every text of the document that it quotes.
    pub(crate) fn change_quotes(&mut self, changed: &dyn Fn(&str) -> String) {
        match self {
            ManifestError::Json(source) => {
                *source = serde::de::Error::custom(changed(&source.to_string()));
            }
            ManifestError::MediaType(text)
            | ManifestError::NotAnImage(text)
            | ManifestError::Layer { media_type: text, .. } => *text = changed(text),
            ManifestError::Contradiction { announced, document } => {
                *announced = changed(announced);
                *document = changed(document);
            }
            ManifestError::Schema1
            | ManifestError::SchemaVersion(_)
            | ManifestError::NoMediaType
            | ManifestError::Ambiguous
            | ManifestError::Missing(_)
            | ManifestError::TooMany { .. }
            | ManifestError::Encrypted(_) => {}
        }
    }
}

/// A reference to a blob (OCI image spec `descriptor.md`). `urls` are never read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What the bytes are.
    pub media_type: String,
    /// Their digest.
    pub digest: Digest,
    /// Their number.
    pub size_bytes: u64,
    /// For index entries: the platform, normalised.
    pub platform: Option<Platform>,
    /// Free-form annotations.
    pub annotations: BTreeMap<String, String>,
}

/// An image manifest of either family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The config blob.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
}

/// An index or manifest list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageIndex {
    /// The entries, in the document's order.
    pub manifests: Vec<Descriptor>,
}

/// What a manifest endpoint returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several.
    Index(ImageIndex),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<i64>,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: Option<String>,
    digest: Digest,
    size: u64,
    #[serde(default)]
    platform: Option<RawPlatform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, Option<String>>>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    variant: Option<String>,
}

const PLATFORM: Shape = Shape(&[("os", None), ("architecture", None), ("variant", None)]);
const DESCRIPTOR: Shape = Shape(&[
    ("mediaType", None),
    ("digest", None),
    ("size", None),
    ("platform", Some(&PLATFORM)),
    ("annotations", None),
]);
static DOCUMENT: Shape = Shape(&[
    ("schemaVersion", None),
    ("mediaType", None),
    ("config", Some(&DESCRIPTOR)),
    ("layers", Some(&DESCRIPTOR)),
    ("manifests", Some(&DESCRIPTOR)),
    ("fsLayers", None),
]);

impl Document {
    /// Reads a document that was announced as `announced` (a `Content-Type` header or a
    /// descriptor's media type) and has at most `layers_max` layers.
    ///
    /// # Errors
    /// When the document is malformed, contradicts its announcement, could be read in two
    /// ways, or is of a kind that is no image.
    pub fn parse(
        bytes: &[u8],
        announced: Option<&str>,
        layers_max: usize,
    ) -> Result<Document, ManifestError> {
        let raw: RawDocument = object(bytes).map_err(ManifestError::Json)?;
        spelling::check(bytes, &DOCUMENT).map_err(ManifestError::Json)?;
        let announced = announced.map(essence);
        let schema1_type =
            announced.as_deref().is_some_and(|t| t.starts_with(media_type::SCHEMA1_PREFIX));
        if schema1_type || raw.schema_version == Some(1) {
            return Err(ManifestError::Schema1);
        }
        if let Some(version) = raw.schema_version.filter(|version| *version != 2) {
            return Err(ManifestError::SchemaVersion(version));
        }
        match agreed_type(announced, raw.media_type.as_deref())?.as_str() {
            media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => {
                manifest(raw, layers_max).map(Document::Manifest)
            }
            media_type::OCI_INDEX | media_type::DOCKER_LIST => index(raw).map(Document::Index),
            other => Err(ManifestError::MediaType(shown(other))),
        }
    }
}

/// Longest message of a reader that is passed on whole.
const MESSAGE_BYTES_MAX: usize = 500;

/// Reads a JSON object; the derived readers alone would take a list of the fields' values too.
pub(crate) fn object<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, serde_json::Error> {
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    if first.is_some_and(|byte| *byte != b'{') {
        return Err(serde::de::Error::custom("not a JSON object"));
    }
    // Its message quotes what it did not expect, however long that is.
    serde_json::from_slice(bytes).map_err(|error: serde_json::Error| {
        let message = error.to_string();
        let is_long = message.len() > MESSAGE_BYTES_MAX;
        if is_long { serde::de::Error::custom(shown(&message)) } else { error }
    })
}

/// The one media type that announcement and document agree on.
fn agreed_type(announced: Option<String>, document: Option<&str>) -> Result<String, ManifestError> {
    match (announced, document) {
        (None, None) => Err(ManifestError::NoMediaType),
        (None, Some(document)) => Ok(document.to_owned()),
        (Some(announced), None) => Ok(announced),
        (Some(announced), Some(document)) if announced == document => Ok(announced),
        (Some(announced), Some(document)) => Err(ManifestError::Contradiction {
            announced: shown(&announced),
            document: shown(document),
        }),
    }
}

/// A media type without parameters, lower case.
pub(crate) fn essence(media_type: &str) -> String {
    media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn manifest(raw: RawDocument, layers_max: usize) -> Result<Manifest, ManifestError> {
    if raw.manifests.is_some() || raw.fs_layers.is_some() {
        return Err(ManifestError::Ambiguous);
    }
    let config = descriptor(raw.config.ok_or(ManifestError::Missing("config"))?);
    let is_image =
        [media_type::OCI_CONFIG, media_type::DOCKER_CONFIG].contains(&config.media_type.as_str());
    if !is_image {
        return Err(ManifestError::NotAnImage(shown(&config.media_type)));
    }
    let layers = raw.layers.ok_or(ManifestError::Missing("layers"))?;
    if layers.len() > layers_max {
        let count = layers.len();
        return Err(ManifestError::TooMany { what: "layers", count, max: layers_max });
    }
    Ok(Manifest { config, layers: layers.into_iter().map(descriptor).collect() })
}

/// Enough for every platform there is, with an attestation each.
const INDEX_ENTRIES_MAX: usize = 1024;

fn index(raw: RawDocument) -> Result<ImageIndex, ManifestError> {
    if raw.layers.is_some() || raw.fs_layers.is_some() || raw.config.is_some() {
        return Err(ManifestError::Ambiguous);
    }
    let manifests = raw.manifests.ok_or(ManifestError::Missing("manifests"))?;
    if manifests.len() > INDEX_ENTRIES_MAX {
        let count = manifests.len();
        return Err(ManifestError::TooMany { what: "manifests", count, max: INDEX_ENTRIES_MAX });
    }
    Ok(ImageIndex { manifests: manifests.into_iter().map(descriptor).collect() })
}

fn descriptor(raw: RawDescriptor) -> Descriptor {
    let platform = raw.platform.and_then(|platform| {
        let architecture = platform.architecture.filter(|text| !text.is_empty())?;
        let os = platform.os.filter(|text| !text.is_empty())?;
        Some(Platform::new(&os, &architecture, platform.variant.as_deref()))
    });
    let annotations = raw.annotations.unwrap_or_default();
    Descriptor {
        media_type: raw.media_type.unwrap_or_default(),
        digest: raw.digest,
        size_bytes: raw.size,
        platform,
        annotations: annotations.into_iter().filter_map(|(k, v)| Some((k, v?))).collect(),
    }
}

impl Descriptor {
    /// Whether this index entry is an attestation and no image (BuildKit's convention).
    #[must_use]
    pub fn is_attestation(&self) -> bool {
        self.annotations.contains_key("vnd.docker.reference.type")
            || self.platform.as_ref().is_some_and(Platform::is_unknown)
    }

    pub(crate) fn is_index(&self) -> bool {
        [media_type::OCI_INDEX, media_type::DOCKER_LIST].contains(&self.media_type.as_str())
    }

    pub(crate) fn is_manifest(&self) -> bool {
        [media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST].contains(&self.media_type.as_str())
    }
}

/// A foreign text as an error may show it.
pub(crate) fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn entry(media_type: &str) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{HEX}"), "size": 3})
    }

    fn image() -> serde_json::Value {
        json!({
            "schemaVersion": 2,
            "mediaType": media_type::OCI_MANIFEST,
            "config": entry(media_type::OCI_CONFIG),
            "layers": [entry(&format!("{}+gzip", media_type::OCI_LAYER))],
        })
    }

    fn parse(
        value: &serde_json::Value,
        announced: Option<&str>,
    ) -> Result<Document, ManifestError> {
        Document::parse(value.to_string().as_bytes(), announced, 1024)
    }

    #[test]
    fn both_families_are_read() {
        for (manifest, config) in [
            (media_type::OCI_MANIFEST, media_type::OCI_CONFIG),
            (media_type::DOCKER_MANIFEST, media_type::DOCKER_CONFIG),
        ] {
            let document = json!({"schemaVersion": 2, "mediaType": manifest,
                "config": entry(config), "layers": []});
            assert!(matches!(parse(&document, Some(manifest)), Ok(Document::Manifest(_))));
        }
        for index in [media_type::OCI_INDEX, media_type::DOCKER_LIST] {
            let document = json!({"schemaVersion": 2, "mediaType": index, "manifests": []});
            assert!(matches!(parse(&document, Some(index)), Ok(Document::Index(_))));
        }
    }

    #[test]
    fn the_media_type_inside_must_equal_the_one_announced() {
        assert!(
            parse(&image(), Some("application/vnd.oci.image.manifest.v1+json; charset=utf-8"))
                .is_ok()
        );
        for announced in [media_type::OCI_INDEX, media_type::DOCKER_MANIFEST, "application/json"] {
            assert!(matches!(
                parse(&image(), Some(announced)),
                Err(ManifestError::Contradiction { .. })
            ));
        }
    }

    #[test]
    fn a_document_without_any_media_type_is_refused() {
        let mut bare = image();
        bare.as_object_mut().unwrap().remove("mediaType");
        assert!(matches!(parse(&bare, None), Err(ManifestError::NoMediaType)));
        assert!(parse(&bare, Some(media_type::OCI_MANIFEST)).is_ok());
        assert!(parse(&image(), None).is_ok());
        assert!(matches!(parse(&bare, Some("application/json")), Err(ManifestError::MediaType(_))));
    }

    #[test]
    fn documents_that_read_two_ways_are_refused() {
        for field in ["manifests", "fsLayers"] {
            let mut both = image();
            both[field] = json!([]);
            assert!(matches!(parse(&both, None), Err(ManifestError::Ambiguous)), "{field}");
        }
        for field in ["layers", "fsLayers", "config"] {
            let mut both = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
                "manifests": []});
            both[field] = if field == "config" { entry("x") } else { json!([]) };
            assert!(matches!(parse(&both, None), Err(ManifestError::Ambiguous)), "{field}");
        }
        let twice = format!("{{\"schemaVersion\":2,\"layers\":[],{}", &image().to_string()[1..]);
        assert!(matches!(Document::parse(twice.as_bytes(), None, 9), Err(ManifestError::Json(_))));
    }

    #[test]
    fn a_field_that_others_would_read_under_another_name_is_refused() {
        // Each time a reader that passes over case would see another image.
        for (name, value) in [
            ("Layers", json!([])),
            ("CONFIG", entry(media_type::OCI_CONFIG)),
            ("MediaType", json!(media_type::OCI_INDEX)),
            ("layer\u{17f}", json!([])),
            ("Manifests", json!([])),
        ] {
            let mut other = image();
            other[name] = value;
            let error = parse(&other, None).unwrap_err();
            let ManifestError::Json(source) = error else { panic!("{error}") };
            assert!(source.to_string().contains("to other readers"), "{name}: {source}");
        }
        for (place, name) in [("/config", "Digest"), ("/layers/0", "SIZE")] {
            let mut other = image();
            other.pointer_mut(place).unwrap()[name] = json!(1);
            assert!(matches!(parse(&other, None), Err(ManifestError::Json(_))), "{place}/{name}");
        }
        let mut other = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
            "manifests": [entry(media_type::OCI_MANIFEST)]});
        other["manifests"][0]["platform"] = json!({"os": "linux", "Architecture": "arm64"});
        assert!(matches!(parse(&other, None), Err(ManifestError::Json(_))));
        // Names that are the author's own are no fields.
        let mut own = image();
        own["annotations"] = json!({"Layers": "x"});
        own["layers"][0]["annotations"] = json!({"Digest": "x"});
        own["artifactType"] = json!("x");
        assert!(parse(&own, None).is_ok());
    }

    #[test]
    fn schema_1_is_refused_by_name() {
        let old = json!({"schemaVersion": 1, "name": "x", "tag": "y", "fsLayers": []});
        let signed = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        assert!(matches!(parse(&old, Some(signed)), Err(ManifestError::Schema1)));
        assert!(matches!(parse(&old, Some("application/json")), Err(ManifestError::Schema1)));
        let strange = json!({"schemaVersion": 3});
        assert!(matches!(parse(&strange, None), Err(ManifestError::SchemaVersion(3))));
    }

    #[test]
    fn an_artifact_is_not_an_image() {
        let mut chart = image();
        chart["config"] = entry("application/vnd.cncf.helm.config.v1+json");
        assert!(
            matches!(parse(&chart, None), Err(ManifestError::NotAnImage(t)) if t.contains("helm"))
        );
    }

    #[test]
    fn a_bad_digest_or_size_never_gets_past_the_parser() {
        for (field, value) in [
            ("digest", json!("sha256:../../../etc/passwd")),
            ("digest", json!("md5:00")),
            ("size", json!(-1)),
            ("size", json!(1.5)),
            ("size", json!(1e30)),
        ] {
            let mut bad = image();
            bad["layers"][0][field] = value;
            assert!(matches!(parse(&bad, None), Err(ManifestError::Json(_))), "{field}");
        }
    }

    #[test]
    fn lists_are_bounded() {
        let mut many = image();
        many["layers"] = json!(vec![entry("x"); 1025]);
        assert!(matches!(
            parse(&many, None),
            Err(ManifestError::TooMany { what: "layers", count: 1025, max: 1024 })
        ));
        let index = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
            "manifests": vec![entry("x"); 1025]});
        assert!(matches!(parse(&index, None), Err(ManifestError::TooMany { .. })));
    }

    #[test]
    fn attestations_are_recognised() {
        let index = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [
            {"mediaType": media_type::OCI_MANIFEST, "digest": format!("sha256:{HEX}"), "size": 1,
             "platform": {"os": "unknown", "architecture": "unknown"}},
            {"mediaType": media_type::OCI_MANIFEST, "digest": format!("sha256:{HEX}"), "size": 1,
             "annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
            {"mediaType": media_type::OCI_MANIFEST, "digest": format!("sha256:{HEX}"), "size": 1,
             "platform": {"os": "linux", "architecture": "amd64"}, "annotations": null},
        ]});
        let Document::Index(index) = parse(&index, None).unwrap() else { panic!("an index") };
        let flags: Vec<bool> = index.manifests.iter().map(Descriptor::is_attestation).collect();
        assert_eq!(flags, [true, true, false]);
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_crash() {
        for field in ["x", "layers", "config"] {
            let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
            let deep = format!("{{\"{field}\":{open}{close}}}");
            assert!(Document::parse(deep.as_bytes(), None, 9).is_err());
        }
    }
}
