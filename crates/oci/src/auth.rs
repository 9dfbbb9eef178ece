//! Getting in: challenges, tokens and where credentials come from.
//!
//! Credentials are sent only after a registry asked for them, and only to that registry or to
//! the token server its challenge names, over TLS unless the registry itself is a named
//! plain-HTTP host. This module knows no images and never sees a redirect.

pub(crate) mod challenge;
pub(crate) mod docker_config;
pub(crate) mod helper;
pub(crate) mod secrets;
pub(crate) mod token;

pub use helper::HelperError;
use secrecy::SecretString;
use serde::{Deserialize as _, Deserializer};

/// What a user shows to a registry. `Debug` shows no secret.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// A user name with a password or an access token in its place.
    Password {
        /// The user name.
        username: String,
        /// The password.
        password: SecretString,
    },
    /// An OAuth2 refresh token, exchanged at the registry's token server.
    IdentityToken(SecretString),
    /// A token that is sent to the registry as it is.
    RegistryToken(SecretString),
}

/// Reads an optional secret; `null`, absence and an empty text are all "none".
pub(crate) fn secret<'de, D>(deserializer: D) -> Result<Option<SecretString>, D::Error>
where
    D: Deserializer<'de>,
{
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.filter(|text| !text.is_empty()).map(SecretString::from))
}
