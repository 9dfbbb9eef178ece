//! What serves the commands' door: a proxy for HTTP, and for whatever goes through CONNECT, to the
//! hosts that the operator allows and no others.
//!
//! Every host that a request names is judged twice: by name against the operator's list, and by
//! the egress guard, which connects to judged addresses alone. The programs that ask are a
//! stranger's, so what two readers of a request could understand differently is refused, and
//! connections, headers, silence and bytes have their ends. Of what goes through a CONNECT the
//! first words are looked at (`hello`) and nothing else. It runs as long as the commands do, and
//! nothing of it outlives them.

mod hello;

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use oci::{AllowedName, DialError, EgressPolicy, Target};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::super::disk::lock;
use crate::accepting;
use hello::Unfit;

/// Connections of commands at once; more wait.
const CONNECTIONS_MAX: usize = 64;
/// Bytes of a request's or an answer's head, and its headers.
const HEAD_BYTES_MAX: usize = 32 << 10;
const HEADERS_MAX: usize = 100;
/// How long a request's head may take.
const HEAD_MAX: Duration = Duration::from_secs(30);
/// How long it may take until TLS has said whom it is for, where it must be TLS.
const HELLO_MAX: Duration = Duration::from_secs(30);
/// Where a CONNECT is for TLS: the ports of the web. HTTP is asked of the proxy itself.
const TLS_PORTS: [u16; 2] = [80, 443];
/// How long nothing may move on a connection.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Refusals of a build that are told.
const REFUSALS_MAX: usize = 100;
/// Headers that are for the next in the line alone (RFC 9110, 7.6.1), and old names of such.
const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authorization"),
];

type Body = Either<Incoming, Full<Bytes>>;

/// What the commands of one build may reach.
#[derive(Debug)]
pub(super) struct Gate {
    names: Vec<AllowedName>,
    policy: EgressPolicy,
    bytes_max: u64,
    silence_max: Duration,
    hello_max: Duration,
    tls_ports: Vec<u16>,
    bytes: AtomicU64,
    refusals: Mutex<Refusals>,
}

#[derive(Debug, Default)]
struct Refusals {
    /// The first since a command began.
    first: Option<String>,
    told: Vec<String>,
    tell: Option<mpsc::Sender<String>>,
}

/// Why a request is not passed on.
#[derive(Debug)]
enum Refusal {
    /// It could be understood in two ways, or in none.
    Bad(&'static str),
    /// The place, and the rule that forbids it.
    Denied(String),
    /// It may be reached, but cannot.
    Unreachable(String),
}

impl Gate {
    /// Lets through to `names`, where `policy` agrees, up to `bytes_max` bytes in both directions.
    pub(super) fn new(names: Vec<AllowedName>, policy: EgressPolicy, bytes_max: u64) -> Self {
        Self {
            names,
            policy,
            bytes_max,
            silence_max: SILENCE_MAX,
            hello_max: HELLO_MAX,
            tls_ports: TLS_PORTS.to_vec(),
            bytes: AtomicU64::new(0),
            refusals: Mutex::default(),
        }
    }

    /// A command begins: what earlier ones were refused is not its reason to fail.
    pub(super) fn begin(&self) {
        lock(&self.refusals).first = None;
    }

    /// What was refused to the present command first.
    pub(super) fn refusal(&self) -> Option<String> {
        lock(&self.refusals).first.clone()
    }

    async fn connect(&self, target: &Target) -> Result<TcpStream, Refusal> {
        if !self.names.iter().any(|name| name.holds(target)) {
            let rule = "no rule lets the commands of this tenant reach it";
            return Err(self.deny(format!("{target}: {rule}")));
        }
        self.policy.connect(target).await.map_err(|error| match error {
            DialError::Denied(rule) => self.deny(format!("{target}: {rule}")),
            DialError::Failed(error) => {
                Refusal::Unreachable(format!("{target}: it cannot be reached ({})", error.kind()))
            }
        })
    }

    /// What is said first through a CONNECT, when it may be said to that host.
    async fn first_words(
        &self,
        from: &mut (impl AsyncRead + Unpin),
        target: &Target,
    ) -> io::Result<Vec<u8>> {
        let must_be_tls = self.tls_ports.contains(&target.port());
        // Elsewhere the host may be the first to speak, and whoever asked may wait for it.
        let most = if must_be_tls { self.hello_max } else { Duration::MAX };
        let read = tokio::time::timeout(most, hello::first_words(from, target, must_be_tls));
        read.await?.map_err(|unfit| match unfit {
            Unfit::Denied(rule) => {
                self.deny(format!("{target}: {rule}"));
                io::ErrorKind::PermissionDenied.into()
            }
            Unfit::Gone(error) => error,
        })
    }

    /// Remembers a refusal and has it told, each once and not without end.
    fn deny(&self, what: String) -> Refusal {
        let mut refusals = lock(&self.refusals);
        refusals.first.get_or_insert_with(|| what.clone());
        if refusals.told.len() < REFUSALS_MAX && !refusals.told.contains(&what) {
            refusals.told.push(what.clone());
            let last = match refusals.told.len() {
                REFUSALS_MAX => "; further refusals are not told",
                _ => "",
            };
            let line = format!("a command was refused the network: {what}{last}");
            // The channel holds all that are told.
            let _ = refusals.tell.as_ref().map(|tell| tell.try_send(line));
        }
        drop(refusals);
        Refusal::Denied(what)
    }

    /// Counts bytes; an error when there were too many.
    fn count(&self, bytes: usize) -> io::Result<()> {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) <= self.bytes_max {
            return Ok(());
        }
        let most = self.bytes_max;
        self.deny(format!("more than {most} bytes went through the proxy of this build"));
        Err(io::ErrorKind::QuotaExceeded.into())
    }
}

/// Serves the door until `stop` is dropped, and tells of each refusal. All that it has started ends
/// with it.
///
/// # Errors
/// When the machine refuses a runtime, or the door cannot be served.
pub(super) fn serve(
    door: TcpListener,
    gate: &Arc<Gate>,
    stop: oneshot::Receiver<Infallible>,
    tell: &dyn Fn(String),
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (sender, mut refusals) = mpsc::channel(REFUSALS_MAX);
    lock(&gate.refusals).tell = Some(sender);
    let served = runtime.block_on(async {
        door.set_nonblocking(true)?;
        let door = tokio::net::TcpListener::from_std(door)?;
        let next = || async { door.accept().await.map(|(stream, _)| stream) };
        let mut accept = Box::pin(accept(next, gate));
        let mut stop = stop;
        loop {
            tokio::select! {
                error = &mut accept => return Err(error),
                Some(line) = refusals.recv() => tell(line),
                _ = &mut stop => return Ok(()),
            }
        }
    });
    // Who is being looked up cannot be called off; nobody waits for the answer.
    runtime.shutdown_background();
    lock(&gate.refusals).tell = None;
    while let Ok(line) = refusals.try_recv() {
        tell(line);
    }
    served
}

/// Takes connections as they come, as many at once as there may be.
async fn accept<F>(mut next: impl FnMut() -> F, gate: &Arc<Gate>) -> io::Error
where
    F: Future<Output = io::Result<TcpStream>>,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return io::ErrorKind::BrokenPipe.into();
        };
        match next().await {
            Ok(stream) => drop(tokio::spawn(converse(stream, Arc::clone(gate), slot))),
            // Nobody is kept waiting by a connection that was gone before it was taken.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if accepting::is_passing(&error) => {
                tokio::time::sleep(accepting::PAUSE).await;
            }
            Err(error) => return error,
        }
    }
}

/// One connection, to its end.
async fn converse(stream: TcpStream, gate: Arc<Gate>, slot: OwnedSemaphorePermit) {
    let line = Arc::new(Line { gate, moved: AtomicU64::new(0), _slot: slot });
    let io = TokioIo::new(Counted { stream, line: Arc::clone(&line) });
    let service = service_fn(|request| {
        let line = Arc::clone(&line);
        async move { Ok::<_, Infallible>(answer(request, &line).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // Some programs end their half behind the request.
        .half_close(true)
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(io, service)
        .with_upgrades();
    line.while_it_moves(connection).await;
}

/// What belongs to one connection, tunnel included.
struct Line {
    gate: Arc<Gate>,
    /// Bytes in both directions.
    moved: AtomicU64,
    _slot: OwnedSemaphorePermit,
}

impl Line {
    /// Does the work as long as something moves. How it ends is nobody's concern here: programs
    /// break off as they like.
    async fn while_it_moves<T>(&self, work: impl Future<Output = T>) {
        let silence = async {
            let mut before = None;
            loop {
                let moved = self.moved.load(Ordering::Relaxed);
                if before == Some(moved) {
                    return;
                }
                before = Some(moved);
                tokio::time::sleep(self.gate.silence_max).await;
            }
        };
        tokio::select! {
            _ = work => {}
            () = silence => {}
        }
    }
}

async fn answer(request: Request<Incoming>, line: &Arc<Line>) -> Response<Body> {
    let passed_on = match *request.method() == Method::CONNECT {
        true => tunnel(request, line).await,
        false => pass_on(request, line).await,
    };
    passed_on.unwrap_or_else(|refusal| {
        let (status, text) = match refusal {
            Refusal::Bad(why) => (StatusCode::BAD_REQUEST, why.to_owned()),
            Refusal::Denied(rule) => (StatusCode::FORBIDDEN, format!("refused: {rule}")),
            Refusal::Unreachable(why) => (StatusCode::BAD_GATEWAY, why),
        };
        let mut response = Response::new(Either::Right(Full::from(format!("{text}\n"))));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("text/plain"));
        // What else was sent with it is not a request.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        response
    })
}

/// The host that a request is for, as its first line says; what else names one must agree.
fn target(request: &Request<Incoming>) -> Result<Target, Refusal> {
    let is_connect = *request.method() == Method::CONNECT;
    let bad = Refusal::Bad("the request names no host and port that could be asked");
    let of = |authority: &http::uri::Authority, default: Option<u16>| {
        // A user's name is for no proxy, and hides the host from who reads from the left.
        if authority.as_str().contains('@') {
            return None;
        }
        // A port that cannot be read is none that was left out.
        let has_port = authority.as_str().len() > authority.host().len();
        let port = if has_port { authority.port_u16() } else { default };
        Target::new(authority.host(), port?)
    };
    let uri = request.uri();
    let default = match (is_connect, uri.scheme_str()) {
        (true, None) => None,
        (false, Some("http")) => Some(80),
        (true, Some(_)) | (false, _) => return Err(bad),
    };
    let named = uri.authority().and_then(|authority| of(authority, default));
    let named = named.ok_or(bad)?;
    // Java and others leave a port out of a CONNECT's Host that is in its first line.
    let default = default.or(Some(named.port()));
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (_, Some(_)) => Err(Refusal::Bad("the request has more than one Host")),
        (None, None) => Ok(named),
        (Some(host), None) => {
            let host = host.to_str().ok().and_then(|host| host.parse().ok());
            match host.and_then(|host| of(&host, default)) == Some(named.clone()) {
                true => Ok(named),
                false => Err(Refusal::Bad("the request's Host is not the host it is for")),
            }
        }
    }
}

/// CONNECT: bytes go to and fro, once the first are for the host that was judged.
async fn tunnel(request: Request<Incoming>, line: &Arc<Line>) -> Result<Response<Body>, Refusal> {
    let target = target(&request)?;
    let upstream = line.gate.connect(&target).await?;
    let line = Arc::clone(line);
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let commands = TokioIo::new(upgraded);
            line.while_it_moves(to_and_fro(commands, upstream, &target, &line.gate)).await;
        }
    });
    Ok(Response::new(Either::Right(Full::default())))
}

/// Both directions until both are over; what goes wrong in one ends the other.
async fn to_and_fro(
    commands: impl AsyncRead + AsyncWrite + Unpin,
    mut upstream: TcpStream,
    target: &Target,
    gate: &Gate,
) -> io::Result<()> {
    let (mut from_commands, mut to_commands) = tokio::io::split(commands);
    let (mut from_host, mut to_host) = upstream.split();
    let up = async {
        let first = gate.first_words(&mut from_commands, target).await?;
        to_host.write_all(&first).await?;
        tokio::io::copy(&mut from_commands, &mut to_host).await?;
        to_host.shutdown().await
    };
    let down = async {
        tokio::io::copy(&mut from_host, &mut to_commands).await?;
        to_commands.shutdown().await
    };
    tokio::try_join!(up, down).map(drop)
}

/// Any other request: asked again, of the host that was judged.
async fn pass_on(
    mut request: Request<Incoming>,
    line: &Arc<Line>,
) -> Result<Response<Body>, Refusal> {
    let target = target(&request)?;
    let upstream = line.gate.connect(&target).await?;
    let lost = |_| Refusal::Unreachable(format!("{target}: it breaks off"));
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .handshake(TokioIo::new(upstream))
        .await
        .map_err(lost)?;
    let kept = Arc::clone(line);
    tokio::spawn(async move { kept.while_it_moves(connection).await });
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let path: Uri = path.parse().map_err(|_| Refusal::Bad("the request names no path"))?;
    let host = match target.port() {
        80 => target.host().to_owned(),
        _ => target.to_string(),
    };
    *request.uri_mut() = path;
    *request.version_mut() = http::Version::HTTP_11;
    strip(request.headers_mut());
    let host = HeaderValue::try_from(host).map_err(|_| Refusal::Bad("the host is no header"))?;
    request.headers_mut().insert(HOST, host);
    let mut response = sender.send_request(request).await.map_err(lost)?;
    if response.status().is_informational() {
        return Err(Refusal::Unreachable(format!("{target}: it wants to speak something else")));
    }
    strip(response.headers_mut());
    Ok(response.map(Either::Left))
}

/// Takes off what is for this hop alone.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        // How long the body is, is for the whole way.
        if *name != CONTENT_LENGTH {
            headers.remove(name);
        }
    }
}

/// A connection whose bytes are counted.
struct Counted {
    stream: TcpStream,
    line: Arc<Line>,
}

impl Counted {
    fn count(&self, bytes: usize) -> io::Result<()> {
        self.line.moved.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
        self.line.gate.count(bytes)
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => Poll::Ready(self.count(buffer.filled().len() - before)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, bytes) {
            Poll::Ready(Ok(count)) => Poll::Ready(self.count(count).map(|()| count)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
