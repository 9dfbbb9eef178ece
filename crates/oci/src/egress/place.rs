//! What an operator writes to allow a place that is not public. It judges nothing.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use reqwest::Url;

use super::address::{Reach, is_within};
use super::{canonical, literal, port};
use crate::reference::check_registry;

/// A host or a network, with a port or with all: `registry.internal`, `registry.internal:5000`,
/// `10.1.2.3:5000`, `10.0.0.0/8`, `10.0.0.0/8:5000`, `[fd00::1]:5000`, `[fd00::/8]:5000`.
///
/// A host that is a name may lead to any private address; one that is an address stands for
/// itself under all names. Addresses of metadata services stay out of reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedPlace {
    place: Place,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Host(String),
    Network { base: IpAddr, prefix: u32 },
}

/// Why a text names no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// It has another shape.
    #[error("expected `HOST[:PORT]` or `NETWORK/BITS[:PORT]`, such as `10.0.0.0/8`")]
    Shape,
    /// Bits are set behind the network's prefix.
    #[error("`{0}` has bits set beyond the network's: write `{1}`")]
    Bits(String, String),
    /// Not even the operator reaches it.
    #[error("it is {0}, which cannot be allowed")]
    Never(&'static str),
}

impl AllowedPlace {
    /// A host, as registries are written, with the port its registry is at.
    pub(crate) fn of_registry(host: &str, is_plain: bool) -> Option<AllowedPlace> {
        let scheme = if is_plain { "http" } else { "https" };
        let url = Url::parse(&format!("{scheme}://{host}/")).ok()?;
        let port = url.port_or_known_default();
        let place = Place::of_host(url.host_str()?);
        Some(AllowedPlace { place, port })
    }

    /// Whether it holds a registry that is spoken to without TLS, `HOST[:PORT]`, as far as its
    /// name tells.
    #[must_use]
    pub fn holds_registry(&self, host: &str) -> bool {
        let Some(AllowedPlace { place, port: Some(port) }) = Self::of_registry(host, true) else {
            return false;
        };
        match place {
            Place::Host(name) => {
                let is_there = matches!(&self.place, Place::Host(own) if *own == name);
                is_there && self.port.is_none_or(|own| own == port)
            }
            Place::Network { base, .. } => self.holds(base, port, None),
        }
    }

    /// Whether it holds an address that stands for itself, or that this name led to.
    pub(super) fn holds(&self, address: IpAddr, port: u16, name: Option<&str>) -> bool {
        let is_there = match &self.place {
            Place::Host(host) => name.is_some_and(|name| canonical(name) == *host),
            Place::Network { base, prefix } => is_within(address, *base, *prefix),
        };
        is_there && self.port.is_none_or(|own| own == port)
    }
}

impl Place {
    /// Of a host as a URL has it.
    fn of_host(host: &str) -> Place {
        match literal(host) {
            Some(address) => Place::of_address(address.to_canonical()),
            None => Place::Host(canonical(host)),
        }
    }

    fn of_address(base: IpAddr) -> Place {
        Place::Network { base, prefix: bits_of(base) }
    }

    fn network(text: &str, base: &str, prefix: &str) -> Result<Place, PlaceError> {
        let base: IpAddr = base.parse().map_err(|_| PlaceError::Shape)?;
        let is_number = prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix: u32 = prefix.parse().map_err(|_| PlaceError::Shape)?;
        if !is_number || prefix > bits_of(base) || base.to_canonical() != base {
            return Err(PlaceError::Shape);
        }
        let start = first_of(base, prefix);
        if start != base {
            return Err(PlaceError::Bits(text.to_owned(), format!("{start}/{prefix}")));
        }
        Ok(Place::Network { base, prefix })
    }
}

fn bits_of(address: IpAddr) -> u32 {
    if address.is_ipv4() { u32::BITS } else { u128::BITS }
}

/// The first address of a network.
fn first_of(address: IpAddr, prefix: u32) -> IpAddr {
    let beyond = bits_of(address).saturating_sub(prefix);
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(beyond).unwrap_or_default();
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(beyond).unwrap_or_default();
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}

impl FromStr for AllowedPlace {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<AllowedPlace, PlaceError> {
        let port_of = |rest: &str| match rest.strip_prefix(':') {
            None if rest.is_empty() => Ok(None),
            None => Err(PlaceError::Shape),
            Some(digits) => port(digits).map(Some).ok_or(PlaceError::Shape),
        };
        let (what, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((inner, rest)) if inner.contains(':') => (inner, port_of(rest)?),
            Some(_) => return Err(PlaceError::Shape),
            // An address of IPv6 without a port.
            None if text.parse::<IpAddr>().is_ok() => (text, None),
            None => {
                // A network's prefix stands behind all colons of its address.
                let from = text.find('/').unwrap_or_default();
                let at = text.get(from..).and_then(|rest| rest.find(':'));
                let (what, rest) = text.split_at(at.map_or(text.len(), |at| from + at));
                (what, port_of(rest)?)
            }
        };
        let place = match what.split_once('/') {
            Some((base, prefix)) => Place::network(what, base, prefix)?,
            None => match what.parse::<IpAddr>() {
                Ok(address) => Place::of_address(address.to_canonical()),
                Err(_) => {
                    check_registry(what).map_err(|_| PlaceError::Shape)?;
                    // Other spellings of an address are that address.
                    let url = Url::parse(&format!("https://{what}/"));
                    let url = url.map_err(|_| PlaceError::Shape)?;
                    Place::of_host(url.host_str().unwrap_or_default())
                }
            },
        };
        match place {
            Place::Network { base, prefix } if prefix == bits_of(base) => match Reach::of(base) {
                Reach::Never(class) => Err(PlaceError::Never(class)),
                Reach::Public | Reach::Private(_) => Ok(AllowedPlace { place, port }),
            },
            Place::Network { .. } | Place::Host(_) => Ok(AllowedPlace { place, port }),
        }
    }
}

impl fmt::Display for AllowedPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = match &self.place {
            Place::Host(host) => host.clone(),
            Place::Network { base, prefix } if *prefix == bits_of(*base) => base.to_string(),
            Place::Network { base, prefix } => format!("{base}/{prefix}"),
        };
        match self.port {
            None => f.write_str(&whole),
            Some(port) if whole.contains(':') => write!(f, "[{whole}]:{port}"),
            Some(port) => write!(f, "{whole}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_in_all_their_shapes_and_written_the_same() {
        for (written, shown) in [
            ("Registry.internal", "registry.internal"),
            ("registry.internal:5000", "registry.internal:5000"),
            ("10.1.2.3", "10.1.2.3"),
            ("0x0a.1.2.3:5000", "10.1.2.3:5000"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.0/8:5000", "10.0.0.0/8:5000"),
            ("::1", "::1"),
            ("[::1]:5000", "[::1]:5000"),
            ("[::ffff:10.0.0.1]:443", "10.0.0.1:443"),
            ("fd00::/8", "fd00::/8"),
            ("fd00::/8:5000", "[fd00::/8]:5000"),
            ("[fd00::/8]:5000", "[fd00::/8]:5000"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            let place: AllowedPlace = written.parse().unwrap();
            assert_eq!(place.to_string(), shown, "{written}");
            assert_eq!(shown.parse(), Ok(place), "{shown}");
        }
    }

    #[test]
    fn what_names_no_place_is_refused() {
        for bad in [
            "",
            "https://a.b",
            "a b",
            "a/b",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "/8",
            "a.b:0",
            "a.b:+5",
            "a.b:99999",
            "[::1",
            "[a.b]:1",
            "[::1]5000",
            "::ffff:10.0.0.0/104",
            "*.internal",
        ] {
            assert_eq!(bad.parse::<AllowedPlace>(), Err(PlaceError::Shape), "{bad}");
        }
        let bits = "10.0.0.5/8".parse::<AllowedPlace>().unwrap_err().to_string();
        assert!(bits.contains("write `10.0.0.0/8`"), "{bits}");
        for never in ["169.254.169.254", "169.254.169.254:80", "fd00:ec2::254", "0.0.0.0"] {
            let refused = never.parse::<AllowedPlace>();
            assert!(matches!(refused, Err(PlaceError::Never(_))), "{never}: {refused:?}");
        }
    }

    #[test]
    fn a_place_holds_registries_by_name_address_and_port() {
        for (place, registry, expected) in [
            ("hub.internal", "Hub.internal:5000", true),
            ("hub.internal:5000", "hub.internal:5000", true),
            ("hub.internal:80", "hub.internal", true),
            ("hub.internal:5000", "hub.internal", false),
            ("hub.internal", "a.hub.internal", false),
            ("10.0.0.0/8", "10.1.2.3:5000", true),
            ("10.0.0.0/8:5000", "0xa.1.2.3:5000", true),
            ("10.0.0.0/8:5000", "10.1.2.3", false),
            ("fd00::/8", "[fd00::1]:5000", true),
            ("10.0.0.0/8", "hub.internal", false),
            ("hub.internal", "10.1.2.3", false),
        ] {
            let place: AllowedPlace = place.parse().unwrap();
            assert_eq!(place.holds_registry(registry), expected, "{place} {registry}");
        }
    }

    #[test]
    fn a_registry_stands_for_its_one_port() {
        let shown = |host, is_plain| AllowedPlace::of_registry(host, is_plain).unwrap().to_string();
        assert_eq!(shown("Mirror.internal", false), "mirror.internal:443");
        assert_eq!(shown("Mirror.internal", true), "mirror.internal:80");
        assert_eq!(shown("127.1:5000", true), "127.0.0.1:5000");
        assert_eq!(shown("[::1]:5000", true), "[::1]:5000");
    }
}
