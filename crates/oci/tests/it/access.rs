//! Logging in: who gets which secret, and when.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use oci::testing::{Access, Fault, TestRegistry};
use oci::{Blame, ClientOptions, Credentials, PullError, Source};

use crate::support::{drain, options, pull_layer, registry_with_app, requests, resolve, told};

fn password(user: &str, password: &str) -> Credentials {
    Credentials::Password { username: user.to_owned(), password: password.into() }
}

fn with_user(registry: &TestRegistry, user: &str, secret: &str) -> ClientOptions {
    let (mut options, _) = options(&[registry]);
    options.credentials.insert(registry.host(), password(user, secret));
    options
}

fn bearer(user: Option<(&str, &str)>) -> Access {
    let user = user.map(|(user, password)| (user.to_owned(), password.to_owned()));
    Access::Bearer { user, refresh_token: None, realm: None }
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_once_and_used_for_everything() {
    let (registry, blob) = registry_with_app(1000);
    registry.set_access(bearer(None));
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    assert!(image.anonymous);
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    let tokens = requests(&registry, "/token");
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0].query, "service=test.service&scope=repository%3Aapp%3Apull");
    assert_eq!(tokens[0].headers.get("authorization"), None);
    let refused = registry.requests().iter().filter(|request| request.status == 401).count();
    assert_eq!(refused, 1, "only the very first request comes without a token");
}

#[tokio::test]
async fn a_private_repository_is_opened_with_user_and_password() {
    let (registry, blob) = registry_with_app(1000);
    for access in [bearer(Some(("me", "pw"))), Access::Basic("me".to_owned(), "pw".to_owned())] {
        registry.set_access(access);
        let options = with_user(&registry, "me", "pw");
        let source = format!("{}/app:v1", registry.host());
        let (fetcher, image) = resolve(&source, &options).await.unwrap();
        assert!(!image.anonymous);
        assert!(!fetcher.is_anonymous());
        let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
        assert_eq!(drain(&mut stream).await.unwrap(), blob);
    }
}

#[tokio::test]
async fn nobody_who_does_not_ask_gets_a_password() {
    let (registry, _) = registry_with_app(1000);
    let options = with_user(&registry, "me", "pw");
    let (_, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    assert!(image.anonymous, "the registry gave it to somebody unknown");
    assert!(registry.requests().iter().all(|r| !r.headers.contains_key("authorization")));
}

#[tokio::test]
async fn wrong_and_missing_passwords_lead_to_different_advice() {
    let (registry, _) = registry_with_app(1000);
    let source = format!("{}/app:v1", registry.host());
    for access in [bearer(Some(("me", "pw"))), Access::Basic("me".to_owned(), "pw".to_owned())] {
        registry.set_access(access);
        let error = resolve(&source, &with_user(&registry, "me", "hunter2")).await.unwrap_err();
        assert!(matches!(error, PullError::Unauthorized { sent_credentials: true, .. }));
        assert!(error.hint().unwrap().contains("renew"));
        assert!(!told(&error).contains("hunter2"));
        assert_eq!(error.blame(), Blame::Yours);
        let error = resolve(&source, &options(&[&registry]).0).await.unwrap_err();
        assert!(matches!(error, PullError::Unauthorized { sent_credentials: false, .. }));
        assert!(error.hint().unwrap().contains(&format!("docker login {}", registry.host())));
    }
}

#[tokio::test]
async fn a_wrong_password_is_tried_once_and_not_again_and_again() {
    let (registry, _) = registry_with_app(1000);
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let options = with_user(&registry, "me", "no");
    resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert_eq!(registry.requests().len(), 2);
}

#[tokio::test]
async fn a_refresh_token_is_exchanged_by_post() {
    let (registry, blob) = registry_with_app(1000);
    let refresh_token = Some("refresh-me".to_owned());
    registry.set_access(Access::Bearer { user: None, refresh_token, realm: None });
    let (mut options, _) = options(&[&registry]);
    let token = Credentials::IdentityToken("refresh-me".into());
    options.credentials.insert(registry.host(), token);
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    let asked = requests(&registry, "/token").pop().unwrap();
    assert_eq!((asked.method.as_str(), asked.query.as_str()), ("POST", ""));
    assert!(asked.body.contains("scope=repository%3Aapp%3Apull"));
    assert!(asked.body.contains("client_id=builderd"));
}

#[tokio::test]
async fn a_token_that_expires_in_the_middle_of_a_blob_is_renewed() {
    let (registry, blob) = registry_with_app(300_000);
    registry.set_access(bearer(Some(("me", "pw"))));
    let options = with_user(&registry, "me", "pw");
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    registry.fault("blobs/", Fault::CutAfter(100_000));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    registry.revoke_tokens();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    assert_eq!(requests(&registry, "/token").len(), 2);
}

#[tokio::test]
async fn parallel_blobs_share_one_renewed_token() {
    let registry = TestRegistry::start().unwrap();
    let layers: Vec<_> = (0..4).map(|seed| crate::support::layer(seed, 1000)).collect();
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &layers);
    registry.set_access(bearer(None));
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    registry.revoke_tokens();
    let [a, b, c, d] = [0, 1, 2, 3].map(|n| fetcher.blob(&image, &image.layers[n]));
    let (a, b, c, d) = tokio::join!(a, b, c, d);
    for (stream, layer) in [a, b, c, d].into_iter().zip(&layers) {
        assert_eq!(drain(&mut stream.unwrap()).await.unwrap(), layer.1);
    }
    assert_eq!(requests(&registry, "/token").len(), 2);
}

#[tokio::test]
async fn a_token_server_that_fails_is_tried_again_and_then_named() {
    let (registry, _) = registry_with_app(1000);
    registry.set_access(bearer(None));
    let (options, waits) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    registry.fault("/token", Fault::Status(503, Vec::new()));
    resolve(&source, &options).await.unwrap();
    assert_eq!(waits.seen(), [Duration::from_millis(250)]);
    registry.revoke_tokens();
    registry.fault("/token", Fault::Body(b"<html>".to_vec()));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::Token { .. }), "{error:?}");
}

#[tokio::test]
async fn a_challenge_that_leads_nowhere_ends_in_an_error() {
    let (registry, _) = registry_with_app(1000);
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    for challenge in ["Negotiate", "", "Bearer realm=\"file:///etc/passwd\"", "Bearer realm=\"x\""]
    {
        let header = vec![("www-authenticate".to_owned(), challenge.to_owned())];
        registry.fault("manifests", Fault::Status(401, header));
        let error = resolve(&source, &options).await.unwrap_err();
        let expected = matches!(error, PullError::Unauthorized { .. } | PullError::Token { .. });
        assert!(expected, "{challenge}: {error:?}");
    }
}

#[tokio::test]
async fn a_token_server_without_tls_gets_nothing_unless_the_registry_is_such_a_one_itself() {
    // The registry is a named plain-HTTP host, its token server another plain host: allowed,
    // because whoever can read the registry's traffic can read the password anyway.
    let (registry, blob) = registry_with_app(1000);
    let tokens = TestRegistry::start().unwrap();
    tokens.set_access(bearer(Some(("me", "pw"))));
    registry.set_access(Access::Bearer {
        user: None,
        refresh_token: None,
        realm: Some(format!("http://{}/token", tokens.host())),
    });
    let options = with_user(&registry, "me", "pw");
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    assert_eq!(tokens.requests().len(), 1);
}

#[tokio::test]
async fn a_docker_config_is_read() {
    use base64::Engine as _;
    let (registry, blob) = registry_with_app(1000);
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let auth = base64::engine::general_purpose::STANDARD.encode("me:pw");
    let host = registry.host();
    std::fs::write(&path, format!(r#"{{"auths": {{"http://{host}/v2/": {{"auth": "{auth}"}}}}}}"#))
        .unwrap();
    let (mut options, _) = options(&[&registry]);
    options.docker_config = Some(path.clone());
    let source = format!("{host}/app:v1");
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    std::fs::write(&path, "{").unwrap();
    let error = pull_layer(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::Credentials { .. }));
}

/// A helper program on `PATH` would need this process's environment changed; a name with a
/// path is refused; so the helper is found through a child process with its own `PATH`.
#[test]
fn a_credential_helper_is_asked_and_its_failures_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let helper = |name: &str, script: &str| {
        let path = dir.path().join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    helper("good", "read host; echo \"{\\\"Username\\\":\\\"me\\\",\\\"Secret\\\":\\\"pw\\\"}\"");
    helper("none", "echo 'credentials not found in native keychain'; exit 1");
    helper("sick", "echo 'keychain is locked'; exit 1");
    helper("slow", "exec sleep 600");
    helper("mute", "exit 0");
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    #[expect(clippy::disallowed_methods, reason = "the child needs a PATH of its own")]
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "access::inside_a_child_with_helpers", "--ignored", "--nocapture"])
        .env("PATH", path)
        .env("OCI_TEST_HELPERS", dir.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}

#[tokio::test]
#[ignore = "runs inside a_credential_helper_is_asked_and_its_failures_are_told"]
async fn inside_a_child_with_helpers() {
    #[expect(clippy::disallowed_methods, reason = "how the parent hands over the directory")]
    let dir = std::env::var("OCI_TEST_HELPERS").unwrap();
    let config = Path::new(&dir).join("config.json");
    let (registry, blob) = registry_with_app(1000);
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let source = format!("{}/app:v1", registry.host());
    let (mut options, _) = options(&[&registry]);
    options.docker_config = Some(config.clone());
    options.timeouts.helper = Duration::from_secs(5);
    let use_helper = |json: String| std::fs::write(&config, json).unwrap();

    use_helper(format!(r#"{{"credHelpers": {{"{}": "good"}}}}"#, registry.host()));
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    use_helper(r#"{"credsStore": "good"}"#.to_owned());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), blob);
    use_helper(r#"{"credsStore": "none"}"#.to_owned());
    let error = pull_layer(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { sent_credentials: false, .. }));
    use_helper(r#"{"credsStore": "sick"}"#.to_owned());
    let error = pull_layer(&source, &options).await.unwrap_err();
    assert!(told(&error).contains("docker-credential-sick failed: keychain is locked"));
    use_helper(r#"{"credsStore": "mute"}"#.to_owned());
    let error = pull_layer(&source, &options).await.unwrap_err();
    assert!(told(&error).contains("not understood"));
    options.timeouts.helper = Duration::from_millis(100);
    use_helper(r#"{"credsStore": "slow"}"#.to_owned());
    let error = pull_layer(&source, &options).await.unwrap_err();
    assert!(told(&error).contains("did not answer within 0.1 seconds"));
}

#[tokio::test]
async fn one_client_serves_several_images_with_one_token() {
    let (registry, _) = registry_with_app(1000);
    registry.set_access(bearer(None));
    let (options, _) = options(&[&registry]);
    let client = oci::Client::new(&options).unwrap();
    let source: Source = format!("{}/app:v1", registry.host()).parse().unwrap();
    for _ in 0..3 {
        let dir = std::env::temp_dir();
        let fetcher = oci::Fetcher::open_shared(&source, &client, &dir).await.unwrap();
        fetcher.resolve(&crate::support::amd64()).await.unwrap();
    }
    assert_eq!(requests(&registry, "/token").len(), 1);
}
