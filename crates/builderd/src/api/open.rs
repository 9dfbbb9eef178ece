//! What is open: connections, calls, and answers that last as long as their reader likes. Whoever asks
//! and then does not read, or does not send what he began, holds memory and files of ours, and how often
//! he may ask does not bound that.
//!
//! Connections are counted for each address. Logs that are followed, artifacts that are downloaded and
//! calls that are answered at once are counted for each tenant; what anybody may ask for, for each
//! address. An answer is open until its last byte is written, and not only made: what was made and is not
//! taken lies in the connection. What the calls of a tenant carry in and out is [`Carried`]'s. Each node
//! counts for itself.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;

use super::ApiState;
use super::carried::Carried;
use super::error::Answer;
use super::frames::looked_at;
use super::peers::counted_as;
use super::server::Peer;
use super::spelling::{self, Form};
use crate::tenant::TenantId;

/// Most of each at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenMax {
    /// Logs that a tenant follows.
    pub(crate) logs: u32,
    /// Artifacts that a tenant downloads.
    pub(crate) artifacts: u32,
    /// A tenant's other calls.
    pub(crate) calls: u32,
    /// What those carry, in bytes: bodies that have come, and answers that are not written yet.
    pub(crate) carried_bytes: usize,
    /// RPCs that an address calls without a credential.
    pub(crate) strangers: u32,
    /// Pages that an address looks at without a credential.
    pub(crate) looks: u32,
}

/// What a tenant with many machines and a proxy before many clients may need, and the memory of a
/// server bears.
pub(crate) const OPEN_MAX: OpenMax = OpenMax {
    logs: 2000,
    artifacts: 250,
    calls: 1000,
    carried_bytes: 64 << 20,
    strangers: 250,
    looks: 100,
};

/// All kinds.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) logs: Places<TenantId>,
    pub(super) artifacts: Places<TenantId>,
    pub(super) calls: Places<TenantId>,
    pub(super) carried: Carried,
    strangers: Places<IpAddr>,
    looks: Places<IpAddr>,
}

impl Open {
    pub(super) fn up_to(max: OpenMax) -> Self {
        Self {
            logs: Places::new("followed logs of this tenant", max.logs),
            artifacts: Places::new("downloads of this tenant", max.artifacts),
            calls: Places::new("calls of this tenant", max.calls),
            carried: Carried::up_to(max.carried_bytes),
            strangers: Places::new("calls from this address", max.strangers),
            looks: Places::new("looks from this address", max.looks),
        }
    }
}

/// How many connections each address may have. Those of this machine are not counted: they are those of
/// a proxy, which has a bound of its own.
#[derive(Clone, Debug)]
pub(crate) struct Crowd {
    /// No bound if none.
    places: Option<Places<IpAddr>>,
    counts_this_machine: bool,
}

impl Crowd {
    /// So many; any number if that is 0.
    pub(crate) fn up_to(max: u32) -> Self {
        let places = (max > 0).then(|| Places::new("connections from this address", max));
        Self { places, counts_this_machine: false }
    }

    /// Those of this machine as well.
    #[cfg(test)]
    pub(super) fn and_from_here(self) -> Self {
        Self { counts_this_machine: true, ..self }
    }

    /// What a connection from there holds until it ends; an error if it is one too many.
    pub(super) fn enter(&self, from: IpAddr) -> Result<Option<Place<IpAddr>>, Answer> {
        let is_here = from.to_canonical().is_loopback();
        match &self.places {
            Some(places) if self.counts_this_machine || !is_here => {
                places.take(&counted_as(from)).map(Some)
            }
            Some(_) | None => Ok(None),
        }
    }
}

/// The places of one kind.
#[derive(Clone, Debug)]
pub(super) struct Places<K: Eq + Hash> {
    what: &'static str,
    max: u32,
    taken: Arc<Mutex<HashMap<K, u32>>>,
}

/// One place, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place<K: Eq + Hash> {
    places: Places<K>,
    of: K,
}

impl<K: Clone + Eq + Hash> Places<K> {
    fn new(what: &'static str, max: u32) -> Self {
        Self { what, max, taken: Arc::default() }
    }

    /// A place, if there is one left.
    pub(super) fn take(&self, of: &K) -> Result<Place<K>, Answer> {
        let mut taken = self.taken();
        let count = taken.entry(of.clone()).or_default();
        if *count >= self.max {
            return Err(Answer::too_many_open(self.what, self.max));
        }
        *count += 1;
        Ok(Place { places: self.clone(), of: of.clone() })
    }
}

impl<K: Eq + Hash> Places<K> {
    fn taken(&self) -> MutexGuard<'_, HashMap<K, u32>> {
        // Nothing is half done in a map whose holder panicked.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(count) = taken.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.of);
            }
        }
    }
}

/// Lets an address have so many RPCs at once that nobody needs a credential for, each until its answer
/// is read.
pub(super) async fn bound(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    within(&state.open.strangers, &state, request, next).await
}

/// The same for pages, which are long beside the answers of such RPCs.
pub(super) async fn bound_look(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    within(&state.open.looks, &state, request, next).await
}

async fn within(
    places: &Places<IpAddr>,
    state: &ApiState,
    request: Request,
    next: Next,
) -> Response {
    // Those of whom no address is known are one.
    let from =
        request.extensions().get::<Peer>().map_or(IpAddr::from([0u8; 4]), |peer| peer.0.ip());
    match places.take(&counted_as(from)) {
        Ok(place) => next.run(request).await.map(|body| holding(body, place)),
        Err(answer) => {
            let (head, body) = request.into_parts();
            (state.meters.observe)("refused", answer.code().as_str(), Duration::ZERO);
            state.refused.swallow(body).await;
            spelling::refuse(answer, Form::of(&head), &head.headers)
        }
    }
}

/// A body that holds something until its last byte is written, or thrown away: also when the body has
/// ended, and what was made of it waits in a connection that nobody reads.
pub(super) fn holding(body: Body, held: impl Send + Sync + 'static) -> Body {
    let held = Arc::new(held);
    let keep = move |bytes| Bytes::from_owner(Held { bytes, _held: Arc::clone(&held) });
    looked_at(body, move |polled, _| polled.map_ok(|frame| frame.map_data(&keep)))
}

/// Bytes with what is held for as long as they are there.
struct Held<T> {
    bytes: Bytes,
    _held: Arc<T>,
}

impl<T> AsRef<[u8]> for Held<T> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;
    use hyper::body::Body as _;

    #[test]
    fn a_tenant_has_so_many_places_and_each_back_that_it_leaves() {
        let open = Open::up_to(OpenMax { logs: 2, artifacts: 1, ..OPEN_MAX });
        let [one, other] = ["one", "other"].map(|name| name.parse::<TenantId>().unwrap());
        let mut places = vec![open.logs.take(&one).unwrap(), open.logs.take(&one).unwrap()];
        assert!(open.logs.take(&one).is_err());
        places.extend([open.artifacts.take(&one).unwrap(), open.logs.take(&other).unwrap()]);
        assert!(open.artifacts.take(&one).is_err());
        drop(places.remove(0));
        places.push(open.logs.take(&one).unwrap());
        assert!(open.logs.take(&one).is_err());
        drop(places);
        assert!(open.logs.taken().is_empty() && open.artifacts.taken().is_empty());
    }

    #[test]
    fn connections_are_counted_by_address_and_those_of_this_machine_are_not() {
        let crowd = Crowd::up_to(1);
        let enter = |from: &str| crowd.enter(from.parse().unwrap());
        let held = enter("192.0.2.1").unwrap();
        assert!(enter("192.0.2.1").is_err() && enter("::ffff:192.0.2.1").is_err());
        let network = enter("2001:db8::1").unwrap();
        assert!(enter("2001:db8::2").is_err(), "a network is one address");
        assert!(enter("192.0.2.2").is_ok());
        for here in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!([enter(here), enter(here)].iter().all(Result::is_ok), "{here}");
        }
        drop((held, network));
        assert!(enter("192.0.2.1").is_ok() && enter("2001:db8::2").is_ok());
        let unbound = Crowd::up_to(0);
        let all: Vec<_> =
            (0..5000).map(|_| unbound.enter([192, 0, 2, 1].into()).unwrap()).collect();
        assert!(all.iter().all(Option::is_none));
    }

    #[tokio::test]
    async fn an_answer_is_open_until_its_last_byte_is_let_go() {
        let open = Open::up_to(OPEN_MAX);
        let tenant: TenantId = "t".parse().unwrap();
        let mut body = holding(Body::from("an answer"), open.calls.take(&tenant).unwrap());
        assert_eq!(body.size_hint().exact(), Some(9));
        let frame = body.frame().await.unwrap().unwrap();
        assert!(body.frame().await.is_none() && body.is_end_stream());
        drop(body);
        assert_eq!(open.calls.taken().len(), 1, "it was made, and is not written");
        let written = frame.into_data().unwrap().slice(..4);
        assert_eq!(open.calls.taken().len(), 1);
        assert_eq!(written, "an a");
        drop(written);
        assert!(open.calls.taken().is_empty());
    }
}
