//! What becomes of lines when a flush is dropped before its end.

use std::pin::pin;
use std::task::Poll;

use super::*;
use crate::clock::WallClock;
use crate::store::Claimed;
use crate::store::tests::{hang, messages, queue_build};

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
