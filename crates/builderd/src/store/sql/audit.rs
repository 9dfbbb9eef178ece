//! The audit log's rows: added at a stream's end in the transaction of what they tell of, read in
//! pages, and forgotten from a stream's beginning. Nothing else is done to them, and triggers
//! refuse the rest.
//!
//! A stream is held last in a transaction, behind everything that [`super`] names, so that
//! tenants do not wait for each other and nobody waits in a circle.

use super::Rows;
use crate::build::record::Micros;
use crate::store::StoreError;
use crate::store::audit::{AuditEntry, AuditFilter, AuditRow, AuditVerdict};
use crate::store::engine::{Row, Tx, sql};

/// Rows read, or forgotten, at once.
pub(in crate::store) const AUDIT_PAGE: u32 = 500;
/// Pages that one call forgets at most: the next call goes on.
const FORGOTTEN_PAGES_MAX: u32 = 200;
/// Problems told of a damaged log.
const PROBLEMS_MAX: usize = 100;

/// Adds rows at the end of one stream.
pub(super) async fn append(tx: &mut Tx, entries: &[AuditEntry]) -> Result<(), StoreError> {
    let Some(first) = entries.first() else { return Ok(()) };
    let stream = first.stream().to_owned();
    // The update changes nothing, but holds the stream.
    let query = sql("INSERT INTO audit_stream \
         (tenant_id, first_number, base_hash, last_number, last_hash) VALUES ($1, 1, '', 0, '') \
         ON CONFLICT (tenant_id) DO UPDATE SET last_number = audit_stream.last_number \
         RETURNING last_number, last_hash");
    let end = tx.one(query.text(&stream)).await?;
    let (mut number, mut hash) = (end.count("last_number")?, end.text("last_hash")?);
    for entry in entries {
        number += 1;
        let row = entry.row(number, &hash);
        let query = sql("INSERT INTO audit (tenant_id, number, happened_at, subject, action, \
             object, outcome, peer, request, hash) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)");
        let query = query
            .text(&row.stream)
            .count(row.number)
            .at(row.at)
            .text(&row.subject)
            .text(&row.action)
            .text(&row.object)
            .text(&row.outcome)
            .text(&row.peer)
            .text(&row.request)
            .text(&row.hash);
        tx.execute(query).await?;
        hash = row.hash;
    }
    let query = sql("UPDATE audit_stream SET last_number = $2, last_hash = $3 \
         WHERE tenant_id = $1");
    tx.execute(query.text(&stream).count(number).text(&hash)).await?;
    Ok(())
}

fn audit_row(row: &Row) -> Result<AuditRow, StoreError> {
    Ok(AuditRow {
        stream: row.text("tenant_id")?,
        number: row.count("number")?,
        at: row.at("happened_at")?,
        subject: row.text("subject")?,
        action: row.text("action")?,
        object: row.text("object")?,
        outcome: row.text("outcome")?,
        peer: row.text("peer")?,
        request: row.text("request")?,
        hash: row.text("hash")?,
    })
}

impl Rows {
    /// Adds entries that tell of no change in this database, each stream's in a transaction.
    pub(crate) async fn add_audit(&self, mut entries: Vec<AuditEntry>) -> Result<(), StoreError> {
        entries.sort_by(|one, other| one.stream().cmp(other.stream()));
        for entries in entries.chunk_by(|one, other| one.tenant == other.tenant) {
            self.again(|| async {
                let mut tx = self.engine.begin().await?;
                append(&mut tx, entries).await?;
                tx.commit().await
            })
            .await?;
        }
        Ok(())
    }

    /// The next rows of a filter in the order of time, behind `last`.
    pub(crate) async fn audit_page(
        &self,
        filter: &AuditFilter,
        last: Option<&AuditRow>,
    ) -> Result<Vec<AuditRow>, StoreError> {
        let query = sql("SELECT tenant_id, number, happened_at, subject, action, object, \
             outcome, peer, request, hash FROM audit \
             WHERE (happened_at, tenant_id, number) > ($1, $2, $3) AND happened_at < $4 \
             AND ($5 = '' OR tenant_id = $5) ORDER BY happened_at, tenant_id, number LIMIT $6");
        let query = match last {
            Some(last) => query.at(last.at).text(&last.stream).count(last.number),
            // Rows are numbered from 1.
            None => query.int(filter.since.map_or(i64::MIN, |since| since.0)).text("").int(0),
        };
        let query = query
            .int(filter.until.map_or(i64::MAX, |until| until.0))
            .text(filter.tenant.as_ref().map_or("", |tenant| tenant.as_str()))
            .int(i64::from(AUDIT_PAGE));
        self.again(|| self.engine.all(query.clone())).await?.iter().map(audit_row).collect()
    }

    /// Forgets rows older than `older_than` from the beginning of each stream; how many. A row
    /// behind a younger one stays with it.
    pub(crate) async fn forget_audit(&self, older_than: Micros) -> Result<u64, StoreError> {
        let (mut finished, mut forgotten) = (None, 0);
        for _ in 0..FORGOTTEN_PAGES_MAX {
            let query = sql("SELECT tenant_id FROM audit WHERE happened_at < $1 \
                 AND ($2 IS NULL OR tenant_id > $2) ORDER BY tenant_id LIMIT 1");
            let query = query.at(older_than).maybe_text(finished.as_deref());
            let Some(row) = self.again(|| self.engine.optional(query.clone())).await? else {
                break;
            };
            let found = row.text("tenant_id")?;
            let gone = self.again(|| self.forget_page(&found, older_than)).await?;
            forgotten += gone;
            if gone == 0 {
                finished = Some(found);
            }
        }
        Ok(forgotten)
    }

    async fn forget_page(&self, stream: &str, older_than: Micros) -> Result<u64, StoreError> {
        let mut tx = self.engine.begin().await?;
        let query = sql("SELECT first_number FROM audit_stream WHERE tenant_id = $1 \
             FOR NO KEY UPDATE");
        let Some(held) = tx.optional(query.text(stream)).await? else { return Ok(0) };
        let query = sql("SELECT number, happened_at, hash FROM audit \
             WHERE tenant_id = $1 AND number >= $2 ORDER BY number LIMIT $3");
        let query = query.text(stream).count(held.count("first_number")?);
        let oldest = tx.all(query.int(i64::from(AUDIT_PAGE))).await?;
        let mut end = None;
        for row in oldest {
            if row.at("happened_at")? >= older_than {
                break;
            }
            end = Some((row.count("number")?, row.text("hash")?));
        }
        let Some((number, hash)) = end else { return Ok(0) };
        let query = sql("UPDATE audit_stream SET first_number = $2, base_hash = $3 \
             WHERE tenant_id = $1");
        tx.execute(query.text(stream).count(number + 1).text(&hash)).await?;
        let query = sql("DELETE FROM audit WHERE tenant_id = $1 AND number <= $2");
        let gone = tx.execute(query.text(stream).count(number)).await?;
        tx.commit().await?;
        Ok(gone)
    }

    /// Reads the whole log, as it is at one moment, and says where numbers or hashes do not
    /// follow each other.
    pub(crate) async fn verify_audit(&self) -> Result<AuditVerdict, StoreError> {
        let mut tx = self.engine.snapshot().await?;
        let mut verdict = AuditVerdict::default();
        let mut last: Option<String> = None;
        while verdict.problems.len() < PROBLEMS_MAX {
            let query = sql("SELECT tenant_id, first_number, base_hash, last_number, last_hash \
                 FROM audit_stream WHERE $1 IS NULL OR tenant_id > $1 ORDER BY tenant_id LIMIT $2");
            let query = query.maybe_text(last.as_deref()).int(i64::from(AUDIT_PAGE));
            let streams = tx.all(query).await?;
            let Some(end) = streams.last() else { break };
            last = Some(end.text("tenant_id")?);
            for stream in &streams {
                verdict.streams += 1;
                let problem = verify_stream(&mut tx, stream, &mut verdict.rows).await?;
                verdict.problems.extend(problem);
            }
        }
        let query = sql("SELECT tenant_id, number FROM audit a WHERE NOT EXISTS \
             (SELECT s.tenant_id FROM audit_stream s WHERE s.tenant_id = a.tenant_id \
              AND a.number BETWEEN s.first_number AND s.last_number) LIMIT 1");
        if let Some(row) = tx.optional(query).await? {
            let (stream, number) = (row.text("tenant_id")?, row.count("number")?);
            verdict.problems.push(format!("row {number} of {stream:?} is outside of its stream"));
        }
        tx.rollback().await?;
        Ok(verdict)
    }
}

/// The first problem of a stream; the rest of it is not read then.
async fn verify_stream(
    tx: &mut Tx,
    stream: &Row,
    rows: &mut u64,
) -> Result<Option<String>, StoreError> {
    let name = stream.text("tenant_id")?;
    let mut number = stream.count("first_number")?;
    let end = stream.count("last_number")?;
    let mut hash = stream.text("base_hash")?;
    while number <= end {
        let query = sql("SELECT tenant_id, number, happened_at, subject, action, object, \
             outcome, peer, request, hash FROM audit \
             WHERE tenant_id = $1 AND number >= $2 ORDER BY number LIMIT $3");
        let query = query.text(&name).count(number).int(i64::from(AUDIT_PAGE));
        let page = tx.all(query).await?;
        if page.is_empty() {
            return Ok(Some(format!("{name:?} has no rows from {number} to {end}")));
        }
        for row in &page {
            let row = audit_row(row)?;
            if row.number != number {
                let before = row.number - 1;
                return Ok(Some(format!("{name:?} has no rows from {number} to {before}")));
            }
            if row.chained(&hash) != row.hash {
                return Ok(Some(format!("row {number} of {name:?} is not what was written")));
            }
            *rows += 1;
            (number, hash) = (number + 1, row.hash);
        }
    }
    let is_whole = hash == stream.text("last_hash")?;
    Ok((!is_whole).then(|| format!("the end of {name:?} is not what was written")))
}
