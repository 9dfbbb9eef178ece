//! Where a client may go at all, whoever names the place: registries, redirects, token servers.
//!
//! An [`EgressPolicy`] is open (the user is the operator) or closed (the user is a stranger, and
//! so is every registry). A closed one judges the host of each URL before it is asked, and what a
//! name leads to where the connection is made: the very addresses that were judged are the ones
//! connected to, so a name that changes its mind between the two gains nothing. It does not know
//! which registries a tenant may use, and makes no requests.

mod address;
mod dial;
mod lookup;
mod name;
mod own;
mod place;

use std::net::IpAddr;
use std::sync::Arc;

use reqwest::Url;

use address::Reach;
pub use dial::{DialError, Target};
pub(crate) use lookup::Guard;
pub use lookup::Lookup;
pub use name::{AllowedName, NameError};
pub use place::{AllowedPlace, PlaceError};

/// Where a client may go. The default is anywhere.
#[derive(Debug, Clone, Default)]
pub struct EgressPolicy(Option<Arc<Closed>>);

#[derive(Debug, Clone)]
struct Closed {
    allowed: Vec<AllowedPlace>,
    blocked: Vec<String>,
    lookup: Lookup,
    /// Whether an address is this machine's own.
    is_own: fn(IpAddr) -> bool,
}

const OWN: Reach = Reach::Private("an address of this machine");

/// Why a place may not be gone to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressDenied {
    /// Nobody can allow it.
    #[error("{} {class}, where nothing is ever fetched from", subject(*by_name))]
    Never {
        /// What address it is.
        class: &'static str,
        /// Whether a name leads there.
        by_name: bool,
    },
    /// Whoever runs this program could allow it.
    #[error("{} {class}, and nothing allows fetching from there", subject(*by_name))]
    Private {
        /// What address it is.
        class: &'static str,
        /// Whether a name leads there.
        by_name: bool,
    },
    /// It is at or below a domain that is blocked.
    #[error("it belongs to the blocked domain {0}")]
    Blocked(String),
    /// A user name or a password stands in the URL.
    #[error("its URL holds a user name or a password")]
    UserInfo,
    /// No TLS, and the host is not named for that.
    #[error("it would be spoken to without TLS, and it is not named for that")]
    PlainHttp,
}

fn subject(by_name: bool) -> &'static str {
    if by_name { "its name leads to" } else { "it is" }
}

impl EgressDenied {
    /// Whether whoever runs this program could allow it.
    #[must_use]
    pub fn can_be_allowed(&self) -> bool {
        matches!(self, EgressDenied::Private { .. })
    }
}

impl EgressPolicy {
    /// Only to public addresses, and to `allowed`; to nothing at or below the domains `blocked`.
    #[must_use]
    pub fn closed(allowed: Vec<AllowedPlace>, blocked: Vec<String>) -> EgressPolicy {
        let blocked = blocked.iter().map(|domain| canonical(domain)).collect();
        let (lookup, is_own) = (Lookup::default(), own::is_own);
        EgressPolicy(Some(Arc::new(Closed { allowed, blocked, lookup, is_own })))
    }

    /// The same with another way to look names up; nothing changes for an open one.
    #[must_use]
    pub fn with_lookup(self, lookup: Lookup) -> EgressPolicy {
        let with = |closed: Arc<Closed>| Arc::new(Closed { lookup, ..Closed::clone(&closed) });
        EgressPolicy(self.0.map(with))
    }

    /// Whether it lets everything pass.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.is_none()
    }

    /// What can be said of a URL before its name is looked up. Each hop of a redirect is a URL
    /// of its own.
    pub(crate) fn check(&self, url: &Url) -> Result<(), EgressDenied> {
        let Some(closed) = &self.0 else { return Ok(()) };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(EgressDenied::UserInfo);
        }
        let host = canonical(url.host_str().unwrap_or_default());
        let port = url.port_or_known_default().unwrap_or_default();
        let below = |domain: &&String| {
            let rest = host.strip_suffix(domain.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        if let Some(domain) = closed.blocked.iter().find(below) {
            return Err(EgressDenied::Blocked(domain.clone()));
        }
        match literal(&host) {
            Some(address) => closed.judge(address, port, None),
            // RFC 6761, 6.3: nobody is asked what it means.
            None if host == "localhost" || host.ends_with(".localhost") => {
                closed.judge(std::net::Ipv4Addr::LOCALHOST.into(), port, Some(&host))
            }
            None => Ok(()),
        }
    }
}

impl Closed {
    /// What an address is worth that stands for itself, or that a name led to.
    fn judge(&self, address: IpAddr, port: u16, name: Option<&str>) -> Result<(), EgressDenied> {
        let by_name = name.is_some();
        let address = address.to_canonical();
        let reach = Reach::of(address);
        let is_own = reach == Reach::Public && (self.is_own)(address);
        match if is_own { OWN } else { reach } {
            Reach::Public => Ok(()),
            Reach::Never(class) => Err(EgressDenied::Never { class, by_name }),
            Reach::Private(class) => {
                match self.allowed.iter().any(|place| place.holds(address, port, name)) {
                    true => Ok(()),
                    false => Err(EgressDenied::Private { class, by_name }),
                }
            }
        }
    }
}

/// A port as operators write it: digits alone, and not 0.
fn port(digits: &str) -> Option<u16> {
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|port| is_number && *port != 0)
}

/// A host as it is compared.
fn canonical(host: &str) -> String {
    host.trim_end_matches('.').to_ascii_lowercase()
}

/// The address that a URL's host is. The URL's parser has understood all spellings of IPv4.
fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    bare.unwrap_or(host).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(allowed: &[&str]) -> EgressPolicy {
        let allowed = allowed.iter().map(|text| text.parse().unwrap()).collect();
        EgressPolicy::closed(allowed, vec!["Evil.example".to_owned()])
    }

    fn denied(policy: &EgressPolicy, url: &str) -> Option<EgressDenied> {
        // What is no URL is refused before anybody asks.
        policy.check(&Url::parse(url).ok()?).err()
    }

    #[test]
    fn every_spelling_of_an_address_is_that_address() {
        let policy = closed(&[]);
        for host in [
            "127.0.0.1",
            "127.0.0.1.",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "017700000001",
            "127.1",
            "127.0.1",
            "0x7f.0x0.0x0.0x1",
            "%31%32%37.0.0.1",
            "①②⑦.0.0.1",
            "127。0。0。1",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[2001:0:101:101::80ff:fffe]",
            "localhost",
            "LOCALHOST.",
            "a.localhost",
            "10.1",
            "192.168.257",
            "100.64.0.1",
            "[fd12:3456::1]",
        ] {
            for url in [format!("https://{host}/v2/"), format!("http://{host}:5000/v2/")] {
                let found = denied(&policy, &url);
                assert!(matches!(found, Some(EgressDenied::Private { .. })), "{url}: {found:?}");
            }
        }
        for host in [
            "169.254.169.254",
            "0xa9fea9fe",
            "2852039166",
            "0251.0376.0251.0376",
            "169.254.43518",
            "[::ffff:a9fe:a9fe]",
            "[64:ff9b::169.254.169.254]",
            "[fd00:ec2::254]",
            "[fe80::1]",
            "0",
            "0.0.0.0",
            "[::]",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            let found = denied(&policy, &format!("https://{host}/"));
            assert!(matches!(found, Some(EgressDenied::Never { .. })), "{host}: {found:?}");
        }
        assert_eq!(Url::parse("https://[fe80::1%25eth0]/").ok(), None, "zones are no URL");
        for public in ["https://1.1.1.1/", "https://ghcr.io/", "https://[2606:4700::1111]/"] {
            assert_eq!(denied(&policy, public), None, "{public}");
        }
    }

    #[test]
    fn what_the_operator_names_is_allowed_by_host_port_and_network() {
        let list = ["10.1.0.0/16", "192.168.0.7:5000", "fd00::/8", "localhost:5000", "0.0.0.0/0"];
        for (allowed, url, expected) in [
            (&list[..1], "https://10.1.2.3:9/", true),
            (&list[..1], "https://[::ffff:10.1.2.3]/", true),
            (&list[..1], "https://10.2.0.1/", false),
            (&list[1..2], "https://192.168.0.7:5000/", true),
            (&list[1..2], "https://192.168.0.7/", false),
            (&list[2..3], "https://[fd00::1]/", true),
            (&list[2..3], "https://[fd00:ec2::254]/", false),
            (&list[3..4], "https://localhost:5000/", true),
            (&list[3..4], "https://localhost/", false),
            (&list[3..4], "https://127.0.0.1:5000/", false),
            (&list[4..], "https://127.0.0.1/", true),
            (&list[4..], "https://169.254.169.254/", false),
            (&list[4..], "https://100.100.100.200/", false),
            (&list[4..], "https://0.0.0.0/", false),
        ] {
            let found = denied(&closed(allowed), url);
            assert_eq!(found.is_none(), expected, "{allowed:?} {url}: {found:?}");
        }
    }

    #[test]
    fn an_address_of_this_machine_is_private_however_public_it_looks() {
        let own = |allowed: &[&str]| {
            let closed = Closed::clone(closed(allowed).0.as_deref().unwrap());
            let lookup = Lookup::new(|_| async { Ok(vec!["1.1.1.1".parse().unwrap()]) });
            EgressPolicy(Some(Arc::new(Closed {
                is_own: |address| address.to_string() == "1.1.1.1",
                lookup,
                ..closed
            })))
        };
        for url in ["https://1.1.1.1/", "https://[::ffff:1.1.1.1]/", "https://[64:ff9b::101:101]/"]
        {
            let found = denied(&own(&[]), url);
            let expected = !url.contains("64:ff9b");
            assert_eq!(matches!(found, Some(EgressDenied::Private { .. })), expected, "{url}");
            assert_eq!(denied(&own(&["1.1.1.1"]), url), None, "{url}");
        }
        assert_eq!(denied(&own(&[]), "https://1.1.1.2/"), None);
        let target = Target::new("named.example", 443).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let reached = runtime.block_on(own(&[]).connect(&target));
        assert!(matches!(
            reached,
            Err(DialError::Denied(EgressDenied::Private { by_name: true, .. }))
        ));
        let real = closed(&[]).0.unwrap();
        assert!((real.is_own)("127.0.0.1".parse().unwrap()), "this machine is asked");
    }

    #[test]
    fn blocked_domains_and_user_names_are_refused_and_an_open_policy_refuses_nothing() {
        let policy = closed(&[]);
        for host in ["evil.example", "a.EVIL.example", "evil.example.:5000"] {
            let found = denied(&policy, &format!("https://{host}/"));
            assert_eq!(found, Some(EgressDenied::Blocked("evil.example".to_owned())), "{host}");
        }
        assert_eq!(denied(&policy, "https://notevil.example/"), None);
        assert_eq!(denied(&policy, "https://me@ghcr.io/"), Some(EgressDenied::UserInfo));
        assert_eq!(denied(&policy, "https://:pw@ghcr.io/"), Some(EgressDenied::UserInfo));
        let open = EgressPolicy::default();
        assert!(open.is_open());
        for url in ["http://169.254.169.254/", "http://127.0.0.1/", "http://a@evil.example/"] {
            assert_eq!(denied(&open, url), None, "{url}");
        }
    }
}
