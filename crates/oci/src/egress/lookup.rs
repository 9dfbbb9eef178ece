//! Names to addresses, under a closed policy: all of a name's addresses are good, or none is.
//!
//! The HTTP library connects to what [`Guard`] hands on and looks nothing up itself; addresses
//! that are written out never come here, so a URL is judged first (`EgressPolicy::check`).

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::{Closed, EgressDenied, EgressPolicy, canonical};

type Found = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// A way to look names up. The default asks the system.
#[derive(Clone)]
pub struct Lookup(Arc<dyn Fn(String) -> Found + Send + Sync>);

impl Lookup {
    /// Looks names up by calling `find`.
    pub fn new<F, P>(find: F) -> Lookup
    where
        F: Fn(String) -> P + Send + Sync + 'static,
        P: Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static,
    {
        Lookup(Arc::new(move |name| Box::pin(find(name))))
    }
}

impl Default for Lookup {
    fn default() -> Lookup {
        Lookup::new(|name| async move {
            let found = tokio::net::lookup_host((name, 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lookup")
    }
}

impl Closed {
    /// What a name leads to now: all of its addresses are good for this port, or none is.
    pub(super) async fn addresses(
        &self,
        name: &str,
        port: u16,
    ) -> io::Result<Result<Vec<IpAddr>, EgressDenied>> {
        let found = (self.lookup.0)(name.to_owned()).await?;
        let judged = found.iter().try_for_each(|address| self.judge(*address, port, Some(name)));
        Ok(judged.map(|()| found))
    }
}

/// Looks names up for connections to one port: the library does not tell which it is for.
#[derive(Debug)]
pub(crate) struct Guard {
    closed: Arc<Closed>,
    port: u16,
}

impl Guard {
    /// None where the policy is open.
    pub(crate) fn new(policy: &EgressPolicy, port: u16) -> Option<Guard> {
        policy.0.as_ref().map(|closed| Guard { closed: Arc::clone(closed), port })
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let (closed, port) = (Arc::clone(&self.closed), self.port);
        let name = canonical(name.as_str());
        Box::pin(async move {
            let found = closed.addresses(&name, port).await??;
            // 0: the port that was asked for.
            let judged = found.into_iter().map(|address| SocketAddr::new(address, 0));
            Ok(Box::new(judged) as Addrs)
        })
    }
}
