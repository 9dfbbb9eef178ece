//! Certificates and revocation lists from files: read at the start, and again whenever their
//! content has changed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256};
use webpki::{CertRevocationList, OwnedCertRevocationList};

use super::TlsError;
use super::clients::Clients;
use super::material::{self, Demands, Ready};
use crate::config::ClientAuth;

/// Which files, and what they are for.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    /// Who signs clients' certificates.
    pub(super) ca: Option<PathBuf>,
    /// What they have revoked.
    pub(super) revoked: Option<PathBuf>,
    pub(super) client_auth: ClientAuth,
}

/// Everything in them at one moment.
pub(super) struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Option<Vec<u8>>,
    revoked: Option<Vec<u8>>,
}

/// By what a change is known: a hash over everything, since files that are swapped by link
/// (Kubernetes) keep times and names.
pub(super) type Print = [u8; 32];

pub(super) fn bytes(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

/// The hash over several files' contents, in order; each goes in with its length.
pub(super) fn print<'a>(contents: impl IntoIterator<Item = &'a [u8]>) -> Print {
    let mut hash = Sha256::new();
    for content in contents {
        hash.update(content.len().to_le_bytes());
        hash.update(content);
    }
    hash.finalize().into()
}

/// Reads the file with the clients, if there is one.
pub(super) fn clients(path: Option<&Path>) -> Result<(Print, Arc<Clients>), TlsError> {
    let Some(path) = path else { return Ok((print([]), Arc::default())) };
    let content = bytes(path)?;
    let wrong = |problem| TlsError::Clients { path: path.to_owned(), problem };
    let text = std::str::from_utf8(&content).map_err(|error| wrong(error.to_string()))?;
    let clients = Clients::read(text).map_err(wrong)?;
    Ok((print([&content[..]]), Arc::new(clients)))
}

impl Files {
    pub(super) fn contents(&self) -> Result<Contents, TlsError> {
        Ok(Contents {
            certificate: bytes(&self.certificate)?,
            key: bytes(&self.key)?,
            ca: self.ca.as_deref().map(bytes).transpose()?,
            revoked: self.revoked.as_deref().map(bytes).transpose()?,
        })
    }

    /// What the doors answer handshakes with.
    pub(super) fn ready(&self, contents: &Contents) -> Result<Ready, TlsError> {
        let chain = certificates(&self.certificate, &contents.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|error| TlsError::Pem {
            path: self.key.clone(),
            problem: format!("no private key: {error}"),
        })?;
        let authorities = match (&self.ca, &contents.ca) {
            (Some(path), Some(content)) => certificates(path, content)?,
            _ => Vec::new(),
        };
        let revoked = match (&self.revoked, &contents.revoked) {
            (Some(path), Some(content)) => lists(path, content)?,
            _ => Vec::new(),
        };
        let demands = Demands { auth: self.client_auth, authorities, revoked, admits: None };
        material::ready(chain, key, demands).map_err(|source| TlsError::Unusable {
            what: self.certificate.display().to_string(),
            source,
        })
    }
}

impl Contents {
    pub(super) fn print(&self) -> Print {
        let (ca, revoked) = (self.ca.as_deref(), self.revoked.as_deref());
        let (ca, revoked) = (ca.unwrap_or_default(), revoked.unwrap_or_default());
        print([&self.certificate[..], &self.key, ca, revoked])
    }
}

fn certificates(path: &Path, content: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |problem| TlsError::Pem { path: path.to_owned(), problem };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(content)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    match certificates.is_empty() {
        true => Err(wrong("no certificate".to_owned())),
        false => Ok(certificates),
    }
}

/// The lists in a file: at least one, since without one nothing is checked at all, and one of each
/// authority, since only the first would be looked into.
fn lists(
    path: &Path,
    content: &[u8],
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let wrong = |problem| TlsError::Pem { path: path.to_owned(), problem };
    let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(content)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    let mut known = HashSet::new();
    for (index, list) in lists.iter().enumerate() {
        let number = index + 1;
        let list = OwnedCertRevocationList::from_der(list)
            .map_err(|error| wrong(format!("revocation list {number} cannot be read: {error}")))?;
        let list = CertRevocationList::from(list);
        let place = list.issuing_distribution_point().map(<[u8]>::to_vec);
        if !known.insert((list.issuer().to_vec(), place)) {
            let problem = "is of the same authority as one before it: keep the newer one alone";
            return Err(wrong(format!("revocation list {number} {problem}")));
        }
    }
    match lists.is_empty() {
        true => Err(wrong("no revocation list".to_owned())),
        false => Ok(lists),
    }
}
