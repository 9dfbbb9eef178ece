//! Where redirects lead, and what goes with them.

use oci::testing::{Access, Fault, TestRegistry};
use oci::{Credentials, PullError};

use crate::support::{drain, options, pull_layer, registry_with_app, requests, resolve, told};

#[tokio::test]
async fn a_redirect_to_another_host_carries_no_authorization() {
    let (registry, blob) = registry_with_app(1000);
    let cdn = TestRegistry::start().unwrap();
    let digest = cdn.put_blob(blob.clone());
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let (mut options, _) = options(&[&registry, &cdn]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    // Even credentials for that very host stay at home: the redirect's URL is the permit.
    options.credentials.insert(registry.host(), credentials.clone());
    options.credentials.insert(cdn.host(), credentials);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    let target = format!("http://user:secret@{}/cdn/{digest}?signature=s3cret", cdn.host());
    registry.fault("blobs/", Fault::Redirect(target));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    let asked = cdn.requests();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].query, "signature=s3cret");
    assert!(!asked[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_redirect_on_the_same_host_keeps_the_authorization() {
    let (registry, blob) = registry_with_app(1000);
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let (mut options, _) = options(&[&registry]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    options.credentials.insert(registry.host(), credentials);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    let digest = image.layers[0].digest;
    registry.fault("app/blobs/", Fault::Redirect(format!("/v2/other/blobs/{digest}")));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    assert!(requests(&registry, "other").iter().all(|r| r.headers.contains_key("authorization")));
}

#[tokio::test]
async fn authorization_that_was_left_behind_does_not_come_back() {
    let (registry, _) = registry_with_app(1000);
    let other = TestRegistry::start().unwrap();
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let (mut options, _) = options(&[&registry, &other]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    options.credentials.insert(registry.host(), credentials);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    let digest = image.layers[0].digest;
    let back = format!("http://{}/v2/returned/blobs/{digest}", registry.host());
    registry.fault("app/blobs/", Fault::Redirect(format!("http://{}/cdn/x", other.host())));
    other.fault("cdn", Fault::Redirect(back));
    fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    let returned = requests(&registry, "returned");
    assert_eq!(returned.len(), 1);
    assert!(!returned[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_resumed_download_asks_the_registry_for_a_fresh_redirect() {
    let (registry, blob) = registry_with_app(300_000);
    let cdn = TestRegistry::start().unwrap();
    let digest = cdn.put_blob(blob.clone());
    let (options, _) = options(&[&registry, &cdn]);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    for signature in ["first", "second"] {
        let target = format!("http://{}/cdn/{digest}?{signature}", cdn.host());
        registry.fault(&digest.to_string(), Fault::Redirect(target));
    }
    cdn.fault("cdn", Fault::CutAfter(100_000));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    let queries: Vec<String> = cdn.requests().into_iter().map(|request| request.query).collect();
    assert_eq!(queries, ["first", "second"]);
    assert_eq!(cdn.requests()[1].headers["range"], "bytes=100000-");
}

#[tokio::test]
async fn a_redirect_to_plain_http_is_followed_to_named_hosts_only() {
    let (registry, blob) = registry_with_app(1000);
    let cdn = TestRegistry::start().unwrap();
    let digest = cdn.put_blob(blob);
    let (options, _) = options(&[&registry]);
    let target = format!("http://{}/cdn/{digest}?signature=s3cret", cdn.host());
    registry.fault("blobs/", Fault::Redirect(target));
    // The config is the first blob that is asked for.
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(&error, PullError::RedirectRefused { target, .. } if *target == cdn.host()));
    assert!(!told(&error).contains("s3cret"));
    assert!(cdn.requests().is_empty());
}

#[tokio::test]
async fn redirects_to_other_schemes_and_to_nowhere_are_refused() {
    let (registry, _) = registry_with_app(1000);
    let (options, waits) = options(&[&registry]);
    for target in ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "data:,x"] {
        registry.fault("manifests", Fault::Redirect(target.to_owned()));
        let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
        let expected =
            matches!(error, PullError::RedirectRefused { .. } | PullError::Protocol { .. });
        assert!(expected, "{target}: {error:?}");
    }
    assert!(waits.seen().is_empty());
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let (registry, _) = registry_with_app(1000);
    let (options, _) = options(&[&registry]);
    for _ in 0..30 {
        registry.fault("manifests", Fault::Redirect("/v2/app/manifests/v1".to_owned()));
    }
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(error, PullError::TooManyRedirects { limit: 8, .. }));
    assert_eq!(registry.requests().len(), 9);
}

#[tokio::test]
async fn a_challenge_of_another_host_is_not_answered() {
    let (registry, _) = registry_with_app(1000);
    let trap = TestRegistry::start().unwrap();
    trap.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let (mut options, _) = options(&[&registry, &trap]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    options.credentials.insert(registry.host(), credentials);
    let target = format!("http://{}/v2/x/blobs/y", trap.host());
    registry.fault("blobs/", Fault::Redirect(target));
    let error = pull_layer(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(error, PullError::Status { status: 401, .. }), "{error:?}");
    assert_eq!(trap.requests().len(), 1);
    assert!(!trap.requests()[0].headers.contains_key("authorization"));
}
