//! One HTTP request, with its redirects: where they may lead, what goes with them, and what an
//! answer that is no success means.
//!
//! Under a closed egress policy each hop is judged before it is asked, and connections are made
//! to judged addresses only. An `Authorization` header goes to the origin (scheme, host and port) it was meant for and is
//! dropped for good by the first redirect that leaves it. Plain HTTP is spoken to named hosts
//! only. It does not know what is asked for, and does not try again.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, Response, Url};
use serde::Deserialize;

use crate::auth::secrets::Secrets;
use crate::egress::{EgressDenied, EgressPolicy, Guard};
use crate::error::PullError;
use crate::manifest::shown;
use crate::options::ClientOptions;
use crate::retry::retry_after;

/// The HTTP client with the rules above.
#[derive(Debug)]
pub(crate) struct Transport {
    connections: Connections,
    egress: EgressPolicy,
    plain_http: BTreeSet<String>,
    response_timeout: Duration,
    stall_timeout: Duration,
    redirects_max: usize,
    /// What no answer's text may repeat to others.
    secrets: Secrets,
}

/// A request, complete but for its `Authorization`.
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) authorization: Option<&'a HeaderValue>,
    pub(crate) body: Option<String>,
    /// Whether an answer named the host, and not the user.
    pub(crate) is_told: bool,
    /// What is asked for, for errors.
    pub(crate) what: &'a str,
}

/// An answer, and whether it comes from the origin that was asked.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response,
    pub(crate) is_home: bool,
    pub(crate) host: String,
}

impl Transport {
    pub(crate) fn new(options: &ClientOptions) -> Result<Transport, PullError> {
        Ok(Transport {
            connections: Connections::new(options)?,
            egress: options.egress.clone(),
            plain_http: options.plain_http.iter().map(|h| h.to_ascii_lowercase()).collect(),
            response_timeout: options.timeouts.response,
            stall_timeout: options.timeouts.stall,
            redirects_max: options.limits.redirects_max,
            secrets: Secrets::default(),
        })
    }

    /// What this client has shown to registries and token servers.
    pub(crate) fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// Whether it goes wherever it is told to.
    pub(crate) fn is_open(&self) -> bool {
        self.egress.is_open()
    }

    /// `host[:port]` of a URL that an answer named, as an error may show it.
    pub(crate) fn foreign_host(&self, url: &Url) -> String {
        shown(&self.secrets.blotted(&host_of(url)))
    }

    /// The origin of a host as users write it: plain HTTP if it is named so, else TLS.
    pub(crate) fn origin(&self, host: &str) -> Option<Url> {
        origin_of(host, &self.plain_http)
    }

    fn names(&self, host: &str) -> bool {
        self.plain_http.contains(&host.to_ascii_lowercase())
    }

    /// Whether plain HTTP may be spoken with the host of this URL. A name without a port stands
    /// for port 80.
    pub(crate) fn may_be_plain(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or_default();
        self.names(&format!("{host}:{port}")) || (port == 80 && self.names(host))
    }

    /// Sends a request and follows its redirects. Any status comes back as an answer.
    pub(crate) async fn send(&self, request: Request<'_>) -> Result<Answer, PullError> {
        let home = request.url.clone();
        let mut url = request.url.clone();
        let mut is_home = true;
        let host = |url: &Url, is_home| match is_home && !request.is_told {
            true => host_of(url),
            false => self.foreign_host(url),
        };
        for _ in 0..=self.redirects_max {
            let asked = host(&url, is_home);
            self.judge(&url, &asked)?;
            let response = self.send_once(&request, &url, &asked, is_home).await?;
            let Some(target) = self.redirect(&request, &url, &asked, &response)? else {
                return Ok(Answer { response, is_home, host: asked });
            };
            is_home = is_home && same_origin(&home, &target);
            url = target;
        }
        Err(PullError::TooManyRedirects { host: host(&home, true), limit: self.redirects_max })
    }

    /// Whether the egress policy lets us go there, as far as the URL decides it.
    fn judge(&self, url: &Url, host: &str) -> Result<(), PullError> {
        let is_plain = url.scheme() == "http";
        let judged = match self.egress.check(url) {
            Ok(()) if is_plain && !self.egress.is_open() && !self.may_be_plain(url) => {
                Err(EgressDenied::PlainHttp)
            }
            judged => judged,
        };
        judged.map_err(|source| PullError::EgressDenied { host: host.to_owned(), source })
    }

    async fn send_once(
        &self,
        request: &Request<'_>,
        url: &Url,
        host: &str,
        is_home: bool,
    ) -> Result<Response, PullError> {
        let mut headers = request.headers.clone();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(authorization) = request.authorization.filter(|_| is_home) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let http = self.connections.to(url)?;
        let mut builder = http.request(request.method.clone(), url.clone()).headers(headers);
        if let Some(body) = &request.body {
            builder = builder.body(body.clone());
        }
        let host = host.to_owned();
        match tokio::time::timeout(self.response_timeout, builder.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(connection_error(host, error.without_url())),
            Err(_elapsed) => Err(PullError::Timeout {
                host,
                what: request.what.to_owned(),
                waited: self.response_timeout,
            }),
        }
    }

    /// Where a response leads, if it is a redirect, and whether we go there.
    fn redirect(
        &self,
        request: &Request<'_>,
        from: &Url,
        host: &str,
        response: &Response,
    ) -> Result<Option<Url>, PullError> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let senseless = |reason: &str| PullError::Protocol {
            host: host.to_owned(),
            what: request.what.to_owned(),
            reason: reason.to_owned(),
        };
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| senseless("a redirect without a target"))?;
        let mut target =
            from.join(location).map_err(|_| senseless("a redirect to something that is no URL"))?;
        if !self.egress.is_open() {
            self.judge(&target, &self.foreign_host(&target))?;
        }
        // The HTTP library would turn these into an Authorization header.
        let cleared = target.set_username("").and_then(|()| target.set_password(None));
        cleared.map_err(|()| senseless("a redirect to something that is no web address"))?;
        let refused = |reason| PullError::RedirectRefused {
            host: host.to_owned(),
            target: self.foreign_host(&target),
            reason,
        };
        if request.method != Method::GET {
            return Err(refused("only reading requests are redirected"));
        }
        match target.scheme() {
            "https" => Ok(Some(target)),
            "http" if self.may_be_plain(&target) => Ok(Some(target)),
            "http" => Err(refused("it is plain HTTP to a host that is not named for it")),
            _ => Err(refused("it is neither https nor http")),
        }
    }

    /// The next bytes of a body; none at its end.
    pub(crate) async fn chunk(
        &self,
        response: &mut Response,
        host: &str,
        what: &str,
        received_bytes: u64,
    ) -> Result<Option<Bytes>, PullError> {
        match tokio::time::timeout(self.stall_timeout, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(PullError::Cut {
                host: host.to_owned(),
                what: what.to_owned(),
                received_bytes,
                source: Some(error.without_url()),
            }),
            Err(_elapsed) => Err(PullError::Timeout {
                host: host.to_owned(),
                what: what.to_owned(),
                waited: self.stall_timeout,
            }),
        }
    }

    /// A whole body of at most `bytes_max`.
    pub(crate) async fn body(
        &self,
        answer: &mut Answer,
        what: &str,
        bytes_max: u64,
    ) -> Result<Bytes, PullError> {
        let too_large = || PullError::TooLarge { what: what.to_owned(), bytes_max };
        if answer.response.content_length().is_some_and(|length| length > bytes_max) {
            return Err(too_large());
        }
        let mut body = BytesMut::new();
        loop {
            let received = body.len() as u64;
            let chunk = self.chunk(&mut answer.response, &answer.host, what, received).await?;
            let Some(chunk) = chunk else { return Ok(body.freeze()) };
            if received + chunk.len() as u64 > bytes_max {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
    }

    /// The error that an answer without success stands for.
    pub(crate) async fn refusal(&self, mut answer: Answer, what: &str, sent: bool) -> PullError {
        let status = answer.response.status().as_u16();
        let retry_after = retry_after(answer.response.headers());
        let message = self.message(&mut answer).await;
        let Answer { host, is_home, .. } = answer;
        let what = what.to_owned();
        match status {
            401 | 403 if is_home => {
                PullError::Unauthorized { host, what, sent_credentials: sent, message }
            }
            404 => PullError::NotFound { host, what, message },
            429 => PullError::RateLimited { host, retry_after, message },
            _ => PullError::Status { host, status, what, retry_after, message },
        }
    }

    /// What a registry says about its refusal (distribution spec, "Error Codes").
    async fn message(&self, answer: &mut Answer) -> String {
        #[derive(Deserialize)]
        struct Body {
            errors: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let body = self.body(answer, "an error message", 64 << 10).await.unwrap_or_default();
        let parsed: Option<Body> = serde_json::from_slice(&body).ok();
        let first = parsed.and_then(|body| body.errors.into_iter().next());
        first.map_or_else(String::new, |entry| {
            let Entry { code, message } = entry;
            let said = if message.is_empty() { &code } else { &message };
            // Before it is cut short: half a secret would not be found.
            shown(&self.secrets.blotted(said))
        })
    }
}

/// The origin of a host, which is spoken to without TLS if it is one of `plain_http`.
pub(crate) fn origin_of(host: &str, plain_http: &BTreeSet<String>) -> Option<Url> {
    let is_plain = plain_http.contains(&host.to_ascii_lowercase());
    let scheme = if is_plain { "http" } else { "https" };
    Url::parse(&format!("{scheme}://{host}/")).ok()
}

/// Connections. What a name leads to is judged by port, and the library's resolver is not told
/// the port: so under a closed policy each port has a client of its own.
struct Connections {
    options: ClientOptions,
    certificates: Vec<reqwest::Certificate>,
    by_port: Mutex<BTreeMap<u16, reqwest::Client>>,
}

impl Connections {
    /// Redirects may name more ports than are worth keeping.
    const PORTS_MAX: usize = 16;

    fn new(options: &ClientOptions) -> Result<Connections, PullError> {
        let connections = Connections {
            options: ClientOptions { credentials: BTreeMap::new(), ..options.clone() },
            certificates: certificates(&options.extra_ca_pem)?,
            by_port: Mutex::default(),
        };
        // What is wrong with the machine is wrong from the start.
        connections.client(443)?;
        Ok(connections)
    }

    fn to(&self, url: &Url) -> Result<reqwest::Client, PullError> {
        self.client(url.port_or_known_default().unwrap_or_default())
    }

    fn client(&self, port: u16) -> Result<reqwest::Client, PullError> {
        let port = if self.options.egress.is_open() { 0 } else { port };
        let mut by_port = self.by_port.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = by_port.get(&port) {
            return Ok(client.clone());
        }
        let client = self.make(port).map_err(|source| PullError::Client { source })?;
        if by_port.len() >= Connections::PORTS_MAX {
            // Requests under way keep theirs.
            by_port.clear();
        }
        by_port.insert(port, client.clone());
        Ok(client)
    }

    fn make(&self, port: u16) -> Result<reqwest::Client, reqwest::Error> {
        let mut builder = reqwest::Client::builder()
            .user_agent(self.options.user_agent.as_str())
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .connect_timeout(self.options.timeouts.connect)
            .tls_certs_merge(self.certificates.clone());
        let guard = Guard::new(&self.options.egress, port);
        // A proxy would look names up for itself.
        if !self.options.system_proxy || guard.is_some() {
            builder = builder.no_proxy();
        }
        if let Some(guard) = guard {
            builder = builder.dns_resolver(guard);
        }
        builder.build().map_err(reqwest::Error::without_url)
    }
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connections")
    }
}

/// Extra certificate authorities, each checked here so that the error names the option.
fn certificates(pems: &[Vec<u8>]) -> Result<Vec<reqwest::Certificate>, PullError> {
    let mut certificates = Vec::new();
    for pem in pems {
        let bundle = reqwest::Certificate::from_pem_bundle(pem).unwrap_or_default();
        if bundle.is_empty() {
            let reason = "it holds no PEM certificate".to_owned();
            return Err(PullError::Option { option: "extra CA", reason });
        }
        certificates.extend(bundle);
    }
    Ok(certificates)
}

/// `host[:port]` of a URL, and nothing else of it.
pub(crate) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

pub(crate) fn same_origin(one: &Url, other: &Url) -> bool {
    one.origin() == other.origin()
}

/// Tells a certificate, a server without TLS and a place we do not go to from a network that
/// does not work.
fn connection_error(host: String, source: reqwest::Error) -> PullError {
    if let Some(denied) = cause::<EgressDenied>(&source) {
        return PullError::EgressDenied { host, source: denied };
    }
    match cause(&source) {
        Some(rustls::Error::InvalidCertificate(_)) => PullError::Certificate { host, source },
        Some(rustls::Error::InvalidMessage(_)) => PullError::PlainHttpServer { host, source },
        Some(_) | None => PullError::Connect { host, source },
    }
}

/// The error of this type somewhere among the causes; I/O errors hide theirs from `source`.
fn cause<E: std::error::Error + Clone + 'static>(error: &reqwest::Error) -> Option<E> {
    const CAUSES_MAX: usize = 16;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    for _ in 0..CAUSES_MAX {
        let error = cause?;
        if let Some(error) = error.downcast_ref::<E>() {
            return Some(error.clone());
        }
        let io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = match io {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
