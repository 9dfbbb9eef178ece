//! The API as a client sees it: Connect with JSON over HTTP (connectrpc.com/docs/protocol).
//!
//! It knows calls, streams and what an answer that is no success means. It does not know what
//! a build is, and does not print.

use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;

use super::service_args::ServerArgs;
use super::{Failure, client_tls};
use crate::config::Settings;

const SERVICE: &str = "builder.v1.BuilderService";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Silence after which the server is asked to say something.
const HEARTBEAT_SECS: u32 = 15;
/// Silence after which a connection is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(45);
/// The largest message of a stream.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// The largest answer that is no success.
const ERROR_BYTES_MAX: usize = 1 << 20;
/// The longest wait that a server may ask for.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Why a call did not do it.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nobody answers, or the connection broke.
    #[error("{server} cannot be reached")]
    Unreachable { server: String, source: reqwest::Error },
    /// A stream ended before its end, or fell silent.
    #[error("the connection to {server} was cut")]
    Cut { server: String },
    /// The server says no, or not now.
    #[error("{message}")]
    Refused {
        code: String,
        message: String,
        /// How long it wants to be left alone before it is asked again.
        wait: Option<Duration>,
    },
    /// Who answers does not speak the protocol.
    #[error("{server} gives an answer that is none of builderd's: {problem}")]
    Foreign { server: String, problem: String },
}

impl CallError {
    /// Whether the same call may go well in a moment.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Cut { .. } => true,
            Self::Refused { wait: Some(_), .. } => true,
            Self::Refused { code, .. } => matches!(code.as_str(), "unavailable" | "aborted"),
            Self::Foreign { .. } => false,
        }
    }

    /// How long the server wants to be left alone first, if it says so.
    pub(super) fn wait(&self) -> Option<Duration> {
        match self {
            Self::Refused { wait, .. } => *wait,
            Self::Unreachable { .. } | Self::Cut { .. } | Self::Foreign { .. } => None,
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let hint = |text: &str| Some(text.to_owned());
        let (code, hint) = match &error {
            CallError::Unreachable { .. } => {
                (4, hint("is it running? see --server, UNKEY_BUILDERD_SERVER_ADDRESS"))
            }
            CallError::Cut { .. } => (4, hint("try again")),
            CallError::Foreign { .. } => (1, hint("see --server, UNKEY_BUILDERD_SERVER_ADDRESS")),
            CallError::Refused { code, .. } => match code.as_str() {
                "unauthenticated" => (
                    3,
                    hint("set UNKEY_BUILDERD_TOKEN; in development mode, name a tenant: --tenant"),
                ),
                "invalid_argument"
                | "not_found"
                | "already_exists"
                | "permission_denied"
                | "resource_exhausted"
                | "failed_precondition"
                | "out_of_range"
                | "unimplemented"
                | "canceled" => (3, None),
                "unavailable" | "deadline_exceeded" | "aborted" => (4, hint("try again")),
                // unknown, internal, data_loss, and what nobody knows
                _ => (1, None),
            },
        };
        Self { code, error: Box::new(error), hint }
    }
}

/// A server, and who asks.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    headers: HeaderMap,
}

/// `--server` and its like before the environment.
pub(super) fn settings(args: &ServerArgs) -> Result<Settings, Failure> {
    let flags = [
        ("--server", "SERVER_ADDRESS", &args.server),
        ("--token", "TOKEN", &args.token),
        ("--tenant", "TENANT_ID", &args.tenant),
        ("--customer", "CUSTOMER_ID", &args.customer),
        ("--ca-file", "SERVER_CA_FILE", &args.ca_file),
        ("--cert-file", "CLIENT_CERT_FILE", &args.cert_file),
        ("--key-file", "CLIENT_KEY_FILE", &args.key_file),
    ];
    let flags = flags
        .into_iter()
        .filter_map(|(flag, name, value)| value.clone().map(|value| (flag, name, value)));
    super::config::resolved(Settings::of_client(flags.collect()))
}

impl Client {
    pub(super) fn new(args: &ServerArgs) -> Result<Self, Failure> {
        let settings = settings(args)?;
        let address = settings.text("SERVER_ADDRESS").unwrap_or_default();
        let base = match address.contains("://") {
            true => address.trim_end_matches('/').to_owned(),
            false => format!("http://{}", address.trim_end_matches('/')),
        };
        let wrong = |problem: &str| {
            let name = settings.written("SERVER_ADDRESS");
            Failure::usage(format!("{name}: the server's address `{base}` {problem}"))
        };
        match reqwest::Url::parse(&base) {
            Ok(url) if matches!(url.scheme(), "http" | "https") => {}
            Ok(_) => return Err(wrong("begins with neither http:// nor https://")),
            Err(_) => return Err(wrong("is no URL")),
        }
        let mut headers = HeaderMap::new();
        let token = settings.secret("TOKEN");
        if let Some(token) = token {
            headers.insert("authorization", bearer(&token)?);
        }
        for (header, name) in [("x-tenant-id", "TENANT_ID"), ("x-customer-id", "CUSTOMER_ID")] {
            if let Some(text) = settings.text(name) {
                let value = HeaderValue::from_str(&text).map_err(|_| {
                    Failure::usage(format!("{} cannot be sent: `{text}`", settings.written(name)))
                })?;
                headers.insert(header, value);
            }
        }
        let http = client_tls::secured(reqwest::Client::builder(), &settings, &base)?
            .user_agent(concat!("builderd/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(Failure::ours)?;
        Ok(Self { http, base, headers })
    }

    /// Where the server is, for messages.
    pub(super) fn server(&self) -> &str {
        &self.base
    }

    fn unreachable(&self, source: reqwest::Error) -> CallError {
        CallError::Unreachable { server: self.base.clone(), source: source.without_url() }
    }

    fn foreign(&self, problem: impl Into<String>) -> CallError {
        CallError::Foreign { server: self.base.clone(), problem: problem.into() }
    }

    fn post(&self, method: &str, content_type: &'static str, body: Bytes) -> RequestBuilder {
        self.http
            .post(format!("{}/{SERVICE}/{method}", self.base))
            .headers(self.headers.clone())
            .header("connect-protocol-version", "1")
            .header(CONTENT_TYPE, content_type)
            .body(body)
    }

    /// One call. A server that is starting or asks to come back is asked again for a while; a
    /// request that may have arrived is not repeated.
    pub(super) async fn call(&self, method: &str, request: &Value) -> Result<Value, CallError> {
        let body = Bytes::from(request.to_string());
        let mut patience = Patience::new(4);
        loop {
            let request = self.post(method, "application/json", body.clone());
            let (error, wait) = match request.timeout(CALL_TIMEOUT).send().await {
                Err(error) if error.is_connect() => (self.unreachable(error), None),
                Err(error) => return Err(self.unreachable(error)),
                Ok(response) if response.status() == StatusCode::OK => {
                    let bytes = response.bytes().await.map_err(|error| self.unreachable(error))?;
                    return serde_json::from_slice(&bytes)
                        .map_err(|error| self.foreign(error.to_string()));
                }
                Ok(response) => match retry_after(response.headers()) {
                    Some(wait) => (self.refusal(response).await, Some(wait)),
                    None => return Err(self.refusal(response).await),
                },
            };
            if !patience.wait(wait).await {
                return Err(error);
            }
        }
    }

    /// What an answer that is no success says, in the form of Connect or of the plain routes.
    async fn refusal(&self, mut response: Response) -> CallError {
        let (status, wait) = (response.status(), retry_after(response.headers()));
        let mut bytes = Vec::new();
        while let Ok(Some(piece)) = response.chunk().await {
            if bytes.len() + piece.len() > ERROR_BYTES_MAX {
                break;
            }
            bytes.extend_from_slice(&piece);
        }
        let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        // The plain routes have codes of their own; the status says the same.
        let said = match answer["error"].as_object() {
            Some(said) => (Some(code_of(status)), said.get("message")),
            None => (answer["code"].as_str(), answer.get("message")),
        };
        let message = said.1.and_then(Value::as_str).unwrap_or("the server gives no reason");
        match (said.0, message) {
            (Some(code), message) => refused(code, message, wait),
            // A proxy in front of the server.
            (None, _) if matches!(status.as_u16(), 429 | 502..=504) => {
                refused(code_of(status), &format!("{} answers {status}", self.base), wait)
            }
            (None, _) => self.foreign(format!("HTTP status {status}")),
        }
    }

    /// Opens the log of a build at line `offset`.
    pub(super) async fn open_log(
        &self,
        build: &str,
        offset: u64,
        follow: bool,
    ) -> Result<LogStream<'_>, CallError> {
        let request = serde_json::json!({
            "buildId": build,
            "follow": follow,
            "offset": offset.to_string(),
            "heartbeatSecs": HEARTBEAT_SECS,
        });
        let body = envelope(request.to_string().as_bytes());
        let request = self.post("StreamBuildLogs", "application/connect+json", body);
        let response = match tokio::time::timeout(STALL_TIMEOUT, request.send()).await {
            Err(_) => return Err(CallError::Cut { server: self.base.clone() }),
            Ok(Err(error)) => return Err(self.unreachable(error)),
            Ok(Ok(response)) if response.status() != StatusCode::OK => {
                return Err(self.refusal(response).await);
            }
            Ok(Ok(response)) => response,
        };
        let wait = retry_after(response.headers());
        Ok(LogStream { client: self, response, buffer: BytesMut::new(), wait, has_ended: false })
    }

    /// Asks for the artifact of a build from byte `from` on, if it is still the one with this
    /// sum; a server that has another one sends it whole.
    pub(super) async fn artifact(
        &self,
        build: &str,
        from: u64,
        sha256: &str,
    ) -> Result<Artifact<'_>, CallError> {
        let mut request = self
            .http
            .get(format!("{}/{SERVICE}/GetBuildArtifact/{build}", self.base))
            .headers(self.headers.clone())
            .header("accept-encoding", "identity");
        if from > 0 {
            request = request
                .header("range", format!("bytes={from}-"))
                .header("if-range", format!("\"{sha256}\""));
        }
        let response = match tokio::time::timeout(STALL_TIMEOUT, request.send()).await {
            Err(_) => return Err(CallError::Cut { server: self.base.clone() }),
            Ok(Err(error)) => return Err(self.unreachable(error)),
            Ok(Ok(response)) => response,
        };
        let (start, total) = match response.status() {
            StatusCode::OK => (0, response.content_length()),
            StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
                Some((start, total)) if start == from => (start, Some(total)),
                _ => return Err(self.foreign("another part of the artifact than was asked for")),
            },
            // Behind the last byte: nothing is missing, or what is here is none of it.
            StatusCode::RANGE_NOT_SATISFIABLE => (from, Some(from)),
            _ => return Err(self.refusal(response).await),
        };
        Ok(Artifact { client: self, response, start, total })
    }
}

fn bearer(token: &SecretString) -> Result<HeaderValue, Failure> {
    let text = format!("Bearer {}", token.expose_secret().trim());
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| Failure::usage("the token has characters that no token has"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn refused(code: &str, message: &str, wait: Option<Duration>) -> CallError {
    CallError::Refused { code: code.to_owned(), message: message.to_owned(), wait }
}

/// The code that Connect has for an HTTP status.
fn code_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "invalid_argument",
        401 => "unauthenticated",
        403 => "permission_denied",
        404 | 410 => "not_found",
        409 => "failed_precondition",
        429 => "resource_exhausted",
        501 => "unimplemented",
        502..=504 => "unavailable",
        _ => "unknown",
    }
}

/// How long the server wants to be left alone, if it says so and it is not long.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    bearable(headers.get(RETRY_AFTER)?.to_str().ok()?)
}

fn bearable(secs: &str) -> Option<Duration> {
    let wait = Duration::from_secs(secs.parse().ok()?);
    (wait <= WAIT_MAX).then_some(wait)
}

/// `bytes 10-19/20`: the first byte and the size of the whole (RFC 9110, section 14.4).
fn content_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let text = headers.get("content-range")?.to_str().ok()?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.parse().ok()?, total.parse().ok()?))
}

/// A message of a stream: flags, length, content.
fn envelope(content: &[u8]) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(content);
    bytes.into()
}

/// A log on its way.
#[derive(Debug)]
pub(super) struct LogStream<'a> {
    client: &'a Client,
    response: Response,
    buffer: BytesMut,
    /// What stands in the head of the answer: a stream that is refused says no elsewhere, in its
    /// last message.
    wait: Option<Duration>,
    has_ended: bool,
}

impl LogStream<'_> {
    /// The next message; none at the proper end.
    pub(super) async fn next(&mut self) -> Result<Option<Value>, CallError> {
        const COMPRESSED: u8 = 1;
        const END: u8 = 2;
        if self.has_ended {
            return Ok(None);
        }
        let (flags, content) = self.next_envelope().await?;
        if flags & COMPRESSED != 0 {
            return Err(self.client.foreign("a compressed message, which was not asked for"));
        }
        let message: Value = serde_json::from_slice(&content)
            .map_err(|error| self.client.foreign(error.to_string()))?;
        if flags & END == 0 {
            return Ok(Some(message));
        }
        self.has_ended = true;
        let error = &message["error"];
        match error["code"].as_str() {
            None => Ok(None),
            Some(code) => {
                let reason = error["message"].as_str().unwrap_or("the server gives no reason");
                let told = message["metadata"]["retry-after"][0].as_str().and_then(bearable);
                Err(refused(code, reason, self.wait.or(told)))
            }
        }
    }

    async fn next_envelope(&mut self) -> Result<(u8, Bytes), CallError> {
        const HEAD: usize = 5;
        loop {
            if let [flags, length @ ..] = &self.buffer[..]
                && let Some(length) = length.first_chunk()
            {
                let (flags, length) = (*flags, u32::from_be_bytes(*length));
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                if length > MESSAGE_BYTES_MAX {
                    return Err(self.client.foreign(format!("a message of {length} bytes")));
                }
                if self.buffer.len() >= HEAD + length {
                    self.buffer.advance(HEAD);
                    return Ok((flags, self.buffer.split_to(length).freeze()));
                }
            }
            match self.client.piece(&mut self.response).await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => return Err(CallError::Cut { server: self.client.base.clone() }),
            }
        }
    }
}

impl Client {
    /// The next bytes of an answer; none at its end. A connection that says nothing is cut.
    async fn piece(&self, response: &mut Response) -> Result<Option<Bytes>, CallError> {
        match tokio::time::timeout(STALL_TIMEOUT, response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(self.unreachable(error)),
            Err(_) => Err(CallError::Cut { server: self.base.clone() }),
        }
    }
}

/// An artifact on its way.
#[derive(Debug)]
pub(super) struct Artifact<'a> {
    client: &'a Client,
    response: Response,
    /// Where these bytes begin.
    pub(super) start: u64,
    /// The size of the whole, if the server says it.
    pub(super) total: Option<u64>,
}

impl Artifact<'_> {
    /// The next bytes; none at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        if self.response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(None);
        }
        self.client.piece(&mut self.response).await
    }
}

/// How often and how long to wait for something that may pass.
#[derive(Debug)]
pub(super) struct Patience {
    tries: u32,
    used: u32,
}

impl Patience {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(5);

    pub(super) fn new(tries: u32) -> Self {
        Self { tries, used: 0 }
    }

    /// There was progress: the waiting starts again.
    pub(super) fn renew(&mut self) {
        self.used = 0;
    }

    /// Waits, `asked` or longer each time; false when it is over.
    pub(super) async fn wait(&mut self, asked: Option<Duration>) -> bool {
        if self.used == self.tries {
            return false;
        }
        let doubled = Self::FIRST.saturating_mul(1 << self.used.min(10)).min(Self::LONGEST);
        self.used += 1;
        tokio::time::sleep(asked.unwrap_or(doubled)).await;
        true
    }
}
