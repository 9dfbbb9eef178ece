//! Who comes with a client certificate that is known needs no token.

use std::path::PathBuf;

use super::*;
use crate::config::{ClientAuth, TlsConfig, TlsSource};
use crate::telemetry::Metrics;
use crate::tls::Keeper;
use crate::tls::tests::{Authority, Issued};

const CLIENTS: &str = r#"
[[client]]
id = "spiffe://example.org/ci"
tenant = "acme"
organization = "acme-group"
[[client]]
id = "spiffe://example.org/reader"
tenant = "acme"
customer = "c1"
permissions = ["build:read"]
[[client]]
id = "spiffe://example.org/gateway"
tenant = "*"
[[client]]
id = "spiffe://example.org/small"
tenant = "tiny"
tier = "free"
[[client]]
id = "spiffe://example.org/prometheus"
"#;

/// A server with TLS, and the authority of its clients.
struct Site {
    server: Server,
    keeper: Keeper,
    authority: Authority,
    clients_file: PathBuf,
    _directory: TempDir,
}

impl Site {
    async fn start() -> Self {
        let (directory, authority) = (tempfile::tempdir().unwrap(), Authority::new("root", &[]));
        let write = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
            directory.path().join(name)
        };
        let own = authority.issue(&[]);
        let clients_file = write("clients.toml", CLIENTS);
        let settings = TlsConfig {
            source: TlsSource::Files {
                certificate: write("c.pem", &own.certificate_pem),
                key: write("k.pem", &own.key_pem),
                ca: Some(write("ca.pem", &authority.pem)),
                revoked: None,
            },
            client_auth: ClientAuth::Optional,
            clients_file: Some(clients_file.clone()),
            for_metrics: true,
        };
        let (tls, keeper) = crate::tls::start(&settings, Metrics::unread()).await.unwrap();
        let rules = rules(Mode::Tokens, Tier::Enterprise);
        let server = Server::start_behind(Some(tls), rules, Origins::NONE).await;
        Self { server, keeper, authority, clients_file, _directory: directory }
    }

    /// A client that shows the certificate of an id.
    fn client(&self, id: &str) -> Caller {
        let issued = self.authority.issue(&[id]);
        self.client_with(Some(&issued))
    }

    fn client_with(&self, issued: Option<&Issued>) -> Caller {
        let root = reqwest::Certificate::from_pem(self.authority.pem.as_bytes()).unwrap();
        let builder = reqwest::Client::builder().no_proxy().tls_certs_only([root]);
        let builder = match issued {
            None => builder,
            Some(issued) => {
                let pem = format!("{}{}", issued.certificate_pem, issued.key_pem);
                builder.identity(reqwest::Identity::from_pem(pem.as_bytes()).unwrap())
            }
        };
        let base = format!("https://{}/{}", self.server.address, api::SERVICE);
        Caller { http: builder.build().unwrap(), base }
    }

    async fn stop(self) {
        self.server.stop().await;
    }
}

struct Caller {
    http: reqwest::Client,
    base: String,
}

impl Caller {
    fn rpc(&self, method: &str, body: &Value) -> RequestBuilder {
        self.http
            .post(format!("{}/{method}", self.base))
            .header("content-type", "application/json")
            .body(body.to_string())
    }

    fn create(&self) -> RequestBuilder {
        self.rpc("CreateBuild", &create_body())
    }

    async fn status(request: RequestBuilder) -> u16 {
        send(request).await.status.as_u16()
    }
}

#[tokio::test]
async fn a_client_that_tls_refuses_is_written_down_and_no_more_often_than_others() {
    let site = Site::start().await;
    let stranger = Authority::new("stranger", &[]).issue(&["spiffe://example.org/ci"]);
    let before = site.server.audit().await.len();
    // What is no handshake is no refusal.
    let mut noise = tokio::net::TcpStream::connect(site.server.address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut noise, b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut noise, &mut answer).await;
    for _ in 0..120 {
        let refused = site.client_with(Some(&stranger)).create().send().await;
        assert!(refused.is_err(), "{refused:?}");
    }
    // And one that says how many were left out.
    let rows = site.server.audit_of(before + 101).await.split_off(before);
    let refused: Vec<_> = rows.iter().filter(|row| row.action == "tls.handshake").collect();
    assert!((100..=105).contains(&refused.len()), "{}", refused.len());
    for row in refused {
        let told = [row.stream.as_str(), &row.subject, &row.object, &row.outcome];
        let object = "certificate of an unknown authority";
        assert_eq!(told, ["", "", object, "unauthenticated"], "{row:?}");
        assert!(row.peer.starts_with("127.0.0.1:") && row.request.len() == 32, "{row:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_known_certificate_is_a_credential_of_its_tenant() {
    let site = Site::start().await;
    let ci = site.client("spiffe://example.org/ci");
    let build = send(ci.create()).await.well()["build_id"].as_str().unwrap().to_owned();
    let row = site.server.claim().await;
    assert_eq!((row.lease.tenant.as_str(), row.lease.build.as_str()), ("acme", build.as_str()));
    // What the request says may only agree.
    assert_eq!(Caller::status(ci.create().header("x-tenant-id", "other")).await, 403);
    assert_eq!(Caller::status(ci.create().header("x-tenant-id", "acme")).await, 200);
    let shown = send(ci.create()).await.well()["tenant_context"].clone();
    assert_eq!(shown["organization_id"], "acme-group");
    assert_eq!(shown["permissions"].as_array().map(Vec::len), Some(Right::ALL.len()));
    // Another with fewer rights, of one customer.
    let reader = site.client("spiffe://example.org/reader");
    let get = json!({"build_id": build});
    assert_eq!(Caller::status(reader.create()).await, 403);
    assert_eq!(Caller::status(reader.rpc("ListBuilds", &json!({}))).await, 200);
    assert_eq!(
        Caller::status(reader.rpc("ListBuilds", &json!({})).header("x-customer-id", "c2")).await,
        403
    );
    // And another tenant's sees nothing of it.
    let small = site.client("spiffe://example.org/small");
    assert_eq!(Caller::status(small.rpc("GetBuild", &get)).await, 404);
    assert_eq!(Caller::status(ci.rpc("GetBuild", &get)).await, 200);
    site.stop().await;
}

#[tokio::test]
async fn a_gateway_names_the_tenant_of_each_request() {
    let site = Site::start().await;
    let gateway = site.client("spiffe://example.org/gateway");
    assert_eq!(Caller::status(gateway.create()).await, 401);
    let create = gateway.create().header("x-tenant-id", "one");
    let build = send(create).await.well()["build_id"].as_str().unwrap().to_owned();
    let get = |tenant| {
        let get = gateway.rpc("GetBuild", &json!({"build_id": build}));
        get.header("x-tenant-id", tenant)
    };
    assert_eq!(Caller::status(get("one")).await, 200);
    assert_eq!(Caller::status(get("two")).await, 404);
    assert_eq!(Caller::status(get("../one")).await, 400);
    site.stop().await;
}

#[tokio::test]
async fn the_tier_of_the_database_counts_before_the_files() {
    let site = Site::start().await;
    let small = site.client("spiffe://example.org/small");
    let limit = async || {
        let reply = send(small.rpc("ListBuilds", &json!({}))).await;
        reply.header("x-ratelimit-limit").to_owned()
    };
    assert_eq!(limit().await, Tier::Free.request_rate().0.to_string());
    let row = TenantRow { id: "tiny".parse().unwrap(), tier: Tier::Pro, limits: None };
    site.server.store.system().put_tenant(&row).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(limit().await, Tier::Pro.request_rate().0.to_string());
    site.stop().await;
}

#[tokio::test]
async fn a_certificate_that_is_not_known_needs_a_token() {
    let mut site = Site::start().await;
    let list = |caller: &Caller| caller.rpc("ListBuilds", &json!({}));
    let token = site.server.token("other", &Right::ALL).await;
    let strangers = [
        site.client("spiffe://example.org/prometheus"),
        site.client("spiffe://example.org/ci/"),
        site.client("spiffe://example.org/nobody"),
        site.client_with(None),
    ];
    for stranger in &strangers {
        assert_eq!(Caller::status(list(stranger)).await, 401);
        assert_eq!(Caller::status(list(stranger).bearer_auth(&token)).await, 200);
    }
    // A token counts alone: the certificate's tenant is not the request's, and a bad token is
    // not mended by a good certificate.
    let ci = site.client("spiffe://example.org/ci");
    let named = |tenant| list(&ci).bearer_auth(&token).header("x-tenant-id", tenant);
    assert_eq!(Caller::status(named("other")).await, 200);
    assert_eq!(Caller::status(named("acme")).await, 403);
    assert_eq!(Caller::status(list(&ci).bearer_auth("bld_0")).await, 401);
    // Who is taken out of the file is nobody at once, also on a connection that is open.
    assert_eq!(Caller::status(list(&ci)).await, 200);
    std::fs::write(&site.clients_file, "").unwrap();
    site.keeper.look().await;
    assert_eq!(Caller::status(list(&ci)).await, 401);
    site.stop().await;
}

#[tokio::test]
async fn a_log_ends_when_its_certificate_is_no_longer_known() {
    let mut site = Site::start().await;
    let ci = site.client("spiffe://example.org/ci");
    let build = send(ci.create()).await.well()["build_id"].as_str().unwrap().to_owned();
    let message = json!({"build_id": build, "follow": true}).to_string();
    let mut framed = vec![0];
    framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend(message.as_bytes());
    let follow = ci
        .http
        .post(format!("{}/StreamBuildLogs", ci.base))
        .header("content-type", "application/connect+json")
        .body(framed);
    let response = follow.send().await.unwrap();
    std::fs::write(&site.clients_file, "").unwrap();
    site.keeper.look().await;
    let rest = tokio::time::timeout(Duration::from_secs(10), response.text()).await;
    let rest = rest.expect("it ends").unwrap();
    assert!(rest.contains("unauthenticated") && rest.contains("no longer known"), "{rest}");
    site.stop().await;
}
