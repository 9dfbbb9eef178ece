//! The accept loop: HTTP/1.1 and HTTP/2 on one port, in TLS or not, each side of a connection held
//! to a deadline, and an end that lets requests finish, while who comes late is told that it is the
//! end. A handshake is part of its connection: who is slow with it keeps nobody else waiting. A
//! connection ends with the certificate that its client showed.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep};
use tower::ServiceExt as _;

use super::open::{Crowd, Place};
use crate::accepting;
use crate::tls::{Shown, Tls};

/// How long a client may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last that came when the server was stopping.
const LATE_MAX: Duration = Duration::from_secs(10);
/// How often it is told that an address has too many connections.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// How often a silent HTTP/2 connection is asked whether it lives, and how long for the answer.
const PING_EVERY: Duration = Duration::from_secs(20);
/// Requests that one HTTP/2 connection may have open: followers of logs share one.
const STREAMS_MAX: u32 = 2048;
/// "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" (RFC 9113, section 3.4).
const PREFACE_BYTES: usize = 24;

/// The address at the other end of a connection; an extension of each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// The id in the client's certificate, if the connection has TLS and there is one that is good as
/// of now; an extension of each request.
#[derive(Clone, Debug)]
pub(crate) struct PeerId(pub(crate) Arc<str>);

/// Where connections come in. An address that has all the connections which the crowd gives it gets no
/// other.
#[derive(Clone)]
pub(crate) struct Entrance {
    listener: Arc<TcpListener>,
    tls: Option<Tls>,
    crowd: Crowd,
    builder: auto::Builder<TokioExecutor>,
}

/// What a connection holds of its address's crowd.
type Entered = Option<Place<IpAddr>>;

impl Entrance {
    pub(crate) fn new(listener: TcpListener, tls: Option<Tls>, crowd: Crowd) -> Self {
        Self { listener: Arc::new(listener), tls, crowd, builder: builder() }
    }

    /// The next connection. May be dropped at any point.
    ///
    /// # Errors
    /// If the listener itself is broken.
    async fn next(
        &self,
        told: &mut Option<Instant>,
    ) -> io::Result<(TcpStream, SocketAddr, Entered)> {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    if let Ok(place) = self.crowd.enter(peer.ip()) {
                        return Ok((stream, peer, place));
                    }
                    if told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
                        *told = Some(Instant::now());
                        tracing::warn!(%peer, "an address has too many connections for another");
                    }
                }
                Err(error) if accepting::is_passing(&error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(accepting::PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn door(&self, router: &axum::Router, shutdown: watch::Receiver<bool>) -> Door {
        let (builder, tls) = (self.builder.clone(), self.tls.clone());
        Door { builder, tls, router: router.clone(), shutdown, asked: None }
    }
}

/// Serves until `shutdown` says true, then takes no new connections and gives requests that run
/// `drain` to end.
///
/// # Errors
/// If the listener itself is broken.
pub(crate) async fn serve(
    entrance: Entrance,
    router: axum::Router,
    mut shutdown: watch::Receiver<bool>,
    drain: Duration,
) -> io::Result<()> {
    let mut connections = JoinSet::new();
    let mut told = None;
    loop {
        let next = tokio::select! {
            biased;
            // A sender that is gone will never say it; nobody wants us any more.
            _ = shutdown.wait_for(|stopping| *stopping) => break,
            next = entrance.next(&mut told) => next,
        };
        while connections.try_join_next().is_some() {}
        let (stream, peer, place) = next?;
        let door = entrance.door(&router, shutdown.clone());
        connections.spawn(door.talk(stream, peer, place));
    }
    drop(entrance);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(drain, ended).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections were cut at shutdown");
    }
    connections.shutdown().await;
    Ok(())
}

/// Once `shutdown` says true, answers whoever comes through the same entrance one question, by `router`.
/// It goes on until it is dropped.
pub(crate) async fn serve_late(
    entrance: Entrance,
    router: axum::Router,
    mut shutdown: watch::Receiver<bool>,
) {
    // A sender that is gone stops, too.
    let _ = shutdown.wait_for(|stopping| *stopping).await;
    let mut connections = JoinSet::new();
    let mut told = None;
    while let Ok((stream, peer, place)) = entrance.next(&mut told).await {
        while connections.try_join_next().is_some() {}
        let (asked, is_asked) = watch::channel(false);
        let door = Door { asked: Some(asked), ..entrance.door(&router, is_asked) };
        connections.spawn(tokio::time::timeout(LATE_MAX, door.talk(stream, peer, place)));
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_EVERY)
        .max_concurrent_streams(STREAMS_MAX);
    builder
}

/// What one connection is served with.
struct Door {
    builder: auto::Builder<TokioExecutor>,
    tls: Option<Tls>,
    router: axum::Router,
    shutdown: watch::Receiver<bool>,
    /// Is told of the first request.
    asked: Option<watch::Sender<bool>>,
}

impl Door {
    /// Talks with one client, who holds his place meanwhile.
    async fn talk(self, stream: TcpStream, peer: SocketAddr, _place: Entered) {
        if let Err(error) = self.converse(stream, peer).await {
            tracing::debug!(%peer, error, "a connection ended early");
        }
    }

    /// Talks with one client until one of both has enough.
    async fn converse(mut self, stream: TcpStream, peer: SocketAddr) -> Result<(), String> {
        // Small answers go at once; a socket that refuses that still works.
        let _ = stream.set_nodelay(true);
        let Some(tls) = self.tls.take() else {
            return self.serve(stream, peer, None).await;
        };
        let accepted = tokio::select! {
            biased;
            // Nothing was asked yet, so nothing is cut short.
            _ = self.shutdown.wait_for(|stopping| *stopping) => return Ok(()),
            accepted = tls.accept(stream) => accepted,
        };
        let accepted = accepted.inspect_err(|error| tls.failed(peer, error));
        let (stream, shown) = accepted.map_err(|error| format!("no TLS handshake: {error}"))?;
        self.serve(stream, peer, shown).await
    }

    async fn serve<S>(
        mut self,
        stream: S,
        peer: SocketAddr,
        shown: Option<Shown>,
    ) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (router, asked) = (self.router, self.asked);
        let id = shown.as_ref().and_then(Shown::id).cloned().map(PeerId);
        // A client may go on asking on a connection that it was told to leave.
        let is_nobody = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&is_nobody);
        let service = hyper::service::service_fn(move |mut request: http::Request<Incoming>| {
            if let Some(asked) = &asked {
                asked.send_replace(true);
            }
            request.extensions_mut().insert(Peer(peer));
            if let Some(id) = id.as_ref().filter(|_| !is_over.load(Ordering::Relaxed)) {
                request.extensions_mut().insert(id.clone());
            }
            router.clone().oneshot(request.map(Body::new))
        });
        let io = TokioIo::new(PromptIo::new(stream, HEAD_TIMEOUT));
        let mut connection = pin!(self.builder.serve_connection(io, service));
        let ended = async {
            match shown {
                Some(shown) => shown.ended().await,
                None => std::future::pending().await,
            }
        };
        let talked = tokio::select! {
            talked = connection.as_mut() => Some(talked),
            // A sender that is gone will never say it; nobody wants us any more.
            _ = self.shutdown.wait_for(|stopping| *stopping) => None,
            () = ended => {
                is_nobody.store(true, Ordering::Relaxed);
                tracing::debug!(%peer, "the client's certificate is not good any more");
                None
            }
        };
        let talked = match talked {
            Some(talked) => talked,
            // What was asked is answered, and nothing more.
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        talked.map_err(|error| error.to_string())
    }
}

/// A connection whose first bytes must come in time: hyper's own clock starts only when it knows
/// which HTTP it speaks.
struct PromptIo<S> {
    inner: S,
    deadline: Option<Pin<Box<Sleep>>>,
    read_bytes: usize,
}

impl<S> PromptIo<S> {
    fn new(inner: S, timeout: Duration) -> Self {
        Self { inner, deadline: Some(Box::pin(sleep(timeout))), read_bytes: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PromptIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.inner).poll_read(context, buffer);
        let Some(deadline) = &mut this.deadline else { return polled };
        let new = buffer.filled().get(before..).unwrap_or_default();
        let is_http1 = this.read_bytes == 0 && new.first().is_some_and(|byte| *byte != b'P');
        this.read_bytes += new.len();
        if is_http1 || this.read_bytes >= PREFACE_BYTES {
            this.deadline = None;
        } else if polled.is_pending() && deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PromptIo<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn read_after(sent: &[u8]) -> io::Result<usize> {
        let (mut client, server) = tokio::io::duplex(64);
        let mut server = PromptIo::new(server, Duration::from_millis(50));
        let mut buffer = [0; 64];
        if !sent.is_empty() {
            client.write_all(sent).await?;
            let read = server.read(&mut buffer).await?;
            assert_eq!(read, sent.len());
        }
        let waited = tokio::time::timeout(Duration::from_millis(500), server.read(&mut buffer));
        match waited.await {
            Ok(read) => read,
            Err(_) => Ok(usize::MAX),
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_begin_is_cut_off() {
        for silent in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n"] {
            let error = read_after(silent).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{silent:?}");
        }
        for begun in [&b"GET / HTTP/1.1\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
            assert_eq!(read_after(begun).await.unwrap(), usize::MAX, "hyper's clock runs now");
        }
    }
}
