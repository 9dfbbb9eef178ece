//! How often a tenant may ask, by its tier, and how often an address may look how the service does
//! or fail to prove who it is.
//!
//! One token bucket for each (GCRA), in memory: several nodes each grant the whole rate.
//! Quotas on builds are another thing and live in the store.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::peers::Peers;
use crate::build::record::Micros;
use crate::tenant::{Principal, TenantId, Tier};

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// Failures to authenticate that one address may have in a minute, and at once.
const FAILURES: (u32, u32) = (60, 40);
/// Requests to `/health`, and to `/stats`, at once.
const LOOKS_BURST: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// After so many decisions the buckets that are full again are forgotten.
const FORGET_EVERY: u32 = 4096;

type Buckets<K> = DefaultKeyedRateLimiter<K, StateInformationMiddleware>;

/// What was decided about a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Requests per minute.
    pub(crate) limit: u32,
    /// How many may follow at once.
    pub(crate) remaining: u32,
    /// When the bucket is full again, in seconds since 1970.
    pub(crate) reset_secs: i64,
    /// How long to wait, if this request is one too many.
    pub(crate) retry_after_secs: Option<u64>,
}

impl Rate {
    /// Puts the documented headers on an answer.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        headers.insert(LIMIT, HeaderValue::from(self.limit));
        headers.insert(REMAINING, HeaderValue::from(self.remaining));
        headers.insert(RESET, HeaderValue::from(self.reset_secs));
    }
}

/// What anybody may look at; looking at one does not count for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// At `/health`.
    Health,
    /// At `/stats`.
    Stats,
}

/// All buckets.
pub(crate) struct RateLimits {
    tiers: [Buckets<TenantId>; 4],
    failures: Peers,
    /// 0 for no limit.
    looks_per_sec: u32,
    health: Peers,
    stats: Peers,
    decisions: AtomicU32,
    clock: DefaultClock,
}

impl RateLimits {
    /// The rates of the tier table; each [`Look`] is answered `looks_per_sec` times a second to
    /// each address, always when that is 0.
    pub(crate) fn new(looks_per_sec: u32) -> Self {
        let looks = || Peers::new(looks_per_sec, SECOND, LOOKS_BURST);
        Self {
            tiers: Tier::ALL
                .map(|tier| RateLimiter::keyed(per_minute(tier.request_rate())).with_middleware()),
            failures: Peers::new(FAILURES.0, MINUTE, FAILURES.1),
            looks_per_sec,
            health: looks(),
            stats: looks(),
            decisions: AtomicU32::new(0),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one request of a tenant.
    pub(crate) fn check(&self, who: &Principal, now: Micros) -> Rate {
        self.forget_now_and_then();
        let buckets = match who.tier() {
            Tier::Free => &self.tiers[0],
            Tier::Pro => &self.tiers[1],
            Tier::Enterprise => &self.tiers[2],
            Tier::Dedicated => &self.tiers[3],
        };
        let (limit, burst) = who.tier().request_rate();
        let secs = |wait: Duration| wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        let full_in = |remaining: u32| {
            let missing = burst.saturating_sub(remaining);
            secs(Duration::from_secs(60) * missing / limit.max(1))
        };
        let (remaining, retry_after_secs) = match buckets.check_key(who.tenant()) {
            Ok(state) => (state.remaining_burst_capacity(), None),
            Err(until) => (0, Some(secs(until.wait_time_from(self.clock.now())).max(1))),
        };
        let reset = now.plus_secs(full_in(remaining));
        let reset_secs = reset.0.div_euclid(Micros::SECOND);
        Rate { limit, remaining, reset_secs, retry_after_secs }
    }

    /// Counts one failure of an address to prove who it is; the seconds to wait if there were
    /// too many.
    pub(crate) fn failed(&self, from: Option<IpAddr>) -> Option<u64> {
        let wait = self.failures.count(from?, Instant::now()).err()?;
        Some(wait.as_secs() + 1)
    }

    /// Counts one look of an address; the rate if it was exceeded.
    pub(crate) fn look(&self, at: Look, from: IpAddr) -> Result<(), u32> {
        let peers = match at {
            _ if self.looks_per_sec == 0 => return Ok(()),
            Look::Health => &self.health,
            Look::Stats => &self.stats,
        };
        peers.count(from, Instant::now()).map_err(|_| self.looks_per_sec)
    }

    fn forget_now_and_then(&self) {
        if self.decisions.fetch_add(1, Ordering::Relaxed) % FORGET_EVERY == FORGET_EVERY - 1 {
            self.tiers.iter().for_each(Buckets::retain_recent);
        }
    }
}

fn at_least_one(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
}

fn per_minute((rate, burst): (u32, u32)) -> Quota {
    Quota::per_minute(at_least_one(rate)).allow_burst(at_least_one(burst))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_uses_up_its_own_rate_and_no_other() {
        let limits = RateLimits::new(0);
        let first = super::super::auth::tests::principal("first", Tier::Free);
        let second = super::super::auth::tests::principal("second", Tier::Free);
        let (_, burst) = Tier::Free.request_rate();
        for sent in 1..=burst {
            let rate = limits.check(&first, Micros(0));
            assert_eq!((rate.limit, rate.remaining), (60, burst - sent));
            assert_eq!(rate.retry_after_secs, None);
            assert_eq!(rate.reset_secs, i64::from(sent), "one request comes back each second");
        }
        assert_eq!(limits.check(&first, Micros(0)).retry_after_secs, Some(1));
        assert_eq!(limits.check(&second, Micros(0)).retry_after_secs, None);
    }

    #[test]
    fn an_address_that_keeps_failing_must_wait() {
        let limits = RateLimits::new(0);
        let from: IpAddr = "192.0.2.7".parse().unwrap();
        for _ in 0..FAILURES.1 {
            assert_eq!(limits.failed(Some(from)), None);
        }
        assert!(limits.failed(Some(from)).is_some_and(|secs| (1..=2).contains(&secs)));
        assert_eq!(limits.failed(Some("192.0.2.8".parse().unwrap())), None);
        assert_eq!(limits.failed(None), None);
    }
    #[test]
    fn looking_at_one_thing_leaves_the_other_and_other_addresses_alone() {
        // One comes back in a second, so that no machine is too slow.
        let limits = RateLimits::new(1);
        let [one, other] = ["192.0.2.7", "192.0.2.8"].map(|text| text.parse().unwrap());
        for _ in 0..LOOKS_BURST {
            assert_eq!(limits.look(Look::Stats, one), Ok(()));
        }
        assert_eq!(limits.look(Look::Stats, one), Err(1));
        assert_eq!(limits.look(Look::Health, one), Ok(()));
        assert_eq!(limits.look(Look::Stats, other), Ok(()));
        let unlimited = RateLimits::new(0);
        assert!((0..1000).all(|_| unlimited.look(Look::Health, one).is_ok()));
    }
}
