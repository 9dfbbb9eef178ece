//! A slow way to a server: passes bytes on, so many in a second. Knows no protocol.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;

/// How often bytes are passed on.
const TICK: Duration = Duration::from_millis(20);

/// Listens on a free loopback port as long as the value lives.
pub(crate) struct Throttle {
    address: String,
    state: Arc<State>,
}

struct State {
    /// On each connection, from the server to the client.
    bytes_per_sec: AtomicU64,
    stopped: AtomicBool,
}

impl Throttle {
    /// Passes connections on to `target`.
    pub(crate) fn start(target: &str, bytes_per_sec: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let state = Arc::new(State {
            bytes_per_sec: AtomicU64::new(bytes_per_sec),
            stopped: AtomicBool::new(false),
        });
        let (target, shared) = (target.to_owned(), Arc::clone(&state));
        std::thread::spawn(move || accept(&listener, &target, &shared));
        Ok(Self { address, state })
    }

    /// `127.0.0.1:PORT`
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// From now on, for open connections too.
    pub(crate) fn set(&self, bytes_per_sec: u64) {
        self.state.bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; if it has ended there is nobody to wake.
        let _ = TcpStream::connect(&self.address);
    }
}

fn accept(listener: &TcpListener, target: &str, state: &Arc<State>) {
    for client in listener.incoming() {
        if state.stopped.load(Ordering::Relaxed) {
            return;
        }
        let (Ok(client), Ok(server)) = (client, TcpStream::connect(target)) else { continue };
        let (Ok(from_client), Ok(to_server)) = (client.try_clone(), server.try_clone()) else {
            continue;
        };
        let state = Arc::clone(state);
        std::thread::spawn(move || forward(from_client, to_server));
        std::thread::spawn(move || slowly(server, client, &state));
    }
}

/// What a client asks is small.
fn forward(mut from: TcpStream, mut to: TcpStream) {
    // A connection that breaks is the end of both.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

fn slowly(mut from: TcpStream, mut to: TcpStream, state: &State) {
    let mut buffer = vec![0; 256 * 1024];
    while !state.stopped.load(Ordering::Relaxed) {
        let per_sec = state.bytes_per_sec.load(Ordering::Relaxed);
        let share = usize::try_from(per_sec / 50).unwrap_or(usize::MAX).clamp(1, buffer.len());
        match from.read(&mut buffer[..share]) {
            Ok(0) | Err(_) => break,
            Ok(count) if to.write_all(&buffer[..count]).is_err() => break,
            Ok(_) => {}
        }
        // Whoever is as fast as a buffer in each tick is not slowed down.
        if share < buffer.len() {
            std::thread::sleep(TICK);
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
    let _ = from.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn bytes_arrive_whole_and_as_slowly_as_wanted() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            stream.write_all(&vec![7; 40_000]).unwrap();
        });
        let throttle = Throttle::start(&target, 100_000).unwrap();
        let started = Instant::now();
        let mut bytes = Vec::new();
        TcpStream::connect(throttle.address()).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, vec![7; 40_000]);
        assert!(started.elapsed() > Duration::from_millis(200), "{:?}", started.elapsed());
    }
}
