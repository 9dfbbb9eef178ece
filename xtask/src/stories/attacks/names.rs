//! A name that changes its mind (DNS rebinding): asked once it leads to a place that is allowed,
//! asked again to the neighbour that nobody may reach.
//!
//! A server of DNS (RFC 1035) for this one name, on an address of its own of this machine, and
//! what listens at the place that is allowed. It answers no other questions.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The name.
pub(super) const TURNING: &str = "turning.attacker.example";
/// Where it leads at last.
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// A name server is always asked at this one.
const PORT: u16 = 53;
/// So many of these may run beside each other.
const PLACES: u8 = 100;
/// How often the server looks whether it should stop.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Longest question without extensions (RFC 1035, 4.2.1).
const QUESTION_BYTES_MAX: usize = 512;
/// Bytes before the question.
const HEAD_BYTES: usize = 12;
/// Type A, class IN.
const ADDRESS: [u8; 4] = [0, 1, 0, 1];

#[derive(Default)]
struct Seen {
    lookups: AtomicUsize,
    lured: AtomicUsize,
    stopped: AtomicBool,
}

/// Both of them, as long as the value lives.
pub(super) struct Names {
    seen: Arc<Seen>,
    server: Ipv4Addr,
    lure: SocketAddrV4,
}

impl Names {
    /// The neighbour's port is that of the lure, too: a name is always asked for with one port.
    pub(super) fn start(neighbours_port: u16) -> Result<Self> {
        let places = (1..=PLACES).map(|place| Ipv4Addr::new(127, 83, 53, place));
        let mut bound = places.map(|place| (place, UdpSocket::bind((place, PORT))));
        let found = bound.find_map(|(place, socket)| Some((place, socket.ok()?)));
        let (server, socket) = found.context("nobody may serve names here, at 127.83.53.*:53")?;
        socket.set_read_timeout(Some(LOOK_AGAIN))?;
        let [.., number] = server.octets();
        let lure = SocketAddrV4::new(Ipv4Addr::new(127, 83, 54, number), neighbours_port);
        let listener = TcpListener::bind(lure)?;
        let seen = Arc::new(Seen::default());
        let (of_names, of_lure) = (Arc::clone(&seen), Arc::clone(&seen));
        std::thread::spawn(move || serve(&socket, *lure.ip(), &of_names));
        std::thread::spawn(move || attract(&listener, &of_lure));
        Ok(Self { seen, server, lure })
    }

    /// Who is asked for names.
    pub(super) fn server(&self) -> Ipv4Addr {
        self.server
    }

    /// Where the name leads at first: the operator of these attacks allows it.
    pub(super) fn lure(&self) -> SocketAddrV4 {
        self.lure
    }

    /// How often the name was looked up, and how many came to the place that is allowed.
    pub(super) fn seen(&self) -> (usize, usize) {
        let Seen { lookups, lured, .. } = &*self.seen;
        (lookups.load(Ordering::Relaxed), lured.load(Ordering::Relaxed))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.seen.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; if it has ended there is nobody to wake.
        let _ = TcpStream::connect(self.lure);
    }
}

fn serve(socket: &UdpSocket, lure: Ipv4Addr, seen: &Seen) {
    let mut question = [0; QUESTION_BYTES_MAX];
    while !seen.stopped.load(Ordering::Relaxed) {
        // Nobody asks, or somebody who has gone.
        let Ok((length, from)) = socket.recv_from(&mut question) else { continue };
        let found = |name: &str| {
            let is_it = name.eq_ignore_ascii_case(TURNING);
            is_it.then(|| match seen.lookups.fetch_add(1, Ordering::Relaxed) % 2 {
                0 => lure,
                _ => NEIGHBOUR,
            })
        };
        if let Some(answer) = answer(&question[..length], found) {
            // Who asked asks again.
            let _ = socket.send_to(&answer, from);
        }
    }
}

/// Whoever comes is sent away without a word.
fn attract(listener: &TcpListener, seen: &Seen) {
    for _client in listener.incoming() {
        if seen.stopped.load(Ordering::Relaxed) {
            return;
        }
        seen.lured.fetch_add(1, Ordering::Relaxed);
    }
}

/// The answer to a question, with the address that is found for its name, if it asks for one of
/// IPv4, and none otherwise; nothing to what is no question.
fn answer(question: &[u8], find: impl FnOnce(&str) -> Option<Ipv4Addr>) -> Option<Vec<u8>> {
    let id = question.get(..2)?;
    let (mut labels, mut at) = (Vec::new(), HEAD_BYTES);
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(std::str::from_utf8(question.get(at..at + length)?).ok()?);
        at += length;
    }
    let end = at + ADDRESS.len();
    let found = (question.get(at..end)? == ADDRESS).then(|| find(&labels.join("."))).flatten();
    // An answer, recursion wanted and available, no error; one question, no or one address.
    let counts = [0x81, 0x80, 0, 1, 0, u8::from(found.is_some()), 0, 0, 0, 0];
    let mut answer = [id, &counts, question.get(HEAD_BYTES..end)?].concat();
    if let Some(address) = found {
        // The name of the question, an address, good for 0 s, 4 bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(kind: u8) -> Vec<u8> {
        let head = [7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        [&head[..], b"\x01a\x07example\0", &[0, kind, 0, 1]].concat()
    }

    #[test]
    fn a_question_for_an_address_has_it_in_its_answer_and_another_has_none() {
        let find = |name: &str| (name == "a.example").then_some(Ipv4Addr::new(1, 2, 3, 4));
        let told = answer(&question(1), find).unwrap();
        assert_eq!((&told[..2], &told[4..8]), (&[7, 9][..], &[0, 1, 0, 1][..]));
        assert!(told.ends_with(&[0, 4, 1, 2, 3, 4]) && told.len() == question(1).len() + 16);
        let other = answer(&question(28), find).unwrap();
        assert_eq!((&other[4..8], other.len()), (&[0, 1, 0, 0][..], question(28).len()));
        let whole = question(1);
        for length in 0..whole.len() {
            assert_eq!(answer(&whole[..length], find), None, "{length}");
        }
    }
}
