//! What the master key seals: credentials of builds that wait, and the keys of tenants.
//!
//! A sealed secret is a version byte, the nonce (12 bytes, random) and the ciphertext with its
//! tag (AES-256-GCM, NIST SP 800-38D). Whose it is, is its associated data: tenant and build of
//! credentials, tenant and id of a key. A row copied to another place does not open.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::hmac;
use sealed::KeyId;
use secrecy::zeroize::{Zeroize as _, Zeroizing};
use secrecy::{ExposeSecret as _, SecretBox, SecretString};
use serde::{Deserialize, Serialize};

use crate::build::record::BuildId;
use crate::build::service::RegistryCredentials;
use crate::tenant::TenantId;

const VERSION: u8 = 1;
const KEY_BYTES: usize = 32;
/// What the key says under itself to have a name.
const NAME: &[u8] = b"builderd master key, version 1";
/// Bytes of the name: enough to tell keys apart.
const NAME_BYTES: usize = 16;
/// For whoever has the wrong key, or none.
const REMEDY: &str = "copy the key file of a server that uses this database; if that key is lost, \
     stop every server and run `builderd admin forget-key`";

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
    /// A tenant's key was wrapped by another key, for another tenant, or is damaged.
    #[error(
        "a key of tenant {tenant} cannot be opened: the master key was changed, or the database \
         is damaged"
    )]
    TenantKey {
        /// Whose.
        tenant: TenantId,
    },
}

/// The bytes of a key, wiped when they are dropped.
type Key = Zeroizing<[u8; KEY_BYTES]>;

/// A key of a tenant, in the open.
pub(crate) type DataKey = SecretBox<[u8; KEY_BYTES]>;

/// What wraps tenants' keys: the master key of this process, or a service that keeps one and never
/// gives it away (a KMS).
#[async_trait]
pub(crate) trait KeyWrapper: Send + Sync {
    /// The name of the key that wraps now; not secret.
    fn id(&self) -> &str;
    /// Wraps a tenant's key; what comes out opens for the same tenant and id alone.
    async fn wrap(&self, tenant: &TenantId, id: KeyId, key: &DataKey)
    -> Result<Vec<u8>, SealError>;
    /// Opens what [`Self::wrap`] made.
    async fn open(
        &self,
        tenant: &TenantId,
        id: KeyId,
        wrapped: &[u8],
    ) -> Result<DataKey, SealError>;
}

/// A new key.
///
/// # Errors
/// [`SealError::Cipher`] if there are no random numbers.
pub(crate) fn new_data_key() -> Result<DataKey, SealError> {
    let mut key = DataKey::new(Box::new([0; KEY_BYTES]));
    aws_lc_rs::rand::fill(secrecy::ExposeSecretMut::expose_secret_mut(&mut key))
        .map_err(|_| SealError::Cipher)?;
    Ok(key)
}

/// The key that everything at rest hangs on.
pub(crate) struct MasterKey {
    cipher: RandomizedNonceKey,
    /// HMAC-SHA-256 of [`NAME`] under the key, in hex: tells keys apart, and nothing of the key.
    id: String,
}

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
        let bytes: Key = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match create_key(path) {
                // Another server that starts at the same moment was first.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    read_key(path, File::open(path))?
                }
                created => created.map_err(|error| unusable(path, error.to_string()))?,
            },
            found => read_key(path, found)?,
        };
        Self::new(path, &bytes)
    }

    /// Reads the key of a database that has one already: another one would be of no use.
    ///
    /// # Errors
    /// [`SealError::KeyFile`]; also if the file does not exist.
    pub(crate) fn load(path: &Path) -> Result<Self, SealError> {
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(unusable(
                path,
                format!("there is none, and the database has secrets sealed with one: {REMEDY}"),
            )),
            found => Self::new(path, &*read_key(path, found)?),
        }
    }

    /// Reads a key that somebody else keeps for us (systemd's credentials): never made, and a
    /// group may be said to read it, which is how an access list of ours shows.
    ///
    /// # Errors
    /// [`SealError::KeyFile`]
    pub(crate) fn load_credential(path: &Path) -> Result<Self, SealError> {
        Self::new(path, &*read_key_of(path, File::open(path), 0o037)?)
    }

    fn new(path: &Path, bytes: &[u8; KEY_BYTES]) -> Result<Self, SealError> {
        let cipher = RandomizedNonceKey::new(&AES_256_GCM, bytes)
            .map_err(|_| unusable(path, "it is no AES-256 key".into()))?;
        let name = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, bytes), NAME);
        let id = crate::build::hex(name.as_ref().get(..NAME_BYTES).unwrap_or_default());
        Ok(Self { cipher, id })
    }

    /// Tells it from other keys; not secret.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Whether it is the key that the database names, read from `path`.
    ///
    /// # Errors
    /// [`SealError::KeyFile`]
    pub(crate) fn must_be(self, id: &str, path: &Path) -> Result<Self, SealError> {
        match self.id == id {
            true => Ok(self),
            false => {
                let own = &self.id;
                let problem =
                    format!("it is key {own}, and the database's secrets need key {id}: {REMEDY}");
                Err(unusable(path, problem))
            }
        }
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
        let bytes = Zeroizing::new(serde_json::to_vec(&plain).map_err(|_| SealError::Cipher)?);
        self.seal_bytes(&context(tenant, build), &bytes)
    }

    /// The plain bytes are nowhere else than where they were: they are sealed in their copy's place.
    fn seal_bytes(&self, context: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut bytes = plain.to_vec();
        let sealed =
            self.cipher.seal_in_place_separate_tag(Aad::from(context.as_bytes()), &mut bytes);
        let Ok((nonce, tag)) = sealed else {
            bytes.zeroize();
            return Err(SealError::Cipher);
        };
        Ok([&[VERSION][..], nonce.as_ref(), &bytes, tag.as_ref()].concat())
    }

    /// The plain bytes of what was sealed with the same context; none if it does not open.
    fn open_bytes(&self, context: &str, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (head, body) = sealed.split_at_checked(1 + NONCE_LEN)?;
        if head[0] != VERSION {
            return None;
        }
        let nonce = Nonce::try_assume_unique_for_key(&head[1..]).ok()?;
        let (mut bytes, aad) = (Zeroizing::new(body.to_vec()), Aad::from(context.as_bytes()));
        let plain = self.cipher.open_in_place(nonce, aad, &mut bytes).ok()?.len();
        bytes.truncate(plain);
        Some(bytes)
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
        let plain = self.open_bytes(&context(tenant, build), sealed).ok_or(SealError::Open)?;
        let plain: Plain = serde_json::from_slice(&plain).map_err(|_| SealError::Open)?;
        Ok(RegistryCredentials {
            registry: plain.registry,
            username: plain.username,
            secret: SecretString::from(plain.secret),
        })
    }
}

#[async_trait]
impl KeyWrapper for MasterKey {
    fn id(&self) -> &str {
        &self.id
    }

    async fn wrap(
        &self,
        tenant: &TenantId,
        id: KeyId,
        key: &DataKey,
    ) -> Result<Vec<u8>, SealError> {
        self.seal_bytes(&key_context(tenant, id), key.expose_secret())
    }

    async fn open(
        &self,
        tenant: &TenantId,
        id: KeyId,
        wrapped: &[u8],
    ) -> Result<DataKey, SealError> {
        let key = self.open_bytes(&key_context(tenant, id), wrapped);
        let key = key.filter(|key| key.len() == KEY_BYTES);
        let key = key.map(|key| {
            DataKey::init_with_mut(|own: &mut [u8; KEY_BYTES]| own.copy_from_slice(&key))
        });
        key.ok_or_else(|| SealError::TenantKey { tenant: tenant.clone() })
    }
}

/// What a tenant's key is bound to.
fn key_context(tenant: &TenantId, id: KeyId) -> String {
    format!("tenant-key/{tenant}/{id}")
}

/// What a seal is bound to.
fn context(tenant: &TenantId, build: &BuildId) -> String {
    format!("registry-credentials/{tenant}/{build}")
}

fn unusable(path: &Path, problem: String) -> SealError {
    SealError::KeyFile { path: path.to_owned(), problem }
}

fn read_key(path: &Path, file: io::Result<File>) -> Result<Key, SealError> {
    read_key_of(path, file, 0o077)
}

/// Refuses a file whose mode has one of the bits of `others`.
fn read_key_of(path: &Path, file: io::Result<File>, others: u32) -> Result<Key, SealError> {
    let failed = |error: io::Error| unusable(path, error.to_string());
    let mut file = file.map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    if mode & others != 0 {
        let problem = format!("its mode is {:o}, others may read it: chmod 600", mode & 0o777);
        return Err(unusable(path, problem));
    }
    // Never larger, so that no copy is left behind when it grows.
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_BYTES + 1));
    let most = u64::try_from(KEY_BYTES + 1).unwrap_or(u64::MAX);
    (&mut file).take(most).read_to_end(&mut bytes).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let wrong = |_| unusable(path, format!("it has {length} bytes, a key has {KEY_BYTES}"));
    bytes.as_slice().try_into().map(Key::new).map_err(wrong)
}

/// The file gets its name when it is whole, and only if nobody has it; that name is on disk when
/// anybody learns of the key.
fn create_key(path: &Path) -> io::Result<Key> {
    let mut bytes = Key::new([0; KEY_BYTES]);
    aws_lc_rs::rand::fill(&mut *bytes).map_err(|_| io::Error::other("no random numbers"))?;
    // Another name each time: who was killed here before must not be in the way, and a process in
    // a container always has the same number.
    let unfinished = path.with_extension(format!("{}.new", uuid::Uuid::new_v4().simple()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let named = (|| {
        file.write_all(&*bytes)?;
        file.sync_all()?;
        std::fs::hard_link(&unfinished, path)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    })();
    std::fs::remove_file(&unfinished)?;
    named.map(|()| bytes)
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
    fn a_key_is_told_from_another_by_a_name_that_does_not_give_it_away() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("key"), directory.path().join("other"));
        let missing = MasterKey::load(&path).map(|_| ()).unwrap_err().to_string();
        assert!(missing.contains("forget-key") && !path.exists(), "{missing}");
        let key = MasterKey::load_or_create(&path).unwrap();
        let name = key.id().to_owned();
        assert_eq!(MasterKey::load(&path).unwrap().id(), name);
        assert!(key.must_be(&name, &path).is_ok());
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(name.len(), 2 * NAME_BYTES);
        assert!(!crate::build::hex(&bytes).contains(&name));
        let stranger = MasterKey::load_or_create(&other).unwrap();
        assert_ne!(stranger.id(), name);
        let refused = stranger.must_be(&name, &other).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains(&name) && refused.contains("copy the key file"), "{refused}");
        assert!(refused.contains(other.to_str().unwrap()), "{refused}");
    }

    #[test]
    fn what_was_left_of_a_start_that_was_killed_is_not_in_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("master.key");
        // What an earlier process of the same number has left, as in a container.
        let number = std::process::id();
        std::fs::write(directory.path().join(format!("master.{number}.new")), b"half").unwrap();
        let key = MasterKey::load_or_create(&path).unwrap();
        assert_eq!(MasterKey::load(&path).unwrap().id(), key.id());
        let entries = std::fs::read_dir(directory.path()).unwrap();
        assert_eq!(entries.count(), 2, "it leaves nothing of its own");
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
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
        assert!(MasterKey::load_or_create(&path).is_err());
        assert!(MasterKey::load_credential(&path).is_ok(), "an access list shows like that");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
        assert!(MasterKey::load_credential(&path).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for length in [0, 31, 33, 4096] {
            std::fs::write(&path, vec![7; length]).unwrap();
            let error = MasterKey::load_or_create(&path).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(&format!("it has {length} bytes")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_tenants_key_opens_for_its_tenant_and_id_alone() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["key", "other"].map(|name| directory.path().join(name));
        let [master, stranger] = paths.map(|path| MasterKey::load_or_create(&path).unwrap());
        let (tenant, other): (TenantId, TenantId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (id, another) = (KeyId([1; 16]), KeyId([2; 16]));
        let key = new_data_key().unwrap();
        let wrapped = master.wrap(&tenant, id, &key).await.unwrap();
        let opened = KeyWrapper::open(&master, &tenant, id, &wrapped).await.unwrap();
        assert_eq!(opened.expose_secret(), key.expose_secret());
        assert!(!wrapped.windows(KEY_BYTES).any(|window| window == key.expose_secret()));
        assert!(KeyWrapper::open(&master, &other, id, &wrapped).await.is_err());
        assert!(KeyWrapper::open(&master, &tenant, another, &wrapped).await.is_err());
        assert!(KeyWrapper::open(&master, &tenant, id, &wrapped[1..]).await.is_err());
        let error = KeyWrapper::open(&stranger, &tenant, id, &wrapped).await.unwrap_err();
        assert!(error.to_string().contains("tenant a"), "{error}");
        assert_ne!(new_data_key().unwrap().expose_secret(), key.expose_secret());
    }
}
