//! An error on its way out of a worker: its words, and what they mean for whoever reads them.

use std::error::Error;

use serde::{Deserialize, Serialize};

use super::claims::plain;
use crate::build::record::FailureCode;
use crate::build::{Blame, BuildError};

/// A [`BuildError`] as a worker told it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ToldError {
    words: Words,
    pub(in crate::build) blame: Blame,
    pub(in crate::build) code: FailureCode,
    pub(in crate::build) hint: Option<String>,
    pub(in crate::build) is_out_of_space: bool,
}

/// An error's text and its causes.
#[derive(Debug, Serialize, Deserialize)]
struct Words {
    text: String,
    cause: Option<Box<Words>>,
}

impl Words {
    fn of(error: &dyn Error) -> Self {
        let cause = error.source().map(|cause| Box::new(Self::of(cause)));
        Self { text: error.to_string(), cause }
    }
}

impl std::fmt::Display for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Words {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
    }
}

impl ToldError {
    pub(super) fn of(error: &BuildError) -> Self {
        Self {
            words: Words::of(error),
            blame: error.blame(),
            code: error.code(),
            hint: error.hint(),
            is_out_of_space: error.is_out_of_space(),
        }
    }
}

/// Causes that are passed on, and letters of each text.
const CAUSES_MAX: usize = 16;
const LETTERS_MAX: usize = 2000;

impl Words {
    fn checked(self, causes_max: usize) -> Self {
        let cause = self.cause.filter(|_| causes_max > 0);
        let cause = cause.map(|cause| Box::new(cause.checked(causes_max - 1)));
        Self { text: plain(&self.text, LETTERS_MAX), cause }
    }
}

impl ToldError {
    /// As it may be passed on: a worker that was taken over words it as it likes, and knows of no
    /// registry.
    pub(super) fn checked(self) -> Self {
        let code = match self.code {
            FailureCode::QuotaExceeded
            | FailureCode::InvalidSource
            | FailureCode::StorageFull
            | FailureCode::TemporaryResourceError
            | FailureCode::Internal => self.code,
            FailureCode::BuildTimeout
            | FailureCode::NetworkDenied
            | FailureCode::AuthenticationFailed
            | FailureCode::NetworkError
            | FailureCode::RegistryRateLimit => FailureCode::Internal,
        };
        let hint = self.hint.map(|hint| plain(&hint, LETTERS_MAX));
        Self { words: self.words.checked(CAUSES_MAX), code, hint, ..self }
    }
}

impl std::fmt::Display for ToldError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.words.fmt(f)
    }
}

impl Error for ToldError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.words.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Phase;
    use crate::causes::chain;

    #[test]
    fn an_error_says_the_same_on_either_side() {
        let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = BuildError::Output { action: "write", path: "/x/rootfs.ext4".into(), source };
        let json = serde_json::to_string(&ToldError::of(&error)).unwrap();
        let told: ToldError = serde_json::from_str(&json).unwrap();
        let told = BuildError::Told(told.checked());
        assert_eq!(chain(&told), chain(&error));
        assert_eq!(told.failure(Phase::Write), error.failure(Phase::Write));
        assert!(told.is_out_of_space());
        // What its command line says of a bug is nothing for whoever asked a service.
        let lost = BuildError::WorkerLost { phase: Phase::Layers };
        let told = BuildError::Told(ToldError::of(&lost).checked());
        assert_eq!(told.hint(), lost.hint());
        assert_eq!(told.failure(Phase::Layers), lost.failure(Phase::Layers));
    }

    #[test]
    fn the_words_of_a_worker_are_cut_and_steer_no_terminal() {
        let deep = (0..100).fold(None, |cause, _| {
            Some(Box::new(Words { text: "\u{1b}[2J\n".repeat(100_000), cause }))
        });
        let words = Words { text: "it".into(), cause: deep };
        let told = ToldError {
            words,
            blame: Blame::Yours,
            code: FailureCode::RegistryRateLimit,
            hint: Some("\u{7}".repeat(100_000)),
            is_out_of_space: false,
        };
        let failure = BuildError::Told(told.checked()).failure(Phase::Flatten);
        assert!(failure.cause.starts_with("it: \\u{1b}[2J\\n"), "{}", &failure.cause[..100]);
        assert!(failure.cause.len() < 200_000 && failure.remedy.len() < 20_000);
        assert!(!failure.cause.chars().chain(failure.remedy.chars()).any(char::is_control));
        assert_eq!(failure.code, FailureCode::Internal, "it has asked no registry");
    }
}
