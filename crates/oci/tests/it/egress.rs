//! A closed egress policy: where strangers' names, redirects and token servers may not lead us.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use oci::testing::{Access, Fault, TestRegistry};
use oci::{Blame, ClientOptions, Credentials, EgressDenied, EgressPolicy, Lookup, PullError};

use crate::support::{Waits, options, pull_layer, registry_with_app, resolve, told};

/// Options that reach these registries because the operator names them, and nothing else.
fn shut(registries: &[&TestRegistry]) -> (ClientOptions, Waits) {
    let (mut options, waits) = options(registries);
    options.close_egress(Vec::new(), vec!["blocked.example".to_owned()]);
    (options, waits)
}

/// A lookup that gives these answers one after the other, the last one for ever, and what it was
/// asked for.
fn answers(script: &[&[&str]]) -> (Lookup, Arc<Mutex<Vec<String>>>) {
    let parse = |list: &&[&str]| list.iter().map(|address| address.parse().unwrap()).collect();
    let script: Vec<Vec<IpAddr>> = script.iter().map(parse).collect();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let lookup = Lookup::new(move |name| {
        let mut log = log.lock().unwrap();
        let answer = script.get(log.len()).or(script.last()).cloned();
        log.push(name);
        std::future::ready(answer.ok_or_else(|| io::ErrorKind::NotFound.into()))
    });
    (lookup, asked)
}

/// The rule that an error is about, and the host.
fn denied(error: &PullError) -> (&str, &EgressDenied) {
    match error {
        PullError::EgressDenied { host, source } => (host, source),
        other => panic!("{other:?}"),
    }
}

/// Options that find `registry.test` at the given addresses, and may reach it at `port`.
fn named(script: &[&[&str]], port: &str) -> (ClientOptions, Waits, Arc<Mutex<Vec<String>>>) {
    let (mut options, waits) = options(&[]);
    options.plain_http.insert(format!("registry.test:{port}"));
    options.close_egress(Vec::new(), Vec::new());
    let (lookup, asked) = answers(script);
    options.egress = options.egress.with_lookup(lookup);
    (options, waits, asked)
}

fn port(registry: &TestRegistry) -> String {
    registry.host().split_once(':').unwrap().1.to_owned()
}

#[tokio::test]
async fn what_the_operator_names_is_reached_and_its_neighbours_are_not() {
    let (registry, blob) = registry_with_app(1000);
    let (other, _) = registry_with_app(1000);
    let (options, waits) = shut(&[&registry]);
    assert_eq!(pull_layer(&format!("{}/app:v1", registry.host()), &options).await.unwrap(), blob);
    for host in [other.host(), format!("2130706433:{}", port(&other)), "[::1]:5000".to_owned()] {
        let error = resolve(&format!("{host}/app:v1"), &options).await.unwrap_err();
        let (_, rule) = denied(&error);
        assert!(matches!(rule, EgressDenied::Private { by_name: false, .. }), "{rule:?}");
        assert!(told(&error).contains("a loopback address"), "{}", told(&error));
        assert!(!error.is_retryable() && error.blame() == Blame::Yours);
        assert!(error.hint().unwrap().contains("ask whoever runs this"));
    }
    assert!(other.requests().is_empty() && waits.seen().is_empty());
}

#[tokio::test]
async fn a_mirror_is_reached_though_nobody_else_may_be_there() {
    let (mirror, blob) = registry_with_app(1000);
    let (mut options, _) = options(&[]);
    options.add_mirror(&format!("quay.io={}", mirror.host()));
    options.plain_http.insert(mirror.host());
    options.close_egress(Vec::new(), Vec::new());
    assert_eq!(pull_layer("quay.io/app:v1", &options).await.unwrap(), blob);
}

#[tokio::test]
async fn a_redirect_to_a_metadata_service_or_a_neighbour_is_refused_at_each_hop() {
    let (registry, _) = registry_with_app(1000);
    let (other, _) = registry_with_app(1000);
    let (options, waits) = shut(&[&registry]);
    for (target, rule) in [
        ("http://169.254.169.254/latest/meta-data/", "link-local"),
        ("https://169.254.169.254/latest/meta-data/", "link-local"),
        ("https://0xa9fea9fe/", "link-local"),
        ("https://[fd00:ec2::254]/", "metadata"),
        ("https://[::ffff:169.254.169.254]/", "link-local"),
        ("https://10.0.0.1/", "a private address"),
        (&*format!("https://127.1:{}/v2/app/manifests/v1", port(&other)), "loopback"),
        (&*format!("https://localhost:{}/v2/app/manifests/v1", port(&other)), "loopback"),
        ("https://a.blocked.example/", "blocked domain blocked.example"),
        ("http://ghcr.io/", "without TLS"),
        ("https://me:pw@ghcr.io/", "a user name or a password"),
    ] {
        // The second hop, so that the first one being good does not help.
        registry.fault("manifests", Fault::Redirect("/v2/app/hop".to_owned()));
        registry.fault("hop", Fault::Redirect(target.to_owned()));
        let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
        denied(&error);
        let text = told(&error);
        assert!(text.contains(rule) && !text.contains("me:pw"), "{target}: {text}");
    }
    assert!(other.requests().is_empty() && waits.seen().is_empty());
}

#[tokio::test]
async fn a_token_server_on_loopback_gets_no_credentials_and_no_request() {
    let (registry, _) = registry_with_app(1000);
    let tokens = TestRegistry::start().unwrap();
    let (mut options, waits) = shut(&[&registry]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    options.credentials.insert(registry.host(), credentials);
    for realm in [
        format!("http://{}/token", tokens.host()),
        format!("https://{}/token", tokens.host()),
        "https://169.254.169.254/token".to_owned(),
    ] {
        registry.set_access(Access::Bearer {
            user: None,
            refresh_token: None,
            realm: Some(realm.clone()),
        });
        let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
        assert!(realm.contains(denied(&error).0), "{error:?}");
    }
    assert!(tokens.requests().is_empty() && waits.seen().is_empty());
}

#[tokio::test]
async fn a_name_is_refused_if_any_of_its_addresses_is() {
    let (registry, _) = registry_with_app(1000);
    for (script, rule) in [
        (&["127.0.0.1"][..], "its name leads to a loopback address"),
        (&["1.1.1.1", "127.0.0.1"], "a loopback address"),
        (&["1.1.1.1", "10.0.0.1", "2606:4700::1111"], "a private address"),
        (&["2606:4700::1111", "64:ff9b::a9fe:a9fe"], "link-local"),
    ] {
        let (lookup, asked) = answers(&[script]);
        let (mut options, waits) = shut(&[]);
        options.egress = options.egress.with_lookup(lookup);
        let source = format!("evil.test:{}/app:v1", port(&registry));
        let error = resolve(&source, &options).await.unwrap_err();
        assert!(denied(&error).0.starts_with("evil.test:"), "{error:?}");
        assert!(told(&error).contains(rule), "{}", told(&error));
        assert_eq!(*asked.lock().unwrap(), ["evil.test"], "it is not tried again");
        assert!(waits.seen().is_empty());
    }
    assert!(registry.requests().is_empty());
}

#[tokio::test]
async fn a_name_that_changes_its_mind_gains_nothing() {
    let (registry, blob) = registry_with_app(1000);
    let changing: &[&[&str]] = &[&["127.0.0.1"], &["169.254.169.254"]];
    let (options, waits, asked) = named(changing, &port(&registry));
    let source = format!("registry.test:{}/app:v1", port(&registry));
    // One look-up, one connection: nobody looks again between the check and the use.
    let (fetcher, image) = resolve(&source, &options).await.unwrap();
    assert_eq!(asked.lock().unwrap().len(), 1);
    // A connection of its own is judged on its own.
    registry.fault("blobs/", Fault::CutAfter(1));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = crate::support::drain(&mut stream).await.unwrap_err();
    let (_, rule) = denied(&error);
    assert!(matches!(rule, EgressDenied::Never { by_name: true, .. }), "{rule:?}");
    assert_eq!(asked.lock().unwrap().len(), 2);
    assert_eq!(waits.seen().len(), 1, "the cut connection is worth another try, the rule is not");
    assert!(blob.len() > 1);
}

#[tokio::test]
async fn a_host_is_allowed_at_the_port_that_is_named() {
    let (registry, blob) = registry_with_app(1000);
    let (other, _) = registry_with_app(1000);
    let (mut options, _, _) = named(&[&["127.0.0.1"]], &port(&registry));
    let source = |of: &TestRegistry| format!("registry.test:{}/app:v1", port(of));
    assert_eq!(pull_layer(&source(&registry), &options).await.unwrap(), blob);
    let error = resolve(&source(&other), &options).await.unwrap_err();
    assert!(matches!(denied(&error).1, EgressDenied::Private { by_name: true, .. }), "{error:?}");
    // Both ports in one client, one after the other by a redirect.
    options.plain_http.insert(format!("registry.test:{}", port(&other)));
    let target = format!("http://registry.test:{}/v2/app/manifests/v1", port(&other));
    registry.fault("manifests", Fault::Redirect(target));
    let error = resolve(&source(&registry), &options).await.unwrap_err();
    assert!(matches!(denied(&error).1, EgressDenied::Private { by_name: true, .. }), "{error:?}");
    assert!(other.requests().is_empty());
}

#[tokio::test]
async fn credentials_stay_at_their_origin_under_a_closed_policy_as_well() {
    let (registry, blob) = registry_with_app(1000);
    let cdn = TestRegistry::start().unwrap();
    let digest = cdn.put_blob(blob.clone());
    registry.set_access(Access::Basic("me".to_owned(), "pw".to_owned()));
    let (mut options, _) = shut(&[&registry, &cdn]);
    let credentials = Credentials::Password { username: "me".to_owned(), password: "pw".into() };
    options.credentials.insert(registry.host(), credentials);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    registry.fault("blobs/", Fault::Redirect(format!("http://{}/cdn/{digest}", cdn.host())));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(crate::support::drain(&mut stream).await.unwrap(), blob);
    assert_eq!(cdn.requests().len(), 1);
    assert!(!cdn.requests()[0].headers.contains_key("authorization"));
}

#[test]
fn what_a_registrys_name_decides_is_known_before_anything_is_asked() {
    let (mut options, _) = options(&[]);
    options.plain_http.insert("10.0.0.5:5000".to_owned());
    options.add_mirror("mirror.internal/hub");
    let places = vec!["10.1.0.0/16:443".parse().unwrap()];
    options.close_egress(places, vec!["blocked.example".to_owned()]);
    let checked = |image: &str| options.check_registry(&image.parse().unwrap()).is_ok();
    for image in ["nginx", "ghcr.io/a/b", "10.0.0.5:5000/x", "10.1.2.3/x", "name.internal/x"] {
        assert!(checked(image), "{image}");
    }
    for image in [
        "127.0.0.1/x",
        "127.0.0.1:5000/x",
        "localhost/x",
        "localhost:5000/x",
        "10.0.0.5/x",
        "10.1.2.3:5000/x",
        "169.254.169.254/x",
        "2852039166:80/x",
        "0x7f.1/x",
        "[::1]:5000/x",
        "hub.blocked.example/x",
    ] {
        assert!(!checked(image), "{image}");
    }
    assert!(ClientOptions::default().check_registry(&"localhost/x".parse().unwrap()).is_ok());
    assert!(EgressPolicy::default().is_open());
}
