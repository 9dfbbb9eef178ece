//! Bodies that come too slowly: a request whose body is not there in time is answered without it,
//! and its connection is closed. Every call that answers once has all of its body read before its
//! handler runs, so that whoever trickles would hold what a request holds for as long as it likes.
//!
//! The body of a stream that goes both ways is read while it is answered, so that what ends it is
//! the deadline of its call; here it ends soon after that, and has a length. A body that nobody
//! reads is not this module's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::Limited;
use hyper::body::Body as _;
use tokio::time::{Instant, sleep};

use super::ApiState;
use super::error::Answer;
use super::frames::looked_at;
use super::spelling::Reader;

/// How long the body of a request may take: 4 MiB come over a line of 1.2 Mbit/s.
pub(crate) const BODY_MAX: Duration = Duration::from_secs(30);

/// Longest body of a stream that goes both ways: ten thousand questions of its kind.
const STREAM_BYTES_MAX: usize = 1 << 20;
/// How much later than its answer such a body ends: who asks is told of the deadline, and not of
/// a body that broke off.
const STREAM_GRACE: Duration = Duration::from_secs(2);

/// See the module.
pub(super) async fn cut(
    state: &ApiState,
    reader: &Reader,
    request: Request,
    next: impl AsyncFnOnce(Request) -> Response,
) -> Response {
    if request.body().is_end_stream() {
        return next(request).await;
    }
    let is_late = Arc::new(AtomicBool::new(false));
    let cut = |body| in_time(body, state.body_max, Arc::clone(&is_late));
    let response = next(request.map(cut)).await;
    if !is_late.load(Ordering::Relaxed) {
        return response;
    }
    let answer = Answer::too_slow(state.body_max);
    (state.meters.observe)("refused", answer.code().as_str(), state.body_max);
    reader.refuse_and_close(answer)
}

/// The same as a layer, for what is called by anybody.
pub(super) async fn cut_open(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    let (head, body) = request.into_parts();
    let reader = Reader::of(&head);
    let request = Request::from_parts(head, body);
    cut(&state, &reader, request, async |request| next.run(request).await).await
}

/// Sees to it that a stream that goes both ways has an end, whatever its sender does.
pub(super) async fn bound(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    next.run(request.map(|body| bounded(body, state.body_max))).await
}

/// A body that ends with its call, which may take that long, whatever becomes of the call.
fn bounded(body: Body, call_max: Duration) -> Body {
    let body = Body::new(Limited::new(body, STREAM_BYTES_MAX));
    in_time(body, call_max + STREAM_GRACE, Arc::default())
}

/// A body that breaks off when its time is over, and says so.
fn in_time(body: Body, time: Duration, is_late: Arc<AtomicBool>) -> Body {
    let mut end = Box::pin(sleep(time));
    looked_at(body, move |polled, context| {
        let is_over = match polled.is_pending() {
            true => end.as_mut().poll(context).is_ready(),
            // Whoever sends little by little is never waited for long.
            false => Instant::now() >= end.deadline(),
        };
        if !is_over {
            return polled;
        }
        is_late.store(true, Ordering::Relaxed);
        let late = std::io::Error::from(std::io::ErrorKind::TimedOut);
        Poll::Ready(Some(Err(axum::Error::new(late))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Bytes;
    use futures_util::stream;
    use http_body_util::BodyExt as _;

    const TIME: Duration = Duration::from_secs(30);

    /// A byte in each second, so many.
    fn trickle(bytes: u32) -> Body {
        Body::from_stream(stream::unfold(bytes, |left| async move {
            let left = left.checked_sub(1)?;
            sleep(Duration::from_secs(1)).await;
            Some((Ok::<_, std::convert::Infallible>(Bytes::from_static(b"x")), left))
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn the_body_of_a_stream_ends_soon_after_its_call_and_has_a_length() {
        let begun = Instant::now();
        let late = bounded(trickle(10_000), TIME).collect().await.unwrap_err();
        assert_eq!(begun.elapsed(), TIME + STREAM_GRACE);
        assert!(format!("{late:?}").contains("TimedOut"), "{late:?}");
        let whole = bounded(trickle(20), TIME).collect().await.unwrap();
        assert_eq!(whole.to_bytes().len(), 20);
        let long = bounded(Body::from(vec![0; STREAM_BYTES_MAX + 1]), TIME).collect().await;
        assert!(long.unwrap_err().to_string().contains("length limit exceeded"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_cut_when_its_time_is_over() {
        for (bytes, late) in [(20, false), (10_000, true)] {
            let is_late = Arc::new(AtomicBool::new(false));
            let begun = Instant::now();
            let read = in_time(trickle(bytes), TIME, Arc::clone(&is_late)).collect().await;
            assert_eq!((read.is_err(), is_late.load(Ordering::Relaxed)), (late, late));
            assert_eq!(begun.elapsed(), if late { TIME } else { Duration::from_secs(20) });
        }
    }
}
