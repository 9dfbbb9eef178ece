//! Whose the CPUs are when builds want more of them than there are: theirs whose tenants have taken
//! little of late, so that a build of one that comes now and then is as fast beside those of one
//! that never stops. Who makes much use of the CPUs makes much use of disk and memory too, which no
//! weight shares out: it is held back for as long as somebody lighter is at work. It does not know
//! how a weight is set.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Notify;
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

/// So many times the weight of another who is at work holds one back,
const HELD_BY: u64 = 2;
/// but nobody whose own is more than this: who has just begun has taken more than who begins next.
const HELD_BELOW: u64 = WEIGHT_MAX / 7;
/// What a tenant has while it is held back, in thousandths of a CPU: enough to end a step.
const HELD_MILLIS: u64 = 50;
/// So long a build may be held back at first, and half of its time in the long run: where somebody
/// lighter always comes, it must end all the same.
const HELD_FIRST: Duration = Duration::from_secs(10);
/// Who has used less than this part of the time does not work but wait: perhaps for the very one
/// that would be held back, who makes the layer that both need.
const WORK_PART: u32 = 50;
/// So long after it has worked somebody counts as being at work: it may wait for its disk.
const AT_WORK: Duration = Duration::from_secs(1);

/// What each tenant has taken.
#[derive(Debug, Default)]
pub(super) struct CpuShares {
    all: Mutex<HashMap<TenantId, Taken>>,
    entered: Notify,
}

/// What a build may have of the CPUs from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CpuPart {
    /// Beside those of others: 10 to 10,000.
    pub(super) weight: u64,
    /// At the most, in thousandths of a CPU, while somebody lighter is at work; none: the build's
    /// own limit.
    pub(super) held_to: Option<u64>,
}

#[derive(Debug)]
struct Taken {
    tier: Tier,
    builds: u64,
    usecs: u64,
    at: Instant,
    worked_at: Instant,
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

    /// Of all builds of the tenant together, 0 to 10,000.
    fn weight(&self) -> u64 {
        let halved_by = micros(HALVED_BY).saturating_mul(u64::from(self.tier.weight()));
        let whole = u128::from(WEIGHT_MAX) * u128::from(halved_by);
        let weight = whole / u128::from(halved_by.saturating_add(self.usecs)).max(1);
        u64::try_from(weight).unwrap_or(WEIGHT_MAX)
    }

    fn is_at_work(&self, now: Instant) -> bool {
        self.builds > 0 && now.saturating_duration_since(self.worked_at) <= AT_WORK
    }
}

impl CpuShares {
    /// Comes when somebody else has begun: parts are others now.
    pub(super) async fn changed(&self) {
        self.entered.notified().await;
    }

    /// A build of `tenant` begins to take CPU time; it ends when the answer is dropped.
    pub(super) fn enter(&self, tenant: &TenantId, tier: Tier, now: Instant) -> CpuShare<'_> {
        let mut all = lock(&self.all);
        all.values_mut().for_each(|taken| taken.fade(now));
        all.retain(|_, taken| taken.builds > 0 || taken.usecs > 0);
        let new = Taken { tier, builds: 0, usecs: 0, at: now, worked_at: now };
        let taken = all.entry(tenant.clone()).or_insert(new);
        taken.builds += 1;
        (taken.tier, taken.worked_at) = (tier, now);
        drop(all);
        self.entered.notify_waiters();
        CpuShare {
            shares: self,
            tenant: tenant.clone(),
            told_usecs: 0,
            told_at: now,
            began_at: now,
            is_held: false,
            held: Duration::ZERO,
        }
    }
}

/// One build among those that share the CPUs.
#[derive(Debug)]
pub(super) struct CpuShare<'a> {
    shares: &'a CpuShares,
    tenant: TenantId,
    told_usecs: u64,
    told_at: Instant,
    began_at: Instant,
    is_held: bool,
    held: Duration,
}

impl CpuShare<'_> {
    /// Its part from now on, when it has taken `usecs` of CPU time so far.
    pub(super) fn part(&mut self, usecs: u64, now: Instant) -> CpuPart {
        let more = usecs.saturating_sub(self.told_usecs);
        let since = now.saturating_duration_since(self.told_at);
        // What could not be read once is not taken twice.
        (self.told_usecs, self.told_at) = (self.told_usecs.max(usecs), now);
        let works = more > 0 && more >= micros(since / WORK_PART);
        // Who works and does not compute writes, or keeps the kernel busy: that is not told by its
        // own time.
        let more = if works && !self.is_held { more.max(micros(since)) } else { more };
        if self.is_held {
            self.held += since;
        }
        let age = now.saturating_duration_since(self.began_at);
        let may_be_held = self.held < HELD_FIRST + age / 2;
        let mut all = lock(&self.shares.all);
        all.values_mut().for_each(|taken| taken.fade(now));
        let Some(taken) = all.get_mut(&self.tenant) else {
            return CpuPart { weight: WEIGHT_MAX, held_to: None };
        };
        taken.usecs = taken.usecs.saturating_add(more);
        if works {
            taken.worked_at = now;
        }
        let (whole, builds) = (taken.weight(), taken.builds.max(1));
        let is_lighter = |other: &Taken| other.weight() / HELD_BY >= whole.max(1);
        self.is_held = may_be_held
            && whole < HELD_BELOW
            && all.iter().any(|(tenant, other)| {
                *tenant != self.tenant && other.is_at_work(now) && is_lighter(other)
            });
        CpuPart {
            weight: (whole / builds).max(WEIGHT_MIN),
            held_to: self.is_held.then_some(HELD_MILLIS / builds),
        }
    }
}

impl Drop for CpuShare<'_> {
    fn drop(&mut self) {
        if let Some(taken) = lock(&self.shares.all).get_mut(&self.tenant) {
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
        let noisy = noisy.part(60 * SECOND, now).weight;
        let mut quiet = shares.enter(&tenant("quiet"), Tier::Pro, now);
        assert_eq!(quiet.part(0, now).weight, WEIGHT_MAX);
        assert!(quiet.part(SECOND, now).weight > 10 * noisy, "{noisy}");
    }

    #[test]
    fn who_has_taken_much_is_held_back_while_somebody_lighter_works_and_no_longer() {
        let (shares, start) = (CpuShares::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        let mut noisy = shares.enter(&tenant("noisy"), Tier::Pro, start);
        let mut more = shares.enter(&tenant("noisy"), Tier::Pro, start);
        assert_eq!(noisy.part(60 * SECOND, at(1)).held_to, None, "nobody else is there");
        let mut quiet = shares.enter(&tenant("quiet"), Tier::Pro, at(2));
        assert_eq!(noisy.part(60 * SECOND, at(3)).held_to, Some(HELD_MILLIS / 2));
        assert_eq!(more.part(0, at(3)).held_to, Some(HELD_MILLIS / 2), "builds share what is left");
        assert_eq!(quiet.part(SECOND, at(1_000)).held_to, None, "the lighter one is free");
        assert!(noisy.part(60 * SECOND, at(1_900)).held_to.is_some(), "it may wait for its disk");
        // It takes next to nothing: it waits, perhaps for the very one that is held back.
        quiet.part(SECOND + 1_000, at(1_900));
        assert_eq!(noisy.part(60 * SECOND, at(2_100)).held_to, None);
        quiet.part(SECOND + 101_000, at(2_200));
        assert!(noisy.part(60 * SECOND, at(2_300)).held_to.is_some(), "it works again");
        drop(quiet);
        assert_eq!(noisy.part(60 * SECOND, at(2_400)).held_to, None, "it has ended");
    }

    #[test]
    fn where_somebody_lighter_always_comes_a_build_is_held_back_half_of_its_time() {
        let (shares, start) = (CpuShares::default(), Instant::now());
        let mut noisy = shares.enter(&tenant("noisy"), Tier::Free, start);
        let (mut usecs, mut held) = (0, 0);
        for tick in 0..4 * 120 {
            let now = start + Duration::from_millis(250 * tick);
            // A new one each time: nobody has taken less.
            let _lighter = shares.enter(&tenant(&format!("t{tick}")), Tier::Free, now);
            usecs += SECOND / 2;
            held += u64::from(noisy.part(usecs, now).held_to.is_some());
        }
        // Ten seconds, and half of two minutes.
        assert!((4 * 65..4 * 75).contains(&held), "{held} quarters of a second of 120 s");
    }

    #[test]
    fn who_writes_takes_as_much_as_who_computes_and_who_waits_takes_nothing() {
        let (shares, start) = (CpuShares::default(), Instant::now());
        let mut all = ["computes", "writes", "waits"]
            .map(|name| shares.enter(&tenant(name), Tier::Free, start));
        let mut last = [WEIGHT_MAX; 3];
        for beat in 1..12 {
            let now = start + Duration::from_millis(250 * beat);
            let taken = [SECOND / 4 * beat, SECOND / 40 * beat, beat];
            for ((share, taken), last) in all.iter_mut().zip(taken).zip(&mut last) {
                *last = share.part(taken, now).weight;
            }
        }
        assert_eq!(last[0], last[1]);
        assert!(last[2] > WEIGHT_MAX / 100 * 99, "{last:?}");
    }

    #[test]
    fn equals_do_not_hold_each_other_back() {
        let (shares, start) = (CpuShares::default(), Instant::now());
        let mut one = shares.enter(&tenant("one"), Tier::Free, start);
        let mut other = shares.enter(&tenant("other"), Tier::Free, start);
        for beat in 1..400 {
            let (now, taken) = (start + Duration::from_millis(250 * beat), SECOND / 4 * beat);
            let parts = [one.part(taken, now), other.part(taken, now)];
            assert_eq!(parts.map(|part| part.held_to), [None, None], "after {beat} beats");
        }
    }

    #[tokio::test]
    async fn those_that_run_are_told_when_somebody_begins() {
        let shares = CpuShares::default();
        let told = shares.changed();
        tokio::pin!(told);
        let first = tokio::time::timeout(Duration::ZERO, told.as_mut()).await;
        assert!(first.is_err(), "nobody has begun");
        let _share = shares.enter(&tenant("t"), Tier::Free, Instant::now());
        tokio::time::timeout(Duration::from_secs(10), told).await.unwrap();
    }

    #[test]
    fn time_that_could_not_be_read_is_not_counted_twice() {
        let (shares, now) = (CpuShares::default(), Instant::now());
        let mut share = shares.enter(&tenant("t"), Tier::Pro, now);
        let part = share.part(SECOND, now);
        assert_eq!((share.part(0, now), share.part(SECOND, now)), (part, part));
    }

    #[test]
    fn what_was_taken_fades() {
        let (shares, start) = (CpuShares::default(), Instant::now());
        let mut share = shares.enter(&tenant("t"), Tier::Pro, start);
        let mut last = share.part(60 * SECOND, start).weight;
        for seconds in [10, 29, 30, 31, 59, 61, 120, 1_000] {
            let weight = share.part(60 * SECOND, start + Duration::from_secs(seconds)).weight;
            assert!(weight > last, "{weight} after {seconds} s, {last} before");
            last = weight;
        }
        let last = share.part(60 * SECOND, start + 100 * HALF_LIFE).weight;
        assert_eq!(last, WEIGHT_MAX);
    }

    #[test]
    fn builds_of_one_tenant_share_its_weight_and_leave_nothing() {
        let (shares, now) = (CpuShares::default(), Instant::now());
        let mut one = shares.enter(&tenant("t"), Tier::Free, now);
        let mut two = shares.enter(&tenant("t"), Tier::Free, now);
        let both = [one.part(0, now).weight, two.part(0, now).weight];
        assert_eq!(both, [WEIGHT_MAX / 2; 2]);
        drop(two);
        assert_eq!(one.part(0, now).weight, WEIGHT_MAX);
        drop(one);
        drop(shares.enter(&tenant("other"), Tier::Free, now));
        assert!(!lock(&shares.all).contains_key(&tenant("t")));
    }

    #[test]
    fn a_higher_tier_keeps_its_weight_for_longer() {
        let (shares, now) = (CpuShares::default(), Instant::now());
        let weight =
            |name: &str, tier| shares.enter(&tenant(name), tier, now).part(SECOND, now).weight;
        assert!(weight("one", Tier::Dedicated) > weight("other", Tier::Free));
    }
}
