//! From a certificate chain, a key, the authorities of clients and their revocation lists to what
//! rustls works with.
//!
//! One provider of cryptography (aws-lc), TLS 1.3 and 1.2, HTTP/2 and HTTP/1.1. A session is
//! never resumed: each handshake checks the client's certificate as of now. What checks it is kept
//! beside, so that a connection that is open is asked the same again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fmt, io};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};

use super::clients::id_of;
use crate::config::ClientAuth;

/// What is asked of clients.
pub(super) struct Demands {
    /// Whether they must show a certificate.
    pub(super) auth: ClientAuth,
    /// Who must have signed it.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// Which certificates they, and those between them and a client, have revoked: a list of each
    /// of them, or none at all to believe every certificate.
    pub(super) revoked: Vec<CertificateRevocationListDer<'static>>,
    /// Which ids may come in; every one if none.
    pub(super) admits: Option<Admits>,
}

/// Whether a client with this id may come in.
pub(super) type Admits = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// What handshakes are answered with.
#[derive(Debug)]
pub(super) struct Ready {
    /// For rustls.
    pub(super) config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    /// Whether the log says that revocation lists shut clients out.
    has_told: AtomicBool,
}

impl Ready {
    /// Whether a client with these certificates, its own first, would come in at `now`.
    pub(super) fn lets_in(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> bool {
        let Some((own, others)) = chain.split_first() else { return false };
        self.verifier.verify_client_cert(own, others, now).is_ok()
    }

    /// Tells the log, once, if a handshake failed because a revocation list is missing or has run
    /// out: it is the operator who can mend that, and the client who sees it.
    pub(super) fn tell(&self, failed: &io::Error) {
        let Some(problem) = problem_of_lists(failed) else { return };
        if !self.has_told.swap(true, Ordering::Relaxed) {
            tracing::error!(
                problem,
                "clients are refused for want of a good revocation list: check \
                 UNKEY_BUILDERD_TLS_CRL_FILE"
            );
        }
    }
}

/// Why a client was refused for its certificate, if a handshake failed for that.
pub(super) fn refusal(failed: &io::Error) -> Option<&'static str> {
    use CertificateError::{
        ApplicationVerificationFailure, Expired, ExpiredContext, Revoked, UnknownIssuer,
    };
    if problem_of_lists(failed).is_some() {
        return Some("no good revocation list");
    }
    let error = failed.get_ref()?.downcast_ref::<Error>()?;
    if matches!(error, Error::NoCertificatesPresented) {
        return Some("no certificate");
    }
    let Error::InvalidCertificate(error) = error else { return None };
    let reasons = [
        (matches!(error, Revoked), "revoked certificate"),
        (matches!(error, UnknownIssuer), "certificate of an unknown authority"),
        (matches!(error, Expired | ExpiredContext { .. }), "certificate that has run out"),
        (matches!(error, ApplicationVerificationFailure), "id that may not come in"),
    ];
    let reason = reasons.into_iter().find_map(|(is_it, reason)| is_it.then_some(reason));
    Some(reason.unwrap_or("bad certificate"))
}

/// What is wrong with revocation lists, if a handshake failed for that.
pub(super) fn problem_of_lists(failed: &io::Error) -> Option<&'static str> {
    use CertificateError::{
        ExpiredRevocationList, ExpiredRevocationListContext, UnknownRevocationStatus,
    };
    let error = failed.get_ref()?.downcast_ref::<Error>()?;
    let problems = [
        (
            matches!(
                error,
                Error::InvalidCertificate(
                    ExpiredRevocationList | ExpiredRevocationListContext { .. }
                )
            ),
            "one has run out",
        ),
        (
            matches!(error, Error::InvalidCertificate(UnknownRevocationStatus)),
            "there is none of an authority",
        ),
        (
            matches!(error, Error::InvalidCertRevocationList(_)),
            "one is not signed by its authority",
        ),
    ];
    problems.into_iter().find_map(|(is_it, problem)| is_it.then_some(problem))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// What the doors answer handshakes with.
pub(super) fn ready(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    demands: Demands,
) -> Result<Ready, Error> {
    let verifier = verifier(demands)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::clone(&verifier))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Ready { config: Arc::new(config), verifier, has_told: AtomicBool::new(false) })
}

fn verifier(demands: Demands) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let mut roots = RootCertStore::empty();
    for authority in demands.authorities {
        roots.add(authority)?;
    }
    // A list that has run out does not say what was revoked since.
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .with_crls(demands.revoked)
        .enforce_revocation_expiration();
    let builder = match demands.auth {
        ClientAuth::None => return Ok(WebPkiClientVerifier::no_client_auth()),
        ClientAuth::Optional => builder.allow_unauthenticated(),
        ClientAuth::Required => builder,
    };
    let signed = builder.build().map_err(|error| Error::General(error.to_string()))?;
    Ok(match demands.admits {
        None => signed,
        Some(admits) => Arc::new(Admitted { signed, admits }),
    })
}

/// Clients whose certificate is good and whose id may come in.
struct Admitted {
    signed: Arc<dyn ClientCertVerifier>,
    admits: Admits,
}

impl fmt::Debug for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admitted").field("signed", &self.signed).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Admitted {
    fn offer_client_auth(&self) -> bool {
        self.signed.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.signed.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.signed.verify_client_cert(certificate, intermediates, now)?;
        match id_of(certificate).is_some_and(|id| (self.admits)(&id)) {
            true => Ok(verified),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}
