//! HTTP/1.1 as the stories and the load generator speak it: connections that are kept, bodies of
//! known length and chunked ones, read whole or as they come.
//!
//! No TLS, no redirects, no retries. Knows nothing of builderd.

use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// How long an answer, or the next piece of one, may take.
const SILENCE_SECS_MAX: u64 = 120;

/// Longest head of an answer.
const HEAD_BYTES_MAX: u64 = 64 * 1024;

/// What is asked.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) headers: &'a [(&'a str, &'a str)],
    pub(crate) body: &'a [u8],
}

/// Status line and headers of an answer.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    /// A header by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.head.status
    }

    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", self.text()))
    }

    /// The body as text, for a message.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).chars().take(2000).collect()
    }
}

/// A connection that is kept for the next request.
pub(crate) struct Connection {
    address: String,
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) fn open(address: &str) -> Result<Self> {
        let stream =
            TcpStream::connect(address).with_context(|| format!("nothing listens on {address}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(SILENCE_SECS_MAX)))?;
        stream.set_nodelay(true)?;
        Ok(Self { address: address.to_owned(), stream: BufReader::new(stream) })
    }

    /// Asks and reads the whole answer.
    pub(crate) fn send(&mut self, request: Request<'_>) -> Result<Answer> {
        self.write(request)?;
        let head = head(&mut self.stream)?;
        let mut body = Vec::new();
        let framing = Framing::of(&head, request.method);
        Body { stream: &mut self.stream, framing }.read_to_end(&mut body)?;
        Ok(Answer { head, body })
    }

    /// Asks and gives the body as it comes; the connection serves nothing else.
    pub(crate) fn stream(mut self, request: Request<'_>) -> Result<(Head, Body<Owned>)> {
        self.write(request)?;
        let head = head(&mut self.stream)?;
        let framing = Framing::of(&head, request.method);
        Ok((head, Body { stream: self.stream, framing }))
    }

    fn write(&mut self, request: Request<'_>) -> Result<()> {
        let mut text = format!("{} {} HTTP/1.1\r\n", request.method, request.path);
        text.push_str(&format!("Host: {}\r\n", self.address));
        for (name, value) in request.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        if request.method != "GET" && request.method != "HEAD" {
            text.push_str(&format!("Content-Length: {}\r\n", request.body.len()));
        }
        text.push_str("\r\n");
        // One segment: two small ones would wait for each other.
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(request.body);
        self.stream.get_mut().write_all(&bytes).context("the request was not taken")
    }
}

/// What a streamed body is read from.
pub(crate) type Owned = BufReader<TcpStream>;

/// Where a body ends.
#[derive(Debug)]
enum Framing {
    Length(u64),
    /// So much of the current chunk is left.
    Chunk(u64),
    /// No more chunks.
    Done,
    UntilClosed,
}

impl Framing {
    fn of(head: &Head, method: &str) -> Self {
        if method == "HEAD" || matches!(head.status, 204 | 304) {
            return Self::Done;
        }
        if head.header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
            return Self::Chunk(0);
        }
        match head.header("content-length").and_then(|value| value.parse().ok()) {
            Some(length) => Self::Length(length),
            None => Self::UntilClosed,
        }
    }
}

/// The bytes of one body.
pub(crate) struct Body<R> {
    stream: R,
    framing: Framing,
}

impl<R: BufRead> Read for Body<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        match self.framing {
            Framing::Done | Framing::Length(0) => Ok(0),
            Framing::UntilClosed => self.stream.read(buffer),
            Framing::Length(left) => {
                let count = limited(&mut self.stream, buffer, left)?;
                self.framing = Framing::Length(left - count as u64);
                Ok(count)
            }
            Framing::Chunk(0) => {
                self.framing = next_chunk(&mut self.stream)?;
                self.read(buffer)
            }
            Framing::Chunk(left) => {
                let count = limited(&mut self.stream, buffer, left)?;
                let left = left - count as u64;
                if left == 0 {
                    line(&mut self.stream)?;
                }
                self.framing = Framing::Chunk(left);
                Ok(count)
            }
        }
    }
}

/// Reads at most `left` bytes, which are known to come.
fn limited(stream: &mut impl BufRead, buffer: &mut [u8], left: u64) -> io::Result<usize> {
    let count = stream.take(left).read(buffer)?;
    if count == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the body is cut"));
    }
    Ok(count)
}

fn next_chunk(stream: &mut impl BufRead) -> io::Result<Framing> {
    let text = line(stream)?;
    let digits = text.split(';').next().unwrap_or_default().trim();
    let size = u64::from_str_radix(digits, 16)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("chunk {text:?}")))?;
    if size > 0 {
        return Ok(Framing::Chunk(size));
    }
    while !line(stream)?.is_empty() {}
    Ok(Framing::Done)
}

/// One line without its end; the end of the stream is an error.
fn line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut text = String::new();
    if stream.take(HEAD_BYTES_MAX).read_line(&mut text)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the answer is cut"));
    }
    Ok(text.trim_end().to_owned())
}

fn head(stream: &mut impl BufRead) -> Result<Head> {
    let first = line(stream)?;
    let status = first.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    let Some(status) = status else { bail!("not an HTTP status line: {first:?}") };
    let mut headers = Vec::new();
    loop {
        let text = line(stream)?;
        if text.is_empty() {
            return Ok(Head { status, headers });
        }
        if let Some((name, value)) = text.split_once(':') {
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(method: &str, mut bytes: &[u8]) -> io::Result<String> {
        let head = head(&mut bytes).unwrap();
        let framing = Framing::of(&head, method);
        let mut text = String::new();
        Body { stream: bytes, framing }.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn bodies_of_every_framing_are_read_to_their_end() {
        let length = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhellonext";
        assert_eq!(read("GET", length).unwrap(), "hello");
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                        3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: 1\r\n\r\nnext";
        assert_eq!(read("GET", chunked).unwrap(), "hello");
        assert_eq!(read("HEAD", length).unwrap(), "");
        assert_eq!(read("GET", b"HTTP/1.1 304 Not Modified\r\n\r\nnext").unwrap(), "");
    }

    #[test]
    fn a_cut_body_is_an_error() {
        assert!(read("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel").is_err());
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n";
        assert!(read("GET", chunked).is_err());
    }
}
