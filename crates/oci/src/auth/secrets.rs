//! What was shown to get in, so that an answer that repeats it is not repeated by us.
//!
//! Registries say in errors what they were sent, and errors are logged and stored. A secret is
//! found as it is, in other case (a host name has but one), percent-encoded, escaped as in JSON,
//! and cut off by the end of the text. It does not find what was hashed or disguised, and is of
//! no use for texts of our own: a password may be a word of them.

use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret as _, SecretString};

use super::Credentials;

/// What stands where a secret stood.
const BLOT: &str = "***";
/// More of a foreign text is not looked at, and not shown.
const TEXT_CHARS_MAX: usize = 2048;
/// So much of a secret at the end of a text is taken for the secret cut off.
const CUT_CHARS_MIN: usize = 4;

/// Everything that one client has shown to somebody. `Debug` shows no secret.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Mutex<Vec<SecretString>>);

impl Secrets {
    /// Remembers credentials, and what they are in a header.
    pub(crate) fn learn(&self, credentials: &Credentials) {
        match credentials {
            Credentials::Password { username, password } => {
                let password = password.expose_secret();
                self.add(password);
                for text in [password.to_owned(), format!("{username}:{password}")] {
                    self.add(&STANDARD_NO_PAD.encode(&text));
                    self.add(&URL_SAFE_NO_PAD.encode(&text));
                }
            }
            Credentials::IdentityToken(token) | Credentials::RegistryToken(token) => {
                self.add(token.expose_secret());
            }
        }
    }

    /// Remembers the token of an `Authorization` header.
    pub(crate) fn learn_header(&self, authorization: &HeaderValue) {
        let text = authorization.to_str().unwrap_or_default();
        self.add(text.split_once(' ').map_or(text, |(_, token)| token).trim_end_matches('='));
    }

    fn add(&self, secret: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !secret.is_empty() && known.iter().all(|known| known.expose_secret() != secret) {
            known.push(SecretString::from(secret));
        }
    }

    /// A foreign text without secrets.
    pub(crate) fn blotted(&self, text: &str) -> String {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let spelled: Vec<Spelled> = known.iter().map(|s| Spelled::of(s.expose_secret())).collect();
        let end = text.char_indices().nth(TEXT_CHARS_MAX).map_or(text.len(), |(end, _)| end);
        let mut rest = text.get(..end).unwrap_or_default();
        let mut blotted = String::new();
        while let Some(first) = rest.chars().next() {
            let length = spelled.iter().filter_map(|secret| secret.length_in(rest)).max();
            match length {
                Some(_) => blotted.push_str(BLOT),
                None => blotted.push(first),
            }
            rest = rest.get(length.unwrap_or(first.len_utf8())..).unwrap_or_default();
        }
        blotted
    }
}

/// A secret's characters, each in all its spellings.
struct Spelled(Vec<Vec<String>>);

impl Spelled {
    fn of(secret: &str) -> Spelled {
        Spelled(secret.chars().map(spellings).collect())
    }

    /// How many bytes at the beginning of `text` are the secret; none if it does not stand there.
    fn length_in(&self, text: &str) -> Option<usize> {
        // The same bytes may be several spellings: all ways are gone at once.
        let mut ends = vec![0];
        for (count, spellings) in self.0.iter().enumerate() {
            let rest_of = |end: usize| text.get(end..).unwrap_or_default();
            // Nothing is left but a beginning of the next character, or not even that.
            let is_cut = |end: &usize| {
                let rest = rest_of(*end);
                let begun =
                    |spelling: &String| rest.len() < spelling.len() && begins(spelling, rest);
                spellings.iter().any(begun)
            };
            if count >= CUT_CHARS_MIN && ends.iter().any(is_cut) {
                return Some(text.len());
            }
            let next = ends.iter().flat_map(|end| {
                let here = spellings.iter().filter(|spelling| begins(rest_of(*end), spelling));
                here.map(move |spelling| end + spelling.len())
            });
            let mut next: Vec<usize> = next.collect();
            next.sort_unstable();
            next.dedup();
            if next.is_empty() {
                return None;
            }
            ends = next;
        }
        ends.pop()
    }
}

fn begins(text: &str, start: &str) -> bool {
    text.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start))
}

/// A character as it may stand in a text, a URL (RFC 3986, 2.1; a form's space) and JSON
/// (RFC 8259, 7).
fn spellings(char: char) -> Vec<String> {
    let (mut bytes, mut units) = ([0; 4], [0; 2]);
    let percent = char.encode_utf8(&mut bytes).bytes().map(|byte| format!("%{byte:02x}"));
    let escaped = char.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}"));
    let mut spellings = vec![char.to_string(), percent.collect(), escaped.collect()];
    let short = match char {
        ' ' => "+",
        '"' => "\\\"",
        '\\' => "\\\\",
        '/' => "\\/",
        '\n' => "\\n",
        '\r' => "\\r",
        '\t' => "\\t",
        _ => return spellings,
    };
    spellings.push(short.to_owned());
    spellings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knowing(secrets: &[&str]) -> Secrets {
        let known = Secrets::default();
        secrets.iter().for_each(|secret| known.add(secret));
        known
    }

    #[test]
    fn a_secret_is_found_in_all_its_spellings() {
        let known = knowing(&["hün ter\"2/%+"]);
        for spelling in [
            "hün ter\"2/%+",
            "HüN TER\"2/%+",
            "h%C3%BCn%20ter%222%2F%25%2B",
            "h%c3%bcn+ter%222/%25%2b",
            "h\\u00FCn ter\\\"2\\/%+",
        ] {
            assert_eq!(known.blotted(&format!("<{spelling}>")), "<***>", "{spelling}");
        }
        assert_eq!(known.blotted("hün ter"), "***", "cut off");
        assert_eq!(known.blotted("h\\u00fcn te\\u00"), "***", "cut off in an escape");
        assert_eq!(known.blotted("hün tür"), "hün tür");
        assert_eq!(known.blotted("the hün"), "the hün", "three letters are none");
    }

    #[test]
    fn the_longest_of_several_secrets_is_blotted() {
        let known = knowing(&["abc", "abcdef", "f"]);
        assert_eq!(known.blotted("xabcdefg abcg f"), "x***g ***g ***");
        assert_eq!(knowing(&[]).blotted("as it is"), "as it is");
    }

    #[test]
    fn credentials_are_found_as_the_header_has_them() {
        let known = Secrets::default();
        let password = SecretString::from("hun?>ter2");
        known.learn(&Credentials::Password { username: "me".into(), password });
        // The base64 of `me:hun?>ter2`, of `hun?>ter2`, and of the first in URLs.
        for echo in ["Basic bWU6aHVuPz50ZXIy", "aHVuPz50ZXIy", "hun%3F%3Eter2"] {
            let told = known.blotted(echo);
            assert!(told.ends_with("***") && !told.contains("IyI"), "{echo}: {told}");
        }
        known.learn_header(&HeaderValue::from_static("Bearer abc.def=="));
        assert_eq!(known.blotted("got bearer ABC.DEF=="), "got bearer ***==");
    }

    #[test]
    fn a_long_text_is_cut_and_none_of_a_secret_is_left_of_it() {
        let token = "0123456789".repeat(500);
        let known = knowing(&[&token]);
        assert_eq!(known.blotted(&token), "***");
        let long = "x".repeat(10 * TEXT_CHARS_MAX);
        assert_eq!(known.blotted(&long).len(), TEXT_CHARS_MAX);
    }
}
