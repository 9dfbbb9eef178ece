//! Whose certificates are known, and what each may do: the file `TLS_CLIENTS_FILE` names.
//!
//! An id is the one URI in a certificate's subject alternative names, a SPIFFE id for example,
//! and counts whole or not at all: no pattern, no prefix. What a client of the file becomes is
//! `api::auth`'s business.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use spiffe::SpiffeId;

use crate::tenant::{NAME_BYTES_MAX, Right, TenantId, Tier};

/// Longest id; the longest SPIFFE id (SPIFFE-ID, section 2.3).
const ID_BYTES_MAX: usize = 2048;
/// In the place of a tenant: whichever the request names.
const EVERY_TENANT: &str = "*";

/// Everybody in the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Clients {
    by_id: HashMap<String, Option<Client>>,
}

/// Whom a certificate stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Client {
    /// For whom it acts.
    pub(crate) tenant: Whose,
    /// The customer within the tenant; whichever the request names if none.
    pub(crate) customer: Option<String>,
    /// The organization that the tenant acts for.
    pub(crate) organization: Option<String>,
    /// The tier, where the database has none for the tenant.
    pub(crate) tier: Option<Tier>,
    /// What it may do.
    pub(crate) rights: BTreeSet<Right>,
}

/// For whom a client acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// This tenant.
    One(TenantId),
    /// The tenant that `X-Tenant-ID` names: for a service that has checked its users itself.
    Named,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    client: Vec<WrittenClient>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenClient {
    id: String,
    tenant: Option<String>,
    customer: Option<String>,
    organization: Option<String>,
    tier: Option<String>,
    permissions: Option<Vec<String>>,
}

impl Clients {
    /// Reads the text of such a file; says what is wrong with it.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let written: Written =
            toml::from_str(text).map_err(|error| error.to_string().replace('\n', " "))?;
        let mut clients = Self::default();
        for entry in written.client {
            let id = entry.id.clone();
            let named = |problem: String| format!("client `{id}`: {problem}");
            let client = check_id(&id).and_then(|()| entry.meant()).map_err(named)?;
            if clients.by_id.insert(id.clone(), client).is_some() {
                return Err(format!("client `{id}` is there twice"));
            }
        }
        Ok(clients)
    }

    /// Whether the file has this id at all, if only to let it bring a token.
    pub(crate) fn knows(&self, id: &str) -> bool {
        self.by_id.contains_key(id)
    }

    /// Whom the certificate with this id stands for by itself.
    pub(crate) fn find(&self, id: &str) -> Option<&Client> {
        self.by_id.get(id).and_then(Option::as_ref)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }
}

fn check_id(id: &str) -> Result<(), String> {
    if id.starts_with("spiffe:") {
        return SpiffeId::new(id).map(drop).map_err(|error| format!("no SPIFFE id: {error}"));
    }
    let is_uri = id.split_once(':').is_some_and(|(scheme, rest)| {
        scheme.starts_with(|sign: char| sign.is_ascii_alphabetic()) && !rest.is_empty()
    });
    match is_uri && is_writable(id) {
        true => Ok(()),
        false => Err("expected a URI, such as `spiffe://example.org/ci`".to_owned()),
    }
}

/// Whether an id may be one at all: it gets into rows, and lines, that people read.
fn is_writable(id: &str) -> bool {
    id.len() <= ID_BYTES_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
}

impl WrittenClient {
    /// None for a client that may come in, and needs a token to do anything.
    fn meant(self) -> Result<Option<Client>, String> {
        let says_who =
            self.customer.is_some() || self.organization.is_some() || self.tier.is_some();
        let tenant = match self.tenant.as_deref() {
            None if says_who || self.permissions.is_some() => {
                let problem = "customer, organization, tier and permissions need a tenant";
                return Err(problem.to_owned());
            }
            None => return Ok(None),
            Some(EVERY_TENANT) if says_who => {
                return Err("customer, organization and tier need one tenant, not `*`".to_owned());
            }
            Some(EVERY_TENANT) => Whose::Named,
            Some(id) => Whose::One(id.parse().map_err(|error| format!("{error}"))?),
        };
        let rights = match &self.permissions {
            None => BTreeSet::from(Right::ALL),
            Some(names) if names.is_empty() => {
                return Err("permissions are empty: leave them out for all of them".to_owned());
            }
            Some(names) => names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
        };
        let tier = self.tier.as_deref().map(str::parse).transpose()?;
        let Self { customer, organization, .. } = self;
        for (what, name) in [("a customer", &customer), ("an organization", &organization)] {
            if name.as_ref().is_some_and(|name| !(1..=NAME_BYTES_MAX).contains(&name.len())) {
                return Err(format!("expected {what} of 1 to {NAME_BYTES_MAX} bytes"));
            }
        }
        Ok(Some(Client { tenant, customer, organization, tier, rights }))
    }
}

/// The id in a client's certificate; none if it has no URI, or, so that nobody can choose among
/// several, more than one (X509-SVID, section 2: exactly one).
pub(crate) fn id_of(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut ids = certificate.valid_uri_names();
    let id = ids.next().filter(|id| is_writable(id))?;
    ids.next().is_none().then(|| id.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Clients {
        Clients::read(text).unwrap()
    }

    #[test]
    fn a_client_acts_for_its_tenant() {
        let clients = read(
            r#"
            [[client]]
            id = "spiffe://example.org/ci"
            tenant = "acme"
            customer = "c1"
            organization = "acme-group"
            tier = "pro"
            permissions = ["build:create", "build:read"]
            [[client]]
            id = "urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
            tenant = "*"
            [[client]]
            id = "spiffe://example.org/prometheus"
            "#,
        );
        let one = clients.find("spiffe://example.org/ci").unwrap();
        assert_eq!(one.tenant, Whose::One("acme".parse().unwrap()));
        assert_eq!((one.customer.as_deref(), one.tier), (Some("c1"), Some(Tier::Pro)));
        assert_eq!(one.organization.as_deref(), Some("acme-group"));
        assert_eq!(one.rights, BTreeSet::from([Right::BuildCreate, Right::BuildRead]));
        let two = clients.find("urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6").unwrap();
        assert_eq!((&two.tenant, two.rights.len()), (&Whose::Named, Right::ALL.len()));
        // It may come in and is nobody.
        assert!(clients.knows("spiffe://example.org/prometheus"));
        assert!(clients.find("spiffe://example.org/prometheus").is_none());
        // The whole id counts.
        for near in
            ["spiffe://example.org/c", "spiffe://example.org/ci/", "SPIFFE://example.org/ci"]
        {
            assert!(!clients.knows(near), "{near}");
        }
        assert_eq!((clients.len(), read("").len()), (3, 0));
    }

    #[test]
    fn what_is_wrong_with_the_file_is_said_by_id() {
        let entry = |rest: &str| format!("[[client]]\nid = \"spiffe://e.org/ci\"\n{rest}");
        for (text, word) in [
            ("client = 7".to_owned(), "invalid type"),
            ("[[client]]\ntenant = \"acme\"".to_owned(), "missing field `id`"),
            (entry("tenant = \"acme\"\nright = 1"), "unknown field `right`"),
            (entry("tenant = \"../x\""), "spiffe://e.org/ci"),
            (entry("tenant = \"acme\"\ntier = \"gold\""), "gold"),
            (entry("tenant = \"acme\"\npermissions = [\"build:all\"]"), "build:all"),
            (entry("tenant = \"acme\"\npermissions = []"), "empty"),
            (entry("tenant = \"acme\"\ncustomer = \"\""), "customer"),
            (entry("tenant = \"acme\"\norganization = \"\""), "organization"),
            (entry("permissions = [\"build:read\"]"), "need a tenant"),
            (entry("organization = \"o\""), "need a tenant"),
            (entry("tenant = \"*\"\norganization = \"o\""), "one tenant"),
            (entry("tenant = \"*\"\ncustomer = \"c\""), "one tenant"),
            (entry(&entry("")), "twice"),
            ("[[client]]\nid = \"spiffe://e.org/ci/\"".to_owned(), "no SPIFFE id"),
            ("[[client]]\nid = \"spiffe://e.org/*\"".to_owned(), "no SPIFFE id"),
            ("[[client]]\nid = \"ci.example.org\"".to_owned(), "expected a URI"),
        ] {
            let problem = Clients::read(&text).unwrap_err();
            assert!(problem.contains(word), "{word}: {problem}");
        }
    }
}
