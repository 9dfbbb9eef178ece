//! A body whose frames somebody looks at on their way, and may change, hold back or break off. It does
//! not know what is looked for.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// A frame, or why there is none.
pub(super) type Looked = Result<Frame<Bytes>, axum::Error>;

/// What a body gives when it is asked for a frame.
pub(super) type Polled = Poll<Option<Looked>>;

/// The body as `look` passes it on, and as long as it was.
pub(super) fn looked_at(
    body: Body,
    look: impl FnMut(Polled, &mut Context<'_>) -> Polled + Send + Unpin + 'static,
) -> Body {
    Body::new(LookedAt { body, look })
}

struct LookedAt<F> {
    body: Body,
    look: F,
}

impl<F: FnMut(Polled, &mut Context<'_>) -> Polled + Unpin> HttpBody for LookedAt<F> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Polled {
        let this = &mut *self;
        let polled = Pin::new(&mut this.body).poll_frame(context);
        (this.look)(polled, context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
