//! Whether the service can do what it is for: it does not stop, and its database takes writes.
//! For `/health` and for `grpc.health.v1.Health`. It does not know why a database does not.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::ConnectError;
use connectrpc_health::{Checker, Status, StatusStream};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{Mutex, watch};

use super::memory::{Memory, REMEMBERED_SECS};
use crate::build::service::BuildService;
use crate::causes::chain;
use crate::clock::Clock;
use crate::store::StoreError;

/// Longest that a database may take for a write and be well.
const BEAT_MAX: Duration = Duration::from_secs(5);
/// How often whoever watches is looked for.
const WATCH_EVERY: Duration = Duration::from_secs(REMEMBERED_SECS);
/// Why a service that ends takes nothing new.
const STOPPING: &str = "stopping";

/// Well, or what is wrong in one word for programs.
type State = Result<(), &'static str>;

/// Looks when it is asked, at most once a second, however many ask.
pub(super) struct Heart {
    service: Arc<BuildService>,
    clock: Arc<dyn Clock>,
    stopped: watch::Receiver<bool>,
    last: Memory<(), State>,
    /// What the log was told; held by the one who looks, while the others wait for what he sees.
    told: Mutex<State>,
}

impl Heart {
    pub(super) fn new(
        service: Arc<BuildService>,
        clock: Arc<dyn Clock>,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        Self { service, clock, stopped, last: Memory::new(), told: Mutex::new(Ok(())) }
    }

    /// See the module.
    pub(super) async fn state(&self) -> State {
        if *self.stopped.borrow() {
            return Err(STOPPING);
        }
        let known = || self.last.get(&(), self.clock.now());
        if let Some(state) = known() {
            return state;
        }
        let mut told = self.told.lock().await;
        if let Some(state) = known() {
            return state;
        }
        let beat = self.service.beat(BEAT_MAX).await;
        let state = beat.as_ref().copied().map_err(StoreError::class);
        if *told != state {
            match &beat {
                Ok(()) => tracing::info!("the database takes writes again"),
                Err(error) => {
                    let error = chain(error);
                    tracing::error!(%error, "the database takes no writes: /health answers 503");
                }
            }
        }
        *told = state;
        self.last.put((), state, self.clock.now());
        state
    }

    /// The same in gRPC's words.
    async fn status(&self) -> Status {
        if self.state().await.is_ok() { Status::Serving } else { Status::NotServing }
    }
}

/// Somebody who wants to hear of every change.
struct Watcher {
    heart: Arc<Heart>,
    told: Status,
}

impl Watcher {
    /// What is another than was told; none after the end of the service.
    async fn next(mut self) -> Option<(Status, Self)> {
        let mut stopped = self.heart.stopped.clone();
        if *stopped.borrow() && self.told == Status::NotServing {
            return None;
        }
        loop {
            tokio::select! {
                // A sender that is gone stops, too.
                _ = stopped.wait_for(|is_stopping| *is_stopping) => {}
                () = tokio::time::sleep(WATCH_EVERY) => {}
            }
            let now = self.heart.status().await;
            if now != self.told {
                self.told = now;
                return Some((now, self));
            }
            if *stopped.borrow() {
                return None;
            }
        }
    }
}

/// `grpc.health.v1.Health`.
pub(super) struct Health {
    heart: Arc<Heart>,
}

impl Health {
    pub(super) fn new(heart: Arc<Heart>) -> Self {
        Self { heart }
    }
}

/// The whole server, and its one service.
fn is_ours(service: &str) -> bool {
    service.is_empty() || service == api::SERVICE
}

fn unknown(service: &str) -> ConnectError {
    ConnectError::not_found(format!("there is no service {service:?} here"))
}

impl Checker for Health {
    async fn check(&self, service: &str) -> Result<Status, ConnectError> {
        if !is_ours(service) {
            return Err(unknown(service));
        }
        Ok(self.heart.status().await)
    }

    /// Says when the database goes and when it is back, until the service stops.
    async fn watch(&self, service: &str) -> Result<StatusStream, ConnectError> {
        let now = self.check(service).await?;
        let watcher = Watcher { heart: Arc::clone(&self.heart), told: now };
        let changes = stream::unfold(watcher, Watcher::next);
        Ok(StatusStream::new(stream::once(std::future::ready(now)).chain(changes)))
    }
}
