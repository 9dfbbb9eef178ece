//! An error with everything that caused it: for logs, and for whoever is told why a command or a build
//! failed. It does not know which errors there are.

use std::error::Error;

/// The error and its causes, the outermost first, but for those whose words end what is said before
/// them: some errors say in their own text what their cause is.
pub(crate) fn causes(error: &dyn Error) -> Vec<String> {
    let (mut all, mut next) = (vec![error.to_string()], error.source());
    while let Some(cause) = next {
        let words = cause.to_string();
        if !all.last().is_some_and(|last| last.ends_with(&words)) {
            all.push(words);
        }
        next = cause.source();
    }
    all
}

/// The same in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    causes(error).join(": ")
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
        let problem = "it has not answered for 5 s";
        let lost = sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, problem));
        let said = chain(&StoreError::Unavailable(lost));
        assert_eq!(said.matches(problem).count(), 1, "{said}");
        assert_eq!(chain(&std::fmt::Error), std::fmt::Error.to_string());
    }
}
