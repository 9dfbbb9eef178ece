//! Stories about certificates, told with real handshakes: a server with TLS on a port of its
//! own, rustls clients, authorities that exist for one story.

mod agent;
mod files;
mod spiffe;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::routing::get;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
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
use crate::api::serve;
use crate::config::ClientAuth;

/// Who signs certificates in one story.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) pem: String,
}

/// A certificate and its key.
pub(crate) struct Issued {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: Vec<u8>,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

impl Authority {
    pub(crate) fn new(name: &str, ids: &[&str]) -> Self {
        let mut params = params(name, ids);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let (der, pem) = (certificate.der().clone(), certificate.pem());
        Self { issuer: Issuer::new(params, key), certificate: der, pem }
    }

    /// For this machine's address, and with the ids as URIs.
    pub(crate) fn issue(&self, ids: &[&str]) -> Issued {
        let mut params = params("leaf", ids);
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
        let task = tokio::spawn(serve(listener, Some(tls), router, stopped, drain));
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
                builder.with_client_auth_cert(vec![own.certificate.clone()], own.key()).unwrap()
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
