//! Just enough HTTP/1.1 to read from a registry on loopback with nothing in between.
//!
//! No TLS, no redirects, no chunked bodies, no authentication.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// Longest accepted header line and largest number of them.
const HEADER_BYTES_MAX: u64 = 64 * 1024;

/// A body of known length.
pub(crate) type Body = std::io::Take<BufReader<TcpStream>>;

/// Asks for `path` on a fresh connection; anything but 200 is an error.
pub(crate) fn get(address: &str, path: &str, accept: &str) -> Result<Body> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("nothing listens on {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_nodelay(true)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reader = BufReader::with_capacity(256 * 1024, stream);
    let (status, length) = head(&mut reader)?;
    if status != 200 {
        bail!("http://{address}{path} answered {status}");
    }
    Ok(reader.take(length.context("the answer has no content-length")?))
}

/// The whole body, at most `limit` bytes.
pub(crate) fn get_bytes(address: &str, path: &str, accept: &str, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    get(address, path, accept)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn head(reader: &mut impl BufRead) -> Result<(u16, Option<u64>)> {
    let mut limited = reader.take(HEADER_BYTES_MAX);
    let mut line = String::new();
    limited.read_line(&mut line)?;
    let status = line
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("not an HTTP status line: {line:?}"))?;
    let mut length = None;
    loop {
        line.clear();
        if limited.read_line(&mut line)? == 0 {
            bail!("the answer ends within its headers");
        }
        if line.trim().is_empty() {
            return Ok((status, length));
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(value.trim().parse().context("content-length is not a number")?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_gives_status_and_length_and_a_cut_one_is_an_error() {
        let mut whole: &[u8] = b"HTTP/1.1 200 OK\r\nContent-LENGTH: 12\r\n\r\nbody";
        assert_eq!(head(&mut whole).unwrap(), (200, Some(12)));
        assert_eq!(whole, b"body");
        let mut cut: &[u8] = b"HTTP/1.1 404 Not Found\r\nServer: x\r\n";
        assert!(head(&mut cut).is_err());
    }
}
