//! Certificates from files.

use tempfile::TempDir;

use super::material::problem_of_lists;
use super::*;

type Versions = &'static [&'static SupportedProtocolVersion];

const OLD: Versions = &[&rustls::version::TLS12];
const NEW: Versions = &[&rustls::version::TLS13];

/// The files of one server, signed by an authority of its own.
struct Disk {
    directory: TempDir,
    authority: Authority,
    settings: TlsConfig,
}

impl Disk {
    /// Clients are signed by `clients`.
    fn new(client_auth: ClientAuth, clients: Option<&Authority>) -> Self {
        let (directory, authority) = (tempfile::tempdir().unwrap(), Authority::new("root", &[]));
        let path = |name: &str| directory.path().join(name);
        let ca = clients.map(|clients| {
            std::fs::write(path("ca.pem"), &clients.pem).unwrap();
            path("ca.pem")
        });
        let (certificate, key) = (path("c.pem"), path("k.pem"));
        let source = TlsSource::Files { certificate, key, ca, revoked: None };
        let settings = TlsConfig { source, client_auth, clients_file: None, for_metrics: true };
        let disk = Self { directory, authority, settings };
        disk.renew();
        disk
    }

    /// With lists of what clients' authorities have revoked.
    fn with_lists(mut self, text: &str) -> Self {
        let TlsSource::Files { revoked, .. } = &mut self.settings.source else { unreachable!() };
        *revoked = Some(self.directory.path().join("r.pem"));
        self.write("r.pem", text);
        self
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.directory.path().join(name), text).unwrap();
    }

    /// A new certificate for the server.
    fn renew(&self) -> Issued {
        let issued = self.authority.issue(&[]);
        self.write("c.pem", &issued.certificate_pem);
        self.write("k.pem", &issued.key_pem);
        issued
    }

    async fn start(&self) -> (Site, Keeper) {
        let (tls, keeper) = start(&self.settings, Metrics::unread()).await.unwrap();
        (Site::start(tls).await, keeper)
    }
}

#[tokio::test]
async fn a_server_shows_its_certificate_in_either_version() {
    let disk = Disk::new(ClientAuth::None, None);
    let (site, _keeper) = disk.start().await;
    for versions in [OLD, NEW] {
        let caller = Caller { versions, ..Caller::new(&disk.authority, None) };
        assert_eq!(caller.name(&site).await.unwrap(), "nobody");
    }
    let stream = Caller::new(&disk.authority, None).connect(&site).await.unwrap();
    let best = stream.get_ref().1.protocol_version();
    assert_eq!(best, Some(rustls::ProtocolVersion::TLSv1_3));
    let two = Caller { alpn: b"h2", ..Caller::new(&disk.authority, None) };
    let stream = two.connect(&site).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let odd = Caller { alpn: b"ftp", ..Caller::new(&disk.authority, None) };
    assert!(odd.connect(&site).await.is_err());
    let stranger = Authority::new("another root", &[]);
    let error = Caller::new(&stranger, None).connect(&site).await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    drop((stream, odd));
    site.stop().await;
}

#[tokio::test]
async fn a_client_without_a_good_certificate_is_refused_where_one_is_required() {
    let (clients, strangers) = (Authority::new("clients", &[]), Authority::new("strangers", &[]));
    let own = clients.issue(&["spiffe://example.org/ci"]);
    let foreign = strangers.issue(&["spiffe://example.org/ci"]);
    let several = clients.issue(&["spiffe://example.org/ci", "spiffe://example.org/admin"]);
    for (demand, without) in [(ClientAuth::Required, None), (ClientAuth::Optional, Some("nobody"))]
    {
        let disk = Disk::new(demand, Some(&clients));
        let (site, _keeper) = disk.start().await;
        let name = async |shows| Caller::new(&disk.authority, shows).name(&site).await;
        assert_eq!(name(Some(&own)).await.unwrap(), "spiffe://example.org/ci");
        assert_eq!(name(None).await.ok().as_deref(), without);
        let error = name(Some(&foreign)).await.unwrap_err();
        assert!(error.to_string().contains("alert"), "{error}");
        // Nobody chooses which of two ids he is.
        assert_eq!(name(Some(&several)).await.unwrap(), "nobody");
        // Nor writes into rows and lines what is no URI.
        for odd in ["urn:x:a\nb", "urn:x:\0", "urn:x:a b"] {
            let odd = clients.issue(&[odd]);
            let caller = Caller::new(&disk.authority, Some(&odd));
            assert_eq!(caller.name(&site).await.unwrap(), "nobody");
        }
        site.stop().await;
    }
}

#[tokio::test]
async fn why_a_client_is_refused_is_told_and_what_is_no_certificates_fault_is_not() {
    let (clients, strangers) = (Authority::new("clients", &[]), Authority::new("strangers", &[]));
    let [own, gone] = ["urn:x:own", "urn:x:gone"].map(|id| clients.issue(&[id]));
    let foreign = strangers.issue(&["urn:x:own"]);
    for versions in [OLD, NEW] {
        let disk = Disk::new(ClientAuth::Required, Some(&clients));
        let disk = disk.with_lists(&clients.list(&[gone.serial], 2100));
        let (tls, mut keeper) = start(&disk.settings, Metrics::unread()).await.unwrap();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        tls.tell(Arc::new(move |peer, why| tell.send((peer.ip().is_loopback(), why)).unwrap()));
        let site = Site::start(tls).await;
        let caller = |shows| Caller { versions, ..Caller::new(&disk.authority, shows) };
        // Who does not trust this server, and who does not speak TLS.
        Caller { trusts: &strangers, ..caller(Some(&own)) }.name(&site).await.unwrap_err();
        let mut noise = TcpStream::connect(site.address).await.unwrap();
        noise.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let _ = noise.read_to_end(&mut Vec::new()).await;
        for (shows, why) in [
            (Some(&gone), "revoked certificate"),
            (Some(&foreign), "certificate of an unknown authority"),
            (None, "no certificate"),
        ] {
            caller(shows).name(&site).await.unwrap_err();
            assert_eq!(told.recv().await, Some((true, why)));
        }
        assert_eq!(caller(Some(&own)).name(&site).await.unwrap(), "urn:x:own");
        disk.write("r.pem", &clients.list(&[], 2020));
        keeper.look().await;
        caller(Some(&own)).name(&site).await.unwrap_err();
        assert_eq!(told.recv().await, Some((true, "no good revocation list")));
        site.stop().await;
        assert!(told.recv().await.is_none(), "nothing else was told");
    }
}

#[tokio::test]
async fn every_connection_checks_the_clients_certificate_anew() {
    let clients = Authority::new("clients", &[]);
    let disk = Disk::new(ClientAuth::Required, Some(&clients));
    let (site, _keeper) = disk.start().await;
    let own = clients.issue(&["urn:x:own"]);
    for versions in [OLD, NEW] {
        let config = Caller { versions, ..Caller::new(&disk.authority, Some(&own)) }.config();
        for _ in 0..2 {
            let mut stream = connect(Arc::clone(&config), &site).await.unwrap();
            // Tickets would come before the answer.
            assert_eq!(ask(&mut stream).await.unwrap(), "urn:x:own");
            let kind = stream.get_ref().1.handshake_kind();
            assert_eq!(kind, Some(rustls::HandshakeKind::Full));
        }
    }
    site.stop().await;
}

#[tokio::test]
async fn new_files_are_taken_and_bad_ones_are_not() {
    let clients = Authority::new("clients", &[]);
    let disk = Disk::new(ClientAuth::Optional, Some(&clients));
    let (site, mut keeper) = disk.start().await;
    let caller = Caller::new(&disk.authority, None);
    let mut open = caller.connect(&site).await.unwrap();
    let first = shown(&open);
    let now = async || shown(&caller.connect(&site).await.unwrap());
    // As it was.
    keeper.look().await;
    assert_eq!(now().await, first);
    let second = disk.renew();
    keeper.look().await;
    assert_eq!(now().await, second.certificate);
    assert_ne!(second.certificate, first);
    // A key that is another certificate's, a file that is none, and none at all.
    disk.write("k.pem", &disk.authority.issue(&[]).key_pem);
    keeper.look().await;
    keeper.look().await;
    disk.write("k.pem", "-----BEGIN NOTHING-----\n");
    keeper.look().await;
    std::fs::remove_file(disk.directory.path().join("k.pem")).unwrap();
    keeper.look().await;
    assert_eq!(now().await, second.certificate);
    disk.write("k.pem", &second.key_pem);
    keeper.look().await;
    assert_eq!(now().await, second.certificate);
    // Whoever was there stays.
    assert_eq!(ask(&mut open).await.unwrap(), "nobody");
    // Other clients.
    let others = Authority::new("other clients", &[]);
    let (old, new) = (clients.issue(&["urn:x:old"]), others.issue(&["urn:x:new"]));
    disk.write("ca.pem", &others.pem);
    keeper.look().await;
    assert!(Caller::new(&disk.authority, Some(&old)).name(&site).await.is_err());
    let name = Caller::new(&disk.authority, Some(&new)).name(&site).await.unwrap();
    assert_eq!(name, "urn:x:new");
    drop(open);
    site.stop().await;
}

#[tokio::test]
async fn a_connection_ends_when_who_signed_its_clients_certificate_is_trusted_no_more() {
    let (old, new) = (Authority::new("clients", &[]), Authority::new("other clients", &[]));
    let disk = Disk::new(ClientAuth::Optional, Some(&old));
    let (site, mut keeper) = disk.start().await;
    let own = old.issue(&["urn:x:own"]);
    let mut open = Caller::new(&disk.authority, Some(&own)).connect(&site).await.unwrap();
    let mut without = Caller::new(&disk.authority, None).connect(&site).await.unwrap();
    assert_eq!(ask(&mut open).await.unwrap(), "urn:x:own");
    // What changes nothing for it ends nothing.
    disk.renew();
    keeper.look().await;
    assert_eq!(ask(&mut open).await.unwrap(), "urn:x:own");
    disk.write("ca.pem", &format!("{}{}", old.pem, new.pem));
    keeper.look().await;
    assert_eq!(ask(&mut open).await.unwrap(), "urn:x:own");
    disk.write("ca.pem", &new.pem);
    keeper.look().await;
    is_over(open).await;
    // Whoever had shown none stays.
    assert_eq!(ask(&mut without).await.unwrap(), "nobody");
    drop(without);
    site.stop().await;
}

#[tokio::test]
async fn a_certificate_is_good_until_it_runs_out() {
    let clients = Authority::new("clients", &[]);
    let disk = Disk::new(ClientAuth::Required, Some(&clients));
    let (tls, _keeper) = start(&disk.settings, Metrics::unread()).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let own = clients.issue(&["urn:x:own"]);
    let config = Caller::new(&disk.authority, Some(&own)).config();
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(config).connect(address.ip().into(), stream).await.unwrap()
    };
    let accept = async { tls.accept(listener.accept().await.unwrap().0).await.unwrap() };
    let (_client, (_server, shown)) = tokio::join!(connect, accept);
    let shown = shown.unwrap();
    assert_eq!(shown.id().map(AsRef::as_ref), Some("urn:x:own"));
    let years = |count: u64| Duration::from_secs(count * 365 * 86_400);
    assert!(shown.is_good_at(UnixTime::now()));
    // rcgen's end in the year 4096.
    let late = UnixTime::since_unix_epoch(years(3000));
    assert!(!shown.is_good_at(late), "it has run out");
    let ended = tokio::time::timeout(Duration::from_millis(1), shown.ended());
    assert!(ended.await.is_err(), "now it is good");
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_and_its_connections_end() {
    let clients = Authority::new("clients", &[]);
    let (own, other) = (clients.issue(&["urn:x:own"]), clients.issue(&["urn:x:other"]));
    for versions in [OLD, NEW] {
        let disk = Disk::new(ClientAuth::Required, Some(&clients));
        let disk = disk.with_lists(&clients.list(&[], 2100));
        let (site, mut keeper) = disk.start().await;
        let caller = |shows| Caller { versions, ..Caller::new(&disk.authority, Some(shows)) };
        let mut open = caller(&own).connect(&site).await.unwrap();
        assert_eq!(ask(&mut open).await.unwrap(), "urn:x:own");
        disk.write("r.pem", &clients.list(&[own.serial], 2100));
        keeper.look().await;
        is_over(open).await;
        let error = caller(&own).name(&site).await.unwrap_err();
        assert!(error.to_string().contains("CertificateRevoked"), "{error}");
        assert_eq!(caller(&other).name(&site).await.unwrap(), "urn:x:other");
        // A list that cannot be read takes nothing back.
        disk.write("r.pem", "");
        keeper.look().await;
        assert!(caller(&own).name(&site).await.is_err());
        assert_eq!(caller(&other).name(&site).await.unwrap(), "urn:x:other");
        site.stop().await;
    }
}

#[tokio::test]
async fn a_revocation_list_that_has_run_out_lets_nobody_in() {
    let (clients, strangers) = (Authority::new("clients", &[]), Authority::new("strangers", &[]));
    let own = clients.issue(&["urn:x:own"]);
    let mut problems = Vec::new();
    // One of the same name, and another one's signature.
    let impostor = Authority::new("clients", &[]);
    for list in [clients.list(&[], 2021), strangers.list(&[], 2100), impostor.list(&[], 2100)] {
        let disk = Disk::new(ClientAuth::Optional, Some(&clients)).with_lists(&list);
        let (tls, _keeper) = start(&disk.settings, Metrics::unread()).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Caller::new(&disk.authority, Some(&own)).config();
        let connect = async {
            let stream = TcpStream::connect(address).await.unwrap();
            // With TLS 1.3 the client hears of it later.
            drop(TlsConnector::from(config).connect(address.ip().into(), stream).await);
        };
        let accept = async { tls.accept(listener.accept().await.unwrap().0).await };
        let ((), accepted) = tokio::join!(connect, accept);
        problems.push(problem_of_lists(&accepted.unwrap_err()).unwrap());
        let site = Site::start(tls).await;
        assert_eq!(Caller::new(&disk.authority, None).name(&site).await.unwrap(), "nobody");
        site.stop().await;
    }
    let told = ["run out", "none of", "not signed by"];
    assert!(problems.iter().zip(told).all(|(found, word)| found.contains(word)), "{problems:?}");
}

#[tokio::test]
async fn a_revocation_list_is_needed_of_everybody_above_a_client() {
    let root = Authority::new("root of clients", &[]);
    let between = Authority::signed_by(Some(&root), "between", &[]);
    let own = between.issue(&["urn:x:own"]);
    let (of_root, of_between) = (root.list(&[], 2100), between.list(&[], 2100));
    for (lists, comes_in) in [
        (of_root.clone(), false),
        (of_between.clone(), false),
        (format!("{of_root}{of_between}"), true),
        (format!("{of_root}{}", between.list(&[own.serial], 2100)), false),
        (format!("{}{of_between}", root.list(&[between.serial], 2100)), false),
    ] {
        let disk = Disk::new(ClientAuth::Required, Some(&root)).with_lists(&lists);
        let (site, _keeper) = disk.start().await;
        let name = Caller::new(&disk.authority, Some(&own)).name(&site).await;
        assert_eq!(name.ok().as_deref(), comes_in.then_some("urn:x:own"));
        site.stop().await;
    }
}

#[tokio::test]
async fn what_is_wrong_is_told_once_and_counted() {
    let disk = Disk::new(ClientAuth::None, None);
    let telemetry = crate::telemetry::tests::readable(false);
    let metrics = telemetry.metrics();
    let (_tls, mut keeper) = start(&disk.settings, Arc::clone(&metrics)).await.unwrap();
    let counted = |used: u64, refused: u64| {
        let text = metrics.render();
        for (result, count) in [("used", used), ("refused", refused)] {
            let line = format!("builderd_tls_reloads_total{{result=\"{result}\"}} {count}\n");
            assert_eq!(text.contains(&line), count > 0, "{line}{text}");
        }
    };
    keeper.look().await;
    counted(0, 0);
    disk.write("c.pem", "");
    keeper.look().await;
    keeper.look().await;
    counted(0, 1);
    disk.renew();
    keeper.look().await;
    counted(1, 1);
}

#[tokio::test(start_paused = true)]
async fn files_are_looked_at_every_half_minute_until_the_service_stops() {
    let disk = Disk::new(ClientAuth::None, None);
    let (mut tls, keeper) = start(&disk.settings, Metrics::unread()).await.unwrap();
    tls.ready.borrow_and_update();
    let (stop, stopping) = watch::channel(false);
    let keeper = tokio::spawn(keeper.run(stopping));
    let begun = tokio::time::Instant::now();
    disk.renew();
    tls.ready.changed().await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), LOOK_EVERY.as_secs());
    stop.send_replace(true);
    keeper.await.unwrap().unwrap();
}

#[tokio::test]
async fn who_is_slow_with_a_handshake_keeps_nobody_waiting() {
    let disk = Disk::new(ClientAuth::None, None);
    let (site, _keeper) = disk.start().await;
    let mut slow = Vec::new();
    for _ in 0..20 {
        slow.push(TcpStream::connect(site.address).await.unwrap());
    }
    assert_eq!(Caller::new(&disk.authority, None).name(&site).await.unwrap(), "nobody");
    // Plain HTTP gets no answer in HTTP.
    let mut plain = TcpStream::connect(site.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // An alert, or nothing.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP") && answer.len() < 16, "{answer:?}");
    // A stop waits for none of them.
    site.stop().await;
    drop(slow);
}

#[tokio::test(start_paused = true)]
async fn a_handshake_ends_in_time() {
    let disk = Disk::new(ClientAuth::None, None);
    let (tls, _keeper) = start(&disk.settings, Metrics::unread()).await.unwrap();
    let (_client, server) = tokio::io::duplex(64);
    let begun = tokio::time::Instant::now();
    let error = tls.accept(server).await.unwrap_err();
    assert_eq!((error.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, HANDSHAKE_TIMEOUT));
}

#[tokio::test]
async fn a_server_without_good_files_does_not_start() {
    let clients = Authority::new("clients", &[]);
    let list = clients.list(&[], 2100);
    let disk = Disk::new(ClientAuth::Required, Some(&clients)).with_lists(&list);
    let other = disk.authority.issue(&[]);
    let problem = async |name: &str, text: &str| {
        let good = std::fs::read_to_string(disk.directory.path().join(name)).unwrap();
        disk.write(name, text);
        let error = start(&disk.settings, Metrics::unread()).await.unwrap_err();
        disk.write(name, &good);
        chain(&error)
    };
    for (name, text, word) in [
        ("c.pem", "", "no certificate"),
        ("k.pem", "", "no private key"),
        ("k.pem", &other.key_pem, "do not fit together"),
        ("ca.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "c.pem"),
        ("ca.pem", "", "ca.pem"),
        // Without a list nothing would be checked, and of two only the first.
        ("r.pem", "", "no revocation list"),
        ("r.pem", &clients.pem, "no revocation list"),
        ("r.pem", &list.replace("\nMI", "\nMJ"), "cannot be read"),
        ("r.pem", &format!("{list}{}", clients.list(&[1], 2100)), "list 2 is of the same"),
    ] {
        let problem = problem(name, text).await;
        assert!(problem.contains(word), "{word}: {problem}");
    }
    std::fs::remove_file(disk.directory.path().join("k.pem")).unwrap();
    let error = start(&disk.settings, Metrics::unread()).await.unwrap_err();
    assert!(chain(&error).contains("k.pem") && chain(&error).contains("No such file"), "{error}");
}
