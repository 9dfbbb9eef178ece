//! The proxy on the loopback device, with hosts whose addresses the tests choose.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream as Stream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use oci::{AllowedPlace, Lookup};

use super::hello::tests::hello;
use super::*;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that answers every request with the request's head as it came, and counts them.
struct Upstream {
    address: SocketAddr,
    asked: Arc<AtomicU64>,
}

impl Upstream {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    let head = head(&mut stream);
                    let length = head.len();
                    let _ =
                        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{head}");
                    // Whoever speaks through a tunnel keeps it open.
                    let _ = stream.read(&mut [0]);
                });
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

/// All up to an empty line.
fn head(stream: &mut Stream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) > 0 {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// A proxy that is served, until this is dropped.
struct Proxy {
    address: SocketAddr,
    gate: Arc<Gate>,
    stop: Option<oneshot::Sender<Infallible>>,
    served: Option<JoinHandle<Vec<String>>>,
}

impl Proxy {
    /// Allows `names`, and of what is not public `allowed`; `good.example` is this machine,
    /// `private.example` beside it, and `metadata.example` what it says.
    fn start(names: &[&str], allowed: &[String]) -> Self {
        Self::of(gate(names, allowed))
    }

    fn of(gate: Gate) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, gate) = (door.local_addr().unwrap(), Arc::new(gate));
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&gate);
        let served = std::thread::spawn(move || {
            let told = Mutex::new(Vec::new());
            serve(door, &served, stopped, &|line| lock(&told).push(line)).unwrap();
            told.into_inner().unwrap()
        });
        Self { address, gate, stop: Some(stop), served: Some(served) }
    }

    fn connect(&self) -> Stream {
        let stream = Stream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends `request` and reads until the proxy has no more to say. It answers some before it has read
    /// all of them, and what it has not read then resets the connection, be it behind the answer.
    fn ask(&self, request: &str) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(request.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    fn get(&self, url: &str, host: &str) -> String {
        self.ask(&format!("GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
    }

    /// What was told of refusals.
    fn end(mut self) -> Vec<String> {
        drop(self.stop.take());
        self.served.take().unwrap().join().unwrap()
    }
}

fn gate(names: &[&str], allowed: &[String]) -> Gate {
    let names = names.iter().map(|name| name.parse().unwrap()).collect();
    let allowed = allowed.iter().map(|place| place.parse::<AllowedPlace>().unwrap()).collect();
    let policy = EgressPolicy::closed(allowed, vec!["blocked.example".into()]);
    let policy = policy.with_lookup(Lookup::new(|name| async move {
        let address: IpAddr = match name.as_str() {
            "private.example" => "10.0.0.1".parse().unwrap(),
            "metadata.example" => "169.254.169.254".parse().unwrap(),
            _ => "127.0.0.1".parse().unwrap(),
        };
        Ok(vec![address])
    }));
    Gate::new(names, policy, 1 << 20)
}

fn good(upstream: &Upstream) -> (Vec<String>, String) {
    let port = upstream.address.port();
    (vec![format!("good.example:{port}")], format!("good.example:{port}"))
}

fn starts_with(answer: &str, status: u16) -> bool {
    answer.starts_with(&format!("HTTP/1.1 {status} "))
}

#[test]
fn an_allowed_host_is_reached_by_http_and_by_connect() {
    let upstream = Upstream::start();
    let (allowed, place) = good(&upstream);
    let proxy = Proxy::start(&[&place], &allowed);
    let answer = proxy.ask(&format!(
        "GET http://{place}/a?b=c HTTP/1.1\r\nHost: {place}\r\nProxy-Authorization: me\r\n\
         Connection: close, X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n\r\n"
    ));
    assert!(starts_with(&answer, 200), "{answer}");
    let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
    assert!(seen.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{seen}");
    let seen = seen.to_lowercase();
    assert!(seen.contains(&format!("host: {place}\r\n")) && seen.contains("x-end: 2"), "{seen}");
    assert!(!seen.contains("x-hop") && !seen.contains("proxy"), "this hop's own: {seen}");

    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    write!(stream, "ANYTHING at all\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    assert_eq!(head(&mut stream), "ANYTHING at all\r\n\r\n");
    // The port stands in the first line.
    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\nHost: good.example\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    assert_eq!(proxy.gate.refusal(), None);
    assert_eq!(proxy.end(), [""; 0]);
}

#[test]
fn a_host_that_nobody_allows_is_refused_by_name_and_told_once() {
    let upstream = Upstream::start();
    let (allowed, place) = good(&upstream);
    let port = upstream.address.port();
    let proxy = Proxy::start(&[&place, "*.web.example"], &allowed);
    for host in ["other.example", "sub.good.example", "web.example"] {
        let of = format!("{host}:{port}");
        for answer in [
            proxy.get(&format!("http://{of}/"), &of),
            proxy.ask(&format!("CONNECT {of} HTTP/1.1\r\nHost: {of}\r\n\r\n")),
        ] {
            assert!(starts_with(&answer, 403) && answer.contains(&of), "{answer}");
        }
    }
    // The name is allowed, the port is not.
    for of in ["good.example:25", "a.web.example:25", "a.web.example:22"] {
        let answer = proxy.ask(&format!("CONNECT {of} HTTP/1.1\r\n\r\n"));
        assert!(starts_with(&answer, 403), "{answer}");
    }
    assert_eq!(upstream.asked(), 0);
    assert!(proxy.gate.refusal().unwrap().contains("other.example"));
    proxy.gate.begin();
    assert_eq!(proxy.gate.refusal(), None, "another command");
    let told = proxy.end();
    assert_eq!(told.len(), 6, "{told:?}");
    assert!(told[0].contains("other.example") && told[0].contains("no rule lets"), "{told:?}");
}

#[test]
fn no_rule_leads_to_a_metadata_service_or_a_neighbour() {
    let upstream = Upstream::start();
    let port = upstream.address.port();
    let proxy = Proxy::start(&["*", &format!("*:{port}")], &[]);
    for host in [
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "169.254.43518",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]",
        "[64:ff9b::a9fe:a9fe]",
        "[fd00:ec2::254]",
        "metadata.example",
        "private.example",
        "127.0.0.1",
        "0x7f.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "10.0.0.1",
        "good.example",
        "a.blocked.example",
    ] {
        for port in [80, port] {
            let of = format!("{host}:{port}");
            for answer in [
                proxy.get(&format!("http://{of}/"), &of),
                proxy.ask(&format!("CONNECT {of} HTTP/1.1\r\n\r\n")),
            ] {
                assert!(starts_with(&answer, 403), "{of}: {answer}");
            }
        }
    }
    assert_eq!(upstream.asked(), 0, "nobody was connected to");
}

#[test]
fn what_could_be_read_in_two_ways_is_refused_and_not_passed_on() {
    let upstream = Upstream::start();
    let (allowed, place) = good(&upstream);
    let proxy = Proxy::start(&[&place], &allowed);
    for request in [
        format!("GET http://{place}/ HTTP/1.1\r\nHost: {place}\r\nHost: other.example\r\n\r\n"),
        format!("GET http://{place}/ HTTP/1.1\r\nHost: other.example\r\n\r\n"),
        format!("GET http://other.example/ HTTP/1.1\r\nHost: {place}\r\n\r\n"),
        format!("GET http://other.example@{place}/ HTTP/1.1\r\nHost: {place}\r\n\r\n"),
        format!("GET http://{place}@other.example/ HTTP/1.1\r\nHost: {place}\r\n\r\n"),
        format!("GET https://{place}/ HTTP/1.1\r\nHost: {place}\r\n\r\n"),
        format!("GET ftp://{place}/ HTTP/1.1\r\nHost: {place}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {place}\r\n\r\n"),
        "CONNECT good.example HTTP/1.1\r\n\r\n".to_owned(),
        "CONNECT good.example:99999 HTTP/1.1\r\n\r\n".to_owned(),
        format!("CONNECT other.example@{place} HTTP/1.1\r\n\r\n"),
        format!("CONNECT {place}/x HTTP/1.1\r\n\r\n"),
        format!("GET http://{place}/ HTTP/1.1\r\nHost : {place}\r\n\r\n"),
        format!("GET http://{place}/ HTTP/1.1\r\nHost: {place}\r\n X: folded\r\n\r\n"),
    ] {
        let answer = proxy.ask(&request);
        let is_refused = starts_with(&answer, 400) || starts_with(&answer, 403);
        assert!(is_refused, "{request}{answer}");
        assert_eq!(upstream.asked(), 0, "{request}{answer}");
    }
    // Two lengths: the body has one for whoever is asked, and nothing behind it is a request.
    let (length, chunked) = ("Content-Length: 40", "Transfer-Encoding: chunked");
    for lengths in [[length, chunked], [chunked, length]] {
        let lengths = lengths.join("\r\n");
        let answer = proxy.ask(&format!(
            "POST http://{place}/ HTTP/1.1\r\nHost: {place}\r\n{lengths}\r\n\r\n0\r\n\r\n\
             GET http://other.example/ HTTP/1.1\r\nX: y\r\n\r\n"
        ));
        assert!(starts_with(&answer, 200), "{answer}");
        let seen = answer.to_lowercase();
        assert!(!seen.contains("content-length: 40") && !seen.contains("other.example"), "{seen}");
    }
    assert_eq!(upstream.asked(), 2);
}

/// A host that says `first`, and remembers what was said to it, connection by connection.
fn listener(first: &'static [u8]) -> (SocketAddr, std::sync::mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (heard, all) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut words = Vec::new();
            let _ = stream.write_all(first);
            let _ = stream.read_to_end(&mut words);
            let _ = heard.send(words);
        }
    });
    (address, all)
}

#[test]
fn what_goes_through_a_connect_is_tls_for_the_host_that_was_judged() {
    let (address, heard) = listener(b"");
    let place = format!("good.example:{}", address.port());
    let tls_ports = vec![address.port()];
    let proxy = Proxy::of(Gate { tls_ports, ..gate(&["*", &place], std::slice::from_ref(&place)) });
    let say = |words: &[u8]| {
        let mut stream = proxy.connect();
        write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
        assert!(starts_with(&head(&mut stream), 200));
        stream.write_all(words).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read(&mut [0]);
        heard.recv_timeout(PATIENCE).unwrap()
    };
    let good = [&hello("good.example", true)[..], b"and more"].concat();
    assert_eq!(say(&good), good);
    assert_eq!(proxy.gate.refusal(), None);
    let plain = b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n".to_vec();
    for words in [hello("other.example", true), hello("good.example", false), plain] {
        assert_eq!(say(&words), b"", "nothing is passed on");
    }
    assert!(proxy.gate.refusal().unwrap().contains("other.example"));
    let told = proxy.end();
    assert_eq!(told.len(), 3, "{told:?}");
    for (line, rule) in told.iter().zip(["other.example", "names no host", "no TLS"]) {
        assert!(line.contains(&place) && line.contains(rule), "{line}");
    }
}

#[test]
fn whoever_is_slow_with_its_first_words_is_cut_where_they_must_be_tls() {
    let (address, heard) = listener(b"");
    let place = format!("good.example:{}", address.port());
    let (tls_ports, hello_max) = (vec![address.port()], Duration::from_millis(100));
    let gate = gate(&[&place], std::slice::from_ref(&place));
    let proxy = Proxy::of(Gate { tls_ports, hello_max, ..gate });
    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    stream.write_all(&hello("good.example", true)[..100]).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), b"");
    assert_eq!(proxy.end(), [""; 0], "nobody was refused");
}

#[test]
fn a_host_may_speak_first_where_it_need_not_be_tls() {
    let (address, heard) = listener(b"hello\r\n\r\n");
    let place = format!("good.example:{}", address.port());
    let proxy = Proxy::start(&[&place], std::slice::from_ref(&place));
    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    assert_eq!(head(&mut stream), "hello\r\n\r\n");
    stream.write_all(b"SSH-2.0-x").unwrap();
    drop(stream);
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), b"SSH-2.0-x");
    // Where it is TLS all the same, it is for that host.
    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    stream.write_all(&hello("other.example", true)).unwrap();
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), b"");
    assert_eq!(proxy.end().len(), 1);
}

#[test]
fn heads_silence_and_bytes_have_an_end() {
    let upstream = Upstream::start();
    let (allowed, place) = good(&upstream);
    let proxy = Proxy::start(&[&place], &allowed);
    let long = "x".repeat(2 * HEAD_BYTES_MAX);
    let answer = proxy.ask(&format!("GET http://{place}/ HTTP/1.1\r\nX: {long}\r\n\r\n"));
    assert!(starts_with(&answer, 431), "{answer}");
    let many = "X: y\r\n".repeat(HEADERS_MAX + 1);
    let answer = proxy.ask(&format!("GET http://{place}/ HTTP/1.1\r\n{many}\r\n"));
    assert!(starts_with(&answer, 431), "{answer}");

    // Longer than a machine under load keeps us from asking.
    let gate = Gate { silence_max: Duration::from_secs(2), ..gate(&[&place], &allowed) };
    let quiet = Proxy::of(gate);
    let (mut stream, mut silent) = (quiet.connect(), quiet.connect());
    write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "it was closed for silence");
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "so was one without a request");

    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    // More than waits in the kernel.
    let chunks_max = 64 << 10;
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let sent = (0..chunks_max).take_while(|_| stream.write_all(&[b'x'; 1024]).is_ok()).count();
    assert!(sent < chunks_max, "it was cut");
    let told = proxy.end();
    assert!(told.iter().any(|line| line.contains("more than 1048576 bytes")), "{told:?}");
}

#[test]
fn no_more_connections_are_served_at_once_than_there_may_be() {
    let upstream = Upstream::start();
    let (allowed, place) = good(&upstream);
    let proxy = Proxy::start(&[&place], &allowed);
    let mut held: Vec<Stream> = (0..CONNECTIONS_MAX).map(|_| proxy.connect()).collect();
    for stream in &mut held {
        write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
        assert!(starts_with(&head(stream), 200));
    }
    let mut next = proxy.connect();
    write!(next, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    next.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(next.read(&mut [0]).is_err(), "it waits");
    drop(held);
    next.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(starts_with(&head(&mut next), 200), "its turn has come");
}

/// The door of a machine that is out of descriptors for a moment, and is then closed.
#[tokio::test(start_paused = true)]
async fn a_machine_that_is_out_of_descriptors_for_a_moment_ends_no_proxy() {
    use rustix::io::Errno;
    let gate = Arc::new(gate(&[], &[]));
    let door = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(door.local_addr().unwrap()).await.unwrap();
    let (begun, mut taken) = (tokio::time::Instant::now(), 0);
    let next = || {
        taken += 1;
        let turn = taken;
        let door = &door;
        async move {
            match turn {
                1 => Err(Errno::MFILE.into()),
                2 => Err(Errno::NFILE.into()),
                3 => Err(Errno::CONNABORTED.into()),
                4 => door.accept().await.map(|(stream, _)| stream),
                _ => Err(Errno::BADF.into()),
            }
        }
    };
    let error = accept(next, &gate).await;
    assert_eq!(Errno::from_io_error(&error), Some(Errno::BADF), "{error}");
    assert_eq!(taken, 5, "the connection was taken");
    // It is not tried as fast as it fails.
    assert!(begun.elapsed() >= 2 * accepting::PAUSE, "{:?}", begun.elapsed());
    drop(client);
}

#[test]
fn a_proxy_that_ends_takes_its_connections_with_it() {
    let upstream = Upstream::start();
    let (allowed, place) = good(&upstream);
    let proxy = Proxy::start(&[&place], &allowed);
    let mut stream = proxy.connect();
    write!(stream, "CONNECT {place} HTTP/1.1\r\n\r\n").unwrap();
    assert!(starts_with(&head(&mut stream), 200));
    let (address, gate) = (proxy.address, Arc::clone(&proxy.gate));
    let started = Instant::now();
    proxy.end();
    assert!(started.elapsed() < PATIENCE, "nobody is waited for");
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "its connection is closed");
    assert!(Stream::connect(address).is_err(), "and so is the door");
    assert_eq!(Arc::strong_count(&gate), 1, "no task holds on to it");
}
