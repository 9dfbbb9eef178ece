//! Tenants are kept apart here.
//!
//! A credential becomes a [`Principal`] in one place (`api::auth`), a principal gives a
//! [`Permit`] for one right, and only a permit opens a tenant's part of the store. No
//! request, body or header names the tenant whose rows are read: the permit does.
//! Knows neither databases nor HTTP.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest tenant id, in bytes.
const ID_BYTES_MAX: usize = 128;
/// Longest name of a customer, or of an organization, in bytes; it is kept with each build.
pub(crate) const NAME_BYTES_MAX: usize = 256;

/// A tenant: 1 to 128 of `A-Z a-z 0-9 . _ -`, not starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantId(String);

/// Why a text is no tenant id.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0:?} is no tenant id: 1 to 128 letters, digits, dots, dashes and underscores are")]
pub struct TenantIdError(String);

impl TenantId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TenantId {
    type Err = TenantIdError;

    fn from_str(text: &str) -> Result<Self, TenantIdError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let length = 1..=ID_BYTES_MAX;
        if length.contains(&text.len()) && !text.starts_with('.') && text.bytes().all(plain) {
            return Ok(Self(text.to_owned()));
        }
        Err(TenantIdError(text.chars().take(ID_BYTES_MAX).collect()))
    }
}

impl TryFrom<String> for TenantId {
    type Error = TenantIdError;

    fn try_from(text: String) -> Result<Self, TenantIdError> {
        text.parse()
    }
}

impl From<TenantId> for String {
    fn from(id: TenantId) -> String {
        id.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A tenant's service tier, smallest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Limited resources.
    Free,
    /// Standard resources.
    Pro,
    /// Higher limits.
    Enterprise,
    /// The highest limits.
    Dedicated,
}

impl Tier {
    /// All tiers, smallest first.
    pub const ALL: [Self; 4] = [Self::Free, Self::Pro, Self::Enterprise, Self::Dedicated];

    /// The tier's name in settings and on the wire, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Pro => "pro",
            Self::Enterprise => "enterprise",
            Self::Dedicated => "dedicated",
        }
    }

    /// The share of the workers that a tenant of this tier gets when all are busy.
    pub fn weight(self) -> u32 {
        match self {
            Self::Free => 1,
            Self::Pro => 3,
            Self::Enterprise => 10,
            Self::Dedicated => 50,
        }
    }

    /// Whether artifacts of tenants of this tier are encrypted whatever the settings say.
    pub fn requires_encryption(self) -> bool {
        matches!(self, Self::Enterprise | Self::Dedicated)
    }

    /// The tier table.
    pub fn limits(self) -> TenantLimits {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        let all = |memory, cpus, disk, timeout, concurrent, daily, storage, minutes| TenantLimits {
            memory_bytes: memory,
            cpu_cores: cpus,
            disk_bytes: disk,
            timeout_secs: timeout,
            concurrent_builds: concurrent,
            daily_builds: daily,
            storage_bytes: storage,
            build_minutes: minutes,
            allowed_registries: Vec::new(),
            external_network: self != Self::Free,
        };
        match self {
            Self::Free => TenantLimits {
                allowed_registries: vec!["docker.io".into(), "ghcr.io".into()],
                ..all(512 * MIB, 1, GIB, 300, 1, 5, GIB, 5)
            },
            Self::Pro => all(2 * GIB, 2, 10 * GIB, 900, 3, 100, 10 * GIB, 15),
            Self::Enterprise => all(8 * GIB, 4, 100 * GIB, 1800, 10, 1000, 100 * GIB, 30),
            Self::Dedicated => all(32 * GIB, 16, 1024 * GIB, 3600, 50, 10_000, 1024 * GIB, 60),
        }
    }

    /// Requests per minute, and how many at once.
    pub fn request_rate(self) -> (u32, u32) {
        match self {
            Self::Free => (60, 10),
            Self::Pro => (300, 50),
            Self::Enterprise => (1000, 100),
            Self::Dedicated => (5000, 500),
        }
    }
}

impl FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no tier; free, pro, enterprise and dedicated are"))
    }
}

/// What a tenant may use.
///
/// A node that does not know a limit cannot keep to it: it refuses the whole of it, and leaves the
/// tenant to nodes that do, as several versions may share a database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantLimits {
    /// Memory of one build.
    pub memory_bytes: u64,
    /// Cores of one build.
    pub cpu_cores: u32,
    /// Disk of one build.
    pub disk_bytes: u64,
    /// Wall time of one build, in seconds.
    pub timeout_secs: u32,
    /// Builds that run at once; more wait.
    pub concurrent_builds: u32,
    /// Builds accepted in one day (UTC).
    pub daily_builds: u32,
    /// Artifacts kept.
    pub storage_bytes: u64,
    /// Wall time of one build in minutes, as the tier table has it; the smaller of both counts.
    pub build_minutes: u32,
    /// Registries images may come from; all when empty.
    pub allowed_registries: Vec<String>,
    /// Whether commands of a build may reach out.
    pub external_network: bool,
}

impl TenantLimits {
    /// How long one build may take, in seconds.
    pub fn build_secs(&self) -> u64 {
        u64::from(self.timeout_secs).min(u64::from(self.build_minutes) * 60)
    }
}

/// What a credential may allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Right {
    /// Create builds.
    BuildCreate,
    /// See builds, their logs and figures.
    BuildRead,
    /// Cancel builds.
    BuildCancel,
    /// Delete builds.
    BuildDelete,
    /// Download artifacts.
    ArtifactRead,
}

impl Right {
    /// Every right.
    pub const ALL: [Self; 5] = [
        Self::BuildCreate,
        Self::BuildRead,
        Self::BuildCancel,
        Self::BuildDelete,
        Self::ArtifactRead,
    ];

    /// The permission's name in tokens.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BuildCreate => "build:create",
            Self::BuildRead => "build:read",
            Self::BuildCancel => "build:cancel",
            Self::BuildDelete => "build:delete",
            Self::ArtifactRead => "artifact:read",
        }
    }
}

impl FromStr for Right {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|right| right.as_str() == text).ok_or_else(|| {
            let all: Vec<&str> = Self::ALL.into_iter().map(Self::as_str).collect();
            format!("{text:?} is no permission; these are: {}", all.join(", "))
        })
    }
}

/// Where a request came from, for the audit log. Decides nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The address at the other end, as the socket has it.
    pub peer: Option<SocketAddr>,
    /// The trace that the request belongs to, 32 hex digits.
    pub request: String,
}

/// What a credential says of whoever shows it.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) tenant: TenantId,
    /// None for whoever acts for all of the tenant's customers.
    pub(crate) customer: Option<String>,
    /// None where the credential names none.
    pub(crate) organization: Option<String>,
    /// The id of the token, or in the certificate; none where nobody is asked for one.
    pub(crate) credential: Option<String>,
    pub(crate) tier: Tier,
    pub(crate) rights: BTreeSet<Right>,
}

/// Who asks, as a checked credential says. Made by `api::auth` alone.
#[derive(Clone, Debug)]
pub struct Principal {
    origin: Origin,
    identity: Identity,
}

impl Principal {
    /// Only who has checked a credential has a [`Checked`](crate::api::Checked).
    pub(crate) fn new(_checked: crate::api::Checked, identity: Identity) -> Self {
        Self { origin: Origin::default(), identity }
    }

    /// What was checked.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The same, asking from `origin`.
    pub(crate) fn asking_from(self, origin: Origin) -> Self {
        Self { origin, ..self }
    }

    /// Where the request came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The tenant.
    pub fn tenant(&self) -> &TenantId {
        &self.identity.tenant
    }

    /// The customer within the tenant, for billing.
    pub fn customer(&self) -> Option<&str> {
        self.identity.customer.as_deref()
    }

    /// The organization that the tenant acts for.
    pub fn organization(&self) -> Option<&str> {
        self.identity.organization.as_deref()
    }

    /// The id of the token, or in the certificate, that was checked; none where nobody is asked for one.
    pub fn credential(&self) -> Option<&str> {
        self.identity.credential.as_deref()
    }

    /// The tenant's tier.
    pub fn tier(&self) -> Tier {
        self.identity.tier
    }

    /// What the credential allows.
    pub fn rights(&self) -> &BTreeSet<Right> {
        &self.identity.rights
    }

    /// Leave to do one kind of thing with the tenant's rows.
    ///
    /// # Errors
    /// [`Denied`] if the credential does not include the right.
    pub fn permit(&self, right: Right) -> Result<Permit<'_>, Denied> {
        match self.rights().contains(&right) {
            true => Ok(Permit { principal: self, right }),
            false => Err(Denied(right)),
        }
    }
}

/// Leave to do one kind of thing with one tenant's rows.
#[derive(Clone, Copy, Debug)]
pub struct Permit<'a> {
    principal: &'a Principal,
    right: Right,
}

impl Permit<'_> {
    /// Whose rows.
    pub fn tenant(&self) -> &TenantId {
        self.principal.tenant()
    }

    /// Who asked.
    pub fn principal(&self) -> &Principal {
        self.principal
    }

    /// For what.
    pub fn right(&self) -> Right {
        self.right
    }
}

/// The credential does not include the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this credential does not include the permission {}", .0.as_str())]
pub struct Denied(pub Right);
