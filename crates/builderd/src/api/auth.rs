//! Who asks: the one place that makes a [`Principal`].
//!
//! Outside development mode a token decides tenant, customer and rights, and the tenant's row
//! its tier; headers and bodies may only agree. In development mode there are no tokens: the
//! header, else the body, names the tenant, and the body of a create its tier. A request without a
//! token may come over a connection whose client certificate is known (`tls::Clients`): it then
//! is the credential, by the same rules as a token.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use flate2::Crc;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use uuid::Uuid;

use super::audit::{Asked, trace_of};
use super::error::Answer;
use super::limits::{Rate, RateLimits};
use super::memory::Memory;
use super::{ApiRules, Checked};
use crate::build::hex;
use crate::build::service::ServiceError;
use crate::clock::Clock;
use crate::store::audit::{Author, DEVELOPMENT};
use crate::store::{Store, StoreError, TenantRow, TokenRow};
use crate::tenant::{Identity, NAME_BYTES_MAX, Principal, Right, TenantId, TenantIdError, Tier};
use crate::tls::{Client, Clients, Whose};

/// Every token's first letters, for scanners of leaked secrets.
const TOKEN_PREFIX: &str = "bld_";
/// Hex digits of a token's random part: two random UUIDs.
const SECRET_DIGITS: usize = 64;
const TENANT_HEADER: &str = "x-tenant-id";
const CUSTOMER_HEADER: &str = "x-customer-id";

/// Why somebody may not come in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Development mode, and nobody said which tenant.
    #[error("tenant ID is required")]
    NoTenant,
    /// A header that decides who asks comes twice, and may not mean the same to whoever stands before
    /// us.
    #[error("the header `{0}` comes more than once: send it once")]
    Twice(&'static str),
    /// There is no token.
    #[error("a token is required: send it as `Authorization: Bearer bld_...`")]
    NoToken,
    /// The same for unknown, expired and revoked tokens.
    #[error("this token is not valid")]
    BadToken,
    /// The certificate was known, and is not any more.
    #[error("the client certificate of this connection is no longer known here")]
    GoneCertificate,
    /// The request names another tenant than the credential.
    #[error("the tenant of this request is not the credential's")]
    OtherTenant,
    /// The request names another customer than the credential.
    #[error("the customer of this request is not the credential's")]
    OtherCustomer,
    /// The request names another organization than the credential.
    #[error("the organization of this request is not the credential's")]
    OtherOrganization,
    /// The request names somebody by more than is kept.
    #[error("the {0} of this request is longer than {max} bytes", max = NAME_BYTES_MAX)]
    NameTooLong(&'static str),
    /// The request names something that cannot be a tenant.
    #[error(transparent)]
    TenantId(#[from] TenantIdError),
    /// The address has failed too often.
    #[error("too many failed attempts; try again in {retry_after_secs} s")]
    TooManyFailures {
        /// How long to wait.
        retry_after_secs: u64,
    },
    /// The database failed.
    #[error(transparent)]
    Store(ServiceError),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Store(ServiceError::Store(error))
    }
}

/// What a request says of its sender beside the credential.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claim {
    /// The tenant; empty if it names none.
    pub(crate) tenant: String,
    /// The build that it is about; empty if it is about none.
    pub(crate) build: String,
    /// The customer; empty if it names none.
    pub(crate) customer: String,
    /// The organization; empty if it names none.
    pub(crate) organization: String,
    /// The tier, which development mode believes.
    pub(crate) tier: Option<Tier>,
}

impl Claim {
    /// A request that names a tenant, or none.
    pub(crate) fn tenant(id: &str) -> Self {
        Self { tenant: id.to_owned(), ..Self::default() }
    }

    /// The same, about one build.
    pub(crate) fn about(self, build: &str) -> Self {
        Self { build: build.to_owned(), ..self }
    }
}

/// Who sent a request, as far as its headers tell. Goes with the request to its handler.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    asked: Arc<Asked>,
    credential: Credential,
    customer: String,
    notes: Arc<Notes>,
}

#[derive(Clone, Debug)]
enum Credential {
    /// A token, by the hash under which it is kept, and whose it was when the request came.
    Token { hash: String, principal: Principal },
    /// A client certificate, by the id in it, the tenant that the header names, and whose it was
    /// when the request came.
    Certificate { id: Arc<str>, tenant: String, principal: Principal },
    /// What the header says, in development mode.
    Believed(Option<TenantId>),
}

/// What the way out must know of the way in.
#[derive(Debug, Default)]
struct Notes {
    rate: OnceLock<Rate>,
    error: OnceLock<Answer>,
}

impl Caller {
    /// The same, in the trace that the log's lines about it name.
    pub(super) fn traced(mut self, traceparent: Option<&str>) -> Self {
        if let Some(trace) = traceparent.and_then(trace_of) {
            Arc::make_mut(&mut self.asked).origin.request = trace.to_owned();
        }
        self
    }

    /// What it wants, and from where.
    pub(super) fn asked(&self) -> &Asked {
        &self.asked
    }

    /// The tenant and the credential, as far as the head alone tells.
    pub(super) fn named(&self) -> (Option<&TenantId>, &str) {
        match &self.credential {
            Credential::Token { principal, .. } | Credential::Certificate { principal, .. } => {
                (Some(principal.tenant()), principal.credential().unwrap_or_default())
            }
            Credential::Believed(tenant) => (tenant.as_ref(), DEVELOPMENT),
        }
    }

    /// What was decided about the rate, once it was.
    pub(crate) fn rate(&self) -> Option<&Rate> {
        self.notes.rate.get()
    }

    /// Keeps an error for an answer to a person.
    pub(crate) fn note(&self, answer: &Answer) {
        // The first error of a request is the one it is answered with.
        let _ = self.notes.error.set(answer.clone());
    }

    /// The error the request was answered with.
    pub(crate) fn error(&self) -> Option<&Answer> {
        self.notes.error.get()
    }
}

/// How callers prove who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// By token.
    Tokens,
    /// Not at all: for one's own machine.
    Development,
}

/// Checks credentials.
pub(crate) struct Auth {
    store: Store,
    clock: Arc<dyn Clock>,
    limits: RateLimits,
    rules: ApiRules,
    /// Tokens by their hash, with the tenant's tier.
    tokens: Memory<String, (TokenRow, Option<Tier>)>,
    /// Development mode and certificates ask for a tenant's tier alone.
    tiers: Memory<TenantId, Option<Tier>>,
    /// Whose certificates are known; nobody's if none.
    clients: Option<watch::Receiver<Arc<Clients>>>,
}

impl Auth {
    /// Checks against `store`.
    pub(crate) fn new(store: Store, clock: Arc<dyn Clock>, rules: ApiRules) -> Self {
        let limits = RateLimits::new(rules.looks_per_sec);
        let (tokens, tiers) = (Memory::new(), Memory::new());
        Self { store, clock, limits, rules, tokens, tiers, clients: None }
    }

    /// Certificates of `clients` are credentials, too.
    pub(crate) fn know(&mut self, clients: watch::Receiver<Arc<Clients>>) {
        self.clients = Some(clients);
    }

    /// How often things may be asked.
    pub(crate) fn limits(&self) -> &RateLimits {
        &self.limits
    }

    /// What the headers tell, before anything of the body is read.
    pub(crate) async fn caller(
        &self,
        headers: &HeaderMap,
        asked: &Arc<Asked>,
        id: Option<&Arc<str>>,
    ) -> Result<Caller, Refusal> {
        for name in [AUTHORIZATION.as_str(), TENANT_HEADER, CUSTOMER_HEADER] {
            if headers.get_all(name).iter().nth(1).is_some() {
                return Err(Refusal::Twice(name));
            }
        }
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let (tenant, customer) = (text(TENANT_HEADER), text(CUSTOMER_HEADER));
        let credential = match self.rules.mode {
            Mode::Development => Credential::Believed(match tenant.is_empty() {
                true => None,
                false => Some(tenant.parse()?),
            }),
            Mode::Tokens if let Some((id, client)) = self.shown(headers, id) => {
                let principal = self.by_certificate(id, &client, tenant).await?;
                agree(&principal, tenant, customer)?;
                Credential::Certificate { id: Arc::clone(id), tenant: tenant.to_owned(), principal }
            }
            Mode::Tokens => {
                let peer = asked.origin.peer.map(|address| address.ip());
                let (hash, principal) = self.by_token(text(AUTHORIZATION.as_str()), peer).await?;
                agree(&principal, tenant, customer)?;
                Credential::Token { hash, principal }
            }
        };
        let (asked, customer) = (Arc::clone(asked), customer.to_owned());
        Ok(Caller { asked, credential, customer, notes: Arc::default() })
    }

    /// Whose credential a refused request showed, as far as that is remembered: for the audit
    /// log, where a token of another tenant's, or one that was revoked just now, has its name.
    pub(super) fn suspect(
        &self,
        headers: &HeaderMap,
        id: Option<&Arc<str>>,
    ) -> Option<(Option<TenantId>, String)> {
        if self.rules.mode == Mode::Development {
            return Some((None, DEVELOPMENT.to_owned()));
        }
        if let Some((id, client)) = self.shown(headers, id) {
            let tenant = match client.tenant {
                Whose::One(tenant) => Some(tenant),
                Whose::Named => None,
            };
            return Some((tenant, id.to_string()));
        }
        let header = headers.get(AUTHORIZATION)?.to_str().ok()?;
        let (_, token) = header.split_once(' ')?;
        let (row, _) = self.tokens.get(&hash(token.trim()), self.clock.now())?;
        Some((Some(row.tenant), row.id))
    }

    /// The client that a certificate stands for, where nothing else was shown: a token counts
    /// alone, so that it never borrows a connection's rights, nor lends it its own.
    fn shown<'a>(
        &self,
        headers: &HeaderMap,
        id: Option<&'a Arc<str>>,
    ) -> Option<(&'a Arc<str>, Client)> {
        let id = id.filter(|_| !headers.contains_key(AUTHORIZATION))?;
        Some((id, self.client(id)?))
    }

    fn client(&self, id: &str) -> Option<Client> {
        self.clients.as_ref()?.borrow().find(id).cloned()
    }

    /// The principal of a client, by what its file says and, for the tier, what the store does.
    async fn by_certificate(
        &self,
        id: &str,
        client: &Client,
        named: &str,
    ) -> Result<Principal, Refusal> {
        let tenant = match &client.tenant {
            Whose::One(tenant) => tenant.clone(),
            Whose::Named if named.is_empty() => return Err(Refusal::NoTenant),
            Whose::Named => named.parse()?,
        };
        let tier = match self.known_tier(&tenant).await? {
            Some(tier) => tier,
            None => client.tier.unwrap_or(self.rules.default_tier),
        };
        let identity = Identity {
            tenant,
            customer: client.customer.clone(),
            organization: client.organization.clone(),
            credential: Some(id.to_owned()),
            tier,
            rights: client.rights.clone(),
        };
        Ok(Principal::new(Checked(()), identity))
    }

    /// The tier of a tenant, remembered for a moment; none if nobody set one.
    async fn known_tier(&self, tenant: &TenantId) -> Result<Option<Tier>, Refusal> {
        let now = self.clock.now();
        if let Some(known) = self.tiers.get(tenant, now) {
            return Ok(known);
        }
        let known = self.store.system().tenant(tenant).await?.map(|row| row.tier);
        self.tiers.put(tenant.clone(), known, now);
        Ok(known)
    }

    /// The token's hash and its principal.
    async fn by_token(
        &self,
        header: &str,
        peer: Option<IpAddr>,
    ) -> Result<(String, Principal), Refusal> {
        let failed = |refusal| match self.limits.failed(peer) {
            Some(retry_after_secs) => Refusal::TooManyFailures { retry_after_secs },
            None => refusal,
        };
        let Some((scheme, token)) = header.split_once(' ') else {
            return Err(failed(Refusal::NoToken));
        };
        let token = token.trim();
        if !scheme.eq_ignore_ascii_case("bearer") || !is_token(token) {
            return Err(failed(Refusal::BadToken));
        }
        let hash = hash(token);
        match self.known(&hash).await? {
            Some(principal) => Ok((hash, principal)),
            None => Err(failed(Refusal::BadToken)),
        }
    }

    /// The principal of a token that is in force. The store is asked by the secret's hash, so
    /// that the time it takes tells nothing about secrets.
    async fn known(&self, hash: &str) -> Result<Option<Principal>, Refusal> {
        let now = self.clock.now();
        let found = match self.tokens.get(hash, now) {
            Some(found) => found,
            None => {
                let found = self.store.system().token_by_hash(hash).await?;
                // Guesses are not remembered.
                let Some(found) = found else { return Ok(None) };
                self.tokens.put(hash.to_owned(), found.clone(), now);
                found
            }
        };
        let (row, tier) = found;
        let expired = row.expires_at.is_some_and(|at| at <= now);
        if expired || row.revoked_at.is_some() {
            return Ok(None);
        }
        let identity = Identity {
            tenant: row.tenant,
            customer: row.customer,
            organization: row.organization,
            credential: Some(row.id),
            tier: tier.unwrap_or(self.rules.default_tier),
            // A right that this version does not know is no right.
            rights: row.rights.iter().filter_map(|right| right.parse().ok()).collect(),
        };
        Ok(Some(Principal::new(Checked(()), identity)))
    }

    /// Who the caller is, given what the request itself says, if the rate allows one more.
    pub(crate) async fn admit(&self, caller: &Caller, claim: &Claim) -> Result<Principal, Answer> {
        let principal = match &caller.credential {
            Credential::Token { principal, .. } | Credential::Certificate { principal, .. } => {
                self.agreed(principal, caller, claim)
            }
            Credential::Believed(tenant) => self.believed(tenant.as_ref(), caller, claim).await,
        };
        let principal = principal.map_err(|refusal| Answer::refused(&refusal))?;
        let rate =
            caller.notes.rate.get_or_init(|| self.limits.check(&principal, self.clock.now()));
        match rate.retry_after_secs {
            Some(_) => Err(Answer::rate_limited(rate)),
            None => Ok(principal.asking_from(caller.asked.origin.clone())),
        }
    }

    /// Refuses a caller whose credential is known and whose rate is used up, before its body is read.
    pub(crate) async fn precheck(&self, caller: &Caller) -> Result<(), Answer> {
        match &caller.credential {
            Credential::Token { .. } | Credential::Certificate { .. } => {
                self.admit(caller, &Claim::default()).await.map(drop)
            }
            Credential::Believed(_) => Ok(()),
        }
    }

    /// Who the caller of a request is that takes long, as of now; an answer if it may no longer
    /// come in. Counts against no rate.
    pub(crate) async fn recheck(
        &self,
        caller: &Caller,
        claim: &Claim,
    ) -> Result<Principal, Answer> {
        let principal = match &caller.credential {
            Credential::Token { hash, .. } => match self.known(hash).await {
                Ok(Some(principal)) => self.agreed(&principal, caller, claim),
                Ok(None) => Err(Refusal::BadToken),
                Err(refusal) => Err(refusal),
            },
            Credential::Certificate { id, tenant, .. } => match self.client(id) {
                Some(client) => match self.by_certificate(id, &client, tenant).await {
                    Ok(principal) => self.agreed(&principal, caller, claim),
                    Err(refusal) => Err(refusal),
                },
                None => Err(Refusal::GoneCertificate),
            },
            Credential::Believed(tenant) => self.believed(tenant.as_ref(), caller, claim).await,
        };
        principal.map_err(|refusal| Answer::refused(&refusal))
    }

    fn agreed(
        &self,
        principal: &Principal,
        caller: &Caller,
        claim: &Claim,
    ) -> Result<Principal, Refusal> {
        agree(principal, &claim.tenant, &claim.customer)?;
        // One that names no organization says nothing about it: what a request says is no more than
        // a part of that request then.
        if let Some(organization) = principal.organization()
            && !["", organization].contains(&claim.organization.as_str())
        {
            return Err(Refusal::OtherOrganization);
        }
        if principal.customer().is_some() {
            return Ok(principal.clone());
        }
        // A token for the whole tenant acts for whichever of its customers is named.
        let customer = named(caller, claim)?;
        let identity = Identity { customer, ..principal.identity().clone() };
        Ok(Principal::new(Checked(()), identity))
    }

    async fn believed(
        &self,
        header: Option<&TenantId>,
        caller: &Caller,
        claim: &Claim,
    ) -> Result<Principal, Refusal> {
        let tenant = match (header, claim.tenant.as_str()) {
            (None, "") => return Err(Refusal::NoTenant),
            (None, claimed) => claimed.parse()?,
            (Some(tenant), "") => tenant.clone(),
            (Some(tenant), claimed) if tenant.as_str() == claimed => tenant.clone(),
            (Some(_), _) => return Err(Refusal::OtherTenant),
        };
        let identity = Identity {
            customer: named(caller, claim)?,
            organization: bounded("organization", &claim.organization)?,
            credential: None,
            tier: self.believed_tier(&tenant, caller, claim.tier).await?,
            rights: BTreeSet::from(Right::ALL),
            tenant,
        };
        Ok(Principal::new(Checked(()), identity))
    }

    /// The tier a tenant names, which is remembered; else the one it named last.
    async fn believed_tier(
        &self,
        tenant: &TenantId,
        caller: &Caller,
        claimed: Option<Tier>,
    ) -> Result<Tier, Refusal> {
        let now = self.clock.now();
        if let Some(known) = self.tiers.get(tenant, now)
            && claimed.is_none_or(|tier| known == Some(tier))
        {
            return Ok(known.unwrap_or(self.rules.default_tier));
        }
        let author = Author::believed(&caller.asked.origin);
        let system = self.store.system_for(&author);
        let row = system.tenant(tenant).await?;
        let mut known = row.as_ref().map(|row| row.tier);
        if let Some(tier) = claimed.filter(|tier| known != Some(*tier)) {
            let limits = row.and_then(|row| row.limits);
            system.put_tenant(&TenantRow { id: tenant.clone(), tier, limits }).await?;
            known = Some(tier);
        }
        self.tiers.put(tenant.clone(), known, now);
        Ok(known.unwrap_or(self.rules.default_tier))
    }
}

/// The customer that header and body name; they must not differ.
fn named(caller: &Caller, claim: &Claim) -> Result<Option<String>, Refusal> {
    let one = match (caller.customer.as_str(), claim.customer.as_str()) {
        ("", one) | (one, "") => one,
        (one, other) if one == other => one,
        _ => return Err(Refusal::OtherCustomer),
    };
    bounded("customer", one)
}

/// What a request calls somebody; none if it is silent.
fn bounded(what: &'static str, name: &str) -> Result<Option<String>, Refusal> {
    match name.len() {
        0 => Ok(None),
        1..=NAME_BYTES_MAX => Ok(Some(name.to_owned())),
        _ => Err(Refusal::NameTooLong(what)),
    }
}

fn agree(principal: &Principal, tenant: &str, customer: &str) -> Result<(), Refusal> {
    if !tenant.is_empty() && tenant != principal.tenant().as_str() {
        return Err(Refusal::OtherTenant);
    }
    let known = principal.customer().unwrap_or(customer);
    if !customer.is_empty() && customer != known {
        return Err(Refusal::OtherCustomer);
    }
    Ok(())
}

/// A new token: its secret, which is shown once, its id, and the hash under which it is kept.
/// The secret is `bld_`, 64 hex digits of random numbers, and 8 of their CRC-32, by which a
/// mistyped or truncated one is known without asking anybody.
pub(crate) fn new_token() -> (String, String, String) {
    let digits = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    let secret = format!("{TOKEN_PREFIX}{digits}{:08x}", checksum(&digits));
    let id = format!("tok_{}", &Uuid::new_v4().simple().to_string()[..16]);
    let hash = hash(&secret);
    (secret, id, hash)
}

fn hash(token: &str) -> String {
    hex(&Sha256::digest(token))
}

fn checksum(digits: &str) -> u32 {
    let mut crc = Crc::new();
    crc.update(digits.as_bytes());
    crc.sum()
}

fn is_token(text: &str) -> bool {
    let Some(rest) = text.strip_prefix(TOKEN_PREFIX) else { return false };
    let Some((digits, sum)) = rest.split_at_checked(SECRET_DIGITS) else { return false };
    sum == format!("{:08x}", checksum(digits))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn principal(tenant: &str, tier: Tier) -> Principal {
        let identity = Identity {
            tenant: tenant.parse().unwrap(),
            customer: None,
            organization: None,
            credential: None,
            tier,
            rights: BTreeSet::from(Right::ALL),
        };
        Principal::new(Checked(()), identity)
    }

    #[test]
    fn a_mistyped_token_is_known_at_once() {
        let (token, id, kept) = new_token();
        assert!(is_token(&token) && id.starts_with("tok_") && kept == hash(&token));
        assert!(!kept.contains(&token[4..20]));
        for index in 0..token.len() {
            let mut wrong = token.clone().into_bytes();
            wrong[index] = if wrong[index] == b'0' { b'1' } else { b'0' };
            assert!(!is_token(&String::from_utf8(wrong).unwrap()), "byte {index}");
            assert!(!is_token(&token[..index]), "cut at {index}");
        }
        assert!(!is_token("bld_\u{1f512}\u{1f512}"));
        assert_ne!(new_token().0, token);
    }

    #[test]
    fn what_a_request_says_must_agree_with_its_credential() {
        let whole = principal("mine", Tier::Pro);
        assert!(agree(&whole, "", "").is_ok() && agree(&whole, "mine", "any").is_ok());
        assert!(matches!(agree(&whole, "other", ""), Err(Refusal::OtherTenant)));
        let identity = Identity { customer: Some("c1".into()), ..whole.identity().clone() };
        let one = Principal::new(Checked(()), identity);
        assert!(agree(&one, "", "c1").is_ok() && agree(&one, "", "").is_ok());
        assert!(matches!(agree(&one, "", "c2"), Err(Refusal::OtherCustomer)));
    }
}
