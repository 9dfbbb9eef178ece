//! An error with everything that caused it, in one line: for logs, and for whoever is told why a
//! build failed. It does not know which errors there are.

use std::error::Error;

/// The error and its causes, the outermost first.
pub(crate) fn chain(error: &dyn Error) -> String {
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
    use crate::store::StoreError;

    #[test]
    fn every_cause_is_named_once_the_outermost_first() {
        let error = StoreError::Unavailable(sqlx::Error::PoolTimedOut);
        let inner = sqlx::Error::PoolTimedOut.to_string();
        assert_eq!(chain(&error), format!("the database is not available: {inner}"));
        assert_eq!(chain(&std::fmt::Error), std::fmt::Error.to_string());
    }
}
