//! Secrets of builds that wait: AES-256-GCM under the master key, bound to tenant and build.
//!
//! A sealed secret is a version byte, the nonce (12 bytes, random) and the ciphertext with its
//! tag (NIST SP 800-38D). Tenant and build are its associated data: a row copied to another
//! build does not open.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::build::record::BuildId;
use crate::build::service::RegistryCredentials;
use crate::tenant::TenantId;

const VERSION: u8 = 1;
const KEY_BYTES: usize = 32;

/// Why a secret could not be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The key file cannot be used.
    #[error("the master key {path:?} cannot be used: {problem}")]
    KeyFile {
        /// Where it is.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The cipher refused.
    #[error("the secret could not be sealed")]
    Cipher,
    /// It was sealed with another key, for another build, or is damaged.
    #[error(
        "the sealed credentials of this build cannot be opened: \
         the master key was changed, or the database is damaged"
    )]
    Open,
}

/// The key that everything at rest hangs on.
pub(crate) struct MasterKey(RandomizedNonceKey);

/// The plain form, inside the seal only.
#[derive(Serialize, Deserialize)]
struct Plain {
    registry: String,
    username: String,
    secret: String,
}

impl MasterKey {
    /// Reads the key; makes one, readable by its owner alone, if the file does not exist.
    ///
    /// # Errors
    /// [`SealError::KeyFile`]; also if others may read the file.
    pub(crate) fn load_or_create(path: &Path) -> Result<Self, SealError> {
        let failed = |problem: String| SealError::KeyFile { path: path.to_owned(), problem };
        let bytes = match File::open(path) {
            Ok(file) => read_key(file).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create_key(path).map_err(|error| failed(error.to_string()))?
            }
            Err(error) => return Err(failed(error.to_string())),
        };
        let key = RandomizedNonceKey::new(&AES_256_GCM, &bytes);
        key.map(Self).map_err(|_| failed("it is no AES-256 key".into()))
    }

    /// Seals the credentials of one build.
    ///
    /// # Errors
    /// [`SealError::Cipher`]
    pub(crate) fn seal(
        &self,
        tenant: &TenantId,
        build: &BuildId,
        credentials: &RegistryCredentials,
    ) -> Result<Vec<u8>, SealError> {
        let plain = Plain {
            registry: credentials.registry.clone(),
            username: credentials.username.clone(),
            secret: credentials.secret.expose_secret().to_owned(),
        };
        let mut bytes = serde_json::to_vec(&plain).map_err(|_| SealError::Cipher)?;
        let context = context(tenant, build);
        let nonce = self.0.seal_in_place_append_tag(Aad::from(context.as_bytes()), &mut bytes);
        let nonce = nonce.map_err(|_| SealError::Cipher)?;
        let mut sealed = vec![VERSION];
        sealed.extend_from_slice(nonce.as_ref());
        sealed.append(&mut bytes);
        Ok(sealed)
    }

    /// Opens what [`Self::seal`] made for the same build.
    ///
    /// # Errors
    /// [`SealError::Open`]
    pub(crate) fn open(
        &self,
        tenant: &TenantId,
        build: &BuildId,
        sealed: &[u8],
    ) -> Result<RegistryCredentials, SealError> {
        let (head, body) = sealed.split_at_checked(1 + NONCE_LEN).ok_or(SealError::Open)?;
        if head[0] != VERSION {
            return Err(SealError::Open);
        }
        let nonce = Nonce::try_assume_unique_for_key(&head[1..]).map_err(|_| SealError::Open)?;
        let (context, mut bytes) = (context(tenant, build), body.to_vec());
        let aad = Aad::from(context.as_bytes());
        let plain = self.0.open_in_place(nonce, aad, &mut bytes).map_err(|_| SealError::Open)?;
        let plain: Plain = serde_json::from_slice(plain).map_err(|_| SealError::Open)?;
        Ok(RegistryCredentials {
            registry: plain.registry,
            username: plain.username,
            secret: SecretString::from(plain.secret),
        })
    }
}

/// What a seal is bound to.
fn context(tenant: &TenantId, build: &BuildId) -> String {
    format!("registry-credentials/{tenant}/{build}")
}

fn read_key(mut file: File) -> Result<[u8; KEY_BYTES], String> {
    let mode = file.metadata().map_err(|error| error.to_string())?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(format!("its mode is {:o}, others may read it: chmod 600", mode & 0o777));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let length = bytes.len();
    bytes.try_into().map_err(|_| format!("it has {length} bytes, a key has {KEY_BYTES}"))
}

fn create_key(path: &Path) -> io::Result<[u8; KEY_BYTES]> {
    let mut bytes = [0; KEY_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| io::Error::other("no random numbers"))?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_opens_for_its_own_build_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let key = MasterKey::load_or_create(&path).unwrap();
        let (tenant, other): (TenantId, TenantId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (build, another) = (BuildId::new(), BuildId::new());
        let credentials = RegistryCredentials {
            registry: "ghcr.io".into(),
            username: "me".into(),
            secret: SecretString::from("canary-3141"),
        };
        let sealed = key.seal(&tenant, &build, &credentials).unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"canary"));
        let again = MasterKey::load_or_create(&path).unwrap();
        let opened = again.open(&tenant, &build, &sealed).unwrap();
        assert_eq!(opened.secret.expose_secret(), "canary-3141");
        assert!(again.open(&tenant, &another, &sealed).is_err());
        assert!(again.open(&other, &build, &sealed).is_err());
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 1;
            assert!(again.open(&tenant, &build, &changed).is_err(), "byte {index}");
            assert!(again.open(&tenant, &build, &sealed[..index]).is_err(), "cut at {index}");
        }
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, [7; 32]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(MasterKey::load_or_create(&path).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(MasterKey::load_or_create(&path).is_ok());
        std::fs::write(&path, [7; 31]).unwrap();
        assert!(MasterKey::load_or_create(&path).is_err());
    }
}
