//! Answers that last as long as their reader likes: how many of them may be open at once. Whoever
//! asks and then does not read, or does not send what he began, holds memory and files of ours, and
//! how often he may ask does not bound that.
//!
//! Logs that are followed and artifacts that are downloaded are counted for each tenant; health and
//! reflection, which anybody may ask for, for each address. Each node counts for itself.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt as _;

use super::ApiState;
use super::error::Answer;
use super::peers::counted_as;
use super::server::Peer;
use super::spelling::{self, Form};
use crate::tenant::TenantId;

/// Most of each at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeldMax {
    /// Logs that a tenant follows.
    pub(crate) logs: u32,
    /// Artifacts that a tenant downloads.
    pub(crate) artifacts: u32,
    /// What an address asks for without a credential.
    pub(crate) open: u32,
}

/// What a tenant with many machines and a proxy before many clients may need, and the memory of a
/// server bears.
pub(crate) const HELD_MAX: HeldMax = HeldMax { logs: 2000, artifacts: 250, open: 250 };

/// All kinds.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) logs: Places<TenantId>,
    pub(super) artifacts: Places<TenantId>,
    open: Places<IpAddr>,
}

impl Held {
    pub(super) fn up_to(max: HeldMax) -> Self {
        Self {
            logs: Places::new("followed logs of this tenant", max.logs),
            artifacts: Places::new("downloads of this tenant", max.artifacts),
            open: Places::new("calls from this address", max.open),
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

/// Lets an address have so many calls at once that nobody needs a credential for, each until its
/// answer is read.
pub(super) async fn bound(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    // Those of whom no address is known are one.
    let from =
        request.extensions().get::<Peer>().map_or(IpAddr::from([0u8; 4]), |peer| peer.0.ip());
    match state.held.open.take(&counted_as(from)) {
        Ok(place) => next.run(request).await.map(|body| {
            Body::new(body.map_err(move |error| {
                let _held = &place;
                error
            }))
        }),
        Err(answer) => {
            let (head, body) = request.into_parts();
            (state.meters.observe)("refused", answer.code().as_str(), Duration::ZERO);
            state.refused.swallow(body).await;
            spelling::refuse(answer, Form::of(&head), &head.headers)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_so_many_places_and_each_back_that_it_leaves() {
        let held = Held::up_to(HeldMax { logs: 2, artifacts: 1, open: 1 });
        let [one, other] = ["one", "other"].map(|name| name.parse::<TenantId>().unwrap());
        let mut places = vec![held.logs.take(&one).unwrap(), held.logs.take(&one).unwrap()];
        assert!(held.logs.take(&one).is_err());
        places.extend([held.artifacts.take(&one).unwrap(), held.logs.take(&other).unwrap()]);
        assert!(held.artifacts.take(&one).is_err());
        drop(places.remove(0));
        places.push(held.logs.take(&one).unwrap());
        assert!(held.logs.take(&one).is_err());
        drop(places);
        assert!(held.logs.taken().is_empty() && held.artifacts.taken().is_empty());
    }
}
