//! When to try again and how long to wait before: exponential, without jitter, so that a test
//! sees the same waits as a user. A server's `Retry-After` wins within bounds.
//!
//! It does not know what is being tried.

use std::time::Duration;

use crate::error::PullError;
use crate::options::{RetryPolicy, Sleep};

/// The attempts at one thing from one server.
#[derive(Debug)]
pub(crate) struct Attempts {
    policy: RetryPolicy,
    sleep: Sleep,
    retries: u32,
    failures: u32,
}

impl Attempts {
    pub(crate) fn new(policy: RetryPolicy, sleep: Sleep, is_mirror: bool) -> Attempts {
        let retries = if is_mirror { policy.retries_mirror } else { policy.retries };
        Attempts { policy, sleep, retries, failures: 0 }
    }

    /// Waits until the next attempt, or gives the error back if there is to be none.
    pub(crate) async fn wait_or_give_up(&mut self, error: PullError) -> Result<(), PullError> {
        match self.next_wait(&error) {
            Some(wait) => {
                self.failures += 1;
                self.sleep.wait(wait).await;
                Ok(())
            }
            None => Err(error),
        }
    }

    /// Real progress was made: patience starts anew.
    pub(crate) fn forgive(&mut self) {
        self.failures = 0;
    }

    fn next_wait(&self, error: &PullError) -> Option<Duration> {
        if !error.is_retryable() || self.failures >= self.retries {
            return None;
        }
        let doubled = self.policy.wait_first.saturating_mul(1 << self.failures.min(20));
        let own = doubled.min(self.policy.wait_max);
        match error.retry_after() {
            Some(asked) if asked > self.policy.retry_after_max => None,
            Some(asked) => Some(asked.max(own)),
            None => Some(own),
        }
    }
}

/// Reads a `Retry-After` header: seconds, or a date that is compared with the `Date` of the
/// same answer, so that no clock of ours is asked.
pub(crate) fn retry_after(headers: &reqwest::header::HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let value = text(reqwest::header::RETRY_AFTER)?;
    if let Ok(seconds) = value.parse::<u32>() {
        return Some(Duration::from_secs(u64::from(seconds)));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let now = httpdate::parse_http_date(text(reqwest::header::DATE)?).ok()?;
    Some(until.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use reqwest::header::{DATE, HeaderMap, HeaderValue, RETRY_AFTER};

    use super::*;

    fn limited(seconds: Option<u64>) -> PullError {
        PullError::RateLimited {
            host: "h".to_owned(),
            retry_after: seconds.map(Duration::from_secs),
            message: String::new(),
        }
    }

    fn attempts(failures: u32) -> Attempts {
        let mut attempts = Attempts::new(RetryPolicy::default(), Sleep::default(), false);
        attempts.failures = failures;
        attempts
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let policy = RetryPolicy { retries: u32::MAX, ..RetryPolicy::default() };
        let mut attempts = Attempts::new(policy, Sleep::default(), false);
        let mut waits = Vec::new();
        for failures in [0, 1, 2, 5, 6, 31, 4_000_000] {
            attempts.failures = failures;
            waits.push(attempts.next_wait(&limited(None)).unwrap().as_millis());
        }
        assert_eq!(waits, [250, 500, 1000, 8000, 10_000, 10_000, 10_000]);
    }

    #[test]
    fn a_server_may_ask_for_more_patience_but_not_for_any_amount() {
        assert_eq!(attempts(0).next_wait(&limited(Some(7))), Some(Duration::from_secs(7)));
        assert_eq!(attempts(0).next_wait(&limited(Some(0))), Some(Duration::from_millis(250)));
        assert_eq!(attempts(0).next_wait(&limited(Some(61))), None);
    }

    #[test]
    fn the_number_of_attempts_is_bounded_and_some_errors_get_none() {
        assert!(attempts(4).next_wait(&limited(None)).is_some());
        assert!(attempts(5).next_wait(&limited(None)).is_none());
        let final_error = PullError::NotFound {
            host: "h".to_owned(),
            what: "x".to_owned(),
            message: String::new(),
        };
        assert!(attempts(0).next_wait(&final_error).is_none());
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_as_a_date_beside_the_servers_own() {
        let read = |value: &str, date: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_str(value).unwrap());
            if let Some(date) = date {
                headers.insert(DATE, HeaderValue::from_str(date).unwrap());
            }
            retry_after(&headers)
        };
        assert_eq!(read("120", None), Some(Duration::from_secs(120)));
        let (now, later) = ("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:30 GMT");
        assert_eq!(read(later, Some(now)), Some(Duration::from_secs(30)));
        assert_eq!(read(now, Some(later)), Some(Duration::ZERO));
        assert_eq!(read(later, None), None);
        assert_eq!(read("-5", None), None);
        assert_eq!(read("soon", Some(now)), None);
    }
}
