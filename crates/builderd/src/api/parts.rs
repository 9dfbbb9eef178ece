//! PartCounts of artifacts that somebody asks for one after the other: the first leaves a row in the audit
//! log before its bytes go, those that follow within a while are counted, and the count is one more
//! row. So nobody fills the log by asking for one byte at a time, and nobody has bytes without a row.
//!
//! It knows the rows and not the requests; `audit` writes what it gives.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::build::record::Micros;
use crate::store::audit::{Action, AuditEntry, Author};
use crate::tenant::TenantId;

/// How long parts are counted together.
const TOGETHER: Duration = Duration::from_secs(600);
/// Counts that are kept at once; beyond that each part leaves a row of its own.
const COUNTS_MAX: usize = 10_000;

/// Whose parts of what are counted together. Another address may be another holder of a token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Whose {
    pub(super) tenant: TenantId,
    pub(super) credential: String,
    /// As addresses are counted.
    pub(super) from: Option<IpAddr>,
    pub(super) build: String,
}

/// What followed a part that left a row.
struct Following {
    since: Instant,
    count: u64,
    last: Author,
}

/// See the module.
#[derive(Default)]
pub(super) struct PartCounts(Mutex<HashMap<Whose, Following>>);

impl PartCounts {
    /// Counts a part; false if it needs a row of its own.
    pub(super) fn count(&self, whose: &Whose, author: &Author, now: Instant) -> bool {
        let mut all = self.all();
        let Some(following) = all.get_mut(whose).filter(|following| following.holds(now)) else {
            return false;
        };
        following.count += 1;
        following.last = author.clone();
        true
    }

    /// A part has left a row: those that follow are counted.
    pub(super) fn begin(&self, whose: Whose, author: Author, now: Instant) {
        let mut all = self.all();
        let has_room = all.len() < COUNTS_MAX;
        match all.entry(whose) {
            Entry::Occupied(mut of) => {
                // What was counted and is not told yet will be told with what follows. Where another
                // one came first at the same time, its time counts.
                if !of.get().holds(now) {
                    of.get_mut().since = now;
                }
            }
            Entry::Vacant(place) if has_room => {
                place.insert(Following { since: now, count: 0, last: author });
            }
            Entry::Vacant(_) => {}
        }
    }

    /// The rows of what is over; of everything, if that is to be all. They are told once.
    pub(super) fn over(&self, now: Instant, is_all: bool, at: Micros) -> Vec<AuditEntry> {
        let mut rows = Vec::new();
        self.all().retain(|whose, following| {
            let stays = !is_all && following.holds(now);
            if !stays && following.count > 0 {
                let object = format!("{}: parts, {} more", whose.build, following.count);
                let (tenant, action) = (Some(&whose.tenant), Action::ArtifactDownload);
                rows.push(AuditEntry::done(tenant, &following.last, action, &object, at));
            }
            stays
        });
        rows
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Whose, Following>> {
        // Nothing is half done in a map whose holder panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Following {
    fn holds(&self, now: Instant) -> bool {
        now.duration_since(self.since) < TOGETHER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whose(credential: &str, build: &str) -> Whose {
        let (tenant, from) = ("acme".parse().unwrap(), Some([10, 0, 0, 1].into()));
        Whose { tenant, credential: credential.into(), from, build: build.into() }
    }

    fn author(request: &str) -> Author {
        Author { subject: "tok_1".into(), request: request.into(), ..Author::default() }
    }

    #[test]
    fn parts_are_counted_together_for_a_while_and_for_nobody_else() {
        let (parts, now) = (PartCounts::default(), Instant::now());
        let one = whose("tok_1", "build_1");
        assert!(!parts.count(&one, &author("a"), now), "the first needs a row");
        parts.begin(one.clone(), author("a"), now);
        for _ in 0..5 {
            assert!(parts.count(&one, &author("b"), now + TOGETHER / 2));
        }
        let elsewhere = Whose { from: Some([10, 0, 0, 2].into()), ..one.clone() };
        for other in [whose("tok_2", "build_1"), whose("tok_1", "build_2"), elsewhere] {
            assert!(!parts.count(&other, &author("c"), now), "{other:?}");
        }
        assert_eq!(parts.over(now + TOGETHER / 2, false, Micros(7)), []);
        assert!(!parts.count(&one, &author("d"), now + TOGETHER), "it has begun anew");
        let rows = parts.over(now + TOGETHER, false, Micros(7));
        let object = "build_1: parts, 5 more";
        let tenant = "acme".parse().unwrap();
        let action = Action::ArtifactDownload;
        let row = AuditEntry::done(Some(&tenant), &author("b"), action, object, Micros(7));
        assert_eq!(rows, [row]);
        assert_eq!(parts.over(now + 2 * TOGETHER, true, Micros(7)), [], "told once");
    }

    #[test]
    fn parts_that_never_end_leave_a_row_now_and_then_and_none_is_forgotten() {
        let (parts, mut now, one) = (PartCounts::default(), Instant::now(), whose("tok_1", "b"));
        let (mut rows, each) = (0, Duration::from_secs(1));
        for _ in 0..3000 {
            if !parts.count(&one, &author("a"), now) {
                rows += 1;
                parts.begin(one.clone(), author("a"), now);
            }
            now += each;
        }
        assert_eq!(rows, 5, "50 minutes");
        let told = parts.over(now, true, Micros(7));
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].object, "b: parts, 2995 more");
    }

    #[test]
    fn what_is_counted_has_an_end_and_what_is_not_leaves_rows() {
        let (parts, now) = (PartCounts::default(), Instant::now());
        let builds = (0..=COUNTS_MAX).map(|number| whose("tok_1", &format!("build_{number}")));
        for build in builds {
            parts.begin(build, author("a"), now);
        }
        assert_eq!(parts.all().len(), COUNTS_MAX);
        let last = whose("tok_1", &format!("build_{COUNTS_MAX}"));
        assert!(!parts.count(&last, &author("a"), now), "one more leaves its own rows");
        assert!(parts.count(&whose("tok_1", "build_0"), &author("a"), now));
        assert_eq!(parts.over(now, true, Micros(1)).len(), 1, "what nothing followed is told");
    }
}
