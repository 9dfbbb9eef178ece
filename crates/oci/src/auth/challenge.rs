//! Reading `WWW-Authenticate`. It does not answer it.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// What a registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from `realm` (Docker registry token authentication specification).
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
    /// User name and password with each request.
    Basic,
}

/// The best challenge among those offered: a token before a password.
pub(crate) fn best(headers: &HeaderMap) -> Option<Challenge> {
    let values = headers.get_all(WWW_AUTHENTICATE).iter().take(8);
    let offered: Vec<Challenge> =
        values.filter_map(|value| value.to_str().ok()).flat_map(read).collect();
    let bearer = offered.iter().find(|challenge| **challenge != Challenge::Basic);
    bearer.or(offered.first()).cloned()
}

fn read(value: &str) -> Vec<Challenge> {
    let parsed = http_auth::parse_challenges(value).unwrap_or_default();
    parsed.iter().filter_map(known).collect()
}

fn known(challenge: &http_auth::ChallengeRef<'_>) -> Option<Challenge> {
    let parameter = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
    };
    if challenge.scheme.eq_ignore_ascii_case("bearer") {
        let (service, scope) = (parameter("service"), parameter("scope"));
        return Some(Challenge::Bearer { realm: parameter("realm")?, service, scope });
    }
    challenge.scheme.eq_ignore_ascii_case("basic").then_some(Challenge::Basic)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        best(&headers)
    }

    #[test]
    fn docker_hubs_challenge_is_understood() {
        let hub = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",\
                   scope=\"repository:library/nginx:pull\"";
        let expected = Challenge::Bearer {
            realm: "https://auth.docker.io/token".to_owned(),
            service: Some("registry.docker.io".to_owned()),
            scope: Some("repository:library/nginx:pull".to_owned()),
        };
        assert_eq!(of(&[hub]), Some(expected));
    }

    #[test]
    fn a_token_is_preferred_to_a_password_wherever_it_stands() {
        let bearer = |challenge| matches!(challenge, Some(Challenge::Bearer { .. }));
        assert!(bearer(of(&["Basic realm=\"x\", Bearer realm=\"https://t\""])));
        assert!(bearer(of(&["Basic realm=\"x\"", "bearer Realm=\"https://t\""])));
        assert_eq!(of(&["Basic realm=\"x\""]), Some(Challenge::Basic));
    }

    #[test]
    fn what_cannot_be_answered_is_no_challenge() {
        for values in [
            &[][..],
            &["Bearer"],
            &["Bearer realm=\"\""],
            &["Negotiate"],
            &["=,=,\"\""],
            &["Bearer realm=\"unterminated"],
        ] {
            assert_eq!(of(values), None, "{values:?}");
        }
    }
}
