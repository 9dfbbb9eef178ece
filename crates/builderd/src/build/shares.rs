//! Whose the CPUs are when builds want more of them than there are: theirs whose tenants have taken
//! little of late, so that a build of one that comes now and then is as fast beside those of one
//! that never stops. It does not know how a weight is set.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::disk::lock;
use crate::tenant::{TenantId, Tier};

/// In this time half of what was taken is forgotten.
const HALF_LIFE: Duration = Duration::from_secs(30);
/// The weight of who has taken nothing: the largest of `cpu.weight`, kernel documentation
/// "Control Group v2".
const WEIGHT_MAX: u64 = 10_000;
/// Enough to go on with, and to keep connections alive.
const WEIGHT_MIN: u64 = 10;
/// CPU time, of a tenant of weight 1, that halves its weight.
const HALVED_BY: Duration = Duration::from_millis(500);

/// What each tenant has taken.
#[derive(Debug, Default)]
pub(super) struct CpuShares(Mutex<HashMap<TenantId, Taken>>);

#[derive(Debug)]
struct Taken {
    builds: u64,
    usecs: u64,
    at: Instant,
}

impl Taken {
    fn fade(&mut self, now: Instant) {
        let half = micros(HALF_LIFE);
        let since = micros(now.saturating_duration_since(self.at));
        let left =
            u32::try_from(since / half).ok().and_then(|halves| self.usecs.checked_shr(halves));
        let left = left.unwrap_or(0);
        // A straight line between one half and the next.
        let rest = u128::from(left) * u128::from(since % half) / u128::from(2 * half);
        self.usecs = left - u64::try_from(rest).unwrap_or(left);
        self.at = now;
    }
}

impl CpuShares {
    /// A build of `tenant` begins to take CPU time; it ends when the answer is dropped.
    pub(super) fn enter(&self, tenant: &TenantId, tier: Tier, now: Instant) -> CpuShare<'_> {
        let mut all = lock(&self.0);
        all.values_mut().for_each(|taken| taken.fade(now));
        all.retain(|_, taken| taken.builds > 0 || taken.usecs > 0);
        all.entry(tenant.clone()).or_insert(Taken { builds: 0, usecs: 0, at: now }).builds += 1;
        CpuShare { shares: self, tenant: tenant.clone(), tier, told_usecs: 0 }
    }
}

/// One build among those that share the CPUs.
#[derive(Debug)]
pub(super) struct CpuShare<'a> {
    shares: &'a CpuShares,
    tenant: TenantId,
    tier: Tier,
    told_usecs: u64,
}

impl CpuShare<'_> {
    /// Its weight from now on, 10 to 10,000, when it has taken `usecs` of CPU time so far.
    pub(super) fn weight(&mut self, usecs: u64, now: Instant) -> u64 {
        let more = usecs.saturating_sub(self.told_usecs);
        self.told_usecs = usecs;
        let mut all = lock(&self.shares.0);
        let Some(taken) = all.get_mut(&self.tenant) else { return WEIGHT_MAX };
        taken.fade(now);
        taken.usecs = taken.usecs.saturating_add(more);
        let halved_by = micros(HALVED_BY).saturating_mul(u64::from(self.tier.weight()));
        let whole = u128::from(WEIGHT_MAX) * u128::from(halved_by);
        let weight = whole / u128::from(halved_by.saturating_add(taken.usecs));
        u64::try_from(weight)
            .unwrap_or(WEIGHT_MAX)
            .checked_div(taken.builds)
            .unwrap_or(0)
            .max(WEIGHT_MIN)
    }
}

impl Drop for CpuShare<'_> {
    fn drop(&mut self) {
        if let Some(taken) = lock(&self.shares.0).get_mut(&self.tenant) {
            taken.builds = taken.builds.saturating_sub(1);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    #[test]
    fn who_has_taken_little_of_late_goes_first() {
        let (shares, now) = (CpuShares::default(), Instant::now());
        let mut noisy = shares.enter(&tenant("noisy"), Tier::Pro, now);
        let noisy = noisy.weight(60 * SECOND, now);
        let mut quiet = shares.enter(&tenant("quiet"), Tier::Pro, now);
        assert_eq!(quiet.weight(0, now), WEIGHT_MAX);
        assert!(quiet.weight(SECOND, now) > 10 * noisy, "{noisy}");
    }

    #[test]
    fn what_was_taken_fades() {
        let (shares, start) = (CpuShares::default(), Instant::now());
        let mut share = shares.enter(&tenant("t"), Tier::Pro, start);
        let mut last = share.weight(60 * SECOND, start);
        for seconds in [10, 29, 30, 31, 59, 61, 120, 1_000] {
            let weight = share.weight(60 * SECOND, start + Duration::from_secs(seconds));
            assert!(weight > last, "{weight} after {seconds} s, {last} before");
            last = weight;
        }
        assert_eq!(share.weight(60 * SECOND, start + 100 * HALF_LIFE), WEIGHT_MAX);
    }

    #[test]
    fn builds_of_one_tenant_share_its_weight_and_leave_nothing() {
        let (shares, now) = (CpuShares::default(), Instant::now());
        let mut one = shares.enter(&tenant("t"), Tier::Free, now);
        let mut two = shares.enter(&tenant("t"), Tier::Free, now);
        assert_eq!((one.weight(0, now), two.weight(0, now)), (WEIGHT_MAX / 2, WEIGHT_MAX / 2));
        drop(two);
        assert_eq!(one.weight(0, now), WEIGHT_MAX);
        drop(one);
        drop(shares.enter(&tenant("other"), Tier::Free, now));
        assert!(!lock(&shares.0).contains_key(&tenant("t")));
    }

    #[test]
    fn a_higher_tier_keeps_its_weight_for_longer() {
        let (shares, now) = (CpuShares::default(), Instant::now());
        let weight = |name: &str, tier| shares.enter(&tenant(name), tier, now).weight(SECOND, now);
        assert!(weight("one", Tier::Dedicated) > weight("other", Tier::Free));
    }
}
