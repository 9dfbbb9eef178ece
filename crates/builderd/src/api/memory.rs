//! What the database said of callers a moment ago: most requests come from who was here before,
//! and asking again each time costs more than the answer to many of them.
//!
//! Nothing is believed for longer than [`REMEMBERED_SECS`], so that a token that is revoked, or a
//! tenant whose tier changes, is known everywhere after that time.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::build::record::Micros;

/// How long an answer is believed.
pub(crate) const REMEMBERED_SECS: u64 = 1;
/// Callers that are remembered at once; more are asked for each time.
const CALLERS_MAX: usize = 10_000;

/// See the module.
pub(super) struct Memory<K, V> {
    answers: Mutex<HashMap<K, (Micros, V)>>,
}

impl<K: Eq + Hash, V: Clone> Memory<K, V> {
    pub(super) fn new() -> Self {
        Self { answers: Mutex::default() }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<K, (Micros, V)>> {
        // Nothing is half done in a map whose holder panicked.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was said of `key`, if that is not too long ago.
    pub(super) fn get<Q>(&self, key: &Q, now: Micros) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let answers = self.answers();
        let (until, answer) = answers.get(key)?;
        // A clock that was set back must not make it last.
        let is_fresh = now < *until && *until <= now.plus_secs(REMEMBERED_SECS);
        is_fresh.then(|| answer.clone())
    }

    pub(super) fn put(&self, key: K, answer: V, now: Micros) {
        let mut answers = self.answers();
        if answers.len() >= CALLERS_MAX {
            answers.retain(|_, (until, _)| now < *until);
        }
        if answers.len() < CALLERS_MAX {
            answers.insert(key, (now.plus_secs(REMEMBERED_SECS), answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_believed_for_longer_than_a_second() {
        let memory = Memory::new();
        let then = Micros(1_700_000_000_000_000);
        memory.put("a", 1, then);
        assert_eq!(memory.get(&"a", then), Some(1));
        assert_eq!(memory.get(&"b", then), None);
        assert_eq!(memory.get(&"a", Micros(then.0 + 999_999)), Some(1));
        assert_eq!(memory.get(&"a", then.plus_secs(1)), None);
        // Set back by an hour.
        assert_eq!(memory.get(&"a", Micros(then.0 - 3_600_000_000)), None);
    }

    #[test]
    fn no_more_are_remembered_than_may_be() {
        let memory = Memory::new();
        let then = Micros(1_700_000_000_000_000);
        for caller in 0..CALLERS_MAX + 5 {
            memory.put(caller, caller, then);
        }
        assert_eq!(memory.answers().len(), CALLERS_MAX);
        assert_eq!(memory.get(&(CALLERS_MAX + 1), then), None);
        let later = then.plus_secs(2);
        memory.put(CALLERS_MAX + 1, 7, later);
        assert_eq!(memory.get(&(CALLERS_MAX + 1), later), Some(7));
        assert_eq!(memory.answers().len(), 1);
    }
}
