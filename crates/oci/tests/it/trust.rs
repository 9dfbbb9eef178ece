//! Documents that lie about what they are.

use oci::testing::{Fault, TestRegistry, descriptor};
use oci::{ConfigError, Digest, ManifestError, PullError, media_type};
use serde_json::json;

use crate::support::{GZIP_LAYER, layer, options, registry_with_app, resolve, told};

/// Serves one document as `app:v1` and resolves it.
async fn refused(media_type: &str, document: &serde_json::Value) -> PullError {
    let registry = TestRegistry::start().unwrap();
    registry.put_manifest("app", Some("v1"), media_type, document);
    let (options, _) = options(&[&registry]);
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(!error.is_retryable());
    error
}

fn is_manifest_error(error: &PullError, check: fn(&ManifestError) -> bool) -> bool {
    matches!(error, PullError::Manifest { source, .. } if check(source))
}

#[tokio::test]
async fn a_manifest_served_under_another_type_is_refused() {
    let (registry, _) = registry_with_app(100);
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    for wrong in [media_type::OCI_INDEX, media_type::DOCKER_MANIFEST, "application/json"] {
        registry.fault("manifests", Fault::Header("content-type".to_owned(), wrong.to_owned()));
        let error = resolve(&source, &options).await.unwrap_err();
        assert!(is_manifest_error(&error, |e| matches!(e, ManifestError::Contradiction { .. })));
    }
    registry.fault("manifests", Fault::Without("content-type".to_owned()));
    assert!(resolve(&source, &options).await.is_ok(), "the document says itself what it is");
}

#[tokio::test]
async fn a_document_that_is_manifest_and_index_at_once_is_refused() {
    let digest = Digest::of(b"");
    let document = json!({
        "schemaVersion": 2,
        "config": descriptor(media_type::OCI_CONFIG, digest, 0),
        "layers": [], "manifests": [],
    });
    for media_type in [media_type::OCI_MANIFEST, media_type::OCI_INDEX] {
        let error = refused(media_type, &document).await;
        assert!(is_manifest_error(&error, |e| matches!(e, ManifestError::Ambiguous)));
    }
}

#[tokio::test]
async fn schema_1_is_refused_with_a_remedy() {
    let document = json!({"schemaVersion": 1, "fsLayers": [], "history": []});
    let signed = "application/vnd.docker.distribution.manifest.v1+prettyjws";
    let error = refused(signed, &document).await;
    assert!(is_manifest_error(&error, |e| matches!(e, ManifestError::Schema1)));
    assert!(error.hint().unwrap().contains("push the image again"));
}

#[tokio::test]
async fn a_manifest_pulled_by_digest_must_have_it() {
    let (registry, _) = registry_with_app(100);
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    let (_, image) = resolve(&source, &options).await.unwrap();
    let by_digest = format!("{}/app@{}", registry.host(), image.manifest_digest);
    assert_eq!(
        resolve(&by_digest, &options).await.unwrap().1.manifest_digest,
        image.manifest_digest
    );
    registry.fault("manifests", Fault::Body(b"{}".to_vec()));
    let error = resolve(&by_digest, &options).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { .. }));
}

#[tokio::test]
async fn a_registry_that_announces_another_digest_is_not_believed() {
    let (registry, _) = registry_with_app(100);
    let (options, _) = options(&[&registry]);
    let other = Digest::of(b"other").to_string();
    registry.fault("manifests", Fault::Header("docker-content-digest".to_owned(), other));
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { .. }));
    registry.fault("manifests", Fault::Without("docker-content-digest".to_owned()));
    assert!(resolve(&format!("{}/app:v1", registry.host()), &options).await.is_ok());
}

#[tokio::test]
async fn a_huge_manifest_is_refused_with_and_without_a_length() {
    let registry = TestRegistry::start().unwrap();
    let huge = vec![b' '; (4 << 20) + 1];
    registry.put_manifest_bytes("app", Some("v1"), media_type::OCI_MANIFEST, huge);
    let (options, _) = options(&[&registry]);
    for _ in 0..2 {
        let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
        assert!(matches!(error, PullError::TooLarge { bytes_max: 4_194_304, .. }), "{error:?}");
        registry.fault("manifests", Fault::ChunkedUpTo(u64::MAX));
    }
}

#[tokio::test]
async fn a_config_that_is_too_large_wrong_or_broken_is_refused() {
    let registry = TestRegistry::start().unwrap();
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    let put = |config: serde_json::Value| {
        let document = json!({"schemaVersion": 2, "config": config, "layers": []});
        registry.put_manifest("app", Some("v1"), media_type::OCI_MANIFEST, &document);
    };
    let broken = registry.put_blob(*b"{\"os\": }");

    put(descriptor(media_type::OCI_CONFIG, broken, (8 << 20) + 1));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::TooLarge { .. }));

    put(descriptor(media_type::OCI_CONFIG, broken, 7));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::SizeMismatch { .. }));

    put(descriptor(media_type::OCI_CONFIG, broken, 8));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::Config { digest, source: ConfigError::Json(_) }
        if digest == broken));

    registry.corrupt_blob(broken, *b"{\"os\":1}");
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { expected, .. } if expected == broken));
}

#[tokio::test]
async fn layers_and_diff_ids_must_be_equally_many() {
    let registry = TestRegistry::start().unwrap();
    let (options, _) = options(&[&registry]);
    let config = json!({"os": "linux", "architecture": "amd64",
        "rootfs": {"diff_ids": [Digest::of(b"a"), Digest::of(b"b")]}});
    let config = config.to_string().into_bytes();
    let size = config.len();
    let document = json!({
        "schemaVersion": 2,
        "config": descriptor(media_type::OCI_CONFIG, registry.put_blob(config), size),
        "layers": [descriptor(GZIP_LAYER, Digest::of(b"x"), 1)],
    });
    registry.put_manifest("app", Some("v1"), media_type::OCI_MANIFEST, &document);
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(error, PullError::LayerCount { layers: 1, diff_ids: 2, .. }));
}

#[tokio::test]
async fn an_image_without_layers_is_an_image() {
    let registry = TestRegistry::start().unwrap();
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &[]);
    let (options, _) = options(&[&registry]);
    let (_, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    assert!(image.layers.is_empty());
    assert_eq!(image.config.cmd, ["/bin/sh"]);
}

#[tokio::test]
async fn encrypted_and_unknown_layers_are_refused_before_any_is_fetched() {
    for (media_type, hint) in
        [(format!("{GZIP_LAYER}+encrypted"), true), ("text/plain".to_owned(), false)]
    {
        let registry = TestRegistry::start().unwrap();
        let (_, blob, diff_id) = layer(1, 100);
        registry.put_image("app", Some("v1"), ("linux", "amd64"), &[(media_type, blob, diff_id)]);
        let (options, _) = options(&[&registry]);
        let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
        assert!(matches!(error, PullError::Manifest { .. }));
        assert_eq!(error.hint().is_some_and(|hint| hint.contains("decrypt")), hint);
    }
}

#[tokio::test]
async fn foreign_layers_come_from_the_registry_or_not_at_all() {
    let registry = TestRegistry::start().unwrap();
    let elsewhere = TestRegistry::start().unwrap();
    let (options, _) = options(&[&registry, &elsewhere]);
    let (_, blob, diff_id) = layer(1, 100);
    let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [diff_id]}});
    let config = config.to_string().into_bytes();
    let size = config.len();
    let digest = registry.put_blob(blob.clone());
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let mut entry = descriptor(foreign, digest, blob.len());
    entry["urls"] = json!([format!("http://{}/cdn/{digest}", elsewhere.host())]);
    let document = json!({
        "schemaVersion": 2, "mediaType": media_type::DOCKER_MANIFEST,
        "config": descriptor(media_type::DOCKER_CONFIG, registry.put_blob(config), size),
        "layers": [entry],
    });
    registry.put_manifest("app", Some("v1"), media_type::DOCKER_MANIFEST, &document);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    assert!(fetcher.blob(&image, &image.layers[0]).await.is_ok());
    registry.delete_blob(digest);
    let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    assert!(matches!(error, PullError::ForeignLayer { .. }));
    assert!(told(&error).contains("never followed"));
    assert!(elsewhere.requests().is_empty());
}

#[tokio::test]
async fn sizes_beyond_the_limits_are_refused_before_any_byte() {
    let registry = TestRegistry::start().unwrap();
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &[layer(1, 9000), layer(2, 9000)]);
    let source = format!("{}/app:v1", registry.host());
    let (mut options, _) = options(&[&registry]);
    options.limits.layer_bytes_max = 1000;
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::TooLarge { bytes_max: 1000, .. }));
    options.limits.layer_bytes_max = 10_000;
    options.limits.image_bytes_max = 10_000;
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::TooLarge { bytes_max: 10_000, .. }));
    options.limits.layers_max = 1;
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(is_manifest_error(&error, |e| matches!(e, ManifestError::TooMany { .. })));
}

#[tokio::test]
async fn a_missing_image_says_so() {
    let (registry, _) = registry_with_app(100);
    let (options, waits) = options(&[&registry]);
    let error = resolve(&format!("{}/app:v2", registry.host()), &options).await.unwrap_err();
    assert!(matches!(&error, PullError::NotFound { what, .. } if what == "app:v2"));
    assert_eq!(error.blame(), oci::Blame::Yours);
    assert!(waits.seen().is_empty());
}

#[tokio::test]
async fn what_a_registry_says_is_passed_on_without_control_characters() {
    let (registry, _) = registry_with_app(100);
    let (options, _) = options(&[&registry]);
    let body = json!({"errors": [{"code": "X", "message": "no\u{1b}[31m\nway"}]}).to_string();
    registry.put_manifest_bytes("app", Some("v3"), "text/plain", body.into_bytes());
    registry.fault("manifests/v3", Fault::Status(400, Vec::new()));
    let error = resolve(&format!("{}/app:v3", registry.host()), &options).await.unwrap_err();
    assert!(error.to_string().ends_with(": fault"), "{error}");
    assert!(!told(&error).contains('\u{1b}'));
}
