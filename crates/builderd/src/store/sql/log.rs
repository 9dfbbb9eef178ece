//! The log of a build: numbered lines, within bounds.
//!
//! The bounds are those of all tries together, and the first try may use them up. When another one
//! follows, the oldest lines give way until half of each bound is free, and in the place of the last of
//! them stands how many went. So only the oldest are ever missing, numbers stay what they were, and
//! whoever follows the log goes on where he is.
//!
//! It does not know what a line says, nor who follows; reading is `reading.rs`.

use std::sync::LazyLock;

use crate::build::record::{LogLine, Micros};
use crate::store::StoreError;
use crate::store::engine::{Tx, signed, sql};

use super::{Held, length, was_held};

/// Longest log of a build, in lines.
pub(crate) const LOG_LINES_MAX: u64 = 100_000;
/// Longest log of a build, in bytes of its messages.
pub(crate) const LOG_BYTES_MAX: u64 = 16 << 20;
/// Longest line of a log, in bytes.
pub(crate) const LOG_LINE_BYTES_MAX: usize = 8 << 10;

/// Lines behind the end of a log that say how the build ended, or its try, and bytes of them.
const LAST_LINES_MAX: u64 = 16;
const LAST_BYTES_MAX: u64 = 64 << 10;
/// Who speaks for the store.
const COMPONENT: &str = "queue";

/// A line that the store says itself.
pub(super) fn own_line(level: &str, message: String, at: Micros) -> LogLine {
    let (level, component) = (level.to_owned(), COMPONENT.to_owned());
    LogLine { offset: 0, at, level, component, message }
}

/// Adds lines to the log of a build that is held in its state.
pub(super) async fn add_to_log(
    tx: &mut Tx,
    held: &Held,
    lines: &[LogLine],
) -> Result<(), StoreError> {
    let mut log = Log::of(held);
    let new = u64::try_from(lines.len()).unwrap_or(u64::MAX);
    if log.next.saturating_add(new) >= LOG_LINES_MAX {
        log.first = first_line(tx, held).await?;
    }
    log.append(tx, held, lines).await
}

/// Adds what the store itself says of the end of a build that is held in its state.
pub(super) async fn add_last_words(
    tx: &mut Tx,
    held: &Held,
    line: LogLine,
) -> Result<(), StoreError> {
    let first = first_line(tx, held).await?;
    let log = Log { first, takes_last_words: true, ..Log::of(held) };
    log.append(tx, held, &[line]).await
}

/// Adds lines behind the last one of a try, where the next one finds room for its own.
pub(super) async fn make_room_in_log(
    tx: &mut Tx,
    held: &Held,
    lines: &[LogLine],
) -> Result<(), StoreError> {
    let mut log = Log::of(held);
    log.first = first_line(tx, held).await?;
    if log.count() > LOG_LINES_MAX / 2 || log.bytes > LOG_BYTES_MAX / 2 {
        log.drop_oldest(tx, held).await?;
    } else if lines.is_empty() {
        return Ok(());
    }
    log.is_cut = false;
    log.append(tx, held, lines).await
}

/// The number of the first line there is; that of the next one if there is none.
async fn first_line(tx: &mut Tx, held: &Held) -> Result<u64, StoreError> {
    let query =
        sql("SELECT MIN(line) AS first FROM build_log WHERE tenant_id = $1 AND build_id = $2");
    let query = query.text(held.tenant.as_str()).text(held.id.as_str());
    let first = tx.one(query).await?.maybe_int("first")?;
    Ok(first.and_then(|first| u64::try_from(first).ok()).unwrap_or(held.log_lines))
}

/// What there is of a log.
struct Log {
    /// The number of the first line.
    first: u64,
    /// The number of the next one.
    next: u64,
    /// Of the messages.
    bytes: u64,
    /// Whether it was said in it that it ends.
    is_cut: bool,
    /// Whether what comes says how the build, or its try, ended.
    takes_last_words: bool,
}

impl Log {
    /// As if none of its lines had gone.
    fn of(held: &Held) -> Self {
        let (next, bytes, is_cut) = (held.log_lines, held.log_bytes, held.log_is_cut);
        Self { first: 0, next, bytes, is_cut, takes_last_words: false }
    }

    fn count(&self) -> u64 {
        self.next.saturating_sub(self.first)
    }

    /// Whether there is room for a line; for one that says how it ended there is, whatever was said before.
    fn takes(&self, line: &LogLine) -> bool {
        let is_last = self.takes_last_words || line.level == "error";
        let has_room = self.count() < LOG_LINES_MAX + LAST_LINES_MAX
            && self.bytes < LOG_BYTES_MAX + LAST_BYTES_MAX;
        !self.is_cut || is_last && has_room
    }

    /// Removes the oldest lines until half of each bound is free.
    async fn drop_oldest(&mut self, tx: &mut Tx, held: &Held) -> Result<(), StoreError> {
        let of = |statement| sql(statement).text(held.tenant.as_str()).text(held.id.as_str());
        let query = of("SELECT line, bytes FROM (SELECT line, \
             SUM(OCTET_LENGTH(message)) OVER (ORDER BY line DESC) AS bytes FROM build_log \
             WHERE tenant_id = $1 AND build_id = $2) AS kept \
             WHERE bytes <= $3 AND line >= $4 ORDER BY line LIMIT 1");
        let oldest = self.next.saturating_sub(LOG_LINES_MAX / 2);
        let query = query.count(LOG_BYTES_MAX / 2).count(oldest);
        let (kept, bytes) = match tx.optional(query).await? {
            Some(row) => (row.count("line")?, row.count("bytes")?),
            None => (self.next, 0),
        };
        // The one before is kept for saying so.
        let Some(told) = kept.checked_sub(1).filter(|told| *told >= self.first) else {
            return Ok(());
        };
        let query =
            of("DELETE FROM build_log WHERE tenant_id = $1 AND build_id = $2 AND line < $3");
        tx.execute(query.count(told)).await?;
        let message = format!(
            "the first {kept} lines were left out: a build's log has at most {LOG_LINES_MAX} lines \
             and {} MiB, and half of it is for the next try",
            LOG_BYTES_MAX >> 20
        );
        let query = of("UPDATE build_log SET level = 'warn', component = $4, message = $5 \
             WHERE tenant_id = $1 AND build_id = $2 AND line = $3");
        tx.execute(query.count(told).text(COMPONENT).text(&message)).await?;
        (self.first, self.bytes) = (told, bytes + length(&message));
        Ok(())
    }

    /// Adds what fits of the lines, and writes down how long the log is.
    async fn append(self, tx: &mut Tx, held: &Held, lines: &[LogLine]) -> Result<(), StoreError> {
        let mut addition = Addition { lines: Vec::with_capacity(lines.len()), log: self };
        for line in lines {
            addition.add(line);
        }
        addition.insert(tx, held).await?;
        let Self { next, bytes, is_cut, .. } = addition.log;
        let query = sql("UPDATE build SET log_lines = $4, log_bytes = $5, log_is_cut = $6 \
             WHERE tenant_id = $1 AND id = $2 AND state = $3");
        let query = held.key(query).count(next).count(bytes).int(i64::from(is_cut));
        was_held(tx.execute(query).await?)
    }
}

/// Lines that go to a log, within its bounds.
struct Addition {
    lines: Vec<LogLine>,
    /// With them.
    log: Log,
}

impl Addition {
    fn add(&mut self, line: &LogLine) {
        let log = &mut self.log;
        if !log.takes(line) {
            return;
        }
        let message = bounded_line(&line.message);
        let (count, bytes) = (log.count(), log.bytes + length(&message));
        let mut level = line.level.as_str();
        // The last line is kept for saying so.
        let message = match log.is_cut || count + 1 < LOG_LINES_MAX && bytes <= LOG_BYTES_MAX {
            true => message,
            false => {
                (log.is_cut, level) = (true, "warn");
                format!(
                    "the log of this try ends here: a build's log has at most {LOG_LINES_MAX} lines \
                     and {} MiB; the build goes on",
                    LOG_BYTES_MAX >> 20
                )
            }
        };
        log.bytes += length(&message);
        let (offset, level) = (log.next, level.to_owned());
        self.lines.push(LogLine { offset, level, message, ..line.clone() });
        log.next += 1;
    }

    async fn insert(&self, tx: &mut Tx, held: &Held) -> Result<(), StoreError> {
        let mut left = self.lines.as_slice();
        while let Some((size, statement)) = INSERTS.iter().find(|(size, _)| *size <= left.len()) {
            let (now, later) = left.split_at(*size);
            let query = sql(statement).text(held.tenant.as_str()).text(held.id.as_str());
            let query = now.iter().fold(query, |query, line| {
                let query = query.int(signed(line.offset)).at(line.at).text(&line.level);
                query.text(&line.component).text(&line.message)
            });
            tx.execute(query).await?;
            left = later;
        }
        Ok(())
    }
}

/// A statement for each number of lines that are inserted at once, biggest first.
static INSERTS: LazyLock<[(usize, String); 3]> =
    LazyLock::new(|| [64, 8, 1].map(|lines| (lines, insert_lines(lines))));

fn insert_lines(lines: usize) -> String {
    let rows: Vec<String> = (0..lines)
        .map(|line| {
            let first = 3 + 5 * line;
            let places: Vec<String> = (first..first + 5).map(|place| format!("${place}")).collect();
            format!("($1, $2, {})", places.join(", "))
        })
        .collect();
    format!(
        "INSERT INTO build_log (tenant_id, build_id, line, said_at, level, component, message) \
         VALUES {}",
        rows.join(", ")
    )
}

/// The line, or its beginning and how much is missing.
fn bounded_line(message: &str) -> String {
    if message.len() <= LOG_LINE_BYTES_MAX {
        return message.to_owned();
    }
    let end = message.floor_char_boundary(LOG_LINE_BYTES_MAX - 64);
    format!("{} ... [{} bytes more]", &message[..end], message.len() - end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_cut_between_characters_and_says_so() {
        let line = bounded_line(&"é".repeat(LOG_LINE_BYTES_MAX));
        assert!(line.len() <= LOG_LINE_BYTES_MAX, "{}", line.len());
        assert!(line.ends_with(" bytes more]"), "{}", &line[line.len() - 40..]);
        assert_eq!(bounded_line("short"), "short");
    }

    #[test]
    fn a_statement_has_a_place_for_every_value() {
        assert!(insert_lines(1).ends_with("VALUES ($1, $2, $3, $4, $5, $6, $7)"));
        assert!(insert_lines(2).ends_with("($1, $2, $8, $9, $10, $11, $12)"));
    }
}
