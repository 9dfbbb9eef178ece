//! What a tenant's calls carry: bodies as they come in, and answers that are made and not written yet.
//! Whoever sends many large bodies at once, or asks for large answers and does not read them, holds
//! that much memory of ours, so all of a tenant's calls together carry so much and no more.
//!
//! Streams and downloads hold a bounded piece each and are counted elsewhere (`open.rs`).

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::response::Response;
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, SizeHint};

use super::ApiState;
use super::auth::Caller;
use super::error::Answer;
use super::frames::{Looked, Polled, looked_at};
use super::open::{Place, holding};
use super::spelling::Reader;
use crate::tenant::TenantId;

/// Routes whose answers are counted elsewhere.
const LONG: [&str; 2] = ["StreamBuildLogs", "GetBuildArtifact"];
/// An answer of this size or less is given however much there is to be read: how many there are is
/// bounded, and nobody who changes something should be left without a word of it.
const SMALL_BYTES: usize = 64 << 10;

/// Lets a tenant have so many calls at once, which carry so much together.
pub(super) async fn bound(
    state: &ApiState,
    reader: &Reader,
    request: Request,
    next: impl AsyncFnOnce(Request) -> Response,
) -> Response {
    let caller = request.extensions().get::<Caller>();
    // In development mode, on one's own machine, the tenant may stand in the body alone.
    let Some(tenant) = caller.and_then(|caller| caller.named().0.cloned()) else {
        return next(request).await;
    };
    let observe = |answer: &Answer| {
        (state.meters.observe)("refused", answer.code().as_str(), Duration::ZERO);
    };
    let (mut head, body) = request.into_parts();
    let is_long = LONG.iter().any(|route| head.uri.path().split('/').nth(2) == Some(route));
    let place = match is_long {
        true => None,
        false => match state.open.calls.take(&tenant) {
            Ok(place) => Some(place),
            Err(answer) => {
                state.refused.swallow(body).await;
                observe(&answer);
                return reader.refuse(answer);
            }
        },
    };
    let (body, brought) = state.open.carried.bring(&tenant, body);
    if !body.is_end_stream() {
        // Whoever unpacks it says what it came to.
        head.extensions.insert(brought.clone());
    }
    let response = next(Request::from_parts(head, body)).await;
    if let Some(answer) = brought.refusal() {
        observe(&answer);
        return reader.refuse_and_close(answer);
    }
    drop(brought);
    let Some(place) = place else { return response };
    let taken = state.open.carried.take(&tenant, place, response).await;
    taken.unwrap_or_else(|answer| {
        observe(&answer);
        reader.refuse(answer)
    })
}

/// What all calls carry, by tenant.
#[derive(Clone, Debug)]
pub(super) struct Carried {
    bytes_max: usize,
    bytes: Arc<Mutex<HashMap<TenantId, usize>>>,
}

/// What one part of a call carries, nobody's any more when it is dropped.
#[derive(Debug)]
struct Load {
    carried: Carried,
    tenant: TenantId,
    bytes: AtomicUsize,
}

impl Carried {
    pub(super) fn up_to(bytes_max: usize) -> Self {
        Self { bytes_max, bytes: Arc::default() }
    }

    fn too_much(&self) -> Answer {
        Answer::too_much_carried(self.bytes_max)
    }

    fn load(&self, tenant: &TenantId) -> Load {
        Load { carried: self.clone(), tenant: tenant.clone(), bytes: AtomicUsize::new(0) }
    }

    /// Changes what a tenant's calls carry, if `fits` says so of what they carry as yet.
    fn change(&self, tenant: &TenantId, fits: impl Fn(usize) -> bool, change: Change) -> bool {
        // Nothing is half done in a map whose holder panicked.
        let mut all = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.get(tenant).copied().unwrap_or_default();
        if !fits(before) {
            return false;
        }
        match change {
            Change::More(bytes) => all.insert(tenant.clone(), before.saturating_add(bytes)),
            Change::Less(bytes) if bytes >= before => all.remove(tenant),
            Change::Less(bytes) => all.insert(tenant.clone(), before - bytes),
        };
        true
    }
}

enum Change {
    More(usize),
    Less(usize),
}

impl Load {
    /// Carries so much more, if it fits. Nothing always does, and is not written down: nobody would
    /// cross it out.
    fn add(&self, bytes: usize, fits: impl Fn(usize) -> bool) -> bool {
        if bytes == 0 {
            return true;
        }
        let has_room = self.carried.change(&self.tenant, fits, Change::More(bytes));
        if has_room {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        has_room
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut();
        if bytes > 0 {
            self.carried.change(&self.tenant, |_| true, Change::Less(bytes));
        }
    }
}

/// What the body of a request has brought, until the request is answered.
#[derive(Clone, Debug)]
pub(super) struct Brought {
    load: Arc<Load>,
    is_too_much: Arc<AtomicBool>,
}

impl Brought {
    /// The refusal, if the body brought more than there was room for.
    pub(super) fn refusal(&self) -> Option<Answer> {
        let is_too_much = self.is_too_much.load(Ordering::Relaxed);
        is_too_much.then(|| self.load.carried.too_much())
    }

    /// The message in it has so many bytes, which may be more than came: a little of gzip is a lot of
    /// anything. The refusal, if there is no room for that.
    pub(super) fn unpacked(&self, bytes: usize) -> Option<Answer> {
        let Load { carried, bytes: came, .. } = &*self.load;
        let more = bytes.saturating_sub(came.load(Ordering::Relaxed));
        let fits = |before: usize| before.saturating_add(more) <= carried.bytes_max;
        (!self.load.add(more, fits)).then(|| carried.too_much())
    }
}

impl Carried {
    /// The body of a tenant's request, counted as it comes. It breaks off where there is no room for
    /// it beside what the tenant's other calls carry; what came counts until `Brought` is dropped.
    pub(super) fn bring(&self, tenant: &TenantId, body: Body) -> (Body, Brought) {
        let brought = Brought { load: Arc::new(self.load(tenant)), is_too_much: Arc::default() };
        if body.is_end_stream() {
            return (body, brought);
        }
        let (load, is_too_much) = (Arc::clone(&brought.load), Arc::clone(&brought.is_too_much));
        let bytes_max = self.bytes_max;
        let body = looked_at(body, move |polled, _| {
            let Poll::Ready(Some(Ok(frame))) = &polled else { return polled };
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            if load.add(bytes, |before| before.saturating_add(bytes) <= bytes_max) {
                return polled;
            }
            is_too_much.store(true, Ordering::Relaxed);
            let full = std::io::Error::from(std::io::ErrorKind::QuotaExceeded);
            Poll::Ready(Some(Err(axum::Error::new(full))))
        });
        (body, brought)
    }

    /// The answer to a tenant's call, all of which is there, counted until it is written; the call
    /// keeps its `place` as long. An error if there is no room for it beside those that wait.
    pub(super) async fn take(
        &self,
        tenant: &TenantId,
        place: Place<TenantId>,
        answer: Response,
    ) -> Result<Response, Answer> {
        let (head, mut body) = answer.into_parts();
        // What cannot be made ends the answer where it is written.
        let first = body.frame().await;
        let load = self.load(tenant);
        let bytes = bytes_of(first.as_ref());
        let fits = |before: usize| {
            bytes <= SMALL_BYTES || before == 0 || before.saturating_add(bytes) <= self.bytes_max
        };
        match load.add(bytes, fits) {
            true => {
                let body = Body::new(Resumed { first, rest: body });
                Ok(Response::from_parts(head, holding(body, (load, place))))
            }
            false => Err(self.too_much()),
        }
    }
}

fn bytes_of(frame: Option<&Looked>) -> usize {
    frame.and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len)
}

/// A body whose first frame was looked at.
struct Resumed {
    first: Option<Looked>,
    rest: Body,
}

impl HttpBody for Resumed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Polled {
        match self.first.take() {
            Some(looked) => Poll::Ready(Some(looked)),
            None => Pin::new(&mut self.rest).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let first = u64::try_from(bytes_of(self.first.as_ref())).unwrap_or(u64::MAX);
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(first));
        }
        hint.set_lower(rest.lower().saturating_add(first));
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::open::{OPEN_MAX, Open, OpenMax};

    fn carrying(bytes: usize) -> Open {
        Open::up_to(OpenMax { carried_bytes: bytes, ..OPEN_MAX })
    }

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    async fn answer(open: &Open, tenant: &TenantId, bytes: usize) -> Result<Response, Answer> {
        let place = open.calls.take(tenant).unwrap();
        open.carried.take(tenant, place, Response::new(Body::from(vec![0; bytes]))).await
    }

    #[tokio::test]
    async fn answers_that_nobody_reads_fill_the_room_of_their_tenant_alone() {
        let (open, t) = (carrying(1 << 20), tenant("t"));
        let big = SMALL_BYTES + 1;
        let mut unread = Vec::new();
        for _ in 0..(1 << 20) / big {
            unread.push(answer(&open, &t, big).await.unwrap());
        }
        let refused = answer(&open, &t, big).await.unwrap_err();
        assert_eq!(refused.code().as_str(), "resource_exhausted");
        assert!(answer(&open, &tenant("other"), big).await.is_ok());
        assert!(answer(&open, &t, SMALL_BYTES).await.is_ok(), "a short word is always said");
        // Taken out of the body, and not yet written.
        let mut body = unread.pop().unwrap().into_body();
        assert_eq!(body.size_hint().exact(), Some(big as u64));
        let frame = body.frame().await.unwrap().unwrap();
        drop(body);
        assert!(answer(&open, &t, big).await.is_err());
        drop(frame);
        assert!(answer(&open, &t, big).await.is_ok());
        drop(unread);
        assert!(open.carried.bytes.lock().unwrap().is_empty());
        drop(answer(&open, &t, 0).await.unwrap());
        assert!(open.carried.bytes.lock().unwrap().is_empty(), "nothing is nothing");
        // One is given however large it is.
        assert!(answer(&open, &t, 2 << 20).await.is_ok());
    }

    #[tokio::test]
    async fn an_answer_that_cannot_be_made_is_not_an_empty_one() {
        let (open, t) = (carrying(1 << 20), tenant("t"));
        let broken = futures_util::stream::once(async { Err::<Bytes, _>("no more") });
        let place = open.calls.take(&t).unwrap();
        let answer = Response::new(Body::from_stream(broken));
        let answer = open.carried.take(&t, place, answer).await.unwrap();
        assert!(answer.into_body().collect().await.is_err());
    }

    #[tokio::test]
    async fn bodies_that_come_at_once_fill_the_room_of_their_tenant_alone() {
        let (open, t) = (carrying(1 << 20), tenant("t"));
        let body = || Body::from(vec![0; 400 << 10]);
        let mut answered = Vec::new();
        for _ in 0..2 {
            let (body, brought) = open.carried.bring(&t, body());
            assert_eq!(body.collect().await.unwrap().to_bytes().len(), 400 << 10);
            assert!(brought.refusal().is_none());
            answered.push(brought);
        }
        let (third, brought) = open.carried.bring(&t, body());
        assert!(third.collect().await.is_err());
        assert_eq!(brought.refusal().unwrap().code().as_str(), "resource_exhausted");
        let (others, brought) = open.carried.bring(&tenant("other"), body());
        assert!(others.collect().await.is_ok() && brought.refusal().is_none());
        drop((answered, brought));
        let (again, brought) = open.carried.bring(&t, body());
        assert!(again.collect().await.is_ok() && brought.refusal().is_none());
        drop(brought);
        assert!(open.carried.bytes.lock().unwrap().is_empty());
    }
}
