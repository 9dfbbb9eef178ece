//! The first words of whoever speaks through a CONNECT. A host that serves many names answers to
//! the one in the TLS ClientHello (RFC 6066, 3), so it must be the one that was judged. Nothing is
//! decrypted; what is asked for inside is not seen.

use std::io;

use oci::Target;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Bytes up to the end of a ClientHello. Today's with the largest key shares have some 2,000.
const HELLO_BYTES_MAX: usize = 32 << 10;
const PIECE_BYTES: usize = 4 << 10;
/// The type of the TLS record that a ClientHello begins with (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;

/// Why nothing that was said is passed on.
#[derive(Debug)]
pub(super) enum Unfit {
    /// The rule that forbids it.
    Denied(String),
    /// Whoever speaks has gone.
    Gone(io::Error),
}

/// Reads the first words to `target` and gives them back as they came. What is no TLS passes
/// unless it `must_be_tls`; TLS always is for that host.
///
/// # Errors
/// [`Unfit`]; then nothing may be passed on.
pub(super) async fn first_words(
    from: &mut (impl AsyncRead + Unpin),
    target: &Target,
    must_be_tls: bool,
) -> Result<Vec<u8>, Unfit> {
    let no_tls = || Unfit::Denied("what is said through its CONNECT is no TLS".to_owned());
    let (mut acceptor, mut said) = (Acceptor::default(), Vec::new());
    let mut piece = [0; PIECE_BYTES];
    while said.len() < HELLO_BYTES_MAX {
        let count = from.read(&mut piece).await.map_err(Unfit::Gone)?;
        let mut rest = piece.get(..count).unwrap_or_default();
        said.extend_from_slice(rest);
        match said.first() {
            // Nothing is said at all.
            None => return Ok(said),
            Some(&HANDSHAKE) if rest.is_empty() => {
                return Err(Unfit::Gone(io::ErrorKind::UnexpectedEof.into()));
            }
            Some(&HANDSHAKE) => {}
            Some(_) if must_be_tls => return Err(no_tls()),
            Some(_) => return Ok(said),
        }
        while !rest.is_empty() {
            if acceptor.read_tls(&mut rest).map_err(|_| no_tls())? == 0 {
                return Err(no_tls());
            }
            if let Some(accepted) = acceptor.accept().map_err(|_| no_tls())? {
                judge(accepted.client_hello().server_name(), target)?;
                return Ok(said);
            }
        }
    }
    Err(no_tls())
}

/// Whether TLS with this name is for the host. An address has no name there; a name that is left
/// out leads to whatever the server thinks best.
fn judge(name: Option<&str>, target: &Target) -> Result<(), Unfit> {
    match name.map(|name| name.trim_end_matches('.')) {
        None if target.is_address() => Ok(()),
        None => Err(Unfit::Denied("its TLS names no host".to_owned())),
        Some(name) if name.eq_ignore_ascii_case(target.host()) => Ok(()),
        Some(name) => Err(Unfit::Denied(format!("its TLS is for another host, {name}"))),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;

    use super::*;

    /// What a client says first that wants to speak to `host`, with a name in it or none.
    pub(in super::super) fn hello(host: &str, is_named: bool) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.enable_sni = is_named;
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut said = Vec::new();
        client.write_tls(&mut said).unwrap();
        said
    }

    fn target(host: &str) -> Target {
        Target::new(host, 443).unwrap()
    }

    async fn read(mut said: &[u8], host: &str, must_be_tls: bool) -> Result<Vec<u8>, Unfit> {
        first_words(&mut said, &target(host), must_be_tls).await
    }

    fn denied(read: Result<Vec<u8>, Unfit>) -> String {
        match read {
            Err(Unfit::Denied(rule)) => rule,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn tls_is_for_the_host_of_its_connect() {
        let said = hello("good.example", true);
        for host in ["good.example", "GOOD.example", "good.example."] {
            assert_eq!(read(&said, host, true).await.unwrap(), said, "{host}");
        }
        let with_more = [&said[..], b"early data"].concat();
        assert_eq!(read(&with_more, "good.example", true).await.unwrap(), with_more);
        for host in ["other.example", "sub.good.example", "example", "10.0.0.1"] {
            for must_be_tls in [true, false] {
                let rule = denied(read(&said, host, must_be_tls).await);
                assert!(rule.contains("another host, good.example"), "{rule}");
            }
        }
        let nameless = hello("good.example", false);
        assert!(denied(read(&nameless, "good.example", true).await).contains("names no host"));
        let of_address = hello("10.0.0.1", true);
        for host in ["10.0.0.1", "[::1]"] {
            assert_eq!(read(&of_address, host, true).await.unwrap(), of_address);
        }
    }

    #[tokio::test]
    async fn a_hello_in_many_pieces_is_judged_when_it_is_whole() {
        let said = hello("good.example", true);
        let (mut near, mut far) = tokio::io::duplex(1);
        let bytes = said.clone();
        let sent = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut far, &bytes).await.unwrap();
        });
        let words = first_words(&mut near, &target("good.example"), true).await.unwrap();
        assert_eq!(words, said);
        sent.await.unwrap();
        // Each byte of the message in a record of its own.
        let records: Vec<u8> =
            said[5..].iter().flat_map(|&byte| [HANDSHAKE, 3, 1, 0, 1, byte]).collect();
        assert_eq!(read(&records, "good.example", true).await.unwrap(), records);
        assert!(denied(read(&records, "other.example", true).await).contains("good.example"));
    }

    #[tokio::test]
    async fn what_is_no_tls_passes_only_where_it_may() {
        for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"SSH-2.0-x\r\n", &[21, 3, 3, 0, 2, 1, 0]] {
            assert!(denied(read(words, "good.example", true).await).contains("no TLS"));
            assert_eq!(read(words, "good.example", false).await.unwrap(), words);
        }
        assert_eq!(read(b"", "good.example", true).await.unwrap(), b"", "nothing is no harm");
        let whole = hello("good.example", true);
        let mut broken = [[HANDSHAKE, 3, 1, 0, 4, 2, 0, 0, 0].to_vec(), vec![HANDSHAKE; 40_000]];
        for words in &mut broken {
            words.resize(words.len().max(64), 0);
            denied(read(words, "good.example", false).await);
        }
        for length in [1, 5, 60, whole.len() - 1] {
            let cut = read(&whole[..length], "good.example", false).await;
            assert!(matches!(cut, Err(Unfit::Gone(_))), "{length}: {cut:?}");
        }
    }

    #[tokio::test]
    async fn a_hello_has_an_end() {
        // A message that is said to have 60,000 bytes, in good records.
        let mut said = Vec::new();
        let mut message = vec![1, 0, 0xea, 0x60];
        message.resize(60_000, 0);
        for piece in message.chunks(16_000) {
            let length = u16::try_from(piece.len()).unwrap().to_be_bytes();
            said.extend([HANDSHAKE, 3, 1]);
            said.extend(length);
            said.extend(piece);
        }
        let mut rest = &said[..];
        let rule = first_words(&mut rest, &target("good.example"), false).await;
        assert!(denied(rule).contains("no TLS"));
        assert!(said.len() - rest.len() <= HELLO_BYTES_MAX + PIECE_BYTES, "no more was read");
    }
}
