//! What a row of the audit log says: who did what, or was refused. It has no room for anything
//! that a caller may write freely: ids, names of ours, addresses and numbers alone.
//!
//! `sql/audit.rs` writes and reads the rows; it does not know who is asked for what.

use sha2::{Digest as _, Sha256};

use crate::build::hex;
use crate::build::record::Micros;
use crate::tenant::{Origin, Principal, Right, TenantId};

/// Longest object, in characters: a file that an operator names may be longer.
const OBJECT_CHARS_MAX: usize = 256;

/// What became of an action that was not refused.
pub(crate) const DONE: &str = "done";

/// Who acts in development mode, which asks nobody for a credential.
pub(crate) const DEVELOPMENT: &str = "development";

/// Who does something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Author {
    /// Id of a token or certificate, `development`, the operator's command, or empty if nobody
    /// showed who he is.
    pub(crate) subject: String,
    /// Its address, as the socket has it; empty if it has none.
    pub(crate) peer: String,
    /// The trace of its request.
    pub(crate) request: String,
}

impl Author {
    /// Whoever runs a command on this machine, by the number of the user.
    pub(crate) fn command() -> Self {
        let user = rustix::process::getuid().as_raw();
        Self { subject: format!("command uid={user}"), ..Self::default() }
    }

    /// The service itself.
    pub(crate) fn service() -> Self {
        Self { subject: "service".into(), ..Self::default() }
    }

    /// Whose credential was checked.
    pub(crate) fn of(who: &Principal) -> Self {
        let author = Self::believed(who.origin());
        match who.credential() {
            Some(id) => Self { subject: id.to_owned(), ..author },
            None => author,
        }
    }

    /// Who is asked for no credential, in development mode.
    pub(crate) fn believed(origin: &Origin) -> Self {
        Self::named(DEVELOPMENT, origin)
    }

    /// Whoever asked from `origin`, by an id of ours.
    pub(crate) fn named(subject: &str, origin: &Origin) -> Self {
        Self {
            subject: subject.to_owned(),
            peer: origin.peer.map(|peer| peer.to_string()).unwrap_or_default(),
            request: origin.request.clone(),
        }
    }
}

/// What somebody does, or was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// A build is accepted.
    BuildCreate,
    /// A build, its log or figures are looked at; only refusals of it are written.
    BuildRead,
    /// A build is cancelled, or told to stop.
    BuildCancel,
    /// A build is deleted.
    BuildDelete,
    /// Bytes of an image are handed out.
    ArtifactDownload,
    /// A token is made.
    TokenCreate,
    /// A token is revoked.
    TokenRevoke,
    /// A tenant's tier or limits are set.
    TenantSet,
    /// The database's master key is forgotten.
    ForgetKey,
    /// A tenant gets a new key.
    KeyRotate,
    /// A tenant's keys are destroyed.
    KeysDestroy,
    /// The database is copied to a file.
    Backup,
    /// The database came from a file.
    Restore,
    /// The database came from SQLite.
    MigrateStore,
    /// The audit log is read.
    AuditExport,
    /// A connection is opened; only refusals of a client's certificate are written.
    TlsHandshake,
    /// Refusals were not written, because there were too many; the object says how many.
    AuditDropped,
    /// A request that names none of these.
    Unknown,
}

impl Action {
    /// Its name in the rows.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::BuildCreate => "build.create",
            Self::BuildRead => "build.read",
            Self::BuildCancel => "build.cancel",
            Self::BuildDelete => "build.delete",
            Self::ArtifactDownload => "artifact.download",
            Self::TokenCreate => "token.create",
            Self::TokenRevoke => "token.revoke",
            Self::TenantSet => "tenant.set",
            Self::ForgetKey => "admin.forget-key",
            Self::KeyRotate => "admin.rotate-key",
            Self::KeysDestroy => "admin.destroy-keys",
            Self::Backup => "admin.backup",
            Self::Restore => "admin.restore",
            Self::MigrateStore => "admin.migrate-store",
            Self::AuditExport => "admin.audit-export",
            Self::TlsHandshake => "tls.handshake",
            Self::AuditDropped => "audit.dropped",
            Self::Unknown => "unknown",
        }
    }

    /// What a right is for.
    pub(crate) fn by(right: Right) -> Self {
        match right {
            Right::BuildCreate => Self::BuildCreate,
            Right::BuildRead => Self::BuildRead,
            Right::BuildCancel => Self::BuildCancel,
            Right::BuildDelete => Self::BuildDelete,
            Right::ArtifactRead => Self::ArtifactDownload,
        }
    }
}

/// A row to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AuditEntry {
    /// In whose stream; none for what belongs to no tenant.
    pub(crate) tenant: Option<TenantId>,
    pub(crate) at: Micros,
    pub(crate) author: Author,
    pub(crate) action: Action,
    pub(crate) object: String,
    /// [`DONE`], or the code of the refusal.
    pub(crate) outcome: &'static str,
}

impl AuditEntry {
    /// Something that was done.
    pub(crate) fn done(
        tenant: Option<&TenantId>,
        author: &Author,
        action: Action,
        object: &str,
        at: Micros,
    ) -> Self {
        let object = object.chars().take(OBJECT_CHARS_MAX).collect();
        let (tenant, author) = (tenant.cloned(), author.clone());
        Self { tenant, at, author, action, object, outcome: DONE }
    }

    /// The name of its stream.
    pub(crate) fn stream(&self) -> &str {
        self.tenant.as_ref().map_or("", TenantId::as_str)
    }

    /// The row that it becomes behind the row with the hash `before`.
    pub(crate) fn row(&self, number: u64, before: &str) -> AuditRow {
        let mut row = AuditRow {
            stream: self.stream().to_owned(),
            number,
            at: self.at,
            subject: self.author.subject.clone(),
            action: self.action.as_str().to_owned(),
            object: self.object.clone(),
            outcome: self.outcome.to_owned(),
            peer: self.author.peer.clone(),
            request: self.author.request.clone(),
            hash: String::new(),
        };
        row.hash = row.chained(before);
        row
    }
}

/// A row as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AuditRow {
    /// The tenant; empty for what belongs to none.
    pub(crate) stream: String,
    /// Its place in the stream; the first is 1.
    pub(crate) number: u64,
    pub(crate) at: Micros,
    pub(crate) subject: String,
    pub(crate) action: String,
    pub(crate) object: String,
    pub(crate) outcome: String,
    pub(crate) peer: String,
    pub(crate) request: String,
    pub(crate) hash: String,
}

impl AuditRow {
    /// The hash that the row must have behind one with the hash `before`: SHA-256, in hex, over
    /// the JSON array of `before` and the row's fields, in their order and without spaces.
    pub(crate) fn chained(&self, before: &str) -> String {
        let fields = serde_json::json!([
            before,
            self.stream,
            self.number,
            self.at.0,
            self.subject,
            self.action,
            self.object,
            self.outcome,
            self.peer,
            self.request,
        ]);
        hex(&Sha256::digest(fields.to_string()))
    }
}

/// Which rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct AuditFilter {
    /// Not older.
    pub(crate) since: Option<Micros>,
    /// Older than this.
    pub(crate) until: Option<Micros>,
    /// Of one tenant.
    pub(crate) tenant: Option<TenantId>,
}

/// What [`verify`](super::SystemStore::verify_audit) found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AuditVerdict {
    /// Streams that were read.
    pub(crate) streams: u64,
    /// Rows that were read.
    pub(crate) rows: u64,
    /// What is wrong, the first of each stream; no more than are told.
    pub(crate) problems: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_covers_every_field_and_the_row_before() {
        let author = Author { subject: "tok_1".into(), peer: "p".into(), request: "r".into() };
        let entry = AuditEntry::done(None, &author, Action::BuildCreate, "build_1", Micros(7));
        let row = entry.row(1, "");
        let changed: [fn(&mut AuditRow); 9] = [
            |row| row.stream.push('x'),
            |row| row.number += 1,
            |row| row.at.0 += 1,
            |row| row.subject.push('x'),
            |row| row.action.push('x'),
            |row| row.object.push('x'),
            |row| row.outcome.push('x'),
            |row| row.peer.push('x'),
            |row| row.request.push('x'),
        ];
        for (index, change) in changed.into_iter().enumerate() {
            let mut other = row.clone();
            change(&mut other);
            assert_ne!(other.chained(""), row.hash, "field {index}");
        }
        assert_ne!(row.chained("other"), row.hash);
        // What another program must compute, too.
        let text = r#"["","",1,7,"tok_1","build.create","build_1","done","p","r"]"#;
        assert_eq!(row.hash, hex(&Sha256::digest(text)));
    }
}
