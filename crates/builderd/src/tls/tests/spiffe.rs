//! Certificates from the Workload API.

use super::agent::Agent;
use super::*;

const SERVER: &str = "spiffe://example.org/builderd";
const CI: &str = "spiffe://example.org/ci";

fn settings(agent: &Agent, clients_file: Option<PathBuf>) -> TlsConfig {
    let source = TlsSource::Spiffe { socket: agent.socket.clone() };
    TlsConfig { source, client_auth: ClientAuth::Required, clients_file, for_metrics: true }
}

/// Lets the keeper hear what the agent said last.
async fn heard(keeper: &mut Keeper) {
    let sent = tokio::time::timeout(Duration::from_secs(20), keeper.source.sent()).await;
    sent.expect("the agent is heard").unwrap();
    keeper.take();
}

#[tokio::test]
async fn the_agents_identity_is_shown_and_follows_it() {
    let (agent, authority) = (Agent::start(), Authority::new("spire", &["spiffe://example.org"]));
    let first = agent.name(SERVER, &authority);
    let (tls, mut keeper) = start(&settings(&agent, None), Metrics::unread()).await.unwrap();
    let site = Site::start(tls).await;
    let own = authority.issue(&[CI]);
    let caller = Caller::new(&authority, Some(&own));
    let mut open = caller.connect(&site).await.unwrap();
    assert_eq!(shown(&open), first.certificate);
    assert_eq!(ask(&mut open).await.unwrap(), CI);
    // A new certificate of ours; whoever is there stays.
    let second = agent.name(SERVER, &authority);
    heard(&mut keeper).await;
    assert_eq!(shown(&caller.connect(&site).await.unwrap()), second.certificate);
    assert_eq!(ask(&mut open).await.unwrap(), CI);
    // New authorities: those signed by the old one are strangers now.
    let next = Authority::new("spire, renewed", &["spiffe://example.org"]);
    agent.name(SERVER, &next);
    heard(&mut keeper).await;
    let renewed = next.issue(&[CI]);
    assert_eq!(Caller::new(&next, Some(&renewed)).name(&site).await.unwrap(), CI);
    assert!(Caller::new(&next, Some(&own)).name(&site).await.is_err());
    // Also those who are there.
    is_over(open).await;
    site.stop().await;
}

#[tokio::test]
async fn only_ids_of_the_own_domain_come_in_and_of_those_only_known_ones() {
    let (agent, authority) = (Agent::start(), Authority::new("spire", &["spiffe://example.org"]));
    agent.name(SERVER, &authority);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("clients.toml");
    std::fs::write(&file, format!("[[client]]\nid = \"{CI}\"\ntenant = \"acme\"\n")).unwrap();
    let issued = |id: &str| authority.issue(&[id]);
    let other = "spiffe://example.org/other";
    for (clients_file, of_domain) in [(None, true), (Some(file.clone()), false)] {
        let settings = settings(&agent, clients_file);
        let (tls, mut keeper) = start(&settings, Metrics::unread()).await.unwrap();
        let site = Site::start(tls).await;
        let name = async |id: &str| Caller::new(&authority, Some(&issued(id))).name(&site).await;
        assert_eq!(name(CI).await.unwrap(), CI);
        let own = issued(CI);
        let mut open = Caller::new(&authority, Some(&own)).connect(&site).await.unwrap();
        assert_eq!(ask(&mut open).await.unwrap(), CI);
        assert_eq!(name(other).await.is_ok(), of_domain);
        // Signed by the right authority, and still of another domain, or no SPIFFE id at all.
        assert!(name("spiffe://example.com/ci").await.is_err());
        assert!(name("https://example.org/ci").await.is_err());
        assert!(Caller::new(&authority, Some(&authority.issue(&[]))).name(&site).await.is_err());
        assert!(
            Caller::new(&authority, Some(&authority.issue(&[CI, other])))
                .name(&site)
                .await
                .is_err()
        );
        assert!(Caller::new(&authority, None).name(&site).await.is_err());
        // Who is taken out of the file does not come in again.
        if !of_domain {
            std::fs::write(&file, format!("[[client]]\nid = \"{other}\"\n")).unwrap();
            keeper.look().await;
            assert!(name(CI).await.is_err());
            assert_eq!(name(other).await.unwrap(), other);
            is_over(open).await;
        }
        site.stop().await;
    }
}

#[tokio::test]
async fn an_identity_that_is_withdrawn_closes_the_doors() {
    let (agent, authority) = (Agent::start(), Authority::new("spire", &["spiffe://example.org"]));
    agent.name(SERVER, &authority);
    let (tls, mut keeper) = start(&settings(&agent, None), Metrics::unread()).await.unwrap();
    let site = Site::start(tls).await;
    let own = authority.issue(&[CI]);
    let caller = Caller::new(&authority, Some(&own));
    let mut open = caller.connect(&site).await.unwrap();
    assert_eq!(ask(&mut open).await.unwrap(), CI);
    agent.forget();
    heard(&mut keeper).await;
    assert!(caller.name(&site).await.is_err());
    is_over(open).await;
    agent.name(SERVER, &authority);
    heard(&mut keeper).await;
    assert_eq!(caller.name(&site).await.unwrap(), CI);
    site.stop().await;
}

#[tokio::test]
async fn an_agent_that_was_away_is_heard_again() {
    let (agent, authority) = (Agent::start(), Authority::new("spire", &["spiffe://example.org"]));
    let first = agent.name(SERVER, &authority);
    let (tls, mut keeper) = start(&settings(&agent, None), Metrics::unread()).await.unwrap();
    let site = Site::start(tls).await;
    let own = authority.issue(&[CI]);
    let caller = Caller::new(&authority, Some(&own));
    let agent = agent.dead().await;
    // What was said before holds.
    assert_eq!(shown(&caller.connect(&site).await.unwrap()), first.certificate);
    let second = agent.name(SERVER, &authority);
    let agent = agent.revived();
    heard(&mut keeper).await;
    assert_eq!(shown(&caller.connect(&site).await.unwrap()), second.certificate);
    drop(agent);
    site.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_no_agent_knows_does_not_start() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let source = TlsSource::Spiffe { socket: socket.clone() };
    let client_auth = ClientAuth::Required;
    let settings = TlsConfig { source, client_auth, clients_file: None, for_metrics: true };
    let error = start(&settings, Metrics::unread()).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("agent.sock") && text.contains("UNKEY_BUILDERD_SPIFFE_SOCKET"), "{text}");
}
