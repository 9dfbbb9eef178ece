//! What an IP address is for, as far as that decides whether somebody else's word may lead there.
//!
//! The tables are IANA's special-purpose registries (RFC 6890 and its updates) and the metadata
//! services of the clouds. An address that carries another one (IPv4-mapped, NAT64, 6to4, Teredo)
//! is at least as far off as what it carries. It knows no names, no ports and no settings.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// How far off an address is, with what it is, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reach {
    /// On the Internet.
    Public,
    /// Near us, or of no public use: whoever runs this may allow it.
    Private(&'static str),
    /// Nobody may allow it.
    Never(&'static str),
}

use Reach::{Never, Private, Public};

const METADATA: Reach = Never("an address of a cloud's metadata service");
const LINK_LOCAL: Reach = Never("a link-local address, where metadata services are");
const UNSPECIFIED: Reach = Never("an unspecified address, which means this machine");
const MULTICAST: Reach = Never("a multicast address");
const LOOPBACK: Reach = Private("a loopback address");
const PRIVATE: Reach = Private("a private address");
const RESERVED: Reach = Private("a reserved address");
const DOCUMENTATION: Reach = Private("an address for documentation");
const BENCHMARK: Reach = Private("an address for benchmarks");
const TRANSLATED: Reach = Private("an address for translation to IPv4");

/// Network, length of its prefix, what it is; the first that holds decides.
const V4: [([u8; 4], u32, Reach); 22] = [
    ([168, 63, 129, 16], 32, METADATA),
    ([100, 100, 100, 200], 32, METADATA),
    ([192, 0, 0, 192], 32, METADATA),
    ([169, 254, 0, 0], 16, LINK_LOCAL),
    ([0, 0, 0, 0], 8, UNSPECIFIED),
    ([224, 0, 0, 0], 4, MULTICAST),
    ([255, 255, 255, 255], 32, Never("the broadcast address")),
    ([127, 0, 0, 0], 8, LOOPBACK),
    ([10, 0, 0, 0], 8, PRIVATE),
    ([172, 16, 0, 0], 12, PRIVATE),
    ([192, 168, 0, 0], 16, PRIVATE),
    ([100, 64, 0, 0], 10, Private("an address behind a provider's NAT")),
    ([192, 0, 2, 0], 24, DOCUMENTATION),
    ([198, 51, 100, 0], 24, DOCUMENTATION),
    ([203, 0, 113, 0], 24, DOCUMENTATION),
    ([198, 18, 0, 0], 15, BENCHMARK),
    ([192, 0, 0, 0], 24, RESERVED),
    ([192, 31, 196, 0], 24, RESERVED),
    ([192, 52, 193, 0], 24, RESERVED),
    ([192, 88, 99, 0], 24, RESERVED),
    ([192, 175, 48, 0], 24, RESERVED),
    ([240, 0, 0, 0], 4, RESERVED),
];

/// As [`V4`], for what carries no address of IPv4.
const V6: [([u16; 8], u32, Reach); 15] = [
    ([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128, METADATA),
    ([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128, METADATA),
    ([0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42], 128, METADATA),
    ([0, 0, 0, 0, 0, 0, 0, 0], 128, UNSPECIFIED),
    ([0, 0, 0, 0, 0, 0, 0, 1], 128, LOOPBACK),
    ([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10, LINK_LOCAL),
    ([0xff00, 0, 0, 0, 0, 0, 0, 0], 8, MULTICAST),
    ([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7, PRIVATE),
    ([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10, PRIVATE),
    ([0x2001, 2, 0, 0, 0, 0, 0, 0], 48, BENCHMARK),
    ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32, DOCUMENTATION),
    ([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20, DOCUMENTATION),
    ([0x2001, 0, 0, 0, 0, 0, 0, 0], 23, RESERVED),
    ([0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0], 48, RESERVED),
    ([0x2000, 0, 0, 0, 0, 0, 0, 0], 3, Public),
];

impl Reach {
    /// Of an address in any family.
    pub(crate) fn of(address: IpAddr) -> Reach {
        match address.to_canonical() {
            IpAddr::V4(address) => of_v4(address),
            IpAddr::V6(address) => match carried(address) {
                Some(reach) => reach,
                None => of_v6(address),
            },
        }
    }
}

/// Whether `address` is in the network of `base` with a prefix of so many bits.
pub(crate) fn is_within(address: IpAddr, base: IpAddr, prefix: u32) -> bool {
    match (address, base) {
        (IpAddr::V4(address), IpAddr::V4(base)) => {
            let beyond = u32::BITS.saturating_sub(prefix);
            (address.to_bits() ^ base.to_bits()).checked_shr(beyond).unwrap_or_default() == 0
        }
        (IpAddr::V6(address), IpAddr::V6(base)) => {
            let beyond = u128::BITS.saturating_sub(prefix);
            (address.to_bits() ^ base.to_bits()).checked_shr(beyond).unwrap_or_default() == 0
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

fn of_v4(address: Ipv4Addr) -> Reach {
    let holds = |(base, prefix, _): &&([u8; 4], u32, Reach)| {
        is_within(address.into(), Ipv4Addr::from(*base).into(), *prefix)
    };
    V4.iter().find(holds).map_or(Public, |(_, _, reach)| *reach)
}

fn of_v6(address: Ipv6Addr) -> Reach {
    let holds = |(base, prefix, _): &&([u16; 8], u32, Reach)| {
        is_within(address.into(), Ipv6Addr::from(*base).into(), *prefix)
    };
    V6.iter().find(holds).map_or(RESERVED, |(_, _, reach)| *reach)
}

/// What an address that carries one of IPv4 is; none if it carries none.
fn carried(address: Ipv6Addr) -> Option<Reach> {
    // The 32 bits that have so many bits behind them.
    let v4 = |behind: u32| {
        let bits = (address.to_bits() >> behind) & u128::from(u32::MAX);
        u32::try_from(bits).map_or(RESERVED, |bits| of_v4(Ipv4Addr::from_bits(bits)))
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        // IPv4-compatible and IPv4-translated, both given up.
        [0, 0, 0, 0, 0, 0, _, _] | [0, 0, 0, 0, 0xffff, 0, _, _] => Some(TRANSLATED.max(v4(0))),
        // NAT64: where there is no IPv4 the whole Internet is behind it.
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => Some(v4(0)),
        // NAT64 of a site, which chooses where the address stands (RFC 6052, 2.2).
        [0x64, 0xff9b, 1, ..] => {
            // With a prefix of 48 bits an octet of zeros stands between the halves.
            let [_, _, _, _, _, _, a, b, _, c, d, ..] = address.octets();
            let split = of_v4(Ipv4Addr::new(a, b, c, d));
            let places = [v4(0), v4(24), split].into_iter();
            let metadata = places.filter(|place| [METADATA, LINK_LOCAL].contains(place)).max();
            Some(metadata.unwrap_or(TRANSLATED))
        }
        // 6to4.
        [0x2002, ..] => Some(TRANSLATED.max(v4(80))),
        // Teredo: its server, and its client with every bit turned over.
        [0x2001, 0, ..] => {
            let client = Ipv6Addr::from_bits(!address.to_bits()).segments();
            let [.., high, low] = client;
            let client = (u32::from(high) << 16) | u32::from(low);
            Some(TRANSLATED.max(v4(64)).max(of_v4(Ipv4Addr::from_bits(client))))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_has_its_place() {
        let table: [(Reach, &[&str]); 12] = [
            (Public, &["1.1.1.1", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0"]),
            (Public, &["100.63.255.255", "100.128.0.0", "169.253.255.255", "223.255.255.255"]),
            (Public, &["2606:4700::1111", "2a00::1", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1"]),
            (METADATA, &["100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254"]),
            (LINK_LOCAL, &["169.254.169.254", "169.254.0.0", "fe80::a9fe:a9fe", "febf::1"]),
            (UNSPECIFIED, &["0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0", "64:ff9b::0.0.0.0"]),
            (MULTICAST, &["224.0.0.1", "239.255.255.255", "ff02::1", "2002:e000:1::"]),
            (LOOPBACK, &["127.0.0.1", "127.255.255.255", "::1", "::ffff:127.0.0.1"]),
            (LOOPBACK, &["64:ff9b::127.0.0.1", "64:ff9b::7f00:1"]),
            (PRIVATE, &["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fdff::1"]),
            (
                DOCUMENTATION,
                &["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
            ),
            (RESERVED, &["240.0.0.1", "192.0.0.1", "192.88.99.1", "100::1", "5f00::1", "4000::1"]),
        ];
        for (reach, addresses) in table {
            for address in addresses {
                assert_eq!(Reach::of(address.parse().unwrap()), reach, "{address}");
            }
        }
        let broadcast = Reach::of(Ipv4Addr::BROADCAST.into());
        assert_eq!(broadcast, Never("the broadcast address"));
        assert!(matches!(Reach::of("100.64.0.1".parse().unwrap()), Private(_)));
        assert_eq!(Reach::of("198.19.255.255".parse().unwrap()), BENCHMARK);
        assert_eq!(Reach::of("2001:2::1".parse().unwrap()), BENCHMARK);
    }

    #[test]
    fn an_address_within_an_address_is_seen() {
        let never = [
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            // A site's NAT64 with prefixes of 96, 64 and 48 bits.
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b:1:0:a9:fea9:fe00:0",
            "64:ff9b:1:a9fe:a9:fe00::",
            "2002:a9fe:a9fe::1",
            // Teredo by its server, and by its client.
            "2001:0:a9fe:a9fe::",
            "2001:0:101:101:0:0:5601:5601",
        ];
        for address in never {
            let reach = Reach::of(address.parse().unwrap());
            assert!(matches!(reach, Never(_)), "{address}: {reach:?}");
        }
        for address in ["2002:101:101::1", "2001:0:101:101:0:0:fefe:fefe", "64:ff9b:1::101:101"] {
            assert_eq!(Reach::of(address.parse().unwrap()), TRANSLATED, "{address}");
        }
        for address in ["::127.0.0.1", "2002:7f00:1::", "2002:a00:1::", "::ffff:0:10.0.0.1"] {
            let reach = Reach::of(address.parse().unwrap());
            assert!(matches!(reach, Private(_)), "{address}: {reach:?}");
        }
    }

    #[test]
    fn networks_end_where_they_should() {
        let within = |address: &str, base: &str, prefix| {
            is_within(address.parse().unwrap(), base.parse().unwrap(), prefix)
        };
        assert!(within("10.255.255.255", "10.0.0.0", 8) && !within("11.0.0.0", "10.0.0.0", 8));
        assert!(within("1.2.3.4", "0.0.0.0", 0) && within("::1", "::", 0));
        assert!(within("1.2.3.4", "1.2.3.4", 32) && !within("1.2.3.5", "1.2.3.4", 32));
        assert!(within("fd00::1", "fd00::", 8) && !within("fe00::1", "fd00::", 8));
        assert!(!within("::a00:1", "10.0.0.0", 8) && !within("10.0.0.1", "::", 0));
    }
}
