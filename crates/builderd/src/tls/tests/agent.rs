//! An agent that speaks SPIFFE's Workload API (the X.509-SVID profile of workload.proto) on a
//! socket of its own, and says what a story lets it say.

use std::convert::Infallible;
use std::path::PathBuf;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Either, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::*;

const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
/// grpc.github.io/grpc/core/md_doc_statuscodes.html
const INVALID_ARGUMENT: u32 = 3;
const PERMISSION_DENIED: u32 = 7;
const UNIMPLEMENTED: u32 = 12;

/// `X509SVIDResponse` of workload.proto.
#[derive(Clone, PartialEq, Message)]
struct SvidResponse {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<Svid>,
}

/// `X509SVID` of workload.proto; the bytes are DER.
#[derive(Clone, PartialEq, Message)]
struct Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
}

/// What the agent says to whoever asks, until it says something else.
#[derive(Clone)]
enum Said {
    Identity(Bytes),
    Refusal,
}

/// See the module.
pub(super) struct Agent {
    pub(super) socket: PathBuf,
    says: watch::Sender<Said>,
    task: JoinHandle<()>,
    _directory: TempDir,
}

impl Agent {
    /// Nobody is known to it yet.
    pub(super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let says = watch::Sender::new(Said::Refusal);
        let task = talk(UnixListener::bind(&socket).unwrap(), says.subscribe());
        Self { socket, says, task, _directory: directory }
    }

    /// Nobody is there any more, nor at the other end of connections.
    pub(super) async fn dead(mut self) -> Self {
        self.task.abort();
        assert!((&mut self.task).await.unwrap_err().is_cancelled());
        std::fs::remove_file(&self.socket).unwrap();
        self
    }

    /// It is there again, and what it says now is what it was given meanwhile.
    pub(super) fn revived(self) -> Self {
        let task = talk(UnixListener::bind(&self.socket).unwrap(), self.says.subscribe());
        Self { task, ..self }
    }

    /// Tells whoever asks that it is `id`, by a new certificate of `authority`; gives it.
    pub(super) fn name(&self, id: &str, authority: &Authority) -> Issued {
        let issued = authority.issue(&[id]);
        let svid = Svid {
            spiffe_id: id.to_owned(),
            x509_svid: issued.certificate.to_vec(),
            x509_svid_key: issued.key.clone(),
            bundle: authority.certificate.to_vec(),
        };
        let message = SvidResponse { svids: vec![svid] }.encode_to_vec();
        let mut framed = BytesMut::new();
        framed.put_u8(0);
        framed.put_u32(u32::try_from(message.len()).unwrap());
        framed.put_slice(&message);
        self.says.send_replace(Said::Identity(framed.freeze()));
        issued
    }

    /// Whoever asks is nobody any more.
    pub(super) fn forget(&self) {
        self.says.send_replace(Said::Refusal);
    }
}

/// Talks to everybody, until it is aborted.
fn talk(listener: UnixListener, said: watch::Receiver<Said>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let said = said.clone();
            let service = hyper::service::service_fn(move |request| {
                std::future::ready(Ok::<_, Infallible>(answer(&request, said.clone())))
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            connections.spawn(server.serve_connection(TokioIo::new(stream), service));
        }
    })
}

type Body = http_body_util::combinators::BoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

fn answer(request: &Request<Incoming>, said: watch::Receiver<Said>) -> Response<Body> {
    let header = |name: &str| request.headers().get(name).map(HeaderValue::as_bytes);
    let code = match request.uri().path() {
        // A page of another site cannot set it (SPIFFE Workload Endpoint, section 4).
        _ if header("workload.spiffe.io") != Some(b"true") => Some(INVALID_ARGUMENT),
        FETCH => None,
        _ => Some(UNIMPLEMENTED),
    };
    let body = match code {
        Some(_) => Either::Left(Empty::new()),
        None => Either::Right(StreamBody::new(Box::pin(frames(said)))),
    };
    let mut response = Response::new(body.boxed());
    let headers = response.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    if let Some(code) = code {
        headers.insert("grpc-status", code.into());
    }
    response
}

/// Everything that is said, one message each; a refusal ends it.
fn frames(
    said: watch::Receiver<Said>,
) -> impl stream::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
    stream::unfold((said, Step::First), |(mut said, step)| async move {
        match step {
            Step::First => {}
            Step::Next => said.changed().await.ok()?,
            Step::Last => return None,
        }
        let now = said.borrow_and_update().clone();
        match now {
            Said::Identity(message) => Some((Ok(Frame::data(message)), (said, Step::Next))),
            Said::Refusal => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", PERMISSION_DENIED.into());
                Some((Ok(Frame::trailers(trailers)), (said, Step::Last)))
            }
        }
    })
}

/// Where a stream of answers is.
enum Step {
    First,
    Next,
    Last,
}
