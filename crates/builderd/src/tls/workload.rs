//! Certificates from SPIFFE's Workload API: the agent on this machine says who we are, signs it
//! anew before it runs out, and says whom to trust.
//!
//! The one place that knows the crate `spiffe`. Clients are trusted by the authorities of our
//! own trust domain alone; federated ones are left out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use spiffe::{SpiffeId, TrustDomain, X509Source, X509SourceBuilder, X509SourceError};
use tokio::sync::watch;

use super::TlsError;
use super::clients::Clients;
use super::material::{self, Admits, Demands, Ready};
use crate::config::ClientAuth;

/// How long the agent may take to say who we are, at the start: it would be asked for ever.
const FIRST_TIMEOUT: Duration = Duration::from_secs(15);
/// How long to wait between two tries, at least and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// The Workload API of this machine.
pub(super) struct Workload {
    socket: PathBuf,
    client_auth: ClientAuth,
    /// Whose ids may come in; every one of our trust domain if none.
    only: Option<watch::Receiver<Arc<Clients>>>,
    source: X509Source,
    updates: spiffe::x509_source::X509SourceUpdates,
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workload").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Workload {
    /// Asks the agent at `socket` who we are, and waits for it a while.
    pub(super) async fn connect(
        socket: &Path,
        client_auth: ClientAuth,
        only: Option<watch::Receiver<Arc<Clients>>>,
    ) -> Result<Self, TlsError> {
        let source = X509SourceBuilder::new()
            .endpoint(format!("unix://{}", socket.display()))
            .reconnect_backoff(BACKOFF.0, BACKOFF.1)
            .initial_sync_timeout(FIRST_TIMEOUT)
            .build()
            .await
            .map_err(|source| failed(socket, source))?;
        let updates = source.updated();
        Ok(Self { socket: socket.to_owned(), client_auth, only, source, updates })
    }

    /// Waits for the agent to send something new.
    pub(super) async fn sent(&mut self) -> Result<(), TlsError> {
        let socket = &self.socket;
        self.updates.changed().await.map(drop).map_err(|source| failed(socket, source))
    }

    /// Whether the agent has said that we are nobody any more.
    pub(super) fn is_withdrawn(&self) -> bool {
        self.source.state().withdrawal().is_some()
    }

    /// What the doors answer handshakes with, by what was sent last.
    pub(super) fn ready(&self) -> Result<Ready, TlsError> {
        let state = self.source.state();
        let svid = state.svid().map_err(|source| failed(&self.socket, source))?;
        let context = state.context().map_err(|source| failed(&self.socket, source))?;
        let id = svid.spiffe_id();
        let domain = id.trust_domain();
        let bundle = context.bundle_set().get(domain).ok_or_else(|| TlsError::NoBundle {
            socket: self.socket.clone(),
            domain: domain.to_string(),
        })?;
        let der = |certificate: &spiffe::Certificate| {
            CertificateDer::from(certificate.as_bytes().to_vec())
        };
        let chain = svid.cert_chain().iter().map(der).collect();
        let key = PrivatePkcs8KeyDer::from(svid.private_key().as_bytes().to_vec());
        let demands = Demands {
            auth: self.client_auth,
            authorities: bundle.authorities().iter().map(der).collect(),
            revoked: Vec::new(),
            admits: Some(self.admits(domain.clone())),
        };
        material::ready(chain, PrivateKeyDer::from(key), demands)
            .map_err(|source| TlsError::Unusable { what: id.to_string(), source })
    }

    /// Who may come in: ids of our own trust domain, and of those only known ones if there is a
    /// list.
    fn admits(&self, domain: TrustDomain) -> Admits {
        let only = self.only.clone();
        Arc::new(move |id| {
            let is_ours = SpiffeId::new(id).is_ok_and(|id| id.is_member_of(&domain));
            is_ours && only.as_ref().is_none_or(|clients| clients.borrow().knows(id))
        })
    }
}

fn failed(socket: &Path, source: X509SourceError) -> TlsError {
    TlsError::Workload { socket: socket.to_owned(), source: Box::new(source) }
}
