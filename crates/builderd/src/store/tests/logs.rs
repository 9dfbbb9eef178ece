//! A build's log: numbered, kept over tries, bounded.

use super::{LONG, TestStore, failure};
use crate::build::record::{Build, FailureCode, LogLine};
use crate::build::state::BuildState;
use crate::store::sql::{LOG_BYTES_MAX, LOG_LINE_BYTES_MAX, LOG_LINES_MAX};
use crate::store::{Fenced, Leases, Outcome};

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
    assert_eq!(rows.state(&build.tenant, &build.id).await.unwrap(), Some(BuildState::Preparing));
    let other = "b".parse().unwrap();
    assert_eq!(rows.state(&other, &build.id).await.unwrap(), None, "it is another tenant's");
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
    assert!(tail[1].starts_with("the log of this try ends here"), "{:?}", tail[1]);
    assert!(!tail[0].starts_with("the log of this try ends here"));
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

/// All of a build's log; its numbers have no gap behind the first.
async fn whole_log(t: &TestStore, build: &Build) -> Vec<LogLine> {
    let all = t.rows().log(&build.tenant, &build.id, 0, u32::MAX).await.unwrap();
    for (line, next) in all.iter().zip(&all[1..]) {
        assert_eq!(line.offset + 1, next.offset);
    }
    all
}

pub(super) async fn a_try_that_talks_without_end_leaves_room_for_the_next(t: &TestStore) {
    for (message, rounds) in [("short".to_owned(), 101), ("x".repeat(LOG_LINE_BYTES_MAX), 3)] {
        let build = t.create("a").await;
        for tried in 1..=3 {
            let claimed = t.try_claim(LONG).await.expect("a build is ready");
            let first = lines(t, [format!("try {tried} begins")]);
            t.rows().append_log(&claimed.lease, &first).await.unwrap();
            let some = lines(t, std::iter::repeat_n(message.clone(), 1000));
            for _ in 0..rounds {
                t.rows().append_log(&claimed.lease, &some).await.unwrap();
            }
            let failure = Some(failure(FailureCode::NetworkError));
            t.finish(&claimed, Outcome::Retry { failure, run_at: t.now() }).await;

            let all = whole_log(t, &build).await;
            let bytes: usize = all.iter().map(|line| line.message.len()).sum();
            assert!(all.len() as u64 <= LOG_LINES_MAX / 2 + 2, "{}", all.len());
            assert!(bytes as u64 <= LOG_BYTES_MAX / 2 + 1000, "{bytes}");
            // Who reads on from the beginning is told at once what is missing.
            let told = format!("the first {} lines were left out", all[1].offset);
            assert!(all[0].message.starts_with(&told), "{:?}", all[0].message);
            assert_eq!((&*all[0].level, &*all[0].component), ("warn", "queue"));
            let [.., ends, failed] = all.as_slice() else { panic!("{all:?}") };
            assert!(ends.message.starts_with("the log of this try ends here"), "{ends:?}");
            assert!(failed.message.starts_with(&format!("try {tried} of")), "{failed:?}");
        }
        let claimed = t.try_claim(LONG).await.expect("a build is ready");
        let last = lines(t, ["all is well".to_owned()]);
        t.rows().append_log(&claimed.lease, &last).await.unwrap();
        assert_eq!(whole_log(t, &build).await.last().unwrap().message, "all is well");
        t.check().await;
        t.finish(&claimed, Outcome::Cancelled).await;
    }
}

pub(super) async fn a_log_says_of_each_try_that_failed_when_the_next_one_begins(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    let why = failure(FailureCode::NetworkError);
    let run_at = t.now().plus_secs(30);
    t.finish(&claimed, Outcome::Retry { failure: Some(why.clone()), run_at }).await;
    let said = t.rows().log(&build.tenant, &build.id, 0, 10).await.unwrap();
    assert_eq!((said.len(), &*said[0].level, &*said[0].component), (1, "warn", "queue"));
    let begins = "try 1 of at most 4 has failed, the next one begins in 30 s, if a worker is free";
    assert!(said[0].message.starts_with(begins), "{:?}", said[0].message);
    assert!(said[0].message.ends_with(&why.cause), "{:?}", said[0].message);

    // A worker that is gone says nothing itself.
    t.advance_secs(30);
    t.claim_and_die().await;
    t.rows().reap(Leases::Expired, 3, t.now()).await.unwrap();
    let lost = "try 2 of at most 3 has failed, the next one begins as soon as a worker is free: \
                the worker stopped answering";
    assert_eq!(t.last_line(&build).await, lost);
    t.claim_and_die().await;
    t.rows().reap(Leases::Expired, 3, t.now()).await.unwrap();
    let over = t.last_line(&build).await;
    assert!(over.contains("failed: the worker stopped answering (build it again"), "{over}");
}

pub(super) async fn no_noise_keeps_a_log_from_saying_how_the_build_ended(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.try_claim(LONG).await.expect("a build is ready");
    let noise = lines(t, std::iter::repeat_n("x".repeat(LOG_LINE_BYTES_MAX), 1000));
    for _ in 0..3 {
        t.rows().append_log(&claimed.lease, &noise).await.unwrap();
    }
    let mut failed = lines(t, std::iter::repeat_n("layers failed: it broke".to_owned(), 100));
    failed.iter_mut().for_each(|line| line.level = "error".into());
    let before = whole_log(t, &build).await;
    t.rows().append_log(&claimed.lease, &failed[..1]).await.unwrap();
    t.rows().append_log(&claimed.lease, &noise[..1]).await.unwrap();
    t.rows().cancel(&build.tenant, &build.id, "no need", t.now()).await.unwrap();
    t.finish(&claimed, Outcome::Cancelled).await;
    let said = whole_log(t, &build).await;
    let last: Vec<&str> = said[before.len()..].iter().map(|line| line.message.as_str()).collect();
    assert_eq!(last, ["layers failed: it broke", "cancelled by service while it ran: no need"]);

    // Nor may that be without end, in bytes or in lines.
    let build = t.create("a").await;
    let claimed = t.try_claim(LONG).await.expect("a build is ready");
    let mut loud = noise;
    loud.iter_mut().for_each(|line| line.level = "error".into());
    for _ in 0..3 {
        t.rows().append_log(&claimed.lease, &loud).await.unwrap();
    }
    let bytes: usize = whole_log(t, &build).await.iter().map(|line| line.message.len()).sum();
    assert!(bytes as u64 <= LOG_BYTES_MAX + (80 << 10), "{bytes}");
    t.finish(&claimed, Outcome::Cancelled).await;
    let build = t.create("a").await;
    let claimed = t.try_claim(LONG).await.expect("a build is ready");
    let short = lines(t, std::iter::repeat_n("short".to_owned(), 10_000));
    for _ in 0..=10 {
        t.rows().append_log(&claimed.lease, &short).await.unwrap();
    }
    for _ in 0..2 {
        t.rows().append_log(&claimed.lease, &failed).await.unwrap();
    }
    assert_eq!(whole_log(t, &build).await.len() as u64, LOG_LINES_MAX + 16);
}
