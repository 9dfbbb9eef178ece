//! `grpc.health.v1.Health`: serving, unless the service stops or its database is away.

use std::sync::Arc;

use connectrpc::ConnectError;
use connectrpc_health::{Checker, Status, StatusStream};
use futures_util::{StreamExt as _, stream};
use tokio::sync::watch;

use crate::build::service::BuildService;

/// See the module.
pub(super) struct Health {
    service: Arc<BuildService>,
    shutdown: watch::Receiver<bool>,
}

impl Health {
    pub(super) fn new(service: Arc<BuildService>, shutdown: watch::Receiver<bool>) -> Self {
        Self { service, shutdown }
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
        let is_up = !*self.shutdown.borrow() && self.service.ping().await.is_ok();
        Ok(if is_up { Status::Serving } else { Status::NotServing })
    }

    /// Says when the service begins to stop; a database that comes and goes is not told.
    async fn watch(&self, service: &str) -> Result<StatusStream, ConnectError> {
        let now = self.check(service).await?;
        let mut shutdown = self.shutdown.clone();
        let stopping = stream::once(async move {
            // A sender that is gone stops, too.
            let _ = shutdown.wait_for(|is_stopping| *is_stopping).await;
            Status::NotServing
        });
        let states = stream::once(std::future::ready(now)).chain(stopping);
        Ok(StatusStream::new(states))
    }
}
