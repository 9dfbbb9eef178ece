//! A registry whose every answer its owner writes, and that remembers what it was asked.
//!
//! One connection for each request, no TLS. Knows of images only where their documents lie.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// How long a client may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// What is said to whoever asks for one path.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Whoever does not show this is asked for it.
    token: Option<String>,
}

impl Answer {
    /// As if there were no such thing.
    pub(super) fn missing() -> Self {
        Self { status: 404, ..Self::default() }
    }

    fn document(content_type: &str, body: Vec<u8>) -> Self {
        let headers = vec![("Content-Type", content_type.to_owned())];
        Self { status: 200, headers, body, token: None }
    }

    /// Sends the client on to another URL.
    pub(super) fn redirect(url: &str) -> Self {
        let headers = vec![("Location", url.to_owned())];
        Self { status: 307, headers, ..Self::default() }
    }

    /// Names a server that gives tokens.
    pub(super) fn realm(url: &str) -> Self {
        let challenge = format!("Bearer realm=\"{url}\",service=\"rogue\",scope=\"all\"");
        let headers = vec![("WWW-Authenticate", challenge)];
        Self { status: 401, headers, ..Self::default() }
    }
}

#[derive(Default)]
struct State {
    answers: Mutex<BTreeMap<String, Answer>>,
    asked: Mutex<Vec<String>>,
    connections: AtomicUsize,
    stopped: AtomicBool,
}

/// Listens on a free loopback port as long as the value lives, of IPv6 as well where there is one.
pub(super) struct Rogue {
    address: String,
    on_v6: Option<SocketAddr>,
    state: Arc<State>,
}

impl Rogue {
    /// Has nothing yet.
    pub(super) fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        // Not every machine has it.
        let on_v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, address.port())).ok();
        let rogue = Self {
            address: address.to_string(),
            on_v6: on_v6.as_ref().map(TcpListener::local_addr).transpose()?,
            state: Arc::default(),
        };
        for listener in [Some(listener), on_v6].into_iter().flatten() {
            let shared = Arc::clone(&rogue.state);
            std::thread::spawn(move || accept(&listener, &shared));
        }
        Ok(rogue)
    }

    /// Whether it is also reached at the loopback address of IPv6.
    pub(super) fn is_on_v6(&self) -> bool {
        self.on_v6.is_some()
    }

    /// `127.0.0.1:PORT`
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn port(&self) -> &str {
        self.address.rsplit(':').next().unwrap_or_default()
    }

    /// How many have come so far, whatever they said: who begins with TLS asks nothing that
    /// [`Self::asked`] would know.
    pub(super) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// The request lines so far.
    pub(super) fn asked(&self) -> Vec<String> {
        lock(&self.state.asked).clone()
    }

    /// From now on, whoever asks for `path` gets this.
    pub(super) fn put(&self, path: &str, answer: Answer) {
        lock(&self.state.answers).insert(path.to_owned(), answer);
    }

    /// Serves an OCI layout's image and returns its reference.
    pub(super) fn serve(&self, layout: &Path, name: &str) -> Result<String> {
        self.serve_for(layout, name, None)
    }

    /// The same, for those alone that show a token.
    pub(super) fn serve_privately(&self, layout: &Path, name: &str, token: &str) -> Result<String> {
        self.serve_for(layout, name, Some(token.to_owned()))
    }

    fn serve_for(&self, layout: &Path, name: &str, token: Option<String>) -> Result<String> {
        let blob = |descriptor: &Value| -> Result<(String, Vec<u8>)> {
            let digest = descriptor["digest"].as_str().context("a descriptor without digest")?;
            let file = layout.join("blobs").join(digest.replace(':', "/"));
            Ok((digest.to_owned(), std::fs::read(file)?))
        };
        let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
        let (digest, manifest) = blob(&index["manifests"][0])?;
        let parsed: Value = serde_json::from_slice(&manifest)?;
        let kind = parsed["mediaType"].as_str().context("a manifest without media type")?;
        let put = |path: String, answer: Answer| {
            self.put(&path, Answer { token: token.clone(), ..answer });
        };
        for tag in ["latest", &digest] {
            let answer = Answer::document(kind, manifest.clone());
            put(format!("/v2/{name}/manifests/{tag}"), answer);
        }
        let layers = parsed["layers"].as_array().into_iter().flatten();
        for descriptor in layers.chain([&parsed["config"]]) {
            let (digest, bytes) = blob(descriptor)?;
            let answer = Answer::document("application/octet-stream", bytes);
            put(format!("/v2/{name}/blobs/{digest}"), answer);
        }
        Ok(format!("{}/{name}:latest", self.address))
    }

    /// The path of an image's top layer, once it is served.
    pub(super) fn top_layer(&self, layout: &Path, name: &str) -> Result<String> {
        let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
        let digest = index["manifests"][0]["digest"].as_str().context("no manifest")?;
        let file = layout.join("blobs").join(digest.replace(':', "/"));
        let manifest: Value = serde_json::from_slice(&std::fs::read(file)?)?;
        let layers = manifest["layers"].as_array().context("no layers")?;
        let top = layers.last().and_then(|layer| layer["digest"].as_str()).context("no layer")?;
        Ok(format!("/v2/{name}/blobs/{top}"))
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::Relaxed);
        // Wakes the threads that accept; if they have ended there is nobody to wake.
        let _ = TcpStream::connect(&self.address);
        let _ = self.on_v6.map(TcpStream::connect);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for client in listener.incoming() {
        if state.stopped.load(Ordering::Relaxed) {
            return;
        }
        let Ok(client) = client else { continue };
        state.connections.fetch_add(1, Ordering::Relaxed);
        let state = Arc::clone(state);
        // A client that goes away is no error of ours.
        std::thread::spawn(move || drop(talk(&client, &state)));
    }
}

fn talk(mut client: &TcpStream, state: &State) -> std::io::Result<()> {
    client.set_read_timeout(Some(SILENCE))?;
    let mut reader = BufReader::new(client);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut shown = String::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            shown = value.trim().to_owned();
        }
    }
    lock(&state.asked).push(first.trim().to_owned());
    let mut words = first.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let found = lock(&state.answers).get(path).cloned();
    let answer = match found {
        Some(answer) if answer.token.as_ref().is_none_or(|t| shown == format!("Bearer {t}")) => {
            answer
        }
        Some(_) => {
            let headers = vec![("WWW-Authenticate", "Basic realm=\"rogue\"".to_owned())];
            Answer { status: 401, headers, ..Answer::default() }
        }
        None if path == "/v2/" => Answer { status: 200, ..Answer::default() },
        None => Answer { status: 404, ..Answer::default() },
    };
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", answer.status);
    head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    client.write_all(head.as_bytes())?;
    if method != "HEAD" {
        client.write_all(&answer.body)?;
    }
    client.flush()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::service::wire::{Connection, Request};

    #[test]
    fn what_was_put_is_answered_and_every_question_is_remembered() {
        let rogue = Rogue::start().unwrap();
        rogue.put("/away", Answer::redirect("http://elsewhere/"));
        let ask = |path: &str| {
            let request = Request { method: "GET", path, headers: &[], body: b"" };
            Connection::open(rogue.address()).unwrap().send(request).unwrap()
        };
        let away = ask("/away?x=1");
        assert_eq!((away.status(), away.head.header("location")), (307, Some("http://elsewhere/")));
        assert_eq!(ask("/nothing").status(), 404);
        assert_eq!(rogue.asked(), ["GET /away?x=1 HTTP/1.1", "GET /nothing HTTP/1.1"]);
        // The beginning of a handshake is no request, but somebody has come.
        let mut stranger = TcpStream::connect(rogue.address()).unwrap();
        stranger.write_all(&[0x16, 0x03, 0x01, 0xff, b'\n']).unwrap();
        stranger.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!((rogue.asked().len(), rogue.connections()), (2, 3));
    }
}
