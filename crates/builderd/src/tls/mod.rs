//! TLS of the doors: where certificates come from, how they change while the service runs, and
//! whose client certificates are known.
//!
//! `files` reads them from disk, `workload` has them from SPIFFE's Workload API; both end in one
//! `Ready` (`material`), which a handshake takes as it is at that moment. Connections that are open
//! keep theirs, but for a client's certificate that would not be let in any more: it stands for
//! nobody then. Whoever asked for TLS never gets plain text: what cannot be had stops the start,
//! and an identity that is withdrawn closes the doors.
//!
//! It does not know HTTP, nor what a client may do to a build.

mod clients;
mod files;
mod material;
#[cfg(test)]
pub(crate) mod tests;
mod workload;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, io};

use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, interval_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub(crate) use clients::{Client, Clients, Whose};
use files::{Files, Print};
use material::Ready;
use workload::Workload;

use crate::causes::chain;
use crate::config::{TlsConfig, TlsSource};
use crate::telemetry::Metrics;

/// How often files, and certificates of clients that are connected, are looked at without anybody
/// saying so.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How long a handshake may take.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: check UNKEY_BUILDERD_TLS_*_FILE", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file has not what it should.
    #[error("{} is no such PEM file: {problem}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file of clients cannot be understood.
    #[error("{} cannot be understood: {problem}", path.display())]
    Clients {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Certificate, key and authorities do not make a server together.
    #[error("the certificate of {what}, its key and the authorities do not fit together")]
    Unusable {
        /// Whose certificate.
        what: String,
        /// Why.
        source: rustls::Error,
    },
    /// The Workload API gives no identity.
    #[error(
        "no identity from the SPIFFE Workload API at {}: is the agent running, and is this \
         workload registered? (UNKEY_BUILDERD_SPIFFE_SOCKET)", socket.display()
    )]
    Workload {
        /// Where it was asked.
        socket: PathBuf,
        /// Why.
        source: Box<spiffe::X509SourceError>,
    },
    /// The Workload API gives nobody to trust.
    #[error("the SPIFFE Workload API at {} gives no authority of {domain}", socket.display())]
    NoBundle {
        /// Where it was asked.
        socket: PathBuf,
        /// Our own trust domain.
        domain: String,
    },
    /// The process cannot hear of SIGHUP.
    #[error("SIGHUP cannot be waited for")]
    Signal(#[source] io::Error),
}

/// What handshakes are answered with, as of now.
#[derive(Clone, Debug)]
pub(crate) struct Tls {
    /// None while there is no identity to show.
    ready: watch::Receiver<Option<Arc<Ready>>>,
    clients: watch::Receiver<Arc<Clients>>,
    told: Arc<Told>,
}

/// Told of each client that is refused for its certificate: from where it came, and why, in one of a
/// few words of ours.
pub(crate) type TellRefused = Arc<dyn Fn(SocketAddr, &'static str) + Send + Sync>;

/// Who is told, once somebody is.
#[derive(Default)]
struct Told(OnceLock<TellRefused>);

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Told").field(&self.0.get().is_some()).finish()
    }
}

impl Tls {
    /// Has `who` told of clients that are refused from now on, whichever door they come to. The first
    /// one stays.
    pub(crate) fn tell(&self, who: TellRefused) {
        let _ = self.told.0.set(who);
    }

    /// Tells of a handshake that failed, if it was for the client's certificate.
    pub(crate) fn failed(&self, peer: SocketAddr, error: &io::Error) {
        if let (Some(why), Some(tell)) = (material::refusal(error), self.told.0.get()) {
            tell(peer, why);
        }
    }

    /// Whose certificates are known.
    pub(crate) fn clients(&self) -> watch::Receiver<Arc<Clients>> {
        self.clients.clone()
    }

    /// Answers a handshake in time, or not at all; gives the stream, and the certificate that the
    /// client showed, if it did.
    pub(crate) async fn accept<S>(&self, stream: S) -> io::Result<(TlsStream<S>, Option<Shown>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let ready = self.ready.borrow().clone();
        let ready = ready.ok_or_else(|| io::Error::other("there is no identity to show"))?;
        let handshake = TlsAcceptor::from(Arc::clone(&ready.config)).accept(stream);
        let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await?;
        let stream = stream.inspect_err(|error| ready.tell(error))?;
        let (_, session) = stream.get_ref();
        let chain = session.peer_certificates().unwrap_or_default();
        let shown = (!chain.is_empty()).then(|| Shown {
            id: chain.first().and_then(clients::id_of),
            chain: chain.iter().map(|one| one.clone().into_owned()).collect(),
            now: self.clone(),
        });
        Ok((stream, shown))
    }
}

/// The certificate that a client showed on a connection.
#[derive(Debug)]
pub(crate) struct Shown {
    id: Option<Arc<str>>,
    chain: Vec<CertificateDer<'static>>,
    now: Tls,
}

impl Shown {
    /// The id in it, if it has one.
    pub(crate) fn id(&self) -> Option<&Arc<str>> {
        self.id.as_ref()
    }

    /// Waits until it would not be let in any more: it has run out or is revoked, who signed it is
    /// not trusted any more, its id may not come in, or there is nobody to say so.
    pub(crate) async fn ended(mut self) {
        loop {
            let told = async {
                let (ready, clients) = (self.now.ready.changed(), self.now.clients.changed());
                tokio::select! {
                    told = ready => told,
                    told = clients => told,
                }
            };
            // Who says what holds ends with the service alone.
            if let Ok(Err(_)) = tokio::time::timeout(LOOK_EVERY, told).await {
                return std::future::pending().await;
            }
            if !self.is_good_at(UnixTime::now()) {
                return;
            }
        }
    }

    fn is_good_at(&self, now: UnixTime) -> bool {
        let ready = self.now.ready.borrow().clone();
        ready.is_some_and(|ready| ready.lets_in(&self.chain, now))
    }
}

/// Keeps what handshakes are answered with up to date.
#[derive(Debug)]
pub(crate) struct Keeper {
    source: Source,
    clients_file: Option<PathBuf>,
    ready: watch::Sender<Option<Arc<Ready>>>,
    clients: watch::Sender<Arc<Clients>>,
    metrics: Arc<Metrics>,
    seen: Seen,
    hangup: Signal,
}

#[derive(Debug)]
enum Source {
    Files(Files),
    Workload(Workload),
}

/// What a keeper waits for.
enum Event {
    Stop,
    Look,
    Sent(io::Result<()>),
}

/// What was there when files were looked at last.
#[derive(Debug, Default)]
struct Seen {
    certificates: Look,
    clients: Look,
}

/// How one look ended: what was read, or what was wrong, so that it is told once.
#[derive(Debug, Default, PartialEq, Eq)]
enum Look {
    #[default]
    Never,
    Good(Print),
    Bad(String),
}

/// Reads what `settings` name.
///
/// # Errors
/// [`TlsError`]: there is no TLS then, and no service either.
pub(crate) async fn start(
    settings: &TlsConfig,
    metrics: Arc<Metrics>,
) -> Result<(Tls, Keeper), TlsError> {
    // From now on, so that it never ends the service.
    let hangup = signal(SignalKind::hangup()).map_err(TlsError::Signal)?;
    let (print, clients) = files::clients(settings.clients_file.as_deref())?;
    let known = clients.len();
    let (clients, told_clients) = watch::channel(clients);
    let mut seen = Seen { clients: Look::Good(print), ..Seen::default() };
    let (source, first) = match &settings.source {
        TlsSource::Files { certificate, key, ca, revoked } => {
            let files = Files {
                certificate: certificate.clone(),
                key: key.clone(),
                ca: ca.clone(),
                revoked: revoked.clone(),
                client_auth: settings.client_auth,
            };
            let contents = files.contents()?;
            let first = files.ready(&contents)?;
            seen.certificates = Look::Good(contents.print());
            (Source::Files(files), first)
        }
        TlsSource::Spiffe { socket } => {
            let only = settings.clients_file.is_some().then(|| told_clients.clone());
            let workload = Workload::connect(socket, settings.client_auth, only).await?;
            let first = workload.ready()?;
            (Source::Workload(workload), first)
        }
    };
    let (ready, told_ready) = watch::channel(Some(Arc::new(first)));
    tracing::info!(clients = known, demand = settings.client_auth.as_str(), "TLS is ready");
    let keeper = Keeper {
        source,
        clients_file: settings.clients_file.clone(),
        ready,
        clients,
        metrics,
        seen,
        hangup,
    };
    let told = Arc::default();
    Ok((Tls { ready: told_ready, clients: told_clients, told }, keeper))
}

impl Keeper {
    /// Looks at the files at SIGHUP and every [`LOOK_EVERY`], and takes what the Workload API
    /// sends, until `stopping`.
    ///
    /// # Errors
    /// If no more can come from the Workload API.
    pub(crate) async fn run(mut self, mut stopping: watch::Receiver<bool>) -> io::Result<()> {
        let mut look = interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
        loop {
            let event = tokio::select! {
                biased;
                _ = stopping.wait_for(|stopping| *stopping) => Event::Stop,
                _ = self.hangup.recv() => Event::Look,
                _ = look.tick() => Event::Look,
                sent = self.source.sent() => Event::Sent(sent),
            };
            match event {
                Event::Stop => return Ok(()),
                Event::Look => self.look().await,
                Event::Sent(sent) => {
                    sent?;
                    self.take();
                }
            }
        }
    }

    /// Reads the files again; what is bad is told once and not used.
    pub(crate) async fn look(&mut self) {
        let source = match &self.source {
            Source::Files(files) => Some(files.clone()),
            Source::Workload(_) => None,
        };
        let path = self.clients_file.clone();
        let before = match &self.seen.certificates {
            Look::Good(print) => Some(*print),
            Look::Never | Look::Bad(_) => None,
        };
        let read = tokio::task::spawn_blocking(move || {
            let ready = source.map(|files| {
                let contents = files.contents()?;
                let print = contents.print();
                let ready = match before == Some(print) {
                    true => None,
                    false => Some(files.ready(&contents)?),
                };
                Ok::<_, TlsError>((print, ready))
            });
            (ready, files::clients(path.as_deref()))
        });
        // It only reads: should it ever panic, the next look tries again.
        let Ok((ready, clients)) = read.await else { return };
        if let Some(ready) = ready {
            let ready = ready.map(|(print, ready)| (print, ready.map(Arc::new)));
            if let Some(Some(ready)) = note(&mut self.seen.certificates, ready, &self.metrics) {
                self.ready.send_replace(Some(ready));
                tracing::info!("new certificates are in use");
            }
        }
        if let Some(clients) = note(&mut self.seen.clients, clients, &self.metrics) {
            tracing::info!(clients = clients.len(), "the clients are new");
            self.clients.send_replace(clients);
        }
    }

    /// Takes what the Workload API has sent.
    fn take(&self) {
        let Source::Workload(workload) = &self.source else { return };
        match workload.ready() {
            Ok(ready) => {
                self.ready.send_replace(Some(Arc::new(ready)));
                self.metrics.tls_reload(true);
                tracing::info!("a new identity is in use");
            }
            Err(error) => {
                if workload.is_withdrawn() {
                    self.ready.send_replace(None);
                }
                self.metrics.tls_reload(false);
                let error = chain(&error);
                tracing::error!(error, "the identity that was sent cannot be used");
            }
        }
    }
}

/// What is new in what was read; tells the log and the metrics, once for each change.
fn note<T>(seen: &mut Look, read: Result<(Print, T), TlsError>, metrics: &Metrics) -> Option<T> {
    let (look, new) = match read {
        Ok((print, new)) => (Look::Good(print), Some(new)),
        Err(error) => (Look::Bad(chain(&error)), None),
    };
    if *seen == look {
        return None;
    }
    if let Look::Bad(error) = &look {
        tracing::error!(error, "what was there before stays in use");
    }
    metrics.tls_reload(new.is_some());
    *seen = look;
    new
}

impl Source {
    /// Waits for the Workload API to send something; for ever if there is none.
    async fn sent(&mut self) -> io::Result<()> {
        match self {
            Self::Files(_) => std::future::pending().await,
            Self::Workload(workload) => workload.sent().await.map_err(wrap),
        }
    }
}

fn wrap(error: TlsError) -> io::Error {
    io::Error::other(error)
}
