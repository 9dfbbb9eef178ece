//! How often an address may do what nobody needs a credential for: a bucket for each (GCRA), and
//! no more buckets than may be.
//!
//! An address is the peer's, as the socket has it: what a header says of an address is not
//! believed. It does not know what is asked.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Addresses with a bucket of their own; when more ask at once, the rest share one.
const PEERS_MAX: usize = 10_000;
/// The bucket of those who have none of their own.
const REST: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// See the module.
pub(super) struct Peers {
    /// How long one question takes to be forgotten.
    each: Duration,
    /// How much may be unforgotten.
    burst: Duration,
    /// When all of an address is forgotten.
    buckets: Mutex<HashMap<IpAddr, Instant>>,
}

impl Peers {
    /// `count` questions in `period`, `burst` of them at once.
    pub(super) fn new(count: u32, period: Duration, burst: u32) -> Self {
        let each = period / count.max(1);
        Self { each, burst: each * burst.max(1), buckets: Mutex::default() }
    }

    /// Counts one question; how long to wait if it is one too many.
    pub(super) fn count(&self, from: IpAddr, now: Instant) -> Result<(), Duration> {
        // Nothing is half done in a map whose holder panicked.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut from = counted_as(from);
        if buckets.len() >= PEERS_MAX && !buckets.contains_key(&from) {
            buckets.retain(|_, forgotten_at| now < *forgotten_at);
            if buckets.len() >= PEERS_MAX {
                from = REST;
            }
        }
        let forgotten_at = buckets.get(&from).map_or(now, |at| (*at).max(now)) + self.each;
        let too_much = forgotten_at.duration_since(now).saturating_sub(self.burst);
        if !too_much.is_zero() {
            return Err(too_much);
        }
        buckets.insert(from, forgotten_at);
        Ok(())
    }
}

/// Whoever has an IPv6 address has 2^64 of them.
pub(super) fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn second() -> Duration {
        Duration::from_secs(1)
    }

    #[test]
    fn an_address_uses_up_its_own_bucket_and_no_other() {
        let (peers, now) = (Peers::new(10, second(), 3), Instant::now());
        let (one, other) = (address("192.0.2.1"), address("192.0.2.2"));
        for _ in 0..3 {
            assert_eq!(peers.count(one, now), Ok(()));
        }
        assert_eq!(peers.count(one, now), Err(second() / 10));
        assert_eq!(peers.count(other, now), Ok(()));
        assert_eq!(peers.count(one, now + second() / 10), Ok(()), "one comes back");
        assert!(peers.count(one, now + second() / 10).is_err());
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let (peers, now) = (Peers::new(1, second(), 1), Instant::now());
        assert_eq!(peers.count(address("2001:db8:0:1::1"), now), Ok(()));
        assert!(peers.count(address("2001:db8:0:1:ffff:ffff:ffff:ffff"), now).is_err());
        assert_eq!(peers.count(address("2001:db8:0:2::1"), now), Ok(()));
        assert_eq!(peers.count(address("::ffff:192.0.2.1"), now), Ok(()));
        assert!(peers.count(address("192.0.2.1"), now).is_err(), "the same, mapped");
        assert_eq!(peers.count(address("::ffff:192.0.2.2"), now), Ok(()));
    }

    #[test]
    fn no_more_addresses_are_remembered_than_may_be() {
        let (peers, now) = (Peers::new(1, second(), 1), Instant::now());
        let remembered = || peers.buckets.lock().unwrap().len();
        let mut numbers = (0..).map(|number| IpAddr::V4(Ipv4Addr::from_bits((10 << 24) + number)));
        let first: Vec<IpAddr> = numbers.by_ref().take(PEERS_MAX).collect();
        for from in &first {
            assert_eq!(peers.count(*from, now), Ok(()));
        }
        let mut next = || numbers.next().unwrap();
        assert_eq!(peers.count(next(), now), Ok(()));
        assert!(peers.count(next(), now).is_err(), "those who came late share");
        assert!(peers.count(first[0], now).is_err(), "who was there keeps its own");
        assert_eq!(remembered(), PEERS_MAX + 1);
        assert_eq!(peers.count(next(), now + second()), Ok(()));
        assert_eq!(remembered(), 1, "the old ones are forgotten");
    }
}
