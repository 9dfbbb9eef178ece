//! An in-memory registry on loopback, with faults, for tests.
//!
//! It speaks real HTTP/1.1 (or TLS, given a server configuration) on threads of its own, so it
//! serves any runtime; dropping it stops it. It records every request. It knows the pull half
//! of the distribution protocol and tokens, and is deliberately willing to lie: about bytes,
//! sizes, types and ranges. Not for production.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::digest::Digest;
use crate::manifest::media_type;

/// A registry; see the module.
#[derive(Debug)]
pub struct TestRegistry {
    address: SocketAddr,
    state: Arc<State>,
}

/// What goes wrong with one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The connection is closed after this many bytes of the body.
    CutAfter(u64),
    /// After this many bytes of the body nothing more is sent; the connection stays open.
    StallAfter(u64),
    /// The connection is closed before any answer.
    Hangup,
    /// Another status, with these headers and no body worth reading.
    Status(u16, Vec<(String, String)>),
    /// Another status, with this message in the body; each `{}` in it is what the request has in
    /// its `Authorization` header, without the scheme, or in its body.
    Echo(u16, String),
    /// The body with its first byte changed.
    WrongBytes,
    /// Other bytes in place of the body.
    Body(Vec<u8>),
    /// The right bytes, then these.
    Extra(Vec<u8>),
    /// The body without a `Content-Length`, chunked, and ended early after this many bytes.
    ChunkedUpTo(u64),
    /// Another or a further header.
    Header(String, String),
    /// A header that is left out.
    Without(String),
    /// A redirect to this URL.
    Redirect(String),
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// `GET` or `POST`.
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The query, without `?`.
    pub query: String,
    /// The headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body of a POST.
    pub body: String,
    /// The status it was answered with; 0 for a hang-up.
    pub status: u16,
}

/// Who is let in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Access {
    /// Everybody.
    #[default]
    Open,
    /// Those with this user name and password.
    Basic(String, String),
    /// Those with a token, which `/token` of the same server gives: to everybody, or to those
    /// with this user name and password or this refresh token.
    Bearer {
        /// User name and password the token server wants.
        user: Option<(String, String)>,
        /// Refresh token the token server takes by POST.
        refresh_token: Option<String>,
        /// The token server, if it is not this one: a URL.
        realm: Option<String>,
    },
}

#[derive(Debug, Default)]
struct State {
    content: Mutex<Content>,
    requests: Mutex<Vec<Recorded>>,
    stopped: AtomicBool,
    /// Tokens are numbered; only the latest generation is accepted.
    token_generation: AtomicU64,
    ignores_ranges: AtomicBool,
}

#[derive(Debug, Default)]
struct Content {
    blobs: HashMap<Digest, Vec<u8>>,
    /// By `repository:tag` or `repository@digest`.
    manifests: HashMap<String, (String, Vec<u8>)>,
    access: Access,
    /// Pairs of a part of the path and what goes wrong next time it is asked for.
    faults: Vec<(String, Fault)>,
    own_url: String,
}

/// Reads what an answer of a registry or token server says beside its documents, as a client does:
/// challenges, waits and ranges in the headers (one in each line, `name: value`), and behind an
/// empty line a token. It does nothing with it; a fuzz target has no other way in.
pub fn read_answer(text: &[u8]) {
    let mut lines = text.split(|byte| *byte == b'\n');
    let mut headers = reqwest::header::HeaderMap::new();
    let mut read = 0;
    for line in lines.by_ref().take_while(|line| !line.is_empty()) {
        read += line.len() + 1;
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = line.split_at(colon);
        let name = reqwest::header::HeaderName::from_bytes(name);
        let value = reqwest::header::HeaderValue::from_bytes(value.get(1..).unwrap_or_default());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let _ = crate::auth::challenge::best(&headers);
    let _ = crate::retry::retry_after(&headers);
    for value in headers.get_all(reqwest::header::CONTENT_RANGE) {
        let _ = value.to_str().map(crate::blob::content_range);
    }
    let body = text.get(read + 1..).unwrap_or_default();
    let now = tokio::time::Instant::now();
    let _ = crate::auth::token::Grant::from_answer(body, false, now);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestRegistry {
    /// Starts a registry that speaks plain HTTP.
    ///
    /// # Errors
    /// When there is no loopback to listen on.
    pub fn start() -> std::io::Result<TestRegistry> {
        TestRegistry::start_with(None)
    }

    /// Starts a registry that speaks TLS.
    ///
    /// # Errors
    /// When there is no loopback to listen on.
    pub fn start_tls(config: Arc<rustls::ServerConfig>) -> std::io::Result<TestRegistry> {
        TestRegistry::start_with(Some(config))
    }

    fn start_with(tls: Option<Arc<rustls::ServerConfig>>) -> std::io::Result<TestRegistry> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let scheme = if tls.is_some() { "https" } else { "http" };
        lock(&state.content).own_url = format!("{scheme}://{address}");
        let served = Arc::clone(&state);
        std::thread::spawn(move || serve(&listener, &served, tls.as_ref()));
        Ok(TestRegistry { address, state })
    }

    /// `127.0.0.1:port`, as it stands in references.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Keeps a blob for all repositories.
    pub fn put_blob(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        lock(&self.state.content).blobs.insert(digest, bytes);
        digest
    }

    /// Serves other bytes under a blob's digest.
    pub fn corrupt_blob(&self, digest: Digest, bytes: impl Into<Vec<u8>>) {
        lock(&self.state.content).blobs.insert(digest, bytes.into());
    }

    /// Forgets a blob.
    pub fn delete_blob(&self, digest: Digest) {
        lock(&self.state.content).blobs.remove(&digest);
    }

    /// Keeps a manifest by its digest and, if given, a tag.
    pub fn put_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        document: &Value,
    ) -> Digest {
        self.put_manifest_bytes(repository, tag, media_type, document.to_string().into_bytes())
    }

    /// As [`TestRegistry::put_manifest`], with bytes that need be no JSON.
    pub fn put_manifest_bytes(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Digest {
        let digest = Digest::of(&bytes);
        let mut content = lock(&self.state.content);
        let entry = (media_type.to_owned(), bytes);
        if let Some(tag) = tag {
            content.manifests.insert(format!("{repository}:{tag}"), entry.clone());
        }
        content.manifests.insert(format!("{repository}@{digest}"), entry);
        digest
    }

    /// Keeps an OCI image of these gzip (or other) layer blobs for one platform; the layers are
    /// (media type, blob, `diff_id`). Gives the manifest's digest.
    pub fn put_image(
        &self,
        repository: &str,
        tag: Option<&str>,
        platform: (&str, &str),
        layers: &[(String, Vec<u8>, Digest)],
    ) -> Digest {
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.2.to_string()).collect();
        let config = json!({
            "os": platform.0, "architecture": platform.1,
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let config_size = config.len();
        let layers: Vec<Value> = layers
            .iter()
            .map(|(media_type, blob, _)| {
                descriptor(media_type, self.put_blob(blob.clone()), blob.len())
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type::OCI_MANIFEST,
            "config": descriptor(media_type::OCI_CONFIG, self.put_blob(config), config_size),
            "layers": layers,
        });
        self.put_manifest(repository, tag, media_type::OCI_MANIFEST, &manifest)
    }

    /// Who is let in from now on.
    pub fn set_access(&self, access: Access) {
        lock(&self.state.content).access = access;
    }

    /// Makes all tokens given so far worthless.
    pub fn revoke_tokens(&self) {
        self.state.token_generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether `Range` is ignored from now on.
    pub fn ignore_ranges(&self, ignore: bool) {
        self.state.ignores_ranges.store(ignore, Ordering::SeqCst);
    }

    /// The next request whose path contains `path_part` meets this fault. Several faults for
    /// the same part are met one after the other.
    pub fn fault(&self, path_part: &str, fault: Fault) {
        lock(&self.state.content).faults.push((path_part.to_owned(), fault));
    }

    /// All requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        lock(&self.state.requests).clone()
    }

    /// How many faults nobody has met yet.
    #[must_use]
    pub fn faults_left(&self) -> usize {
        lock(&self.state.content).faults.len()
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees the flag.
        let _ = TcpStream::connect(self.address);
    }
}

/// A descriptor as JSON.
#[must_use]
pub fn descriptor(media_type: &str, digest: Digest, size_bytes: usize) -> Value {
    json!({"mediaType": media_type, "digest": digest.to_string(), "size": size_bytes})
}

fn serve(listener: &TcpListener, state: &Arc<State>, tls: Option<&Arc<rustls::ServerConfig>>) {
    for stream in listener.incoming() {
        if state.stopped.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        // A client that keeps an idle connection must not keep the thread for ever.
        let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
        let _ = stream.set_nodelay(true);
        let (state, tls) = (Arc::clone(state), tls.cloned());
        std::thread::spawn(move || {
            // A client that goes away in the middle is part of the tests.
            let _ = match tls {
                None => converse(stream, &state),
                Some(config) => match rustls::ServerConnection::new(config) {
                    Ok(connection) => {
                        converse(rustls::StreamOwned::new(connection, stream), &state)
                    }
                    Err(_) => Ok(()),
                },
            };
        });
    }
}

/// Answers the requests of one connection.
fn converse<S: Read + Write>(stream: S, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(mut request) = read_request(&mut stream)? {
        if state.stopped.load(Ordering::SeqCst) {
            return Ok(());
        }
        let fault = take_fault(state, &request.path);
        if fault == Some(Fault::Hangup) {
            lock(&state.requests).push(request);
            return Ok(());
        }
        let mut answer = answer(state, &request);
        apply(&mut answer, fault.as_ref(), &request);
        request.status = answer.status;
        lock(&state.requests).push(request);
        let keeps_open = answer.write(stream.get_mut(), fault.as_ref(), state)?;
        if !keeps_open {
            return Ok(());
        }
    }
    Ok(())
}

fn take_fault(state: &State, path: &str) -> Option<Fault> {
    let faults = &mut lock(&state.content).faults;
    let at = faults.iter().position(|(part, _)| path.contains(part.as_str()))?;
    Some(faults.remove(at).1)
}

fn read_request<S: Read + Write>(stream: &mut BufReader<S>) -> std::io::Result<Option<Recorded>> {
    // A TLS handshake at a server without TLS is answered as real servers do.
    if stream.fill_buf()?.first() == Some(&0x16) {
        stream.get_mut().write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")?;
        return Ok(None);
    }
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default().to_owned();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        let value = value.trim();
        headers
            .entry(name.to_ascii_lowercase())
            .and_modify(|all: &mut String| *all = format!("{all}, {value}"))
            .or_insert_with(|| value.to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok());
    let mut body = vec![0; length.unwrap_or(0).min(1 << 20)];
    stream.read_exact(&mut body)?;
    Ok(Some(Recorded {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
        status: 0,
    }))
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, content_type: &str, body: Vec<u8>) -> Answer {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Answer { status, headers, body }
    }

    fn refusal(status: u16, code: &str) -> Answer {
        let body = json!({"errors": [{"code": code, "message": code.to_ascii_lowercase()}]});
        Answer::new(status, "application/json", body.to_string().into_bytes())
    }

    fn set(&mut self, name: &str, value: &str) {
        self.remove(name);
        self.headers.push((name.to_owned(), value.to_owned()));
    }

    fn remove(&mut self, name: &str) {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
    }

    /// Sends the answer; true if the connection can be used again.
    fn write<S: Write>(
        &self,
        stream: &mut S,
        fault: Option<&Fault>,
        state: &State,
    ) -> std::io::Result<bool> {
        let chunked = matches!(fault, Some(Fault::ChunkedUpTo(_)));
        let mut head = format!("HTTP/1.1 {} Answer\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let named =
            self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        if chunked {
            head.push_str("transfer-encoding: chunked\r\n");
        } else if !named {
            head.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes())?;
        let limit = match fault {
            Some(Fault::CutAfter(n) | Fault::StallAfter(n) | Fault::ChunkedUpTo(n)) => *n,
            Some(_) | None => u64::MAX,
        };
        let sent = usize::try_from(limit).unwrap_or(usize::MAX).min(self.body.len());
        let part = self.body.get(..sent).unwrap_or_default();
        if chunked {
            let size = format!("{:x}\r\n", part.len());
            stream.write_all(&[size.as_bytes(), part, b"\r\n0\r\n\r\n"].concat())?;
        } else {
            stream.write_all(part)?;
        }
        stream.flush()?;
        if matches!(fault, Some(Fault::StallAfter(_))) {
            while !state.stopped.load(Ordering::SeqCst) {
                std::thread::park_timeout(Duration::from_millis(5));
            }
        }
        Ok(!matches!(fault, Some(Fault::CutAfter(_) | Fault::StallAfter(_))))
    }
}

fn apply(answer: &mut Answer, fault: Option<&Fault>, request: &Recorded) {
    match fault {
        Some(Fault::Echo(status, message)) => {
            let message = message.replace("{}", shown_credential(request));
            let body = json!({"errors": [{"code": "ECHO", "message": message}]});
            *answer = Answer::new(*status, "application/json", body.to_string().into_bytes());
        }
        Some(Fault::Status(status, headers)) => {
            *answer = Answer::refusal(*status, "FAULT");
            for (name, value) in headers {
                answer.set(name, value);
            }
        }
        Some(Fault::WrongBytes) => {
            if let Some(first) = answer.body.first_mut() {
                *first = !*first;
            }
        }
        Some(Fault::Body(body)) => answer.body.clone_from(body),
        Some(Fault::Extra(extra)) => answer.body.extend_from_slice(extra),
        Some(Fault::Header(name, value)) => answer.set(name, value),
        Some(Fault::Without(name)) => answer.remove(name),
        Some(Fault::Redirect(target)) => {
            *answer = Answer::new(307, "text/plain", Vec::new());
            answer.set("location", target);
        }
        Some(Fault::CutAfter(_) | Fault::StallAfter(_) | Fault::ChunkedUpTo(_) | Fault::Hangup)
        | None => {}
    }
}

/// What a request came with to be let in.
fn shown_credential(request: &Recorded) -> &str {
    let header = request.headers.get("authorization").and_then(|value| value.split_once(' '));
    header.map_or(&request.body, |(_, credential)| credential)
}

fn answer(state: &State, request: &Recorded) -> Answer {
    let content = lock(&state.content);
    if request.path == "/token" {
        return token(&content, state, request);
    }
    if let Some(refusal) = refuse(&content, state, request) {
        return refusal;
    }
    if let Some((repository, selector)) = split(&request.path, "/manifests/") {
        let separator = if selector.contains(':') { '@' } else { ':' };
        let key = format!("{repository}{separator}{selector}");
        return match content.manifests.get(&key) {
            None => Answer::refusal(404, "MANIFEST_UNKNOWN"),
            Some((media_type, bytes)) => {
                let mut answer = Answer::new(200, media_type, bytes.clone());
                answer.set("docker-content-digest", &Digest::of(bytes).to_string());
                answer
            }
        };
    }
    // `/cdn/<digest>` is where a redirect may lead: there nobody asks who you are.
    let digest = split(&request.path, "/blobs/").map(|(_, digest)| digest);
    let digest = digest.or(request.path.strip_prefix("/cdn/"));
    let blob = digest.and_then(|text| content.blobs.get(&text.parse().ok()?));
    match blob {
        None => Answer::refusal(404, "BLOB_UNKNOWN"),
        Some(bytes) => blob_answer(state, request, bytes),
    }
}

fn split<'a>(path: &'a str, middle: &str) -> Option<(&'a str, &'a str)> {
    path.strip_prefix("/v2/")?.split_once(middle)
}

fn blob_answer(state: &State, request: &Recorded, bytes: &[u8]) -> Answer {
    let kind = "application/octet-stream";
    let range =
        request.headers.get("range").filter(|_| !state.ignores_ranges.load(Ordering::SeqCst));
    let from =
        range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from: Option<usize> = from;
    match from {
        None => Answer::new(200, kind, bytes.to_vec()),
        Some(from) if from < bytes.len() => {
            let mut answer = Answer::new(206, kind, bytes.get(from..).unwrap_or_default().to_vec());
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            answer.set("content-range", &range);
            answer
        }
        Some(_) => Answer::refusal(416, "RANGE_INVALID"),
    }
}

fn basic(user: &(String, String)) -> String {
    use base64::Engine as _;
    let pair = format!("{}:{}", user.0, user.1);
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
}

fn current_token(state: &State) -> String {
    format!("token-{}", state.token_generation.load(Ordering::SeqCst))
}

fn refuse(content: &Content, state: &State, request: &Recorded) -> Option<Answer> {
    if request.path.starts_with("/cdn/") {
        return None;
    }
    let shown = request.headers.get("authorization").map(String::as_str);
    let (expected, challenge) = match &content.access {
        Access::Open => return None,
        Access::Basic(user, password) => {
            let expected = basic(&(user.clone(), password.clone()));
            (expected, "Basic realm=\"test\"".to_owned())
        }
        Access::Bearer { realm, .. } => {
            let own = format!("{}/token", content.own_url);
            let realm = realm.as_ref().unwrap_or(&own);
            let repository = request.path.trim_start_matches("/v2/");
            let repository = repository.split("/manifests/").next().unwrap_or_default();
            let repository = repository.split("/blobs/").next().unwrap_or_default();
            let scope = format!("repository:{repository}:pull");
            let challenge =
                format!("Bearer realm=\"{realm}\",service=\"test.service\",scope=\"{scope}\"");
            (format!("Bearer {}", current_token(state)), challenge)
        }
    };
    if shown == Some(expected.as_str()) {
        return None;
    }
    let mut refusal = Answer::refusal(401, "UNAUTHORIZED");
    refusal.set("www-authenticate", &challenge);
    Some(refusal)
}

fn token(content: &Content, state: &State, request: &Recorded) -> Answer {
    let Access::Bearer { user, refresh_token, .. } = &content.access else {
        return Answer::refusal(404, "NOT_FOUND");
    };
    let allowed = match (request.method.as_str(), refresh_token, user) {
        ("POST", Some(token), _) => {
            let granted =
                request.body.split('&').any(|pair| *pair == format!("refresh_token={token}"));
            granted && request.body.contains("grant_type=refresh_token")
        }
        ("POST", None, _) => false,
        (_, _, Some(user)) => request.headers.get("authorization") == Some(&basic(user)),
        (_, Some(_), None) => false,
        (_, None, None) => true,
    };
    if !allowed {
        return Answer::refusal(401, "UNAUTHORIZED");
    }
    let body = json!({"token": current_token(state), "expires_in": 300});
    Answer::new(200, "application/json", body.to_string().into_bytes())
}
