//! Docker's `config.json`: where `docker login` leaves credentials.
//!
//! Format: docker/cli `cli/config/configfile`, with the path-scoped keys of containers/image
//! `containers-auth.json(5)`. It does not decide to whom credentials are sent.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::{Credentials, HelperError};
use crate::reference::{canonical_registry, check_registry};

const FILE_BYTES_MAX: u64 = 4 << 20;
/// The key under which Docker keeps the credentials of Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// Why stored credentials are of no use.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a docker config. What is wrong is not shown: it might be a secret.
    #[error("{} is not a docker config (line {line})", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
    },
    /// An `auth` value is not base64 of `user:password`.
    #[error("the auth entry of {registry:?} in {} is not base64 of user:password", path.display())]
    Auth {
        /// The file.
        path: PathBuf,
        /// The entry.
        registry: String,
    },
    /// A credential helper failed.
    #[error("the credential helper failed")]
    Helper(#[from] HelperError),
}

/// A docker config, with everything it has for registries.
#[derive(Debug, Default)]
pub(crate) struct DockerConfig {
    path: PathBuf,
    file: File,
}

#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    auths: Option<BTreeMap<String, Option<Entry>>>,
    #[serde(default)]
    cred_helpers: Option<BTreeMap<String, String>>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Deserialize, Default, Debug, Clone)]
#[serde(default)]
struct Entry {
    #[serde(deserialize_with = "super::secret")]
    auth: Option<SecretString>,
    username: Option<String>,
    #[serde(deserialize_with = "super::secret")]
    password: Option<SecretString>,
    #[serde(deserialize_with = "super::secret")]
    identitytoken: Option<SecretString>,
    #[serde(deserialize_with = "super::secret")]
    registrytoken: Option<SecretString>,
}

/// A helper and the address to ask it about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HelperQuestion {
    pub(crate) helper: String,
    pub(crate) server: String,
}

impl DockerConfig {
    /// Reads the file; one that does not exist counts as empty.
    pub(crate) fn read(path: &Path) -> Result<DockerConfig, CredentialsError> {
        let failed = |source| CredentialsError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        match std::fs::File::open(path) {
            Ok(file) => file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(DockerConfig::default());
            }
            Err(error) => return Err(failed(error)),
        };
        let malformed = |error: serde_json::Error| CredentialsError::Malformed {
            path: path.to_owned(),
            line: error.line(),
        };
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(DockerConfig::default());
        }
        let file = serde_json::from_slice(&bytes).map_err(malformed)?;
        Ok(DockerConfig { path: path.to_owned(), file })
    }

    /// The helper that is responsible for a registry, the specific one first.
    pub(crate) fn helper(&self, registry: &str) -> Option<HelperQuestion> {
        let server = if registry == "docker.io" { HUB_KEY } else { registry }.to_owned();
        let helpers = self.file.cred_helpers.iter().flatten();
        let mut helpers = helpers.filter(|(key, _)| canonical_registry(host_of(key)) == registry);
        let helper = helpers.next().map(|(_, helper)| helper).or(self.file.creds_store.as_ref())?;
        (!helper.is_empty()).then(|| HelperQuestion { helper: helper.clone(), server })
    }

    /// The credentials kept in the file itself for a repository of a registry: of all keys
    /// that fit, the longest path.
    pub(crate) fn stored(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Option<Credentials>, CredentialsError> {
        let auths = self.file.auths.iter().flatten();
        let fitting = auths.filter_map(|(key, entry)| {
            let length = fit(key, registry, repository)?;
            let credentials = self.credentials(key, entry.as_ref()?).transpose()?;
            Some((length, credentials))
        });
        let best = fitting.max_by_key(|(length, _)| *length);
        best.map(|(_, credentials)| credentials).transpose()
    }

    fn credentials(
        &self,
        key: &str,
        entry: &Entry,
    ) -> Result<Option<Credentials>, CredentialsError> {
        if let Some(token) = &entry.identitytoken {
            return Ok(Some(Credentials::IdentityToken(token.clone())));
        }
        if let Some(token) = &entry.registrytoken {
            return Ok(Some(Credentials::RegistryToken(token.clone())));
        }
        if let Some(auth) = &entry.auth {
            let bad =
                || CredentialsError::Auth { path: self.path.clone(), registry: key.to_owned() };
            return decoded(auth.expose_secret()).map(Some).ok_or_else(bad);
        }
        let username = entry.username.clone().filter(|name| !name.is_empty());
        Ok(username
            .zip(entry.password.clone())
            .map(|(username, password)| Credentials::Password { username, password }))
    }
}

fn decoded(auth: &str) -> Option<Credentials> {
    let bytes = STANDARD.decode(auth.trim()).ok()?;
    let text = SecretString::from(String::from_utf8(bytes).ok()?);
    let (username, password) = text.expose_secret().split_once(':')?;
    // Docker pads what it wrote with NUL bytes.
    let password = SecretString::from(password.trim_end_matches('\0'));
    Some(Credentials::Password { username: username.to_owned(), password })
}

fn without_scheme(key: &str) -> &str {
    key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key)
}

fn host_of(key: &str) -> &str {
    without_scheme(key).split('/').next().unwrap_or_default()
}

/// Host and path of a key; the path of a registry as a whole is empty.
fn host_and_path(key: &str) -> (&str, &str) {
    let (host, path) = without_scheme(key).split_once('/').unwrap_or((without_scheme(key), ""));
    match path.trim_matches('/') {
        "" | "v1" | "v2" => (host, ""),
        path => (host, path),
    }
}

/// The registry that is called so where credentials are written down, in the form that
/// [`Reference::registry`](crate::Reference::registry) has: `https://index.docker.io/v1/` is
/// `docker.io`. None for what is not a registry as a whole.
#[must_use]
pub fn registry_named(key: &str) -> Option<String> {
    match host_and_path(key) {
        (host, "") if check_registry(host).is_ok() => Some(canonical_registry(host)),
        _ => None,
    }
}

/// How many bytes of path a key has that fits the repository; none if it does not fit.
fn fit(key: &str, registry: &str, repository: &str) -> Option<usize> {
    let (host, path) = host_and_path(key);
    if canonical_registry(host) != registry {
        return None;
    }
    if path.is_empty() {
        return Some(0);
    }
    let rest = repository.strip_prefix(path)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(path.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> DockerConfig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        DockerConfig::read(&path).unwrap()
    }

    fn user(config: &DockerConfig, registry: &str, repository: &str) -> Option<(String, String)> {
        match config.stored(registry, repository).unwrap()? {
            Credentials::Password { username, password } => {
                Some((username, password.expose_secret().to_owned()))
            }
            Credentials::IdentityToken(token) => {
                Some(("identity".to_owned(), token.expose_secret().to_owned()))
            }
            Credentials::RegistryToken(token) => {
                Some(("registry".to_owned(), token.expose_secret().to_owned()))
            }
        }
    }

    #[test]
    fn every_way_to_write_credentials_is_read() {
        let config = config(&format!(
            r#"{{"auths": {{
                "https://index.docker.io/v1/": {{"auth": "{}"}},
                "ghcr.io": {{"username": "u", "password": "p"}},
                "https://host:5000": {{"identitytoken": "t", "auth": "{}"}},
                "reg.example/v2/": {{"registrytoken": "r"}},
                "empty.example": {{}}, "null.example": null
            }}, "HttpHeaders": {{"X": "y"}}, "detachKeys": "ctrl-a"}}"#,
            STANDARD.encode("me:se:cret\0\0"),
            STANDARD.encode("<token>:"),
        ));
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(user(&config, "docker.io", "library/nginx"), pair("me", "se:cret"));
        assert_eq!(user(&config, "ghcr.io", "a/b"), pair("u", "p"));
        assert_eq!(user(&config, "host:5000", "x"), pair("identity", "t"));
        assert_eq!(user(&config, "reg.example", "x"), pair("registry", "r"));
        for registry in ["host", "host:5001", "empty.example", "null.example", "io"] {
            assert_eq!(user(&config, registry, "x"), None, "{registry}");
        }
    }

    #[test]
    fn a_registry_has_many_names() {
        for (key, registry) in [
            (HUB_KEY, "docker.io"),
            ("index.docker.io", "docker.io"),
            ("https://registry-1.docker.io/v2/", "docker.io"),
            ("docker.io", "docker.io"),
            ("https://GHCR.io/", "ghcr.io"),
            ("http://localhost:5000", "localhost:5000"),
            ("[::1]:5000", "[::1]:5000"),
        ] {
            assert_eq!(registry_named(key).as_deref(), Some(registry), "{key}");
        }
        for key in ["", "https://", "gcr.io/project", "ftp://gcr.io", "a b", "gcr.io:0", "/v1/"] {
            assert_eq!(registry_named(key), None, "{key:?}");
        }
    }

    #[test]
    fn credentials_for_a_namespace_serve_that_namespace_alone() {
        let auth = |user: &str| STANDARD.encode(format!("{user}:p"));
        let config = config(&format!(
            r#"{{"auths": {{"quay.io/team": {{"auth": "{}"}}, "quay.io/team/app": {{"auth": "{}"}}}}}}"#,
            auth("team"),
            auth("app"),
        ));
        let name = |repository| user(&config, "quay.io", repository).map(|(name, _)| name);
        assert_eq!(name("team/x").as_deref(), Some("team"));
        assert_eq!(name("team/app").as_deref(), Some("app"));
        assert_eq!(name("team/app/x").as_deref(), Some("app"));
        assert_eq!(name("teamster/x"), None);
        assert_eq!(name("other"), None);
    }

    #[test]
    fn the_specific_helper_wins_over_the_general_one() {
        let config = config(
            r#"{"credHelpers": {"gcr.io": "gcloud", "index.docker.io": "hub"}, "credsStore": "pass"}"#,
        );
        let question = |registry| config.helper(registry).map(|q| (q.helper, q.server));
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(question("gcr.io"), pair("gcloud", "gcr.io"));
        assert_eq!(question("ghcr.io"), pair("pass", "ghcr.io"));
        assert_eq!(question("docker.io"), pair("hub", HUB_KEY));
    }

    #[test]
    fn a_missing_or_empty_file_is_an_empty_config() {
        let missing = DockerConfig::read(Path::new("/nonexistent/config.json")).unwrap();
        assert!(missing.stored("docker.io", "x").unwrap().is_none());
        assert!(config(" \n").helper("docker.io").is_none());
        assert!(config(r#"{"auths": null, "credsStore": ""}"#).helper("docker.io").is_none());
    }

    #[test]
    fn a_broken_file_or_entry_is_named_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "{\"auths\": {\"h\": {\"auth\": hunter2}}}").unwrap();
        let error = DockerConfig::read(&path).unwrap_err();
        assert!(matches!(error, CredentialsError::Malformed { line: 1, .. }));
        assert!(!format!("{error:?}").contains("hunter2"));
        for auth in ["hunter2", &STANDARD.encode("hunter2")] {
            let config = config(&format!(r#"{{"auths": {{"h.io": {{"auth": "{auth}"}}}}}}"#));
            let error = config.stored("h.io", "x").unwrap_err();
            assert!(matches!(error, CredentialsError::Auth { .. }));
            assert!(!format!("{error:?} {error}").contains("hunter2"));
            assert!(!format!("{config:?}").contains("hunter2"));
        }
    }
}
