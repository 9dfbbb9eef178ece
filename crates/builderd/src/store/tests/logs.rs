//! A build's log: numbered, kept over tries, bounded.

use super::{LONG, TestStore};
use crate::build::record::LogLine;
use crate::store::sql::{LOG_BYTES_MAX, LOG_LINE_BYTES_MAX, LOG_LINES_MAX};
use crate::store::{Fenced, Outcome};

fn lines(t: &TestStore, messages: impl IntoIterator<Item = String>) -> Vec<LogLine> {
    let line = |message| LogLine {
        // Whatever the worker says: the store counts.
        offset: 77,
        at: t.now(),
        level: "info".into(),
        component: "builder".into(),
        message,
    };
    messages.into_iter().map(line).collect()
}

pub(super) async fn lines_are_numbered_from_zero(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    let rows = t.rows();
    let some = lines(t, (0..75).map(|number| format!("line {number}")));
    assert_eq!(rows.append_log(&claimed.lease, &some).await.unwrap(), Fenced::Written);
    assert_eq!(rows.append_log(&claimed.lease, &[]).await.unwrap(), Fenced::Written);
    t.finish(&claimed, Outcome::Retry { failure: None, run_at: t.now() }).await;
    let again = t.claim().await;
    let more = lines(t, (75..80).map(|number| format!("line {number}")));
    rows.append_log(&again.lease, &more).await.unwrap();

    let all = rows.log(&build.tenant, &build.id, 0, 1000).await.unwrap();
    assert_eq!(all.len(), 80);
    for (number, line) in all.iter().enumerate() {
        assert_eq!(line.offset, number as u64);
        assert_eq!(line.message, format!("line {number}"));
        assert_eq!((line.level.as_str(), line.component.as_str()), ("info", "builder"));
        assert_eq!(line.at, t.now());
    }
    assert_eq!(rows.log(&build.tenant, &build.id, 70, 3).await.unwrap(), all[70..73]);
    assert!(rows.log(&build.tenant, &build.id, 80, 3).await.unwrap().is_empty());
    let seen = rows.get_with_log(&build.tenant, &build.id, 4).await.unwrap().unwrap();
    assert_eq!((seen.build, seen.log), (t.get(&build).await, messages(&all[76..])));
    let silent = t.create("a").await;
    let seen = rows.get_with_log(&silent.tenant, &silent.id, 4).await.unwrap().unwrap();
    assert_eq!(seen.log, Vec::<String>::new());
    t.finish(&again, Outcome::Cancelled).await;
    let late = rows.append_log(&again.lease, &more).await.unwrap();
    assert_eq!(late, Fenced::Lost);
    rows.delete(&build.tenant, &build.id).await.unwrap();
    assert!(rows.log(&build.tenant, &build.id, 0, 10).await.unwrap().is_empty());
}

fn messages(lines: &[LogLine]) -> Vec<String> {
    lines.iter().map(|line| line.message.clone()).collect()
}

/// Appends until well behind the bound; gives the number of lines kept.
async fn flood(t: &TestStore, message: &str, rounds: usize) -> u64 {
    let build = t.create("a").await;
    let claimed = t.try_claim(LONG).await.expect("a build is ready");
    let some = lines(t, std::iter::repeat_n(message.to_owned(), 1000));
    for _ in 0..rounds {
        let done = t.rows().append_log(&claimed.lease, &some).await.unwrap();
        assert_eq!(done, Fenced::Written);
    }
    let seen = t.rows().get_with_log(&build.tenant, &build.id, 2).await.unwrap();
    let tail = seen.expect("it is there").log;
    assert!(tail[1].starts_with("the log ends here"), "{:?}", tail[1]);
    assert!(!tail[0].starts_with("the log ends here"));
    let said = rounds as u64 * 1000;
    let (mut end, mut behind) = (0, said);
    // The last line is found by halving.
    while behind - end > 1 {
        let middle = u64::midpoint(end, behind);
        match t.rows().log(&build.tenant, &build.id, middle, 1).await.unwrap().as_slice() {
            [] => behind = middle,
            _ => end = middle,
        }
    }
    let last = t.rows().log(&build.tenant, &build.id, end, 2).await.unwrap();
    assert_eq!((last.len(), last[0].level.as_str()), (1, "warn"));
    assert_eq!(last[0].message, tail[1]);
    end + 1
}

pub(super) async fn a_log_has_an_end_in_bytes(t: &TestStore) {
    let longer = "x".repeat(LOG_LINE_BYTES_MAX + 1);
    let kept = flood(t, &longer, 3).await;
    let whole = LOG_BYTES_MAX / LOG_LINE_BYTES_MAX as u64;
    assert!((whole..whole + 50).contains(&kept), "{kept}");
}

pub(super) async fn a_log_has_an_end_in_lines(t: &TestStore) {
    assert_eq!(flood(t, "short", 101).await, LOG_LINES_MAX);
}
