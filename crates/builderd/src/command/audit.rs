//! `builderd admin audit …`: the audit log as lines of JSON, and whether it is whole.

use serde_json::{Value, json};

use super::service_args::{AuditCommand, AuditExportArgs, AuditFormat};
use super::{Failure, text};
use crate::build::record::Micros;
use crate::clock::{Clock as _, WallClock};
use crate::config::parse_duration;
use crate::store::Store;
use crate::store::audit::{Action, AuditEntry, AuditFilter, AuditRow, Author};

pub(super) async fn run(store: &Store, command: &AuditCommand) -> Result<(), Failure> {
    match command {
        AuditCommand::Export(args) => export(store, args).await,
        AuditCommand::Verify => verify(store).await,
    }
}

/// Writes down that the operator does something to the database as a whole.
pub(super) async fn note(store: &Store, action: Action, object: &str) -> Result<(), Failure> {
    let author = Author::command();
    let entry = AuditEntry::done(None, &author, action, object, WallClock.now());
    Ok(store.system().add_audit(vec![entry]).await?)
}

async fn export(store: &Store, args: &AuditExportArgs) -> Result<(), Failure> {
    let of = args.tenant.as_ref().map_or("", |tenant| tenant.as_str());
    note(store, Action::AuditExport, of).await?;
    let filter = AuditFilter { since: args.since, until: args.until, tenant: args.tenant.clone() };
    let mut last: Option<AuditRow> = None;
    loop {
        let mut page = store.system().audit_page(&filter, last.as_ref()).await?;
        for row in &page {
            match args.format {
                AuditFormat::Jsonl => put!("{}", line(row)),
            }
        }
        last = page.pop();
        if last.is_none() {
            return Ok(());
        }
    }
}

fn line(row: &AuditRow) -> Value {
    let at = jiff::Timestamp::from_microsecond(row.at.0).map(|at| at.to_string());
    json!({
        "time": at.unwrap_or_default(),
        "time_us": row.at.0,
        "tenant": row.stream,
        "number": row.number,
        "subject": row.subject,
        "action": row.action,
        "object": row.object,
        "outcome": row.outcome,
        "peer": row.peer,
        "request": row.request,
        "hash": row.hash,
    })
}

async fn verify(store: &Store) -> Result<(), Failure> {
    let verdict = store.system().verify_audit().await?;
    for problem in &verdict.problems {
        put!("{}", text::printable(problem));
    }
    put!("{} rows in {} streams", verdict.rows, verdict.streams);
    if verdict.problems.is_empty() {
        put!("every row is there and as it was written");
        return Ok(());
    }
    let error = format!("the audit log is damaged in {} places", verdict.problems.len()).into();
    let hint = "somebody wrote to the database past builderd: compare it with an earlier export \
                or backup";
    Err(Failure { code: 1, error, hint: Some(hint.to_owned()) })
}

/// A moment, as RFC 3339 writes it or as long ago as a duration says.
pub(super) fn parse_moment(text: &str) -> Result<Micros, String> {
    if let Ok(at) = text.parse::<jiff::Timestamp>() {
        return Ok(Micros(at.as_microsecond()));
    }
    let ago = parse_duration(text).map_err(|_| {
        "expected a moment such as 2026-01-31T00:00:00Z, or how long ago, such as 30d".to_owned()
    })?;
    let ago = i64::try_from(ago.as_micros()).unwrap_or(i64::MAX);
    Ok(Micros(WallClock.now().0.saturating_sub(ago)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_date_or_so_long_ago() {
        assert_eq!(parse_moment("2024-01-15T10:30:00Z"), Ok(Micros(1_705_314_600_000_000)));
        let (before, day) = (WallClock.now(), parse_moment("1d").unwrap());
        let late = day.plus_secs(86_400).0 - before.0;
        assert!((0..60 * Micros::SECOND).contains(&late), "{late}");
        assert!(parse_moment("yesterday").unwrap_err().contains("2026-01-31T00:00:00Z"));
    }
}
