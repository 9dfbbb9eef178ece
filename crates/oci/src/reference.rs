//! Image references: `nginx`, `ghcr.io/a/b:tag`, `host:5000/x@sha256:…`.
//!
//! The grammar is that of github.com/distribution/reference with Docker Hub's short names.
//! This module knows names only; whether anything is there, it does not know.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

/// Docker Hub as it is written in references.
const HUB: &str = "docker.io";
/// Docker Hub as its API is reached.
const HUB_API: &str = "registry-1.docker.io";
const TAG_LENGTH_MAX: usize = 128;
/// `RepositoryNameTotalLengthMax` of distribution/reference, without the registry.
const REPOSITORY_LENGTH_MAX: usize = 255;
/// A registry host with its port; DNS allows 253 for the name.
const REGISTRY_LENGTH_MAX: usize = 261;

/// A fully qualified image reference: registry, repository, and a tag, a digest or both.
///
/// `Display` prints the canonical form, which parses to the same value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing was given.
    #[error("the image reference is empty")]
    Empty,
    /// A URL scheme stands in front.
    #[error("a reference has no scheme: leave out \"{0}://\"")]
    Scheme(String),
    /// The name has upper-case letters.
    #[error("repository name {0:?} must be lower case")]
    UpperCase(String),
    /// The repository does not follow the grammar.
    #[error("repository name {0:?} is not valid")]
    Repository(String),
    /// The name alone is 64 hex digits, which reads as an image id.
    #[error("{0:?} is an image id, not a name: ids exist only inside an engine")]
    ImageId(String),
    /// The registry host or port does not follow the grammar.
    #[error("registry {0:?} is not a host with an optional port")]
    Registry(String),
    /// The tag does not follow the grammar.
    #[error("tag {0:?} is not valid")]
    Tag(String),
    /// The repository name is too long.
    #[error("repository name is {0} bytes long, at most 255 are allowed")]
    TooLong(usize),
    /// The digest is malformed.
    #[error("the digest in the reference is not valid")]
    Digest(#[source] DigestError),
}

impl Reference {
    /// The registry as written in references, `docker.io` for Docker Hub, lower case.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The host (and port) that serves the registry's API.
    #[must_use]
    pub fn api_host(&self) -> &str {
        api_host(&self.registry)
    }

    /// The repository, `library/nginx` for Docker Hub's `nginx`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `latest` when neither tag nor digest was written.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest; it decides when there is a tag too.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What stands behind `/manifests/` in the registry's API: the digest if any, else the tag.
    #[must_use]
    pub fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

/// The host that serves the API of this registry.
pub(crate) fn api_host(registry: &str) -> &str {
    if registry == HUB { HUB_API } else { registry }
}

/// A registry name as users write it in options and docker configs, in our canonical form.
pub(crate) fn canonical_registry(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    match name.as_str() {
        "index.docker.io" | "registry-1.docker.io" => HUB.to_owned(),
        _ => name,
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(ReferenceError::Scheme(shown(scheme)));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(ReferenceError::Digest)?)),
            None => (text, None),
        };
        if Digest::from_hex(rest).is_some() {
            return Err(ReferenceError::ImageId(shown(rest)));
        }
        let (registry, rest) = split_registry(rest)?;
        // The first colon, so that a second one makes the tag wrong and is named as such.
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(checked_tag(tag)?)),
            None => (rest, None),
        };
        let repository = checked_repository(&registry, path)?;
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag,
        };
        Ok(Reference { registry, repository, tag, digest })
    }
}

/// Splits off the registry as Docker does: the part before the first `/` is one if it holds a
/// `.` or `:` or is `localhost`. Docker also takes an upper-case word for a host; we say that
/// names are lower case, which is what was meant.
fn split_registry(text: &str) -> Result<(String, &str), ReferenceError> {
    let Some((first, rest)) = text.split_once('/') else {
        return Ok((HUB.to_owned(), text));
    };
    if first != "localhost" && !first.contains(['.', ':']) {
        return Ok((HUB.to_owned(), text));
    }
    check_registry(first)?;
    Ok((canonical_registry(first), rest))
}

/// `host[:port]`: dot-separated labels of letters, digits and inner hyphens, or `[IPv6]`.
///
/// # Errors
/// [`ReferenceError::Registry`] for anything else, such as a URL.
pub fn check_registry(text: &str) -> Result<(), ReferenceError> {
    let bad = || ReferenceError::Registry(shown(text));
    if text.len() > REGISTRY_LENGTH_MAX {
        return Err(bad());
    }
    let (host_is_valid, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or_else(bad)?;
            (address.parse::<std::net::Ipv6Addr>().is_ok(), port)
        }
        None => {
            let at = text.find(':').unwrap_or(text.len());
            let (host, port) = text.split_at(at);
            (host.split('.').all(is_label), port)
        }
    };
    let port_is_valid = match port.strip_prefix(':') {
        Some(digits) => {
            digits.bytes().all(|b| b.is_ascii_digit())
                && digits.parse::<u16>().is_ok_and(|port| port != 0)
        }
        None => port.is_empty(),
    };
    if host_is_valid && port_is_valid { Ok(()) } else { Err(bad()) }
}

/// Whether a text can be a mirror: `host[:port][/path-prefix]`, without a scheme.
#[must_use]
pub fn is_mirror(text: &str) -> bool {
    mirror_parts(text).is_some()
}

/// Host and path of a mirror.
pub(crate) fn mirror_parts(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_end_matches('/');
    let (host, prefix) = text.split_once('/').unwrap_or((text, ""));
    let is_path = !text.contains('/') || prefix.split('/').all(is_component);
    (is_path && check_registry(host).is_ok()).then_some((host, prefix))
}

fn is_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn checked_tag(tag: &str) -> Result<String, ReferenceError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = tag.len() <= TAG_LENGTH_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if valid { Ok(tag.to_owned()) } else { Err(ReferenceError::Tag(shown(tag))) }
}

fn checked_repository(registry: &str, path: &str) -> Result<String, ReferenceError> {
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(ReferenceError::UpperCase(shown(path)));
    }
    if !path.split('/').all(is_component) {
        return Err(ReferenceError::Repository(shown(path)));
    }
    let repository = if registry == HUB && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if repository.len() > REPOSITORY_LENGTH_MAX {
        return Err(ReferenceError::TooLong(repository.len()));
    }
    Ok(repository)
}

/// `[a-z0-9]+` runs joined by `.`, `_`, `__` or any number of hyphens.
pub(crate) fn is_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends_are_alphanumeric = bytes.first().is_some_and(|b| alphanumeric(*b))
        && bytes.last().is_some_and(|b| alphanumeric(*b));
    ends_are_alphanumeric
        && component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).all(
            |separator| {
                matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            },
        )
}

fn shown(text: &str) -> String {
    text.chars().take(300).collect()
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn canonical(text: &str) -> String {
        text.parse::<Reference>().unwrap_or_else(|e| panic!("{text}: {e}")).to_string()
    }

    fn refused(text: &str) -> ReferenceError {
        text.parse::<Reference>().expect_err(text)
    }

    #[test]
    fn docker_hub_names_are_completed() {
        for (short, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
            ("registry-1.docker.io/library/nginx", "docker.io/library/nginx:latest"),
            ("docker.io/a/b/c:t", "docker.io/a/b/c:t"),
        ] {
            assert_eq!(canonical(short), full);
        }
        let nginx: Reference = "nginx".parse().unwrap();
        assert_eq!(nginx.api_host(), "registry-1.docker.io");
        assert_eq!(nginx.registry(), "docker.io");
    }

    #[test]
    fn a_dot_a_colon_or_localhost_makes_a_registry() {
        for (text, registry, repository) in [
            ("localhost/x", "localhost", "x"),
            ("localhost:5000/x/y", "localhost:5000", "x/y"),
            ("host:5000/x", "host:5000", "x"),
            ("ghcr.io/a/b", "ghcr.io", "a/b"),
            ("GHCR.io/a/b", "ghcr.io", "a/b"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000", "x"),
            ("[::1]:5000/x", "[::1]:5000", "x"),
            ("[::1]/x", "[::1]", "x"),
            ("host/x", "docker.io", "host/x"),
            ("localhosts/x", "docker.io", "localhosts/x"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.registry(), reference.repository()), (registry, repository));
        }
    }

    #[test]
    fn a_colon_without_a_slash_is_a_tag() {
        assert_eq!(canonical("localhost:5000"), "docker.io/library/localhost:5000");
    }

    #[test]
    fn a_digest_wins_over_a_tag_and_both_are_kept() {
        let both: Reference = format!("ghcr.io/a/b:v1@{DIGEST}").parse().unwrap();
        assert_eq!((both.tag(), both.selector()), (Some("v1"), DIGEST.to_owned()));
        let digest_only: Reference = format!("ghcr.io/a/b@{DIGEST}").parse().unwrap();
        assert_eq!((digest_only.tag(), digest_only.selector()), (None, DIGEST.to_owned()));
    }

    #[test]
    fn separators_follow_the_grammar() {
        for good in ["a.b", "a_b", "a__b", "a-b", "a---b", "a/b.c/d-e", "0a", "a0"] {
            canonical(good);
        }
        for bad in [
            "a..b",
            "a___b",
            "a._b",
            "-a",
            "a-",
            "a_",
            ".a",
            "a//b",
            "a/",
            "/a",
            "a b",
            "a/../b",
            "ä",
            "a%2f",
            "a\0",
            "a?b",
            "a#b",
            "a\\b",
            "ghcr.io/",
            "ghcr.io/a/.",
        ] {
            assert!(matches!(refused(bad), ReferenceError::Repository(_)), "{bad}");
        }
    }

    #[test]
    fn upper_case_repositories_are_refused_as_such() {
        for bad in ["Nginx", "Foo/bar", "ghcr.io/A/b", "localhost:5000/X"] {
            assert!(matches!(refused(bad), ReferenceError::UpperCase(_)), "{bad}");
        }
    }

    #[test]
    fn bad_registries_are_refused() {
        for bad in [
            "-a.io/x",
            "a-.io/x",
            "a..io/x",
            ".io/x",
            "a.io:/x",
            "a.io:0/x",
            "a.io:65536/x",
            "a.io:80a/x",
            "a_b.io/x",
            "[::1/x",
            "[nonsense]:1/x",
            "a.io:+1/x",
            "user:pw@a.io/x",
        ] {
            let error = refused(bad);
            let digest_like = bad.contains('@');
            assert!(
                matches!(error, ReferenceError::Registry(_))
                    || (digest_like && matches!(error, ReferenceError::Digest(_))),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn tags_follow_the_grammar() {
        canonical(&format!("a:{}", "x".repeat(128)));
        canonical("a:_1.2-3");
        for bad in ["a:", "a:-x", "a:.x", "a:x:y", "a:x/y", "a:x y", "a:é"] {
            assert!(
                matches!(refused(bad), ReferenceError::Tag(_) | ReferenceError::Registry(_)),
                "{bad}"
            );
        }
        assert!(matches!(refused(&format!("a:{}", "x".repeat(129))), ReferenceError::Tag(_)));
    }

    #[test]
    fn lengths_are_bounded() {
        canonical(&format!("ghcr.io/{}", "a".repeat(255)));
        assert_eq!(refused(&format!("ghcr.io/{}", "a".repeat(256))), ReferenceError::TooLong(256));
        assert!(matches!(
            refused(&format!("{}.io/a", "a".repeat(300))),
            ReferenceError::Registry(_)
        ));
    }

    #[test]
    fn image_ids_urls_and_nothing_are_refused_with_their_reason() {
        assert!(matches!(refused(&DIGEST[7..]), ReferenceError::ImageId(_)));
        assert!(matches!(refused("https://ghcr.io/a"), ReferenceError::Scheme(_)));
        assert_eq!(refused(""), ReferenceError::Empty);
        assert!(matches!(refused("a@sha256:xyz"), ReferenceError::Digest(_)));
        assert!(matches!(refused(&format!("a@{DIGEST}@{DIGEST}")), ReferenceError::Digest(_)));
    }

    proptest! {
        #[test]
        fn the_canonical_form_parses_to_the_same_reference(
            registry in prop_oneof![
                Just("docker.io".to_owned()),
                Just("localhost".to_owned()),
                Just("[fe80::1]:443".to_owned()),
                "[a-z0-9]{1,8}(-[a-z0-9]{1,4})?\\.[a-z]{2,5}(:[1-9][0-9]{0,3})?",
            ],
            path in "[a-z0-9]{1,6}(([._]|__|-{1,3})[a-z0-9]{1,6}){0,2}(/[a-z0-9]{1,6}){0,3}",
            tag in proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}"),
            digest in proptest::option::of(any::<[u8; 32]>()),
        ) {
            let mut text = format!("{registry}/{path}");
            if let Some(tag) = &tag { text.push_str(&format!(":{tag}")); }
            let digest = digest.map(Digest::from_bytes);
            if let Some(digest) = &digest { text.push_str(&format!("@{digest}")); }
            let parsed: Reference = text.parse().unwrap();
            prop_assert_eq!(parsed.digest(), digest);
            let again: Reference = parsed.to_string().parse().unwrap();
            prop_assert_eq!(again, parsed);
        }

        #[test]
        fn no_text_makes_the_parser_panic_and_what_it_accepts_is_stable(text in "\\PC{0,80}") {
            if let Ok(parsed) = text.parse::<Reference>() {
                prop_assert_eq!(parsed.to_string().parse::<Reference>().unwrap(), parsed);
            }
        }
    }
}
