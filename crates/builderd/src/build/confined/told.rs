//! An error on its way out of a worker: its words, and what they mean for whoever reads them.

use std::error::Error;

use serde::{Deserialize, Serialize};

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

/// The error and its causes in one line.
pub(in crate::build) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Phase;

    #[test]
    fn an_error_says_the_same_on_either_side() {
        let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = BuildError::Output { action: "write", path: "/x/rootfs.ext4".into(), source };
        let json = serde_json::to_string(&ToldError::of(&error)).unwrap();
        let told = BuildError::Told(serde_json::from_str(&json).unwrap());
        assert_eq!(chain(&told), chain(&error));
        assert_eq!(told.failure(Phase::Write), error.failure(Phase::Write));
        assert!(told.is_out_of_space());
    }
}
