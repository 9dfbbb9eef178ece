//! Stories about certificates, told with real handshakes: a server with TLS on a port of its
//! own, rustls clients, authorities that exist for one story.

mod agent;
mod files;
mod spiffe;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::routing::get;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::api::{Crowd, Entrance, serve};
use crate::config::ClientAuth;

/// Who signs certificates in one story.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) pem: String,
    serial: u64,
    /// Certificates between it and a root, its own first; none of a root.
    below: Vec<CertificateDer<'static>>,
}

/// A certificate and its key.
pub(crate) struct Issued {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: Vec<u8>,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
    serial: u64,
    /// Certificates between it and a root.
    below: Vec<CertificateDer<'static>>,
}

/// A number that no certificate of this process has yet.
fn next_serial() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

impl Authority {
    pub(crate) fn new(name: &str, ids: &[&str]) -> Self {
        Self::signed_by(None, name, ids)
    }

    fn signed_by(above: Option<&Self>, name: &str, ids: &[&str]) -> Self {
        let (mut params, serial) = (params(name, ids), next_serial());
        params.serial_number = Some(SerialNumber::from(serial));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let certificate = match above {
            None => params.self_signed(&key),
            Some(above) => params.signed_by(&key, &above.issuer),
        };
        let certificate = certificate.unwrap();
        let (der, pem) = (certificate.der().clone(), certificate.pem());
        let below =
            above.map_or_else(Vec::new, |above| [&[der.clone()][..], &above.below].concat());
        Self { issuer: Issuer::new(params, key), certificate: der, pem, serial, below }
    }

    /// The list of what it has revoked, in PEM, good until the end of a year.
    fn list(&self, revoked: &[u64], year: i32) -> String {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(year, 12, 31),
            crl_number: SerialNumber::from(next_serial()),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// For this machine's address, and with the ids as URIs.
    pub(crate) fn issue(&self, ids: &[&str]) -> Issued {
        let (mut params, serial) = (params("leaf", ids), next_serial());
        params.serial_number = Some(SerialNumber::from(serial));
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            certificate: certificate.der().clone(),
            key: key.serialize_der(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            serial,
            below: self.below.clone(),
        }
    }
}

fn params(name: &str, ids: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let uri = |id: &&str| SanType::URI(Ia5String::try_from((*id).to_owned()).unwrap());
    params.subject_alt_names = ids.iter().map(uri).collect();
    params
}

impl Issued {
    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.clone()))
    }
}

/// A server whose one page says who asks.
struct Site {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<io::Result<()>>,
}

impl Site {
    async fn start(tls: Tls) -> Self {
        async fn page(id: Option<Extension<crate::api::PeerId>>) -> String {
            id.map_or_else(|| "nobody".to_owned(), |id| id.0.0.to_string())
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let router = axum::Router::new().route("/", get(page));
        let drain = Duration::from_secs(20);
        let entrance = Entrance::new(listener, Some(tls), Crowd::up_to(0));
        let task = tokio::spawn(serve(entrance, router, stopped, drain));
        Self { address, stop, task }
    }

    /// Ends the story: the server must end by itself, and soon.
    async fn stop(self) {
        self.stop.send_replace(true);
        let ended = tokio::time::timeout(Duration::from_secs(5), self.task).await;
        ended.expect("the server ends").unwrap().unwrap();
    }
}

/// How a client comes.
struct Caller<'a> {
    trusts: &'a Authority,
    shows: Option<&'a Issued>,
    versions: &'static [&'static SupportedProtocolVersion],
    alpn: &'static [u8],
}

impl<'a> Caller<'a> {
    fn new(trusts: &'a Authority, shows: Option<&'a Issued>) -> Self {
        Self { trusts, shows, versions: rustls::ALL_VERSIONS, alpn: b"http/1.1" }
    }

    fn config(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.trusts.certificate.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match self.shows {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let chain = [&[own.certificate.clone()][..], &own.below].concat();
                builder.with_client_auth_cert(chain, own.key()).unwrap()
            }
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        Arc::new(config)
    }

    async fn connect(&self, site: &Site) -> io::Result<TlsStream<TcpStream>> {
        connect(self.config(), site).await
    }

    /// Whom the server takes this caller for; with TLS 1.3 a refusal comes with the first answer.
    async fn name(&self, site: &Site) -> io::Result<String> {
        let mut stream = self.connect(site).await?;
        ask(&mut stream).await
    }
}

async fn connect(config: Arc<ClientConfig>, site: &Site) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(site.address).await?;
    TlsConnector::from(config).connect(site.address.ip().into(), stream).await
}

/// One request on an open connection.
async fn ask(stream: &mut TlsStream<TcpStream>) -> io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    loop {
        if let Some((head, body)) = String::from_utf8_lossy(&answer).split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if length.is_some_and(|length| length.parse() == Ok(body.len())) {
                assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                return Ok(body.to_owned());
            }
        }
        match stream.read_buf(&mut answer).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => continue,
        }
    }
}

/// Nothing more is heard on a connection, and nothing can be asked.
async fn is_over(mut stream: TlsStream<TcpStream>) {
    let mut rest = Vec::new();
    // Sooner than an idle connection ends by itself.
    let end = tokio::time::timeout(HANDSHAKE_TIMEOUT / 2, stream.read_to_end(&mut rest));
    // A clean end or a cut one.
    let _ = end.await.expect("the server ends the connection");
    assert!(rest.is_empty(), "{rest:?}");
}

/// The certificate that the server showed on a connection.
fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}
