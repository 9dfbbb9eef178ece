//! Asking a registry for manifests and blobs: which host, with which authorisation, how often.
//!
//! A [`Client`] holds connections, tokens and credentials and may serve many images of one
//! user. A `Repository` is one image's name with the mirrors to try. Protocol: OCI
//! distribution spec v1.1, "Pull". It does not interpret what it fetches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RANGE};
use reqwest::{Method, Url};
use secrecy::ExposeSecret as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::auth::challenge::{self, Challenge};
use crate::auth::docker_config::DockerConfig;
use crate::auth::token::{self, Grant, Grants};
use crate::auth::{Credentials, helper};
use crate::digest::Digest;
use crate::error::PullError;
use crate::manifest::media_type;
use crate::options::ClientOptions;
use crate::reference::{Reference, api_host, canonical_registry, check_registry, mirror_parts};
use crate::retry::Attempts;
use crate::transport::{Answer, Request, Transport, host_of};

const TOKEN_BYTES_MAX: u64 = 1 << 20;
const MANIFEST_TYPES: [&str; 4] = [
    media_type::OCI_INDEX,
    media_type::DOCKER_LIST,
    media_type::OCI_MANIFEST,
    media_type::DOCKER_MANIFEST,
];

/// Connections, tokens and credentials of one user. Cheap to clone; never share one between
/// tenants, because what one may see the other would see.
#[derive(Debug, Clone)]
pub struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    transport: Transport,
    options: ClientOptions,
    docker_config: tokio::sync::OnceCell<DockerConfig>,
    helper_answers: tokio::sync::Mutex<HashMap<String, Option<Credentials>>>,
    /// Held while a token is fetched, so that parallel blobs fetch one token.
    grants: tokio::sync::Mutex<Grants>,
    slots: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Client {
    /// A client with these options.
    ///
    /// # Errors
    /// When a CA is no certificate or no HTTP client can be set up.
    pub fn new(options: &ClientOptions) -> Result<Client, PullError> {
        Ok(Client(Arc::new(Inner {
            transport: Transport::new(options)?,
            options: options.clone(),
            docker_config: tokio::sync::OnceCell::new(),
            helper_answers: tokio::sync::Mutex::default(),
            grants: tokio::sync::Mutex::default(),
            slots: Mutex::default(),
        })))
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.0.transport
    }

    /// One of the few places for a blob from this registry.
    pub(crate) async fn slot(&self, registry: &str) -> Option<OwnedSemaphorePermit> {
        let places = self.0.options.connections_per_host.max(1);
        let semaphore = {
            let mut slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || Arc::new(Semaphore::new(places));
            Arc::clone(slots.entry(registry.to_owned()).or_insert_with(new))
        };
        // The semaphore is never closed.
        semaphore.acquire_owned().await.ok()
    }

    /// The credentials for a repository: those of the options, of a helper, of the docker
    /// config, in this order.
    async fn credentials(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Option<Credentials>, PullError> {
        let options = &self.0.options;
        let explicit = options.credentials.iter();
        let mut explicit = explicit.filter(|(host, _)| canonical_registry(host) == registry);
        if let Some((_, credentials)) = explicit.next() {
            return Ok(Some(credentials.clone()));
        }
        let Some(path) = options.docker_config.clone() else { return Ok(None) };
        let failed = |source| PullError::Credentials { host: registry.to_owned(), source };
        let read = || async { DockerConfig::read(&path) };
        let config = self.0.docker_config.get_or_try_init(read).await.map_err(failed)?;
        if let Some(found) = self.ask_helper(config, registry).await? {
            return Ok(Some(found));
        }
        config.stored(registry, repository).map_err(failed)
    }

    /// Asks the registry's credential helper once and remembers the answer.
    async fn ask_helper(
        &self,
        config: &DockerConfig,
        registry: &str,
    ) -> Result<Option<Credentials>, PullError> {
        let Some(question) = config.helper(registry) else { return Ok(None) };
        let mut answers = self.0.helper_answers.lock().await;
        if let Some(answer) = answers.get(registry) {
            return Ok(answer.clone());
        }
        let patience = self.0.options.timeouts.helper;
        let answer = helper::get(&question.helper, &question.server, patience).await;
        let failed = |source: helper::HelperError| PullError::Credentials {
            host: registry.to_owned(),
            source: source.into(),
        };
        let answer = answer.map_err(failed)?;
        answers.insert(registry.to_owned(), answer.clone());
        Ok(answer)
    }
}

/// A host that may have the repository.
#[derive(Debug)]
pub(crate) struct Endpoint {
    origin: Url,
    /// The registry name that credentials are looked up by.
    registry: String,
    /// The repository's path there.
    repository: String,
    /// For a mirror: the registry it stands for.
    mirrors: Option<String>,
}

impl Endpoint {
    pub(crate) fn host(&self) -> String {
        host_of(&self.origin)
    }

    pub(crate) fn is_mirror(&self) -> bool {
        self.mirrors.is_some()
    }

    /// The URL of a manifest or blob. Repository and tail have been checked by their parsers.
    fn url(&self, tail: &str) -> Url {
        let mut url = self.origin.clone();
        url.set_path(&format!("/v2/{}/{tail}", self.repository));
        if let Some(registry) = &self.mirrors {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        url
    }
}

/// One repository, wherever it can be had.
#[derive(Debug)]
pub(crate) struct Repository {
    pub(crate) client: Client,
    pub(crate) reference: Reference,
    pub(crate) endpoints: Vec<Endpoint>,
    /// The endpoint that had the manifest: those before it have failed.
    first_good: AtomicUsize,
    used_credentials: AtomicBool,
    /// Mirrors that were passed over, with the reason, until somebody takes note.
    notes: Mutex<Vec<String>>,
}

/// One thing to get from a repository.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask<'a> {
    /// `manifests/…` or `blobs/…`.
    pub(crate) tail: &'a str,
    /// For errors.
    pub(crate) what: &'a str,
    /// The first byte wanted.
    pub(crate) from_byte: u64,
    pub(crate) is_manifest: bool,
}

/// A manifest document as it came.
pub(crate) struct Fetched {
    pub(crate) bytes: Bytes,
    pub(crate) content_type: Option<String>,
    pub(crate) digest: Digest,
}

impl Repository {
    pub(crate) fn new(client: &Client, reference: &Reference) -> Result<Repository, PullError> {
        let mirrors = &client.options().mirrors;
        let named = |name: &String| canonical_registry(name) == reference.registry();
        let own = mirrors.iter().filter(|(name, _)| named(name)).flat_map(|(_, list)| list);
        let general = mirrors.get("*").into_iter().flatten();
        let mut endpoints = Vec::new();
        for mirror in own.chain(general) {
            endpoints.push(mirror_endpoint(client, reference, mirror)?);
        }
        let host = reference.api_host();
        endpoints.push(Endpoint {
            origin: origin(client, host, "registry")?,
            registry: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
            mirrors: None,
        });
        Ok(Repository {
            client: client.clone(),
            reference: reference.clone(),
            endpoints,
            first_good: AtomicUsize::new(0),
            used_credentials: AtomicBool::new(false),
            notes: Mutex::default(),
        })
    }

    /// Whether everything so far was given without credentials.
    pub(crate) fn is_anonymous(&self) -> bool {
        !self.used_credentials.load(Ordering::Relaxed)
    }

    pub(crate) fn first_good(&self) -> usize {
        self.first_good.load(Ordering::Relaxed)
    }

    pub(crate) fn attempts(&self, endpoint: &Endpoint) -> Attempts {
        let options = self.client.options();
        Attempts::new(options.retry, options.sleep.clone(), endpoint.is_mirror())
    }

    /// Fetches a manifest or index by tag or digest: mirrors first, then the registry.
    pub(crate) async fn manifest(&self, selector: &str) -> Result<Fetched, PullError> {
        let mut at = self.first_good();
        loop {
            let Some(endpoint) = self.endpoints.get(at) else {
                // There is always the registry itself, and its failure returns below.
                return Err(self.nothing_left());
            };
            match self.manifest_from(endpoint, selector).await {
                Ok(fetched) => {
                    self.first_good.store(at, Ordering::Relaxed);
                    return Ok(fetched);
                }
                Err(error) if at + 1 == self.endpoints.len() => return Err(error),
                Err(error) => {
                    self.note(&endpoint.host(), &error);
                    at += 1;
                }
            }
        }
    }

    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers why a mirror was passed over.
    pub(crate) fn note(&self, mirror: &str, error: &PullError) {
        const NOTES_MAX: usize = 100;
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < NOTES_MAX {
            notes.push(format!("mirror {mirror} was passed over: {error}"));
        }
    }

    fn nothing_left(&self) -> PullError {
        let host = self.reference.api_host().to_owned();
        PullError::NotFound { host, what: self.reference.to_string(), message: String::new() }
    }

    async fn manifest_from(
        &self,
        endpoint: &Endpoint,
        selector: &str,
    ) -> Result<Fetched, PullError> {
        let mut attempts = self.attempts(endpoint);
        loop {
            match self.manifest_once(endpoint, selector).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => attempts.wait_or_give_up(error).await?,
            }
        }
    }

    async fn manifest_once(
        &self,
        endpoint: &Endpoint,
        selector: &str,
    ) -> Result<Fetched, PullError> {
        let name = match selector.contains(':') {
            true => format!("{}@{selector}", self.reference.repository()),
            false => format!("{}:{selector}", self.reference.repository()),
        };
        let tail = format!("manifests/{selector}");
        let ask = Ask { tail: &tail, what: &name, from_byte: 0, is_manifest: true };
        let mut answer = self.get(endpoint, ask).await?;
        let header = |name: &str| {
            let value = answer.response.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        let content_type = header(CONTENT_TYPE.as_str());
        let announced = header("docker-content-digest").and_then(|text| text.parse().ok());
        let max = self.client.options().limits.manifest_bytes_max;
        let what = format!("the manifest of {name}");
        let bytes = self.client.transport().body(&mut answer, &what, max).await?;
        let actual = Digest::of(&bytes);
        for expected in [selector.parse().ok(), announced].into_iter().flatten() {
            if expected != actual {
                return Err(PullError::DigestMismatch { what, expected, actual });
            }
        }
        Ok(Fetched { bytes, content_type, digest: actual })
    }

    /// One attempt at one endpoint, authorisation included. Only success comes back.
    pub(crate) async fn get(&self, endpoint: &Endpoint, ask: Ask<'_>) -> Result<Answer, PullError> {
        // A grant may have expired since, and its successor may be refused for what it lacks.
        const GRANTS_MAX: u32 = 2;
        let mut grant = self.known_grant(endpoint).await;
        let mut fetched = 0;
        loop {
            let answer =
                self.client.transport().send(request(endpoint, ask, grant.as_ref())).await?;
            let status = answer.response.status().as_u16();
            if matches!(status, 200 | 206) {
                if grant.as_ref().is_some_and(|grant| grant.with_credentials) {
                    self.used_credentials.store(true, Ordering::Relaxed);
                }
                return Ok(answer);
            }
            let challenge = challenge::best(answer.response.headers());
            let wanted = challenge.filter(|_| status == 401 && answer.is_home);
            let Some(challenge) = wanted.filter(|_| fetched < GRANTS_MAX) else {
                let sent = grant.is_some_and(|grant| grant.with_credentials);
                return Err(self.client.transport().refusal(answer, ask.what, sent).await);
            };
            let refused = grant.take();
            match self.new_grant(endpoint, &challenge, refused.as_ref()).await? {
                Some(new) => grant = Some(new),
                None => {
                    let sent = refused.is_some_and(|grant| grant.with_credentials);
                    return Err(self.client.transport().refusal(answer, ask.what, sent).await);
                }
            }
            fetched += 1;
        }
    }

    async fn known_grant(&self, endpoint: &Endpoint) -> Option<Grant> {
        let grants = self.client.0.grants.lock().await;
        grants.get(&endpoint.host(), &endpoint.repository, Instant::now())
    }

    /// Answers a challenge: with a grant that someone else fetched meanwhile, or a new one.
    async fn new_grant(
        &self,
        endpoint: &Endpoint,
        challenge: &Challenge,
        refused: Option<&Grant>,
    ) -> Result<Option<Grant>, PullError> {
        let mut grants = self.client.0.grants.lock().await;
        let (host, repository) = (endpoint.host(), &endpoint.repository);
        if let Some(refused) = refused {
            grants.forget(&host, repository, &refused.header);
        }
        if let Some(grant) = grants.get(&host, repository, Instant::now()) {
            return Ok(Some(grant));
        }
        let credentials = self.client.credentials(&endpoint.registry, repository).await?;
        let secrets = self.client.transport().secrets();
        if let Some(credentials) = &credentials {
            secrets.learn(credentials);
        }
        let grant = match (challenge, credentials) {
            (_, Some(Credentials::RegistryToken(token))) => Grant::bearer(&token),
            (Challenge::Basic, Some(Credentials::Password { username, password })) => {
                token::basic(&username, &password).map(Grant::lasting)
            }
            (Challenge::Basic, Some(Credentials::IdentityToken(_)) | None) => None,
            (Challenge::Bearer { realm, service, scope }, credentials) => {
                let question =
                    TokenQuestion { realm, service: service.as_deref(), scope: scope.as_deref() };
                Some(self.ask_for_token(endpoint, question, credentials.as_ref()).await?)
            }
        };
        // The same password again would be refused again.
        let is_new = |grant: &Grant| refused.is_none_or(|old| old.header != grant.header);
        let grant = grant.filter(is_new);
        if let Some(grant) = &grant {
            secrets.learn_header(&grant.header);
            grants.put(&host, repository, grant.clone(), Instant::now());
        }
        Ok(grant)
    }

    async fn ask_for_token(
        &self,
        endpoint: &Endpoint,
        question: TokenQuestion<'_>,
        credentials: Option<&Credentials>,
    ) -> Result<Grant, PullError> {
        let mut attempts = self.attempts(endpoint);
        loop {
            match self.ask_for_token_once(endpoint, question, credentials).await {
                Ok(grant) => return Ok(grant),
                Err(error) => attempts.wait_or_give_up(error).await?,
            }
        }
    }

    async fn ask_for_token_once(
        &self,
        endpoint: &Endpoint,
        question: TokenQuestion<'_>,
        credentials: Option<&Credentials>,
    ) -> Result<Grant, PullError> {
        let host = endpoint.host();
        let realm = self.realm(endpoint, question.realm)?;
        let realm_host = self.client.transport().foreign_host(&realm);
        let failed = |reason: String| PullError::Token {
            host: host.clone(),
            realm: realm_host.clone(),
            reason,
        };
        let fallback = format!("repository:{}:pull", endpoint.repository);
        let scope = question.scope.unwrap_or(&fallback);
        let basic = if let Some(Credentials::Password { username, password }) = credentials {
            token::basic(username, password)
        } else {
            None
        };
        let what = format!("a token for {}", self.reference.repository());
        let mut request = Request {
            method: Method::GET,
            url: realm,
            headers: HeaderMap::new(),
            authorization: basic.as_ref(),
            body: None,
            is_told: true,
            what: &what,
        };
        let refresh =
            if let Some(Credentials::IdentityToken(t)) = credentials { Some(t) } else { None };
        question.write_into(&mut request, scope, refresh.map(|token| token.expose_secret()));
        let transport = self.client.transport();
        let mut answer = transport.send(request).await?;
        if answer.response.status().as_u16() != 200 {
            let error = transport.refusal(answer, &what, credentials.is_some()).await;
            // Whoever has a wrong password is refused by the registry, as users see it.
            let PullError::Unauthorized { sent_credentials, message, .. } = error else {
                return Err(error);
            };
            let what = self.reference.to_string();
            return Err(PullError::Unauthorized { host, what, sent_credentials, message });
        }
        let bytes = transport.body(&mut answer, &what, TOKEN_BYTES_MAX).await?;
        Grant::from_answer(&bytes, credentials.is_some(), Instant::now())
            .ok_or_else(|| failed("the answer holds no token".to_owned()))
    }

    /// The token server's address: TLS, unless the registry itself is a named plain-HTTP host.
    /// Where egress is closed, that is no excuse, and the address is judged as any other.
    fn realm(&self, endpoint: &Endpoint, realm: &str) -> Result<Url, PullError> {
        let host = endpoint.host();
        let transport = self.client.transport();
        let named = realm.split(['?', '@']).next().unwrap_or_default();
        let unusable = || PullError::Token {
            host: host.clone(),
            realm: crate::manifest::shown(&transport.secrets().blotted(named)),
            reason: "its address is not a web address".to_owned(),
        };
        let url = Url::parse(realm).map_err(|_| unusable())?;
        if !url.username().is_empty() || url.password().is_some() || !url.has_host() {
            return Err(unusable());
        }
        let plain = endpoint.origin.scheme() == "http" || transport.may_be_plain(&url);
        match url.scheme() {
            "https" => Ok(url),
            "http" if plain || !transport.is_open() => Ok(url),
            "http" => Err(PullError::InsecureRealm { host, realm: transport.foreign_host(&url) }),
            _ => Err(unusable()),
        }
    }
}

#[derive(Clone, Copy)]
struct TokenQuestion<'a> {
    realm: &'a str,
    service: Option<&'a str>,
    scope: Option<&'a str>,
}

impl TokenQuestion<'_> {
    /// GET with a query, or POST with a form for those who have a refresh token.
    fn write_into(self, request: &mut Request<'_>, scope: &str, refresh_token: Option<&str>) {
        let Some(refresh_token) = refresh_token else {
            let mut query = request.url.query_pairs_mut();
            if let Some(service) = self.service {
                query.append_pair("service", service);
            }
            for scope in scope.split(' ') {
                query.append_pair("scope", scope);
            }
            return;
        };
        // The form encoding is that of a query.
        let mut form = request.url.clone();
        form.set_query(None);
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("client_id", "builderd")
            .append_pair("service", self.service.unwrap_or_default())
            .append_pair("scope", scope)
            .append_pair("refresh_token", refresh_token);
        request.method = Method::POST;
        request.body = form.query().map(str::to_owned);
        request
            .headers
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    }
}

fn request<'a>(endpoint: &Endpoint, ask: Ask<'a>, grant: Option<&'a Grant>) -> Request<'a> {
    let mut headers = HeaderMap::new();
    if ask.is_manifest {
        for media_type in MANIFEST_TYPES {
            headers.append(ACCEPT, HeaderValue::from_static(media_type));
        }
    }
    if ask.from_byte > 0 {
        insert_text(&mut headers, RANGE, &format!("bytes={}-", ask.from_byte));
    }
    Request {
        method: Method::GET,
        url: endpoint.url(ask.tail),
        headers,
        authorization: grant.map(|grant| &grant.header),
        body: None,
        is_told: false,
        what: ask.what,
    }
}

fn insert_text(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn origin(client: &Client, host: &str, option: &'static str) -> Result<Url, PullError> {
    let unusable = || PullError::Option {
        option,
        reason: format!("{host:?} is not a host with an optional port"),
    };
    check_registry(host).map_err(|_| unusable())?;
    client.transport().origin(host).ok_or_else(unusable)
}

/// A mirror is written `host[:port][/path-prefix]`.
fn mirror_endpoint(
    client: &Client,
    reference: &Reference,
    mirror: &str,
) -> Result<Endpoint, PullError> {
    let Some((host, prefix)) = mirror_parts(mirror) else {
        let reason = format!("{mirror:?} is not host[:port][/path-prefix], without a scheme");
        return Err(PullError::Option { option: "mirror", reason });
    };
    let separator = if prefix.is_empty() { "" } else { "/" };
    let registry = canonical_registry(host);
    Ok(Endpoint {
        origin: origin(client, api_host(&registry), "mirror")?,
        registry,
        repository: format!("{prefix}{separator}{}", reference.repository()),
        mirrors: Some(reference.registry().to_owned()),
    })
}
