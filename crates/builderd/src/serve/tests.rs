//! The service as a whole, when it cannot go on or must not begin.

use std::os::fd::AsFd as _;
use std::time::Duration;

use super::*;
use crate::config::{PREFIX, Sources};
use crate::store::audit::AuditFilter;
use crate::store::tests::hang;

/// Settings of a server below `directory`.
fn config(directory: &Path) -> Config {
    let path = |name: &str| directory.join(name).display().to_string();
    let environment = [
        ("DEV", "true".to_owned()),
        ("DATABASE_DATA_DIR", path("data")),
        ("ROOTFS_OUTPUT_DIR", path("rootfs")),
        ("CACHE_DIR", path("cache")),
        ("SHUTDOWN_TIMEOUT", "1s".to_owned()),
    ];
    let named = |(name, text): (&str, String)| (format!("{PREFIX}{name}"), text);
    let environment = environment.map(named).into();
    let sources = Sources { environment, ..Sources::default() };
    Config::load(&sources).unwrap().1
}

async fn read(answer: reqwest::Response) -> serde_json::Value {
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}

/// A server that stops takes nothing new, and says so until it has ended.
#[tokio::test]
async fn who_comes_while_a_server_stops_is_told_so() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    let config = Config { shutdown_timeout: Duration::from_secs(60), ..config(directory.path()) };
    let metrics = telemetry::Metrics::unread();
    let server = tokio::spawn(serve(config, Host::default(), (listener, None), metrics, stopped));
    // One that is not over keeps the server.
    let mut held = tokio::net::TcpStream::connect(address).await.unwrap();
    let path = format!("/{}/CreateBuild", ::api::SERVICE);
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Tenant-ID: t\r\nExpect: 100-continue\r\n\
         Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    );
    held.write_all(head.as_bytes()).await.unwrap();
    let mut begun = [0; 25];
    held.read_exact(&mut begun).await.unwrap();
    assert_eq!(&begun, b"HTTP/1.1 100 Continue\r\n\r\n");

    // Each on a connection of its own.
    let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
    let url = |path: &str| format!("http://{address}{path}");
    let health = async || {
        let answer = client.get(url("/health")).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, read(answer).await["reason"].clone())
    };
    assert_eq!(health().await, (200, json!(null)));
    stop.send_replace(true);
    while health().await.0 == 200 {}
    for _ in 0..3 {
        assert_eq!(health().await, (503, json!("stopping")));
        let other = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
        let check = other.post(url("/grpc.health.v1.Health/Check")).body("{}");
        let check = check.header("content-type", "application/json").send().await.unwrap();
        assert_eq!(read(check).await["status"], "NOT_SERVING");
        let create = client.post(url(&path)).header("content-type", "application/json");
        let refused = create.header("x-tenant-id", "t").body("{}").send().await.unwrap();
        assert_eq!(refused.status().as_u16(), 503);
        let said = read(refused).await;
        assert_eq!(said["code"], "unavailable", "{said}");
    }
    assert!(!server.is_finished());
    held.write_all(b"{}").await.unwrap();
    let mut answer = String::new();
    held.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("build config is required"), "what ran is answered: {answer}");
    tokio::time::timeout(Duration::from_secs(30), server).await.expect("it ends").unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody is there any more");
}

/// A socket that has a port and never listens: the kernel refuses to accept (EINVAL).
fn broken_listener() -> TcpListener {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = std::net::TcpListener::from(socket.as_fd().try_clone_to_owned().unwrap());
    TcpListener::from_std(listener).unwrap()
}

#[tokio::test]
async fn a_server_whose_door_is_broken_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (_stop, stopped) = watch::channel(false);
    let metrics = telemetry::Metrics::unread();
    let serve = serve(
        config(directory.path()),
        Host::default(),
        (broken_listener(), None),
        metrics,
        stopped,
    );
    let ended = tokio::time::timeout(Duration::from_secs(30), serve).await.expect("it ends");
    let ServeError::Part(error) = ended.unwrap_err() else { panic!("another error") };
    assert_eq!(error.to_string(), "the API failed");
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "Invalid argument (os error 22)"
    );
    // What it held is free again.
    claim_directory(&directory.path().join("rootfs")).unwrap();
    Store::open_sqlite(&directory.path().join("data")).await.unwrap();
}

/// Whoever is refused just before the end is in the audit log, though the database is slow.
#[tokio::test]
async fn a_server_that_stops_writes_down_whom_it_refused() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let url = format!("http://{address}/{}/GetBuild", ::api::SERVICE);
    let (stop, stopped) = watch::channel(false);
    let (config, metrics) = (config(directory.path()), telemetry::Metrics::unread());
    let server = serve(config, Host::default(), (listener, None), metrics, stopped);
    let mut server = tokio::spawn(server);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async || {
        let request = client.post(&url).header("content-type", "application/json").body("{}");
        request.send().await.map(|response| response.status().as_u16())
    };
    assert_eq!(ask().await.unwrap(), 401);
    let store = Store::attach_sqlite(&directory.path().join("data")).await.unwrap();
    let slow = hang(&store).await;
    assert_eq!(ask().await.unwrap(), 401);
    stop.send_replace(true);
    let mut refused = 2;
    // Until the doors are closed, and nobody is there any more who would say so.
    while let Ok(status) = ask().await {
        refused += usize::from(status == 401);
    }
    let early = tokio::time::timeout(Duration::from_millis(500), &mut server).await;
    assert!(early.is_err(), "it ends without the rows: {early:?}");
    drop(slow);
    server.await.unwrap().unwrap();
    let rows = store.system().audit_page(&AuditFilter::default(), None).await.unwrap();
    let outcomes: Vec<&str> = rows.iter().map(|row| row.outcome.as_str()).collect();
    assert_eq!(outcomes, vec!["unauthenticated"; refused]);
}

#[tokio::test]
async fn a_server_with_another_key_does_not_start() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(&directory.path().join("data")).await.unwrap();
    let paths = ["one", "two", "three"].map(|name| directory.path().join(name));
    let places = paths.each_ref().map(|path| KeyPlace::File(path.clone()));
    let first = master_key(&places[0], &store).await.unwrap();
    let again = master_key(&places[0], &store).await.unwrap();
    assert_eq!(first.id(), again.id());
    let problem = |result: Result<MasterKey, ServeError>| match result {
        Err(ServeError::Seal(SealError::KeyFile { problem, .. })) => problem,
        other => panic!("{:?}", other.map(|key| key.id().to_owned())),
    };
    MasterKey::load_or_create(&paths[1]).unwrap();
    let other = problem(master_key(&places[1], &store).await);
    assert!(other.contains(first.id()) && other.contains("copy the key file"), "{other}");
    let none = problem(master_key(&places[2], &store).await);
    assert!(none.contains("there is none"), "{none}");
    assert!(!paths[2].exists(), "a key that is of no use is not made");
    store.system().forget_master_key().await.unwrap();
    master_key(&places[1], &store).await.unwrap();
    assert!(master_key(&places[0], &store).await.is_err());
}

#[tokio::test]
async fn what_waits_for_the_kernel_holds_up_nobody_else() {
    let (go, gone) = std::sync::mpsc::channel();
    let (done, is_done) = std::sync::mpsc::channel();
    let work = move || done.send(gone.recv_timeout(Duration::from_secs(20)).is_ok()).unwrap();
    // There is one thread for both.
    tokio::join!(aside(work), async { go.send(()).unwrap() });
    assert!(is_done.recv().unwrap(), "the other one had no turn");
}
