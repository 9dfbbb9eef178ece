//! Whether an address is this machine's own. Such a one is not further off than a loopback address,
//! however public it looks: what listens there for neighbours alone would answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Asks the routes: what is sent to an own address is sent from it. Nothing is sent for it.
pub(super) fn is_own(address: IpAddr) -> bool {
    let any = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    // Any port: a datagram socket that is connected has its own address chosen, and that is all.
    let from = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 1))?;
        socket.local_addr()
    });
    // What cannot be sent to cannot be connected to either.
    from.is_ok_and(|from| from.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_this_machine_is_told_from_others() {
        assert!(is_own("127.0.0.1".parse().unwrap()));
        for other in ["1.1.1.1", "192.0.2.1", "2606:4700::1111"] {
            assert!(!is_own(other.parse().unwrap()), "{other}");
        }
    }
}
