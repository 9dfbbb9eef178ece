//! What stands between the wire and every RPC handler, whatever the protocol: JSON that has not
//! its message's form is refused, and so is what unpacked is too much beside what its tenant's other
//! calls carry; a panic becomes `internal`, an error before a stream's first
//! message is its only message, and each call is told to whoever measures.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use connectrpc::dispatcher::{MethodDescriptor, RequestStream, StreamingResult, UnaryResult};
use connectrpc::{CodecFormat, ConnectError, Dispatcher, Payload, RequestContext, Response};
use futures_util::{FutureExt as _, StreamExt as _, stream};

use super::auth::Caller;
use super::carried::Brought;
use super::error::Answer;
use super::shape;

/// Told of each call when it has been answered: method, code (`ok` or Connect's name of an
/// error), and how long it took. Of a stream only the beginning counts.
pub(crate) type Observe = Arc<dyn Fn(&str, &str, Duration) + Send + Sync>;

/// Told in the place of a code, before the answer's own, when a handler panicked.
pub(crate) const PANICKED: &str = "panicked";

/// See the module.
pub(super) struct Guard<D> {
    inner: D,
    observe: Observe,
}

impl<D> Guard<D> {
    pub(super) fn new(inner: D, observe: Observe) -> Self {
        Self { inner, observe }
    }

    /// Runs a call under the rules of the module.
    fn call<T: Send + 'static>(
        &self,
        path: &str,
        call: futures_util::future::BoxFuture<'static, Result<T, ConnectError>>,
    ) -> futures_util::future::BoxFuture<'static, Result<T, ConnectError>> {
        let (observe, path, start) = (Arc::clone(&self.observe), path.to_owned(), Instant::now());
        Box::pin(async move {
            let result = AssertUnwindSafe(call).catch_unwind().await;
            let result = result.unwrap_or_else(|_| {
                observe(&path, PANICKED, start.elapsed());
                Err(Answer::panicked().into_connect())
            });
            let code = result.as_ref().map_or_else(|error| error.code.as_str(), |_| "ok");
            observe(&path, code, start.elapsed());
            result
        })
    }

    fn streaming(&self, path: &str, call: StreamingResult) -> StreamingResult {
        let call = self.call(path, call);
        Box::pin(async move {
            match call.await {
                Ok(response) => Ok(response.map_body(|body| {
                    let caught = AssertUnwindSafe(body).catch_unwind();
                    let item = |item: Result<_, _>| {
                        item.unwrap_or_else(|_| Err(Answer::panicked().into_connect()))
                    };
                    Box::pin(caught.map(item)) as connectrpc::EncodedStream
                })),
                // Some gRPC clients lose the details of an error that comes instead of a stream.
                Err(error) => Response::stream_ok(stream::once(async move { Err(error) })),
            }
        })
    }
}

/// Why a message does not get to its handler: there is no room for it, or its JSON has another form.
fn refused(
    path: &str,
    context: &RequestContext,
    message: &[u8],
    format: CodecFormat,
) -> Option<ConnectError> {
    let brought = context.extensions().get::<Brought>();
    let too_much = brought.and_then(|brought| brought.unpacked(message.len()));
    let answer = match (too_much, format) {
        (Some(answer), _) => answer,
        (None, CodecFormat::Json) => Answer::of(&shape::check(input(path), message).err()?),
        (None, _) => return None,
    };
    if let Some(caller) = context.extensions().get::<Caller>() {
        caller.note(&answer);
    }
    Some(answer.into_connect())
}

/// The message that a method of ours takes.
fn input(path: &str) -> Option<&'static api::Message> {
    let name = path.strip_prefix(api::SERVICE)?.strip_prefix('/')?;
    let method = api::METHODS.iter().find(|method| method.name == name)?;
    api::message(method.input)
}

impl<D: Dispatcher> Dispatcher for Guard<D> {
    fn lookup(&self, path: &str) -> Option<MethodDescriptor> {
        self.inner.lookup(path)
    }

    fn call_unary(
        &self,
        path: &str,
        mut context: RequestContext,
        request: Payload,
        format: CodecFormat,
    ) -> UnaryResult {
        // Handlers may ask what the caller reads.
        context.extensions_mut().insert(format);
        let call: UnaryResult = match refused(path, &context, request.bytes(), format) {
            Some(error) => Box::pin(async move { Err(error) }),
            None => self.inner.call_unary(path, context, request, format),
        };
        self.call(path, call)
    }

    fn call_server_streaming(
        &self,
        path: &str,
        context: RequestContext,
        request: Bytes,
        format: CodecFormat,
    ) -> StreamingResult {
        let call: StreamingResult = match refused(path, &context, &request, format) {
            Some(error) => Box::pin(async move { Err(error) }),
            None => self.inner.call_server_streaming(path, context, request, format),
        };
        self.streaming(path, call)
    }

    fn call_client_streaming(
        &self,
        path: &str,
        context: RequestContext,
        requests: RequestStream,
        format: CodecFormat,
    ) -> UnaryResult {
        self.call(path, self.inner.call_client_streaming(path, context, requests, format))
    }

    fn call_bidi_streaming(
        &self,
        path: &str,
        context: RequestContext,
        requests: RequestStream,
        format: CodecFormat,
    ) -> StreamingResult {
        self.streaming(path, self.inner.call_bidi_streaming(path, context, requests, format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    use api::v1;
    use connectrpc::{ConnectRpcService, Router, ServiceStream, handler_fn, streaming_handler_fn};
    use http::{Request, StatusCode};
    use http_body_util::{BodyExt as _, Full};
    use tower::ServiceExt as _;

    type Seen = Arc<Mutex<Vec<(String, String)>>>;

    async fn panics(
        _: RequestContext,
        _: v1::GetBuildRequest,
    ) -> connectrpc::ServiceResult<v1::GetBuildResponse> {
        panic!("a defect")
    }

    async fn breaks(
        _: RequestContext,
        _: v1::StreamBuildLogsRequest,
    ) -> connectrpc::ServiceResult<ServiceStream<v1::StreamBuildLogsResponse>> {
        let first = v1::StreamBuildLogsResponse { message: "first".into(), ..Default::default() };
        let broken = stream::once(async { panic!("a defect") });
        Response::stream_ok(stream::once(async { Ok(first) }).chain(broken))
    }

    async fn post(path: &str, content_type: &str, body: &[u8]) -> (StatusCode, String, Seen) {
        let seen = Seen::default();
        let observe: Observe = Arc::new({
            let seen = Arc::clone(&seen);
            move |path, code, _| seen.lock().unwrap().push((path.to_owned(), code.to_owned()))
        });
        let router = Router::new().route("s", "Panics", handler_fn(panics)).route_server_stream(
            "s",
            "Breaks",
            streaming_handler_fn(breaks),
        );
        let service = ConnectRpcService::new(Guard::new(router, observe));
        let request = Request::post(path).header("content-type", content_type);
        let request = request.body(Full::new(Bytes::copy_from_slice(body))).unwrap();
        let response = service.oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&bytes).into_owned(), seen)
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error_and_tells_nothing() {
        let (status, body, seen) = post("/s/Panics", "application/json", b"{}").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(body.contains("\"internal\"") && !body.contains("a defect"), "{body}");
        let told = ["panicked", "internal"].map(|code| ("s/Panics".to_owned(), code.to_owned()));
        assert_eq!(*seen.lock().unwrap(), told);

        let body = [0, 0, 0, 0, 2, b'{', b'}'];
        let (_, body, seen) = post("/s/Breaks", "application/connect+json", &body).await;
        assert!(body.contains("\"first\"") && body.contains("\"internal\""), "{body}");
        assert_eq!(*seen.lock().unwrap(), [("s/Breaks".to_owned(), "ok".to_owned())]);
    }
}
