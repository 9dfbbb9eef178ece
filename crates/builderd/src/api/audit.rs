//! Who was refused, for the audit log: written behind the request's back, and no more of it than
//! a tenant, an address of strangers and all together may cause, so that nobody fills the disk by
//! being refused. What is left out is counted, and the count is written.
//!
//! What changes something is not written here but by the store, with the change itself.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use connectrpc::ErrorCode;
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::request::Parts;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::watch;
use uuid::Uuid;

use super::auth::Caller;
use super::error::Answer;
use super::parts::{PartCounts, Whose};
use super::peers::{Peers, counted_as};
use super::{ApiState, server};
use crate::build::record::BuildId;
use crate::build::service::ServiceError;
use crate::clock::Clock;
use crate::store::Store;
use crate::store::audit::{Action, AuditEntry, Author, DEVELOPMENT};
use crate::tenant::{Origin, Principal, TenantId};
use crate::tls::TellRefused;

const MINUTE: Duration = Duration::from_secs(60);
/// Rows in a minute that an address causes where no tenant is known, and as many at once.
const PEER: (u32, u32) = (10, 100);
/// The same of a tenant.
const TENANT: (u32, u32) = (10, 100);
/// The same of all who showed a credential that is known, and of all who did not: whoever comes from
/// many addresses hides nobody whose name there is. At most 172,800 rows in a day, some 60 MB.
const ALL: (u32, u32) = (60, 1000);
/// Rows that wait to be written.
const WAITING_MAX: usize = 2048;
/// Rows written at once.
const BATCH_MAX: usize = 100;
/// How long a database that takes no rows is waited for, between one try and the next: long enough
/// for one that is started anew. What comes meanwhile waits in the queue.
const TRY_AGAIN: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(15),
];
/// How long the last rows may take when the doors are closed.
const LAST_ROWS_MAX: Duration = Duration::from_secs(10);
/// How often a node says how many it left out.
const MARK_EVERY: Duration = Duration::from_secs(60);
/// How many refusals come between two times that tenants' buckets are looked through.
const FORGET_EVERY: u64 = 1000;

/// What a request wants, as far as its head tells.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) origin: Origin,
    action: Action,
    build: Option<BuildId>,
}

impl Asked {
    pub(super) fn of(head: &Parts) -> Self {
        let mut path = head.uri.path().split('/').skip(1);
        let names = (path.next() == Some(api::SERVICE)).then(|| path.next()).flatten();
        let id = path.next().unwrap_or_default();
        let header = head.headers.get("traceparent").and_then(|value| value.to_str().ok());
        let peer = head.extensions.get::<server::Peer>().map(|peer| peer.0);
        Self {
            origin: Origin { peer, request: request(header) },
            action: names.map_or(Action::Unknown, action),
            build: id.strip_suffix(".sha256").unwrap_or(id).parse().ok(),
        }
    }
}

/// The trace that a caller says its request belongs to, else one of our own.
fn request(traceparent: Option<&str>) -> String {
    match traceparent.and_then(trace_of) {
        Some(trace) => trace.to_owned(),
        None => Uuid::new_v4().simple().to_string(),
    }
}

/// The trace of a `traceparent` (W3C Trace Context), which is 32 hex digits or none.
pub(super) fn trace_of(traceparent: &str) -> Option<&str> {
    let is_hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let trace = traceparent.split('-').nth(1)?;
    (trace.len() == 32 && trace.bytes().all(is_hex)).then_some(trace)
}

/// What a method or a plain route does.
fn action(name: &str) -> Action {
    match name {
        "CreateBuild" => Action::BuildCreate,
        "CancelBuild" => Action::BuildCancel,
        "DeleteBuild" => Action::BuildDelete,
        "GetBuildArtifact" => Action::ArtifactDownload,
        "GetBuildStatus" | "GetBuildLogs" => Action::BuildRead,
        name if api::METHODS.iter().any(|method| method.name == name) => Action::BuildRead,
        _ => Action::Unknown,
    }
}

/// What whoever is refused may cause.
struct Limits {
    peers: Peers,
    tenants: DefaultKeyedRateLimiter<TenantId>,
    known: DefaultDirectRateLimiter,
    strangers: DefaultDirectRateLimiter,
}

fn per_minute((rate, burst): (u32, u32)) -> Quota {
    let least = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    Quota::per_minute(least(rate)).allow_burst(least(burst))
}

impl Limits {
    fn new() -> Self {
        Self {
            peers: Peers::new(PEER.0, MINUTE, PEER.1),
            tenants: RateLimiter::keyed(per_minute(TENANT)),
            known: RateLimiter::direct(per_minute(ALL)),
            strangers: RateLimiter::direct(per_minute(ALL)),
        }
    }

    /// Whether one more may be written; who has had enough takes nothing from the others.
    fn allow(&self, peer: IpAddr, tenant: Option<&TenantId>, is_known: bool) -> bool {
        let own = match tenant {
            Some(tenant) => self.tenants.check_key(tenant).is_ok(),
            None => self.peers.count(peer, Instant::now()).is_ok(),
        };
        let all = if is_known { &self.known } else { &self.strangers };
        own && all.check().is_ok()
    }
}

/// Told how many rows were left out.
pub(super) type Dropped = Arc<dyn Fn(u64) + Send + Sync>;

/// See the module.
pub(super) struct Refusals {
    clock: Arc<dyn Clock>,
    limits: Limits,
    waiting: Sender<AuditEntry>,
    left_out: Arc<LeftOut>,
    parts: Arc<PartCounts>,
    seen: AtomicU64,
    written: Written,
}

/// Tells when nothing is left to be written.
#[derive(Clone)]
pub(crate) struct Written(watch::Receiver<()>);

impl Written {
    /// Waits until every refusal is written down or counted, which is after the last door has
    /// closed; not for ever, should the database not answer.
    pub(crate) async fn wait(mut self) {
        // The writer says nothing, and is gone when it is done.
        let gone = async { while self.0.changed().await.is_ok() {} };
        if tokio::time::timeout(LAST_ROWS_MAX, gone).await.is_err() {
            tracing::warn!("the last refusals could not be written to the audit log in time");
        }
    }
}

/// How many refusals were not written, and of whom that is told.
struct LeftOut {
    since_mark: AtomicU64,
    told: Dropped,
}

impl LeftOut {
    fn add(&self, count: u64) {
        self.since_mark.fetch_add(count, Ordering::Relaxed);
        (self.told)(count);
    }
}

impl Refusals {
    /// Writes to `store` until it is dropped and nothing waits any more.
    pub(super) fn new(store: Store, clock: Arc<dyn Clock>, told: Dropped) -> Self {
        let (waiting, entries) = channel(WAITING_MAX);
        let left_out = Arc::new(LeftOut { since_mark: AtomicU64::new(0), told });
        let (works, written) = watch::channel(());
        let parts = Arc::new(PartCounts::default());
        let writer = Writer {
            store,
            clock: Arc::clone(&clock),
            left_out: Arc::clone(&left_out),
            parts: Arc::clone(&parts),
            marked: None,
            _works: works,
        };
        tokio::spawn(writer.run(entries));
        let (limits, seen, written) = (Limits::new(), AtomicU64::new(0), Written(written));
        Self { clock, limits, waiting, left_out, parts, seen, written }
    }

    /// Takes note of an answer, if it refuses somebody.
    pub(super) fn note(
        &self,
        asked: &Asked,
        who: Option<(Option<&TenantId>, &str)>,
        build: Option<&BuildId>,
        answer: &Answer,
    ) {
        if !answer.is_refusal() {
            return;
        }
        let (tenant, subject) = who.unwrap_or_default();
        self.add(
            AuditEntry {
                tenant: tenant.cloned(),
                at: self.clock.now(),
                author: Author::named(subject, &asked.origin),
                action: asked.action,
                object: build.or(asked.build.as_ref()).map(ToString::to_string).unwrap_or_default(),
                outcome: answer.code().as_str(),
            },
            asked.origin.peer,
        );
    }

    /// Takes note of a client that was refused before it could ask for anything.
    fn note_handshake(&self, peer: SocketAddr, why: &'static str) {
        let origin = Origin { peer: Some(peer), request: request(None) };
        self.add(
            AuditEntry {
                tenant: None,
                at: self.clock.now(),
                author: Author::named("", &origin),
                action: Action::TlsHandshake,
                object: why.to_owned(),
                outcome: ErrorCode::Unauthenticated.as_str(),
            },
            Some(peer),
        );
    }

    /// Has a row written, unless there are too many.
    fn add(&self, entry: AuditEntry, peer: Option<SocketAddr>) {
        if self.seen.fetch_add(1, Ordering::Relaxed) % FORGET_EVERY == FORGET_EVERY - 1 {
            self.limits.tenants.retain_recent();
        }
        let from = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.ip());
        let is_known = !entry.author.subject.is_empty();
        let is_allowed = self.limits.allow(from, entry.tenant.as_ref(), is_known);
        if !is_allowed || self.waiting.try_send(entry).is_err() {
            self.left_out.add(1);
        }
    }
}

impl ApiState {
    /// Tells when the audit log has everything, once the doors are closed.
    pub(crate) fn written(&self) -> Written {
        self.refusals.written.clone()
    }

    /// Who is to be told of clients that TLS refuses. It keeps nothing open when the doors close.
    pub(super) fn tell_handshakes(&self) -> TellRefused {
        let refusals = Arc::downgrade(&self.refusals);
        Arc::new(move |peer, why| {
            if let Some(refusals) = refusals.upgrade() {
                refusals.note_handshake(peer, why);
            }
        })
    }

    /// Writes down that bytes of a build's artifact are handed out, before they are. Of parts that
    /// follow each other the first alone has a row; the others are counted.
    ///
    /// # Errors
    /// [`ServiceError`]: no byte may go then.
    pub(super) async fn note_download(
        &self,
        who: &Principal,
        id: &str,
        is_part: bool,
    ) -> Result<(), ServiceError> {
        let (now, origin) = (Instant::now(), who.origin());
        let credential = who.credential().unwrap_or(DEVELOPMENT);
        let author = Author::named(credential, origin);
        let whose = Whose {
            tenant: who.tenant().clone(),
            credential: credential.to_owned(),
            from: origin.peer.map(|peer| counted_as(peer.ip())),
            build: id.to_owned(),
        };
        let parts = &self.refusals.parts;
        if is_part && parts.count(&whose, &author, now) {
            return Ok(());
        }
        self.service.note_download(who, id).await?;
        if is_part {
            parts.begin(whose, author, now);
        }
        Ok(())
    }

    /// Takes note of an answer to a caller, if it refuses it.
    pub(super) fn refused(
        &self,
        caller: &Caller,
        who: Option<&Principal>,
        build: &str,
        answer: &Answer,
    ) {
        let who = match who {
            Some(who) => (Some(who.tenant()), who.credential().unwrap_or(DEVELOPMENT)),
            None => caller.named(),
        };
        self.refusals.note(caller.asked(), Some(who), build.parse().ok().as_ref(), answer);
    }
}

/// What writes.
struct Writer {
    store: Store,
    clock: Arc<dyn Clock>,
    left_out: Arc<LeftOut>,
    parts: Arc<PartCounts>,
    /// When it was last said how many were left out.
    marked: Option<Instant>,
    /// Gone when it is.
    _works: watch::Sender<()>,
}

impl Writer {
    async fn run(mut self, mut entries: Receiver<AuditEntry>) {
        loop {
            let mut batch = Vec::new();
            let wait = tokio::time::timeout(MARK_EVERY, entries.recv_many(&mut batch, BATCH_MAX));
            let is_over = wait.await == Ok(0);
            batch.extend(self.parts.over(Instant::now(), is_over, self.clock.now()));
            self.write(batch).await;
            if is_over || self.marked.is_none_or(|marked| marked.elapsed() >= MARK_EVERY) {
                self.mark().await;
            }
            if is_over {
                return;
            }
        }
    }

    /// Writes down each stream's rows by themselves, so that those of one are not lost, or written
    /// twice, for the others.
    async fn write(&self, mut batch: Vec<AuditEntry>) {
        batch.sort_by(|one, other| one.stream().cmp(other.stream()));
        for entries in batch.chunk_by(|one, other| one.tenant == other.tenant) {
            let mut waits = TRY_AGAIN.iter();
            while let Err(error) = self.store.system().add_audit(entries.to_vec()).await {
                let Some(wait) = waits.next() else {
                    let count = u64::try_from(entries.len()).unwrap_or(u64::MAX);
                    tracing::warn!(%error, count, "refusals could not be written to the audit log");
                    self.left_out.add(count);
                    break;
                };
                tokio::time::sleep(*wait).await;
            }
        }
    }

    /// Says how many were left out since the last time, if any were.
    async fn mark(&mut self) {
        let count = self.left_out.since_mark.swap(0, Ordering::Relaxed);
        if count == 0 {
            return;
        }
        self.marked = Some(Instant::now());
        tracing::warn!(count, "refusals were left out of the audit log: there were too many");
        let (author, object) = (Author::service(), format!("{count} refusals"));
        let (action, now) = (Action::AuditDropped, self.clock.now());
        let entry = AuditEntry::done(None, &author, action, &object, now);
        if let Err(error) = self.store.system().add_audit(vec![entry]).await {
            tracing::warn!(%error, "the audit log cannot be written");
            self.left_out.since_mark.fetch_add(count, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_hex_or_our_own() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(request(Some(&format!("00-{trace}-b7ad6b7169203331-01"))), trace);
        for bad in [None, Some("00-secret-x-01"), Some("00-"), Some(trace)] {
            let own = request(bad);
            assert!(own.len() == 32 && own != trace, "{own}");
        }
    }

    #[test]
    fn whoever_is_refused_often_uses_up_its_own_rows() {
        let limits = Limits::new();
        let address = |number| IpAddr::V4(Ipv4Addr::from_bits(number));
        let [one, other, third] = ["a", "b", "c"].map(|id| id.parse::<TenantId>().unwrap());
        let allowed = |peer: IpAddr, tenant: Option<&TenantId>| {
            let allow = |_: &u32| limits.allow(peer, tenant, tenant.is_some());
            (0..2 * PEER.1).filter(allow).count()
        };
        let burst = |(_, burst): (u32, u32)| usize::try_from(burst).unwrap();
        assert_eq!(allowed(address(1), None), burst(PEER));
        assert_eq!(allowed(address(2), Some(&one)), burst(TENANT));
        assert_eq!(allowed(address(3), Some(&one)), 0, "the tenant, from elsewhere");
        assert_eq!(allowed(address(4), Some(&other)), burst(TENANT));
        let rest: usize = (5..100).map(|number| allowed(address(number), None)).sum();
        assert_eq!(rest, burst(ALL) - burst(PEER), "all strangers together");
        assert_eq!(allowed(address(100), None), 0, "another stranger");
        assert_eq!(allowed(address(101), Some(&third)), burst(TENANT), "they hide nobody");
        let fourth = "d".parse().unwrap();
        assert_eq!(allowed(address(1), Some(&fourth)), burst(TENANT), "nor behind one address");
    }
}
