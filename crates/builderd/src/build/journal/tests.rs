//! What becomes of lines when a flush is dropped before its end.

use std::pin::pin;
use std::task::Poll;

use super::*;
use crate::clock::WallClock;
use crate::store::Claimed;
use crate::store::tests::{hang, messages, queue_build, stored};

/// A build that is being worked on, in a database of its own.
async fn claimed(directory: &tempfile::TempDir) -> (Store, Claimed) {
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    queue_build(&store, "nginx:1.21", WallClock.now()).await;
    let claimed = store.system().claim("worker", 3600, WallClock.now()).await.unwrap();
    (store, claimed.expect("a build waits"))
}

/// Polls a flush at most so often, then drops it; whether it was cut off by that.
async fn cut_off(flush: impl Future<Output = ()>, polls: u32) -> bool {
    let (mut flush, mut left) = (pin!(flush), polls);
    std::future::poll_fn(|context| {
        if flush.as_mut().poll(context).is_ready() {
            return Poll::Ready(false);
        }
        left -= 1;
        if left == 0 { Poll::Ready(true) } else { Poll::Pending }
    })
    .await
}

#[tokio::test]
async fn a_flush_that_is_dropped_loses_no_line_and_doubles_none() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    let (mut said, mut cuts) = (Vec::new(), 0);
    for polls in 1..=30 {
        said.push(format!("line {polls}"));
        journal.say("info", "builder", format!("line {polls}"));
        cuts += u32::from(cut_off(journal.flush(), polls).await);
        // Before that write may have come to its end.
        said.push(format!("behind line {polls}"));
        journal.say("info", "builder", format!("behind line {polls}"));
        journal.flush().await;
        assert_eq!(messages(&store, &claimed.build).await, said, "after {polls} polls");
    }
    assert!(cuts > 0, "no flush was dropped in its middle");
}

#[tokio::test]
async fn lines_that_were_said_while_the_database_hung_are_written_once() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    let hung = hang(&store).await;
    for line in ["one", "two", "three"] {
        journal.say("info", "builder", line.into());
        assert!(cut_off(journal.flush(), 1).await, "somebody wrote {line}");
    }
    drop(hung);
    journal.flush().await;
    assert_eq!(messages(&store, &claimed.build).await, ["one", "two", "three"]);
    journal.flush().await;
    assert_eq!(messages(&store, &claimed.build).await.len(), 3);
}

#[tokio::test]
async fn who_says_more_lines_than_may_wait_is_held_back_and_loses_none() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    let said: Vec<String> =
        (0..2 * LINES_WAITING_MAX).map(|number| format!("line {number}")).collect();
    for line in &said {
        journal.say("info", "commands", line.clone());
        journal.room().await;
    }
    journal.flush().await;
    assert_eq!(messages(&store, &claimed.build).await, said);
    // Few lines that are long fill the memory as well.
    for _ in 0..3 {
        journal.say("info", "commands", "x".repeat(BYTES_HELD));
        journal.room().await;
        assert_eq!(lock(&journal.book).bytes, 0);
    }
}

#[tokio::test]
async fn what_is_left_out_is_counted_and_is_no_warning_and_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    for number in 0..LINES_WAITING_MAX + 900 {
        journal.say("info", "commands", format!("line {number}"));
    }
    journal.say("warn", "builder", "a mark".into());
    journal.say("error", "builder", "it failed".into());
    journal.flush().await;
    let kept = messages(&store, &claimed.build).await;
    let end = ["a mark", "it failed", "900 lines were left out: the log came too fast"];
    assert_eq!(kept.len(), LINES_WAITING_MAX + end.len());
    assert_eq!(kept[LINES_WAITING_MAX..], end);
}

#[tokio::test]
async fn lines_that_wait_have_so_many_bytes_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    let long = "x".repeat(8 << 10);
    for (level, most) in [("info", BYTES_WAITING_MAX), ("warn", 2 * BYTES_WAITING_MAX)] {
        for _ in 0..=most / long.len() {
            journal.say(level, "builder", long.clone());
        }
        let book = lock(&journal.book);
        assert_eq!((book.bytes, book.left_out > 0), (most, true), "{level}");
    }
    journal.say("error", "builder", "it failed".into());
    journal.flush().await;
    assert!(messages(&store, &claimed.build).await.contains(&"it failed".to_owned()));
}

#[tokio::test]
async fn who_goes_to_and_fro_between_two_states_is_not_written_down_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    let there_and_back = [BuildState::Downloading, BuildState::Building];
    for state in there_and_back {
        assert!(cut_off(journal.enter(state, 50, "a step"), 1).await, "{state} is new");
        journal.flush().await;
        assert_eq!(stored(&store, &claimed.build).await.state, state);
    }
    tokio::time::pause();
    for state in there_and_back.repeat(100) {
        assert!(!cut_off(journal.enter(state, 50, "a step"), 1).await, "{state} is written");
    }
    tokio::time::advance(PROGRESS_EVERY).await;
    assert!(cut_off(journal.enter(BuildState::Building, 51, "a step"), 1).await);
}

#[tokio::test]
async fn a_store_that_takes_nothing_is_waited_for_only_so_long() {
    let directory = tempfile::tempdir().unwrap();
    let (store, claimed) = claimed(&directory).await;
    let journal = Journal::new(&store, &claimed.lease, &WallClock);
    let hung = hang(&store).await;
    for number in 0..LINES_HELD {
        journal.say("info", "commands", format!("line {number}"));
    }
    tokio::time::pause();
    let since = Instant::now();
    journal.room().await;
    let waited = since.elapsed();
    assert!((HELD_MAX..HELD_MAX + Duration::from_secs(1)).contains(&waited), "{waited:?}");
    journal.say("info", "commands", "one more".into());
    journal.room().await;
    assert!(since.elapsed() < HELD_MAX + Duration::from_secs(2), "each line waits anew");
    tokio::time::resume();
    drop(hung);
    journal.flush().await;
    assert_eq!(messages(&store, &claimed.build).await.len(), LINES_HELD + 1);
    assert_eq!(lock(&journal.book).held_since, None, "it is waited for again");
}
