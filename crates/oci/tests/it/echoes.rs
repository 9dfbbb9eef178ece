//! Registries that repeat what they were sent: nobody else is told.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci::testing::{Access, Fault, TestRegistry};
use oci::{ClientOptions, Credentials, Fetcher, PullError};

use crate::support::{amd64, layer, open, options, pull_layer, registry_with_app, resolve, told};

/// With what URLs and JSON write differently.
const PASSWORD: &str = "hunter2/\"pass word\"+%";

fn with_password(registry: &TestRegistry) -> ClientOptions {
    let (mut options, _) = options(&[registry]);
    let (username, password) = ("me".to_owned(), PASSWORD.into());
    options.credentials.insert(registry.host(), Credentials::Password { username, password });
    options
}

fn basic() -> Access {
    Access::Basic("me".to_owned(), PASSWORD.to_owned())
}

fn bearer() -> Access {
    Access::Bearer {
        user: Some(("me".to_owned(), PASSWORD.to_owned())),
        refresh_token: None,
        realm: None,
    }
}

/// All that the echo of a test could leave.
fn assert_tells_nothing(text: &str) {
    let sent = STANDARD.encode(format!("me:{PASSWORD}"));
    for part in ["hunter2", "pass word", "token-0", "refresh-me", &sent, &sent[..12]] {
        let has = text.to_ascii_lowercase().contains(&part.to_ascii_lowercase());
        assert!(!has, "{part} is in {text}");
    }
}

#[tokio::test]
async fn an_error_that_repeats_the_authorization_is_shown_without_it() {
    for (access, path) in [(basic(), "manifests"), (bearer(), "manifests"), (bearer(), "/token")] {
        for status in [400, 401, 403, 404, 429, 503] {
            let (registry, _) = registry_with_app(1000);
            registry.set_access(access.clone());
            if path == "manifests" {
                // The first request comes without, and is to be refused.
                registry.fault(path, Fault::Header("x".to_owned(), "y".to_owned()));
            }
            // As often as a client tries, also for a token in each try for a manifest.
            for _ in 0..36 {
                registry.fault(path, Fault::Echo(status, "no leave for <{}>".to_owned()));
            }
            let source = format!("{}/app:v1", registry.host());
            let error = resolve(&source, &with_password(&registry)).await.unwrap_err();
            let text = told(&error);
            assert!(text.contains("no leave for <***"), "{path} {status}: {text}");
            assert_tells_nothing(&text);
        }
    }
}

#[tokio::test]
async fn the_password_is_found_in_every_spelling_and_where_the_text_is_cut() {
    let (registry, _) = registry_with_app(1000);
    registry.set_access(basic());
    let source = format!("{}/app:v1", registry.host());
    let password_in_json = serde_json::to_string(PASSWORD).unwrap();
    let messages = [
        PASSWORD.to_owned(),
        PASSWORD.to_ascii_uppercase(),
        "hunter2%2F%22pass%20word%22%2B%25".to_owned(),
        "hunter2%2f%22pass+word%22%2b%25".to_owned(),
        password_in_json,
        STANDARD.encode(PASSWORD),
        format!("{}{PASSWORD}", "x".repeat(195)),
        format!("{}{PASSWORD}", "x".repeat(5000)),
    ];
    for message in messages {
        registry.fault("manifests", Fault::Header("x".to_owned(), "y".to_owned()));
        registry.fault("manifests", Fault::Echo(400, message.clone()));
        let error = resolve(&source, &with_password(&registry)).await.unwrap_err();
        assert!(matches!(error, PullError::Status { status: 400, .. }), "{error:?}");
        assert_tells_nothing(&told(&error));
        let encoded = STANDARD.encode(PASSWORD);
        assert!(!told(&error).contains(encoded.trim_end_matches('=')), "{message}");
    }
}

#[tokio::test]
async fn tokens_of_the_user_are_not_repeated() {
    let (registry, _) = registry_with_app(1000);
    let source = format!("{}/app:v1", registry.host());
    let refresh_token = Some("refresh-me".to_owned());
    registry.set_access(Access::Bearer { user: None, refresh_token, realm: None });
    let (mut options, _) = options(&[&registry]);
    let token = Credentials::IdentityToken("refresh-me".into());
    options.credentials.insert(registry.host(), token);
    registry.fault("/token", Fault::Echo(400, "bad form {}".to_owned()));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(told(&error).contains("refresh_token=***"), "{}", told(&error));
    assert_tells_nothing(&told(&error));
    let token = Credentials::RegistryToken("refresh-me".into());
    options.credentials.insert(registry.host(), token);
    registry.fault("manifests", Fault::Header("x".to_owned(), "y".to_owned()));
    registry.fault("manifests", Fault::Echo(400, "bad token {}".to_owned()));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(told(&error).contains("bad token ***"), "{}", told(&error));
    assert_tells_nothing(&told(&error));
}

#[tokio::test]
async fn hosts_that_an_answer_names_do_not_carry_it_on() {
    let (registry, _) = registry_with_app(1000);
    let source = format!("{}/app:v1", registry.host());
    let options = with_password(&registry);
    registry.set_access(bearer());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    // One is refused, the other is not there.
    for target in ["http://TOKEN-0.localhost/x", "https://token-0.localhost:1/x"] {
        for _ in 0..6 {
            registry.fault("blobs/", Fault::Redirect(target.to_owned()));
        }
        let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
        assert!(told(&error).contains("***.localhost"), "{}", told(&error));
        assert_tells_nothing(&told(&error));
        while registry.faults_left() > 0 {
            drop(fetcher.blob(&image, &image.layers[0]).await);
        }
    }
    registry.fault("blobs/", Fault::Header("content-encoding".to_owned(), "token-0".to_owned()));
    let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    assert_tells_nothing(&told(&error));
    for realm in ["http://token-0.invalid/", "token-0", "ftp://token-0.invalid/"] {
        let realm = format!("Bearer realm=\"{realm}\"");
        let header = vec![("www-authenticate".to_owned(), realm)];
        for _ in 0..6 {
            registry.fault("blobs/", Fault::Status(401, header.clone()));
        }
        let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
        assert_tells_nothing(&told(&error));
        while registry.faults_left() > 0 {
            drop(fetcher.blob(&image, &image.layers[0]).await);
        }
    }
}

async fn refused(fetcher: &Fetcher) -> String {
    told(&fetcher.resolve(&amd64()).await.unwrap_err())
}

#[tokio::test]
async fn documents_that_repeat_it_are_quoted_without_it() {
    let registry = TestRegistry::start().unwrap();
    registry.put_image("app", Some("v1"), ("linux", "token-0"), &[layer(1, 9)]);
    registry.set_access(bearer());
    let options = with_password(&registry);
    let fetcher = open(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let text = refused(&fetcher).await;
    assert!(text.contains("only for linux/***"), "{text}");
    assert_tells_nothing(&text);
    for document in [
        r#"{"schemaVersion": "token-0"}"#,
        r#"{"schemaVersion": 2, "mediaType": "token-0"}"#,
        r#"{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "token-0", "size": 1}}"#,
    ] {
        registry.put_manifest_bytes("app", Some("v2"), "application/json", document.into());
        let fetcher = open(&format!("{}/app:v2", registry.host()), &options).await.unwrap();
        let text = refused(&fetcher).await;
        assert_tells_nothing(&text);
    }
}

#[tokio::test]
async fn what_a_document_says_is_quoted_in_bounds() {
    let registry = TestRegistry::start().unwrap();
    let source = format!("{}/app:v1", registry.host());
    let (options, _) = options(&[&registry]);
    let long = "\\u001b[31m".repeat(20_000);
    for document in [
        format!("{{\"schemaVersion\": \"{long}\"}}"),
        format!("{{\"schemaVersion\": 2, \"mediaType\": \"{long}\"}}"),
    ] {
        registry.put_manifest_bytes("app", Some("v1"), "", document.into_bytes());
        let error = pull_layer(&source, &options).await.unwrap_err();
        let text = told(&error);
        assert!(text.len() < 4000 && !text.contains('\u{1b}'), "{} bytes", text.len());
    }
    registry.put_image("app", Some("v1"), ("linux", &"\u{1b}x".repeat(20_000)), &[layer(1, 9)]);
    let error = pull_layer(&source, &options).await.unwrap_err();
    let text = format!("{error} {:?}", error.hint());
    assert!(text.len() < 1000 && !text.contains('\u{1b}'), "{} bytes", text.len());
}

#[tokio::test]
async fn a_mirror_is_passed_over_without_its_echo() {
    let (registry, blob) = registry_with_app(1000);
    let (mirror, _) = registry_with_app(1000);
    mirror.set_access(basic());
    let (mut options, _) = options(&[&registry, &mirror]);
    options.credentials = with_password(&mirror).credentials;
    options.mirrors = [(registry.host(), vec![mirror.host()])].into();
    mirror.fault("manifests", Fault::Header("x".to_owned(), "y".to_owned()));
    mirror.fault("manifests", Fault::Echo(400, "bad header {}".to_owned()));
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    assert_eq!(image.layers[0].digest, oci::Digest::of(&blob));
    let notes = fetcher.take_notes().concat();
    assert!(notes.contains("bad header ***"), "{notes}");
    assert_tells_nothing(&notes);
}
