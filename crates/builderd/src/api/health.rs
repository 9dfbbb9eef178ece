//! Whether the service can do what it is for: it does not stop, and its database takes writes.
//! For `/health` and for `grpc.health.v1.Health`. It does not know why a database does not.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::ConnectError;
use connectrpc_health::{Checker, Status, StatusStream};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{Mutex, watch};

use super::error;
use super::memory::Memory;
use crate::build::service::BuildService;
use crate::clock::Clock;
use crate::store::StoreError;

/// Longest that a database may take for a write and be well.
const BEAT_MAX: Duration = Duration::from_secs(5);
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
        let beat = tokio::time::timeout(BEAT_MAX, self.service.beat()).await;
        let beat = beat.unwrap_or_else(|_| Err(StoreError::timed_out()));
        let state = beat.as_ref().copied().map_err(StoreError::class);
        if *told != state {
            match &beat {
                Ok(()) => tracing::info!("the database takes writes again"),
                Err(error) => {
                    let error = error::chain(error);
                    tracing::error!(%error, "the database takes no writes: /health answers 503");
                }
            }
        }
        *told = state;
        self.last.put((), state, self.clock.now());
        state
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
        let is_well = self.heart.state().await.is_ok();
        Ok(if is_well { Status::Serving } else { Status::NotServing })
    }

    /// Says when the service begins to stop; a database that comes and goes is not told.
    async fn watch(&self, service: &str) -> Result<StatusStream, ConnectError> {
        let now = self.check(service).await?;
        let mut stopped = self.heart.stopped.clone();
        let stopping = stream::once(async move {
            // A sender that is gone stops, too.
            let _ = stopped.wait_for(|is_stopping| *is_stopping).await;
            Status::NotServing
        });
        let states = stream::once(std::future::ready(now)).chain(stopping);
        Ok(StatusStream::new(states))
    }
}
