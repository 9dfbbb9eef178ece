//! Connections on behalf of others: a host and a port that a stranger names are judged as a URL of
//! them would be, and what is connected to are the judged addresses. It speaks no protocol.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use reqwest::Url;
use tokio::net::TcpStream;

use super::{EgressDenied, EgressPolicy, canonical, literal};

/// How long one address of a name may take to answer.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a name may take to be looked up.
const LOOKUP_MAX: Duration = Duration::from_secs(10);
/// Bytes of a host: those of a name in DNS (RFC 1035, 2.3.4), and the dot of the root.
const HOST_BYTES_MAX: usize = 254;
/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 4;

/// A host and a port. Whatever spelling an address had, it is that address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    url: Url,
    host: String,
    port: u16,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The policy forbids it.
    #[error(transparent)]
    Denied(#[from] EgressDenied),
    /// The name is not known, or nobody answers.
    #[error("it cannot be reached")]
    Failed(#[source] io::Error),
}

impl Target {
    /// Of a host as it stands in a URL (an address of IPv6 in brackets), and a port. None for what
    /// is no host.
    #[must_use]
    pub fn new(host: &str, port: u16) -> Option<Target> {
        // Names of other scripts come as ASCII to whoever connects; what else a URL's parser
        // would understand, others would not. More is a name here than in a reference: hosts with
        // an underscore are there, if not as registries.
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
        let is_short = (1..=HOST_BYTES_MAX).contains(&host.len());
        if port == 0 || !is_short || !host.bytes().all(is_plain) {
            return None;
        }
        let url = Url::parse(&format!("http://{host}:{port}/")).ok()?;
        let canonical = canonical(url.host_str()?);
        let is_whole = url.port_or_known_default() == Some(port) && !canonical.is_empty();
        is_whole.then_some(Target { url, host: canonical, port })
    }

    /// The host: a name in lower case, or an address as it is usually written.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the host is an address.
    #[must_use]
    pub fn is_address(&self) -> bool {
        literal(&self.host).is_some()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl EgressPolicy {
    /// Connects to a target, if the policy allows it and every address that its name leads to.
    ///
    /// # Errors
    /// [`DialError`]. What is refused was not connected to.
    pub async fn connect(&self, target: &Target) -> Result<TcpStream, DialError> {
        self.check(&target.url)?;
        let addresses = match literal(&target.host) {
            Some(address) => vec![address],
            None => tokio::time::timeout(LOOKUP_MAX, self.addresses(target))
                .await
                .map_err(|_| DialError::Failed(io::ErrorKind::TimedOut.into()))??,
        };
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses.into_iter().take(ADDRESSES_MAX) {
            let place = SocketAddr::new(address, target.port);
            match tokio::time::timeout(CONNECT_MAX, TcpStream::connect(place)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(DialError::Failed(last))
    }

    async fn addresses(&self, target: &Target) -> Result<Vec<IpAddr>, DialError> {
        let found = match &self.0 {
            Some(closed) => closed.addresses(&target.host, target.port).await,
            None => tokio::net::lookup_host((target.host.as_str(), target.port))
                .await
                .map(|found| Ok(found.map(|address| address.ip()).collect())),
        };
        Ok(found.map_err(DialError::Failed)??)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AllowedPlace, Lookup};
    use super::*;

    fn closed(allowed: &[&str]) -> EgressPolicy {
        let allowed = allowed.iter().map(|text| text.parse::<AllowedPlace>().unwrap()).collect();
        EgressPolicy::closed(allowed, vec!["evil.example".to_owned()])
    }

    /// A policy whose names lead to one address after the other, round and round.
    fn leading_to(policy: EgressPolicy, answers: &[&[&str]]) -> EgressPolicy {
        let answers: Vec<Vec<IpAddr>> = answers
            .iter()
            .map(|answer| answer.iter().map(|text| text.parse().unwrap()).collect())
            .collect();
        let asked = std::sync::atomic::AtomicUsize::new(0);
        policy.with_lookup(Lookup::new(move |_| {
            let turn = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let answer = answers[turn % answers.len()].clone();
            async move { Ok(answer) }
        }))
    }

    #[test]
    fn what_is_no_host_and_port_is_no_target() {
        for bad in [
            "",
            "a b",
            "a/b",
            "a@b",
            "me:pw@b",
            "a?b",
            "a#b",
            "a\\b",
            "a%00b",
            "a\r\nb",
            "::1",
            "a:80",
            "[::1",
            "b\u{fc}cher.example",
            "[fe80::1%25eth0]",
            "..",
            "[::1]x",
        ] {
            assert_eq!(Target::new(bad, 80), None, "{bad:?}");
        }
        assert_eq!(Target::new("a.example", 0), None);
        let long = |labels: usize| "a.".repeat(labels);
        assert!(Target::new(&long(127), 80).is_some());
        assert_eq!(Target::new(&long(128), 80), None, "no name is that long");
        for (written, shown) in [
            ("Deb.Example.", "deb.example:80"),
            ("0x7f.1", "127.0.0.1:80"),
            ("2852039166", "169.254.169.254:80"),
            ("[::FFFF:169.254.169.254]", "[::ffff:a9fe:a9fe]:80"),
        ] {
            assert_eq!(Target::new(written, 80).unwrap().to_string(), shown);
        }
    }

    #[tokio::test]
    async fn a_connection_is_made_to_judged_addresses_and_to_no_others() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let place = |host: &str| format!("{host}:{port}");
        let target = |host: &str| Target::new(host, port).unwrap();
        let denied = |reached: Result<TcpStream, DialError>| match reached {
            Err(DialError::Denied(_)) => true,
            Ok(_) | Err(DialError::Failed(_)) => false,
        };
        for host in ["127.0.0.1", "0x7f.1", "[::ffff:127.0.0.1]", "localhost", "169.254.169.254"] {
            assert!(denied(closed(&[]).connect(&target(host)).await), "{host}");
        }
        assert!(closed(&[&place("127.0.0.1")]).connect(&target("127.1")).await.is_ok());
        let good = leading_to(closed(&[&place("good.example")]), &[&["127.0.0.1"]]);
        assert!(good.connect(&target("Good.example")).await.is_ok());
        assert!(denied(good.connect(&target("other.example")).await));
        let evil = leading_to(closed(&["evil.example"]), &[&["127.0.0.1"]]);
        assert!(denied(evil.connect(&target("a.evil.example")).await), "blocked");
        let mixed = leading_to(closed(&[]), &[&["1.1.1.1", "127.0.0.1"]]);
        assert!(denied(mixed.connect(&target("mixed.example")).await), "one address is bad");
        // Looked up once: what was judged is what is connected to, and nobody is asked again.
        let turning = leading_to(closed(&[&place("127.0.0.1")]), &[&["127.0.0.1"], &["10.0.0.1"]]);
        assert!(turning.connect(&target("turning.example")).await.is_ok());
        assert!(denied(turning.connect(&target("turning.example")).await));
    }
}
