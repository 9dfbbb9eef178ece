//! Docker credential helpers: the only place of this crate that starts a process.
//!
//! Protocol: github.com/docker/docker-credential-helpers. The server address goes to the
//! helper's standard input, the answer is JSON on its standard output. The helper is found in
//! `PATH` by its checked name, runs with this process's environment, and is killed when it
//! takes too long. It does not know what the credentials are used for.

use std::process::Stdio;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::Credentials;

const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Why a credential helper gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The name could be a path.
    #[error(
        "credential helper name {0:?} has characters other than letters, digits, '.', '-' and '_'"
    )]
    Name(String),
    /// It cannot be started.
    #[error("cannot run docker-credential-{name}: is it installed and in PATH?")]
    Start {
        /// The helper.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// Talking to it failed.
    #[error("cannot talk to docker-credential-{name}")]
    Talk {
        /// The helper.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// It takes too long.
    #[error("docker-credential-{name} did not answer within {} seconds", waited.as_secs_f32())]
    Timeout {
        /// The helper.
        name: String,
        /// How long we waited.
        waited: Duration,
    },
    /// It failed.
    #[error("docker-credential-{name} failed: {message}")]
    Failed {
        /// The helper.
        name: String,
        /// The first line it printed.
        message: String,
    },
    /// Its answer is not the JSON of the protocol.
    #[error("docker-credential-{name} gave an answer that is not understood")]
    Answer {
        /// The helper.
        name: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default, deserialize_with = "super::secret")]
    secret: Option<SecretString>,
}

/// Asks `docker-credential-<name>` for the credentials of `server`; none if it has none.
pub(crate) async fn get(
    name: &str,
    server: &str,
    patience: Duration,
) -> Result<Option<Credentials>, HelperError> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(valid) {
        return Err(HelperError::Name(name.chars().take(100).collect()));
    }
    match tokio::time::timeout(patience, ask(name, server)).await {
        Ok(answer) => answer,
        Err(_elapsed) => Err(HelperError::Timeout { name: name.to_owned(), waited: patience }),
    }
}

async fn ask(name: &str, server: &str) -> Result<Option<Credentials>, HelperError> {
    let talk = |source| HelperError::Talk { name: name.to_owned(), source };
    let mut child = command(name)
        .spawn()
        .map_err(|source| HelperError::Start { name: name.to_owned(), source })?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that needs no question may be gone already: its answer decides.
        let _ = input.write_all(format!("{server}\n").as_bytes()).await;
    }
    let output = read_bounded(child.stdout.take()).await.map_err(talk)?;
    let status = child.wait().await.map_err(talk)?;
    if !status.success() {
        return refusal(name, &String::from_utf8_lossy(&output));
    }
    let unclear = |_| HelperError::Answer { name: name.to_owned() };
    let answer: Answer = serde_json::from_slice(&output).map_err(unclear)?;
    let Answer { username, secret } = answer;
    Ok(secret.map(|secret| match username.as_str() {
        "<token>" => Credentials::IdentityToken(secret),
        _ => Credentials::Password { username, password: secret },
    }))
}

/// "Not found" is an answer, anything else is a failure.
fn refusal(name: &str, output: &str) -> Result<Option<Credentials>, HelperError> {
    let first_line = output.lines().next().unwrap_or_default().trim();
    let lower = first_line.to_ascii_lowercase();
    let has_none = ["credentials not found", "not logged in", "no credentials"];
    if has_none.iter().any(|phrase| lower.contains(phrase)) {
        return Ok(None);
    }
    let message = crate::manifest::shown(first_line);
    Err(HelperError::Failed { name: name.to_owned(), message })
}

async fn read_bounded<R: AsyncRead + Unpin>(output: Option<R>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(output) = output {
        output.take(ANSWER_BYTES_MAX).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[expect(
    clippy::disallowed_methods,
    reason = "credential helpers are programs by definition; the name is checked above"
)]
fn command(name: &str) -> Command {
    let mut command =
        Command::from(std::process::Command::new(format!("docker-credential-{name}")));
    command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_helper_name_cannot_be_a_path() {
        for name in ["", "../evil", "a/b", "a b", "a\0b", "é", &"x".repeat(65)] {
            let answer = get(name, "h", Duration::from_secs(1)).await;
            assert!(matches!(answer, Err(HelperError::Name(_))), "{name:?}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_is_not_installed_is_named() {
        let error = get("no-such-helper", "h", Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, HelperError::Start { .. }));
        assert!(error.to_string().contains("docker-credential-no-such-helper"));
    }

    #[test]
    fn a_helper_without_credentials_is_not_a_failure() {
        let hub = refusal("x", "credentials not found in native keychain\n");
        assert!(matches!(hub, Ok(None)));
        assert!(matches!(refusal("x", "keychain is locked"), Err(HelperError::Failed { .. })));
    }
}
