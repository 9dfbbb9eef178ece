//! Tokens: asking for them, and remembering them until they expire.
//!
//! Specification: distribution `spec/auth/token.md` (GET) and `spec/auth/oauth.md` (POST with
//! a refresh token). It never logs, prints or returns a token as text.

use std::collections::HashMap;
use std::time::Duration;

use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::time::Instant;

/// The specification's default and minimum life of a token.
const LIFE_MIN: Duration = Duration::from_secs(60);
const LIFE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Tokens are renewed this long before they expire.
const MARGIN: Duration = Duration::from_secs(10);

/// An `Authorization` value that works for one host and repository.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) header: HeaderValue,
    pub(crate) with_credentials: bool,
    expires: Option<Instant>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default, deserialize_with = "super::secret")]
    token: Option<SecretString>,
    #[serde(default, deserialize_with = "super::secret")]
    access_token: Option<SecretString>,
    expires_in: Option<f64>,
}

/// What stands between a user and a password in the header, without leaving copies in `Debug`.
fn sensitive(scheme: &str, secret: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("{scheme} {secret}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The `Basic` value of RFC 7617.
pub(crate) fn basic(username: &str, password: &SecretString) -> Option<HeaderValue> {
    use base64::Engine as _;
    let pair = format!("{username}:{}", password.expose_secret());
    sensitive("Basic", &base64::engine::general_purpose::STANDARD.encode(pair))
}

impl Grant {
    /// A grant that lasts as long as the client.
    pub(crate) fn lasting(header: HeaderValue) -> Grant {
        Grant { header, with_credentials: true, expires: None }
    }

    /// A registry token from the user's own store.
    pub(crate) fn bearer(token: &SecretString) -> Option<Grant> {
        sensitive("Bearer", token.expose_secret()).map(Grant::lasting)
    }

    /// Reads a token server's answer that came at `now`.
    pub(crate) fn from_answer(bytes: &[u8], with_credentials: bool, now: Instant) -> Option<Grant> {
        let answer: Answer = serde_json::from_slice(bytes).ok()?;
        let token = answer.token.or(answer.access_token)?;
        let header = sensitive("Bearer", token.expose_secret())?;
        let named = Duration::try_from_secs_f64(answer.expires_in.unwrap_or_default());
        let life = named.unwrap_or_default().clamp(LIFE_MIN, LIFE_MAX);
        Some(Grant { header, with_credentials, expires: Some(now + life) })
    }

    fn is_usable(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| now + MARGIN < expires)
    }
}

/// Grants by host and repository.
#[derive(Debug, Default)]
pub(crate) struct Grants(HashMap<(String, String), Grant>);

impl Grants {
    /// The grant for a repository, if it is still good at `now`.
    pub(crate) fn get(&self, host: &str, repository: &str, now: Instant) -> Option<Grant> {
        let grant = self.0.get(&(host.to_owned(), repository.to_owned()))?;
        grant.is_usable(now).then(|| grant.clone())
    }

    /// Keeps a grant and forgets the expired ones.
    pub(crate) fn put(&mut self, host: &str, repository: &str, grant: Grant, now: Instant) {
        self.0.retain(|_, grant| grant.is_usable(now));
        self.0.insert((host.to_owned(), repository.to_owned()), grant);
    }

    /// Forgets a grant that was refused, unless another one has replaced it by now.
    pub(crate) fn forget(&mut self, host: &str, repository: &str, refused: &HeaderValue) {
        let key = (host.to_owned(), repository.to_owned());
        if self.0.get(&key).is_some_and(|grant| grant.header == *refused) {
            self.0.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(json: &str, now: Instant) -> Option<Grant> {
        Grant::from_answer(json.as_bytes(), false, now)
    }

    #[tokio::test]
    async fn tokens_live_as_long_as_they_say_within_bounds() {
        let now = Instant::now();
        let after = |json: &str, seconds| {
            grant(json, now).unwrap().is_usable(now + Duration::from_secs(seconds))
        };
        assert!(after(r#"{"token":"t","expires_in":300}"#, 280));
        assert!(!after(r#"{"token":"t","expires_in":300}"#, 295));
        assert!(after(r#"{"token":"t"}"#, 45));
        assert!(!after(r#"{"token":"t"}"#, 55));
        assert!(after(r#"{"token":"t","expires_in":-4}"#, 45));
        assert!(!after(r#"{"token":"t","expires_in":1e300}"#, 25 * 3600));
        assert!(after(r#"{"access_token":"t","expires_in":5}"#, 45));
    }

    #[tokio::test]
    async fn an_answer_without_a_token_is_none() {
        let now = Instant::now();
        for json in ["{}", "[]", "{\"token\":\"\"}", "{\"token\":1}", "{\"token\":\"a\\nb\"}", ""] {
            assert!(grant(json, now).is_none(), "{json}");
        }
    }

    #[tokio::test]
    async fn grants_are_kept_apart_by_host_and_repository() {
        let now = Instant::now();
        let mut grants = Grants::default();
        grants.put("h", "a", grant(r#"{"token":"t"}"#, now).unwrap(), now);
        assert!(grants.get("h", "a", now).is_some());
        assert!(grants.get("h", "b", now).is_none());
        assert!(grants.get("g", "a", now).is_none());
        assert!(grants.get("h", "a", now + LIFE_MIN).is_none());
    }

    #[tokio::test]
    async fn forgetting_a_refused_grant_spares_its_successor() {
        let now = Instant::now();
        let (old, new) = (r#"{"token":"old"}"#, r#"{"token":"new"}"#);
        let old = grant(old, now).unwrap();
        let mut grants = Grants::default();
        grants.put("h", "a", grant(new, now).unwrap(), now);
        grants.forget("h", "a", &old.header);
        let kept = grants.get("h", "a", now).unwrap();
        grants.forget("h", "a", &kept.header);
        assert!(grants.get("h", "a", now).is_none());
    }

    #[tokio::test]
    async fn no_secret_shows_in_debug() {
        let mut grants = Grants::default();
        let now = Instant::now();
        grants.put("h", "a", grant(r#"{"token":"hunter2"}"#, now).unwrap(), now);
        let password = SecretString::from("hunter2");
        let shown = format!("{grants:?} {:?} {password:?}", basic("u", &password));
        assert!(!shown.contains("hunter2") && !shown.contains("dTpodW50ZXIy"));
    }
}
