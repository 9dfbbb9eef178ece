//! A build's state machine: [`BuildState::next`] and nothing else decides what may follow what.
//!
//! Pure: no clock, no database. The store writes a state only as the answer of `next`, by one
//! compare-and-set.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a build stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BuildState {
    /// Accepted, waiting for a worker.
    Queued,
    /// The image is resolved.
    Preparing,
    /// Layers stream into packs.
    Downloading,
    /// Layers become a tree, the tree an image.
    Building,
    /// The image is compressed.
    Optimizing,
    /// The artifact is handed to the store.
    Packaging,
    /// The artifact is there.
    Completed,
    /// It ended without an artifact; the failure says why.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
    /// It took longer than it may.
    Timeout,
}

/// What happens to a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A worker takes it from the queue.
    Claimed,
    /// The worker enters a step.
    Entered(BuildState),
    /// The artifact is published.
    Published,
    /// It cannot be finished.
    Failed,
    /// It goes back to the queue: the worker died, shuts down, or met a failure that may pass.
    Released,
    /// Somebody cancelled it.
    Cancelled,
    /// Its time is up.
    TimedOut,
}

/// Something that cannot happen in that state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{happening:?} cannot happen to a build that is {state}")]
pub struct IllegalTransition {
    /// Where the build stands.
    pub state: BuildState,
    /// What was to happen.
    pub happening: Happening,
}

impl BuildState {
    /// Every state, in the order of a build's life.
    pub const ALL: [Self; 10] = [
        Self::Queued,
        Self::Preparing,
        Self::Downloading,
        Self::Building,
        Self::Optimizing,
        Self::Packaging,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Timeout,
    ];

    /// The state after `happening`.
    ///
    /// # Errors
    /// [`IllegalTransition`] when that cannot happen here; nothing leaves an ended build.
    pub fn next(self, happening: Happening) -> Result<Self, IllegalTransition> {
        use BuildState as State;
        let illegal = Err(IllegalTransition { state: self, happening });
        match (self, happening) {
            // Queued → Preparing | Cancelled | Failed
            (State::Queued, Happening::Claimed) => Ok(State::Preparing),
            (State::Queued, Happening::Cancelled) => Ok(State::Cancelled),
            // Its workers died too often; see the queue's limit of attempts.
            (State::Queued, Happening::Failed) => Ok(State::Failed),
            (State::Queued, _) => illegal,

            // running → the same or a later step | Queued | Completed (from Packaging) | Failed
            //         | Cancelled | Timeout
            (step, Happening::Entered(to)) if step.is_running() && to.is_running() => {
                // A step is never entered twice but by the same worker's repeated word, and a
                // build never goes back but through the queue.
                if to >= step { Ok(to) } else { illegal }
            }
            (State::Packaging, Happening::Published) => Ok(State::Completed),
            (step, Happening::Failed) if step.is_running() => Ok(State::Failed),
            (step, Happening::Released) if step.is_running() => Ok(State::Queued),
            (step, Happening::Cancelled) if step.is_running() => Ok(State::Cancelled),
            (step, Happening::TimedOut) if step.is_running() => Ok(State::Timeout),

            // Completed, Failed, Cancelled, Timeout → nothing
            _ => illegal,
        }
    }

    /// Whether a worker has it.
    pub fn is_running(self) -> bool {
        match self {
            Self::Preparing
            | Self::Downloading
            | Self::Building
            | Self::Optimizing
            | Self::Packaging => true,
            Self::Queued | Self::Completed | Self::Failed | Self::Cancelled | Self::Timeout => {
                false
            }
        }
    }

    /// Whether it has ended, and so stays as it is.
    pub fn is_terminal(self) -> bool {
        self != Self::Queued && !self.is_running()
    }

    /// The state's name in the database and in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Downloading => "downloading",
            Self::Building => "building",
            Self::Optimizing => "optimizing",
            Self::Packaging => "packaging",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Timeout => "timeout",
        }
    }
}

impl fmt::Display for BuildState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for BuildState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|state| state.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no state of a build"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn happenings() -> Vec<Happening> {
        let entered = BuildState::ALL.into_iter().map(Happening::Entered);
        [
            Happening::Claimed,
            Happening::Published,
            Happening::Failed,
            Happening::Released,
            Happening::Cancelled,
            Happening::TimedOut,
        ]
        .into_iter()
        .chain(entered)
        .collect()
    }

    #[test]
    fn the_whole_table() {
        let mut table = String::new();
        for state in BuildState::ALL {
            for happening in happenings() {
                if let Ok(to) = state.next(happening) {
                    table.push_str(&format!("{state} --{happening:?}-> {to}\n"));
                }
            }
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/state.txt");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(table, written, "docs/state.txt is not the table");
    }

    #[test]
    fn nothing_leaves_an_ended_build() {
        for state in BuildState::ALL.into_iter().filter(|state| state.is_terminal()) {
            for happening in happenings() {
                assert_eq!(state.next(happening), Err(IllegalTransition { state, happening }));
            }
        }
    }

    #[test]
    fn every_state_has_its_own_name() {
        for state in BuildState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
    }
}
