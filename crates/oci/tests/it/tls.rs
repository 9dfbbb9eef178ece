//! Certificates, and hosts that speak no TLS.

use std::sync::Arc;

use oci::testing::{Access, Fault, TestRegistry};
use oci::{Blame, ClientOptions, PullError};

use crate::support::{layer, options, pull_layer, registry_with_app, resolve};

/// A registry with a certificate of a private authority, and that authority as PEM.
fn private_registry() -> (TestRegistry, Vec<u8>) {
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let host = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = host.signed_by(&key, &issuer).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let registry = TestRegistry::start_tls(Arc::new(config)).unwrap();
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &[layer(1, 1000)]);
    (registry, pem.into_bytes())
}

fn with_ca(pem: Vec<u8>) -> ClientOptions {
    ClientOptions { extra_ca_pem: vec![pem], ..options(&[]).0 }
}

#[tokio::test]
async fn a_private_authority_is_trusted_when_it_is_given() {
    let (registry, pem) = private_registry();
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &with_ca(pem)).await.unwrap(), layer(1, 1000).1);
}

#[tokio::test]
async fn an_unknown_authority_is_an_error_with_a_remedy_and_no_second_try() {
    let (registry, _) = private_registry();
    let (_, other_pem) = private_registry();
    let source = format!("{}/app:v1", registry.host());
    for options in [options(&[]).0, with_ca(other_pem)] {
        let error = resolve(&source, &options).await.unwrap_err();
        assert!(matches!(error, PullError::Certificate { .. }), "{error:?}");
        assert!(error.hint().unwrap().contains("extra CA"));
        assert!(!error.is_retryable());
        assert_eq!(error.blame(), Blame::Yours);
    }
    assert!(registry.requests().is_empty());
}

#[tokio::test]
async fn a_ca_file_that_holds_no_certificate_is_named() {
    for bad in [&b""[..], b"nonsense", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"]
    {
        let error = resolve("127.0.0.1:1/app", &with_ca(bad.to_vec())).await.unwrap_err();
        assert!(matches!(error, PullError::Option { option: "extra CA", .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_host_without_tls_is_told_apart_and_never_spoken_to_in_the_clear() {
    let (registry, _) = registry_with_app(1000);
    let (options, waits) = options(&[]);
    let source = format!("{}/app:v1", registry.host());
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::PlainHttpServer { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("plain-HTTP"));
    assert!(waits.seen().is_empty());
    assert!(registry.requests().is_empty());
}

#[tokio::test]
async fn a_redirect_from_tls_to_plain_http_is_refused_unless_named() {
    let (registry, pem) = private_registry();
    let (plain, _) = registry_with_app(1000);
    let mut options = with_ca(pem);
    let source = format!("{}/app:v1", registry.host());
    let target = format!("http://{}/v2/app/manifests/v1", plain.host());
    registry.fault("manifests", Fault::Redirect(target.clone()));
    let error = resolve(&source, &options).await.unwrap_err();
    assert!(matches!(error, PullError::RedirectRefused { .. }));
    assert!(plain.requests().is_empty());
    options.plain_http.insert(plain.host());
    registry.fault("manifests", Fault::Redirect(target));
    assert!(resolve(&source, &options).await.is_ok());
}

#[tokio::test]
async fn a_registry_with_tls_cannot_send_us_to_a_token_server_without() {
    let (registry, pem) = private_registry();
    let tokens = TestRegistry::start().unwrap();
    let realm = Some(format!("http://{}/token", tokens.host()));
    registry.set_access(Access::Bearer { user: None, refresh_token: None, realm });
    let source = format!("{}/app:v1", registry.host());
    let error = resolve(&source, &with_ca(pem)).await.unwrap_err();
    assert!(matches!(&error, PullError::InsecureRealm { realm, .. } if *realm == tokens.host()));
    assert!(tokens.requests().is_empty());
}

#[tokio::test]
async fn a_host_that_is_not_there_is_tried_again_and_named() {
    let gone = TestRegistry::start().unwrap().host();
    let (options, waits) = options(&[]);
    let error = resolve(&format!("{gone}/app"), &options).await.unwrap_err();
    assert!(matches!(&error, PullError::Connect { host, .. } if *host == gone));
    assert_eq!(waits.seen().len(), 5);
    assert!(error.is_retryable());
}
