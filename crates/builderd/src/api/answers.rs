//! Answers of `GetBuild` about builds that have ended, kept as they went out: such a build hardly
//! changes any more, and reading it from the database, making a message of it and writing that
//! costs many times what asking whether it changed does.
//!
//! Nothing here says whether an answer is still true: whoever takes one asks the database for the
//! build's [`Revision`] first, and for the permit to do so.

use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::v1;
use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError, Encodable};

use super::Answered;
use super::error::Answer;
use crate::store::Revision;
use crate::tenant::TenantId;

/// What all of them take together; the oldest make room.
const ANSWERS_BYTES_MAX: usize = 16 << 20;
/// One that is longer is not kept: it would take the place of many.
const ANSWER_BYTES_MAX: usize = 256 << 10;
/// What an answer takes beside its name and its bytes, generously.
const ENTRY_BYTES: usize = 384;

/// What was answered, to whom, in which format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    /// Whose build.
    pub(super) tenant: TenantId,
    /// Its id, as the request has it.
    pub(super) build: String,
    /// What the caller reads.
    pub(super) format: CodecFormat,
}

impl Hash for Name {
    /// The formats of an answer share one hash; they are told apart by being unequal.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.tenant.hash(state);
        self.build.hash(state);
    }
}

/// A message in the format that its caller reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    format: CodecFormat,
    bytes: Bytes,
}

impl Written {
    /// The message as it goes out.
    pub(super) fn of(message: &v1::GetBuildResponse, format: CodecFormat) -> Answered<Self> {
        let bytes = Encodable::<v1::GetBuildResponse>::encode(message, format);
        let bytes = bytes.map_err(|error| Answer::corrupt(&error.to_string()))?;
        Ok(Self { format, bytes })
    }
}

impl Encodable<v1::GetBuildResponse> for Written {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        if codec != self.format {
            let problem = format!("an answer in {:?} was wanted in {codec:?}", self.format);
            return Err(Answer::corrupt(&problem).into_connect());
        }
        Ok(self.bytes.clone())
    }
}

/// See the module.
pub(super) struct Answers {
    kept: Mutex<Kept>,
    bytes_max: usize,
}

#[derive(Default)]
struct Kept {
    answers: HashMap<Arc<Name>, Entry>,
    /// Which came when, oldest first.
    turns: BTreeMap<u64, Arc<Name>>,
    next_turn: u64,
    held_bytes: usize,
}

struct Entry {
    turn: u64,
    size_bytes: usize,
    revision: Revision,
    bytes: Bytes,
}

impl Answers {
    pub(super) fn new() -> Self {
        Self::up_to(ANSWERS_BYTES_MAX)
    }

    fn up_to(bytes_max: usize) -> Self {
        Self { kept: Mutex::default(), bytes_max }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // What a holder that panicked left half done are figures of what is held, at worst.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was answered last, and of which revision it is true.
    pub(super) fn get(&self, name: &Name) -> Option<(Revision, Written)> {
        let kept = self.kept();
        let entry = kept.answers.get(name)?;
        Some((entry.revision, Written { format: name.format, bytes: entry.bytes.clone() }))
    }

    /// Keeps what is answered about an ended build.
    pub(super) fn put(&self, name: Name, revision: Revision, written: &Written) {
        let names_bytes = name.tenant.as_str().len() + name.build.len();
        let size_bytes = ENTRY_BYTES + names_bytes + written.bytes.len();
        if size_bytes > ANSWER_BYTES_MAX.min(self.bytes_max) {
            return;
        }
        // What was written has more room than it takes; a copy has not.
        let bytes = Bytes::copy_from_slice(&written.bytes);
        let mut kept = self.kept();
        kept.remove(&name);
        while kept.held_bytes + size_bytes > self.bytes_max && kept.remove_oldest() {}
        let (name, turn) = (Arc::new(name), kept.next_turn);
        kept.next_turn += 1;
        kept.held_bytes += size_bytes;
        kept.turns.insert(turn, Arc::clone(&name));
        kept.answers.insert(name, Entry { turn, size_bytes, revision, bytes });
    }

    /// Forgets an answer that is no longer true.
    pub(super) fn forget(&self, name: &Name) {
        self.kept().remove(name);
    }
}

impl Kept {
    fn remove(&mut self, name: &Name) {
        if let Some(entry) = self.answers.remove(name) {
            self.turns.remove(&entry.turn);
            self.held_bytes -= entry.size_bytes;
        }
    }

    /// False if there is none.
    fn remove_oldest(&mut self) -> bool {
        let Some((_, name)) = self.turns.pop_first() else { return false };
        self.remove(&name);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 10_000;

    fn name(tenant: &str, build: u32, format: CodecFormat) -> Name {
        Name { tenant: tenant.parse().unwrap(), build: format!("build_{build:026}"), format }
    }

    fn proto(build: u32) -> Name {
        name("t", build, CodecFormat::Proto)
    }

    /// With much room behind it, as encoders leave it.
    fn written(length: usize) -> Written {
        let mut bytes = Vec::with_capacity(3 * length + 1);
        bytes.resize(length, 7);
        Written { format: CodecFormat::Proto, bytes: bytes.into() }
    }

    fn is_kept(answers: &Answers, name: &Name) -> bool {
        answers.get(name).is_some()
    }

    /// Asserts that the figures are right and the bound is kept; gives the number of answers.
    fn count(answers: &Answers) -> usize {
        let kept = answers.kept();
        let sizes = kept.answers.iter().map(|(name, entry)| {
            ENTRY_BYTES + name.tenant.as_str().len() + name.build.len() + entry.bytes.len()
        });
        assert_eq!(kept.held_bytes, sizes.sum::<usize>());
        assert!(kept.held_bytes <= answers.bytes_max, "{}", kept.held_bytes);
        assert_eq!(kept.turns.len(), kept.answers.len());
        kept.answers.len()
    }

    #[test]
    fn the_oldest_make_room_for_the_newest() {
        let answers = Answers::up_to(MAX);
        for build in 0..100 {
            answers.put(proto(build), Revision(0), &written(1000));
            count(&answers);
        }
        let fit = MAX / (ENTRY_BYTES + 33 + 1000);
        assert_eq!(count(&answers), fit);
        assert!(is_kept(&answers, &proto(99)) && !is_kept(&answers, &proto(0)));
        // Whoever is put again is new again, and counts once.
        let oldest = 100 - u32::try_from(fit).unwrap();
        for revision in 1..50 {
            answers.put(proto(oldest), Revision(revision), &written(1000));
        }
        assert_eq!(count(&answers), fit);
        answers.put(proto(100), Revision(0), &written(1000));
        assert!(is_kept(&answers, &proto(oldest)) && !is_kept(&answers, &proto(oldest + 1)));
        assert_eq!(answers.get(&proto(oldest)).unwrap(), (Revision(49), written(1000)));
        answers.forget(&proto(oldest));
        assert!(!is_kept(&answers, &proto(oldest)));
        assert_eq!(count(&answers), fit - 1);
    }

    #[test]
    fn what_would_take_the_place_of_many_is_not_kept() {
        let answers = Answers::up_to(MAX);
        answers.put(proto(1), Revision(0), &written(10));
        answers.put(proto(2), Revision(0), &written(MAX));
        assert!(is_kept(&answers, &proto(1)) && !is_kept(&answers, &proto(2)));
        let large = Answers::new();
        large.put(proto(1), Revision(0), &written(ANSWER_BYTES_MAX));
        assert_eq!(count(&large), 0);
    }

    #[test]
    fn an_answer_is_for_one_tenant_in_one_format() {
        let answers = Answers::up_to(MAX);
        answers.put(proto(1), Revision(0), &written(10));
        assert!(!is_kept(&answers, &name("other", 1, CodecFormat::Proto)));
        assert!(!is_kept(&answers, &name("t", 1, CodecFormat::Json)));
        assert!(is_kept(&answers, &proto(1)));
        assert!(written(10).encode(CodecFormat::Json).is_err());
    }
}
