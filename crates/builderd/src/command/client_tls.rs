//! TLS of a client: whom it trusts, and how it says who it is.

use reqwest::{Certificate, ClientBuilder, Identity};

use super::Failure;
use crate::config::Settings;

/// Those that are of no use over plain HTTP.
const FILES: [&str; 3] = ["SERVER_CA_FILE", "CLIENT_CERT_FILE", "CLIENT_KEY_FILE"];

/// A client of the server at `base` with what the settings say of TLS.
pub(super) fn secured(
    builder: ClientBuilder,
    settings: &Settings,
    base: &str,
) -> Result<ClientBuilder, Failure> {
    let [ca, certificate, key] = FILES.map(|name| settings.path(name));
    let set = FILES.into_iter().find(|name| settings.is_set(name));
    if let Some(name) = set.filter(|_| !base.starts_with("https://")) {
        let name = settings.written(name);
        return Err(Failure::usage(format!(
            "{name} is of no use for {base}: give the server's address with https:// (--server)"
        )));
    }
    let bytes = |name: &'static str, path: &std::path::Path| {
        std::fs::read(path).map_err(|error| {
            let name = settings.written(name);
            Failure::usage(format!("{name}: cannot read {}: {error}", path.display()))
        })
    };
    let wrong = |name: &'static str, problem: String| {
        Failure::usage(format!("{} cannot be used: {problem}", settings.written(name)))
    };
    let mut builder = builder;
    if let Some(path) = ca {
        let pem = bytes(FILES[0], &path)?;
        let authorities = Certificate::from_pem_bundle(&pem)
            .map_err(|error| wrong(FILES[0], error.to_string()))?;
        if authorities.is_empty() {
            return Err(wrong(FILES[0], format!("no certificate in {}", path.display())));
        }
        builder = builder.tls_certs_only(authorities);
    }
    match (certificate, key) {
        (None, None) => Ok(builder),
        (Some(certificate), Some(key)) => {
            let pem = [bytes(FILES[1], &certificate)?, b"\n".to_vec(), bytes(FILES[2], &key)?];
            let identity = Identity::from_pem(&pem.concat()).map_err(|error| {
                wrong(FILES[1], format!("no certificate with its key in PEM: {error}"))
            })?;
            Ok(builder.identity(identity))
        }
        _ => Err(Failure::usage(
            "--cert-file and --key-file (UNKEY_BUILDERD_CLIENT_CERT_FILE, …_KEY_FILE): give both \
             or none",
        )),
    }
}
