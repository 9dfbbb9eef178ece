//! Mirrors first, then the registry.

use std::collections::BTreeMap;

use oci::testing::{Access, Fault, TestRegistry};
use oci::{ClientOptions, Credentials, PullError};

use crate::support::{
    Waits, drain, layer, options, pull_layer, registry_with_app, requests, resolve,
};

/// Options with `mirror` in front of `registry`, which itself is not plain-HTTP unless listed.
fn mirrored(name: &str, mirror: &str, registries: &[&TestRegistry]) -> (ClientOptions, Waits) {
    let (mut options, waits) = options(registries);
    options.mirrors = BTreeMap::from([(name.to_owned(), vec![mirror.to_owned()])]);
    (options, waits)
}

#[tokio::test]
async fn a_mirror_is_asked_instead_of_docker_hub() {
    let mirror = TestRegistry::start().unwrap();
    let layer = layer(1, 1000);
    let blob = layer.1.clone();
    mirror.put_image("library/app", Some("latest"), ("linux", "amd64"), &[layer]);
    for name in ["docker.io", "index.docker.io", "*"] {
        let (options, _) = mirrored(name, &mirror.host(), &[&mirror]);
        assert_eq!(pull_layer("app", &options).await.unwrap(), blob);
    }
    assert!(mirror.requests().iter().all(|request| request.query == "ns=docker.io"));
}

#[tokio::test]
async fn a_mirror_may_live_below_a_path() {
    let mirror = TestRegistry::start().unwrap();
    mirror.put_image("hub-cache/library/app", Some("latest"), ("linux", "amd64"), &[layer(1, 9)]);
    let (options, _) = mirrored("docker.io", &format!("{}/hub-cache/", mirror.host()), &[&mirror]);
    pull_layer("app", &options).await.unwrap();
}

#[tokio::test]
async fn a_mirror_without_the_image_or_in_trouble_is_passed_over() {
    let (registry, blob) = registry_with_app(1000);
    let mirror = TestRegistry::start().unwrap();
    let faults = [
        None,
        Some(Fault::Status(500, Vec::new())),
        Some(Fault::Status(403, Vec::new())),
        Some(Fault::Hangup),
        Some(Fault::Body(b"{}".to_vec())),
    ];
    for fault in faults {
        if let Some(fault) = fault {
            mirror.fault("manifests", fault);
        }
        let (options, waits) = mirrored(&registry.host(), &mirror.host(), &[&registry, &mirror]);
        let source = format!("{}/app:v1", registry.host());
        assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
        assert!(waits.seen().len() <= 1, "a mirror gets little patience");
    }
    assert!(requests(&mirror, "blobs/").is_empty());
    assert!(requests(&registry, "").iter().all(|request| request.query.is_empty()));
}

#[tokio::test]
async fn a_mirror_that_is_not_there_costs_one_retry() {
    let (registry, blob) = registry_with_app(1000);
    let gone = TestRegistry::start().unwrap().host();
    let (mut options, waits) = mirrored(&registry.host(), &gone, &[&registry]);
    options.plain_http.insert(gone.clone());
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    assert_eq!(waits.seen().len(), 1);
    let (fetcher, _) = resolve(&source, &options).await.unwrap();
    let notes = fetcher.take_notes();
    assert!(matches!(&notes[..], [note] if note.contains(&gone)), "{notes:?}");
    assert!(fetcher.take_notes().is_empty(), "each is told once");
}

#[tokio::test]
async fn a_blob_that_breaks_on_the_mirror_is_finished_from_the_registry() {
    let (registry, blob) = registry_with_app(300_000);
    let (mirror, _) = registry_with_app(300_000);
    let (options, _) = mirrored(&registry.host(), &mirror.host(), &[&registry, &mirror]);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    mirror.fault(&name, Fault::CutAfter(100_000));
    mirror.fault(&name, Fault::CutAfter(100_000));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    let rest = requests(&registry, &name);
    assert_eq!(rest.len(), 1);
    let notes = fetcher.take_notes();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains(&mirror.host()) && notes[0].contains("broke off"), "{notes:?}");
    assert_eq!(rest[0].headers["range"], "bytes=200000-");
}

#[tokio::test]
async fn a_blob_the_mirror_lacks_comes_from_the_registry() {
    let (registry, blob) = registry_with_app(1000);
    let (mirror, _) = registry_with_app(1000);
    let (options, _) = mirrored(&registry.host(), &mirror.host(), &[&registry, &mirror]);
    mirror.delete_blob(oci::Digest::of(&blob));
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
}

#[tokio::test]
async fn a_mirror_never_gets_the_registrys_password() {
    let (registry, blob) = registry_with_app(1000);
    let (mirror, _) = registry_with_app(1000);
    for asked in [&registry, &mirror] {
        asked.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    }
    let (mut options, _) = mirrored(&registry.host(), &mirror.host(), &[&registry, &mirror]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    options.credentials.insert(registry.host(), credentials);
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    assert!(!mirror.requests().is_empty());
    assert!(mirror.requests().iter().all(|r| !r.headers.contains_key("authorization")));
}

#[tokio::test]
async fn a_mirror_that_cannot_be_meant_is_an_error_of_the_option() {
    for bad in ["https://mirror.example", "mirror.example/../x", "mirror example", ""] {
        let (options, _) = mirrored("docker.io", bad, &[]);
        let error = pull_layer("app", &options).await.unwrap_err();
        assert!(matches!(error, PullError::Option { option: "mirror", .. }), "{bad}: {error:?}");
    }
}
