//! What an operator writes to allow hosts by their names. It judges no address: a name that is
//! allowed may still lead where nobody may go.

use std::fmt;
use std::str::FromStr;

use super::dial::Target;
use super::port;

/// The ports that stand for none.
const WEB_PORTS: [u16; 2] = [80, 443];

/// Hosts with a port, or with those of HTTP and HTTPS: `deb.debian.org`, `10.1.2.3:8080`,
/// `*.npmjs.org` (all below it, not the domain itself), `*` (all names and addresses).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedName {
    hosts: Hosts,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    All,
    Below(String),
    One(String),
}

/// Why a text names no hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected `HOST[:PORT]`, `*.DOMAIN[:PORT]` or `*[:PORT]`, without a scheme")]
pub struct NameError;

impl AllowedName {
    /// Whether it allows this host and port.
    #[must_use]
    pub fn holds(&self, target: &Target) -> bool {
        let is_port = match self.port {
            Some(port) => port == target.port(),
            None => WEB_PORTS.contains(&target.port()),
        };
        is_port
            && match &self.hosts {
                Hosts::All => true,
                Hosts::One(host) => host == target.host(),
                Hosts::Below(domain) => {
                    let rest = target.host().strip_suffix(domain.as_str());
                    !target.is_address() && rest.is_some_and(|rest| rest.ends_with('.'))
                }
            }
    }
}

impl FromStr for AllowedName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<AllowedName, NameError> {
        let (host, port) = match text.rsplit_once(':') {
            // The colon of a port, not one within an address of IPv6.
            Some((host, digits)) if !digits.ends_with(']') => {
                (host, Some(port(digits).ok_or(NameError)?))
            }
            _ => (text, None),
        };
        let named = |host: &str| Target::new(host, port.unwrap_or(WEB_PORTS[0])).ok_or(NameError);
        let hosts = match host.strip_prefix('*') {
            Some("") => Hosts::All,
            Some(below) => {
                let domain = named(below.strip_prefix('.').ok_or(NameError)?)?;
                match domain.is_address() {
                    true => return Err(NameError),
                    false => Hosts::Below(domain.host().to_owned()),
                }
            }
            None => Hosts::One(named(host)?.host().to_owned()),
        };
        Ok(AllowedName { hosts, port })
    }
}

impl fmt::Display for AllowedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hosts {
            Hosts::All => f.write_str("*")?,
            Hosts::Below(domain) => write!(f, "*.{domain}")?,
            Hosts::One(host) => f.write_str(host)?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_allows_its_hosts_at_its_ports_and_nothing_beside() {
        for (name, host, port, expected) in [
            ("deb.debian.org", "deb.debian.org", 80, true),
            ("Deb.Debian.org", "DEB.debian.org.", 443, true),
            ("deb.debian.org", "deb.debian.org", 25, false),
            ("deb.debian.org", "a.deb.debian.org", 80, false),
            ("deb.debian.org", "deb.debian.org.evil.example", 80, false),
            ("deb.debian.org:8080", "deb.debian.org", 8080, true),
            ("deb.debian.org:8080", "deb.debian.org", 80, false),
            ("*.npmjs.org", "registry.npmjs.org", 443, true),
            ("*.npmjs.org", "a.b.npmjs.org", 443, true),
            ("*.npmjs.org", "npmjs.org", 443, false),
            ("*.npmjs.org", "evilnpmjs.org", 443, false),
            ("*.1", "10.0.0.1", 80, false),
            ("10.0.0.1", "0x0a.1", 80, true),
            ("[::1]:81", "[0:0::1]", 81, true),
            ("*", "anything.example", 443, true),
            ("*", "anything.example", 22, false),
            ("*:22", "anything.example", 22, true),
        ] {
            let Ok(read) = name.parse::<AllowedName>() else {
                assert!(!expected, "{name}");
                continue;
            };
            let target = Target::new(host, port).unwrap();
            assert_eq!(read.holds(&target), expected, "{name} {host}:{port}");
            assert_eq!(read.to_string().parse(), Ok(read), "{name}");
        }
    }

    #[test]
    fn what_names_no_hosts_is_refused() {
        for bad in
            ["", "https://a.b", "a b", "a/b", "a.b:0", "a.b:99999", "*a.b", "*.", "a.*", "::1"]
        {
            assert_eq!(bad.parse::<AllowedName>(), Err(NameError), "{bad}");
        }
    }
}
