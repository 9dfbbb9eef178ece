//! What a running build tells the store: its log and its progress, gathered so that a chatty
//! build costs a few writes a second. Secrets are blotted out before anything is kept.
//!
//! Who says many lines one after the other waits for [`Journal::room`] behind each: a build that is
//! quicker than the store is held back by its pipe, and loses none of them.
//!
//! Whoever waits for a write may be dropped at any moment; the write itself goes on, since nobody
//! could say of one that was cut off whether it was made. The next flush hears what came of it.

use std::mem;
use std::sync::Mutex;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument as _;

use super::disk::lock;
use super::progress::step_name;
use super::record::{LogLine, Micros};
use super::state::BuildState;
use crate::clock::Clock;
use crate::store::{Lease, Store};

/// Progress is written at most so often, unless a state is entered for the first time.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// Lines that wait for the store, and bytes of their texts; more are counted and left out. Twice as many
/// warnings may wait, and an error always.
const LINES_WAITING_MAX: usize = 4096;
const BYTES_WAITING_MAX: usize = 2 * BYTES_HELD;
/// When so many wait, or so many bytes of them, there is no room for the next one yet.
const LINES_HELD: usize = LINES_WAITING_MAX / 2;
const BYTES_HELD: usize = 1 << 20;
/// A store that takes no line for so long is not waited for any more until it takes one.
const HELD_MAX: Duration = Duration::from_secs(30);
/// How often one that refuses is asked again meanwhile.
const HELD_ASK_EVERY: Duration = Duration::from_millis(100);
/// What stands where a secret stood.
const BLOT: &str = "***";

/// See the module.
pub(super) struct Journal<'a> {
    store: &'a Store,
    lease: &'a Lease,
    clock: &'a dyn Clock,
    book: Mutex<Book>,
    /// The write that is under way, never two: lines reach the store in the order they were said.
    /// Ends with the journal.
    writing: tokio::sync::Mutex<JoinSet<Written>>,
}

/// What is to be written.
struct Waiting {
    lines: Vec<LogLine>,
    progress: Option<Progress>,
}

/// Where the build stands: state, percent, step.
type Progress = (BuildState, u32, String);

/// What was written of it.
#[derive(Default)]
struct Written {
    lines: usize,
    progress: Option<Progress>,
}

struct Book {
    lines: Vec<LogLine>,
    /// Of their texts together.
    bytes: usize,
    left_out: u64,
    /// Since when somebody has waited for room.
    held_since: Option<Instant>,
    state: BuildState,
    /// The last of all states that were entered.
    furthest: BuildState,
    percent: u32,
    step: String,
    is_told: bool,
    told: Option<Instant>,
    secrets: Vec<SecretString>,
}

impl Book {
    fn push(&mut self, at: Micros, level: &str, component: &str, message: String) {
        self.bytes += message.len();
        let (level, component) = (level.to_owned(), component.to_owned());
        self.lines.push(LogLine { offset: 0, at, level, component, message });
    }

    /// The first so many were written.
    fn cross_out(&mut self, lines: usize) {
        self.bytes -= self.lines.drain(..lines).map(|line| line.message.len()).sum::<usize>();
        if lines > 0 {
            self.held_since = None;
        }
    }

    fn takes(&self, level: &str) -> bool {
        let fits = |times: usize| {
            self.lines.len() < times * LINES_WAITING_MAX && self.bytes < times * BYTES_WAITING_MAX
        };
        match level {
            "error" => true,
            "warn" => fits(2),
            _ => fits(1),
        }
    }

    /// Until when the next line waits for room; none if there is some.
    fn held_until(&mut self) -> Option<Instant> {
        let is_held = self.lines.len() >= LINES_HELD || self.bytes >= BYTES_HELD;
        is_held.then(|| *self.held_since.get_or_insert_with(Instant::now) + HELD_MAX)
    }
}

impl<'a> Journal<'a> {
    pub(super) fn new(store: &'a Store, lease: &'a Lease, clock: &'a dyn Clock) -> Self {
        let book = Book {
            lines: Vec::new(),
            bytes: 0,
            left_out: 0,
            held_since: None,
            state: BuildState::Preparing,
            furthest: BuildState::Preparing,
            percent: 0,
            step: "prepare".into(),
            is_told: true,
            told: None,
            secrets: Vec::new(),
        };
        let writing = tokio::sync::Mutex::default();
        Self { store, lease, clock, book: Mutex::new(book), writing }
    }

    /// From now on `secret` is blotted out of every line.
    pub(super) fn hide(&self, secret: SecretString) {
        if !secret.expose_secret().is_empty() {
            lock(&self.book).secrets.push(secret);
        }
    }

    /// The step the build is at, as a [`Failure`](super::record::Failure) names it.
    pub(super) fn step(&self) -> String {
        step_name(&lock(&self.book).step).to_owned()
    }

    /// The text without secrets.
    pub(super) fn blotted(&self, text: &str) -> String {
        let book = lock(&self.book);
        book.secrets
            .iter()
            .fold(text.to_owned(), |text, secret| text.replace(secret.expose_secret(), BLOT))
    }

    /// One line for the log.
    pub(super) fn say(&self, level: &str, component: &str, message: String) {
        let message = self.blotted(&message);
        let at = self.clock.now();
        let mut book = lock(&self.book);
        match book.takes(level) {
            true => book.push(at, level, component, message),
            false => book.left_out += 1,
        }
    }

    /// Waits until the next line is not one too many. May be dropped at any point.
    pub(super) async fn room(&self) {
        loop {
            let Some(until) = lock(&self.book).held_until() else { return };
            if Instant::now() >= until
                || tokio::time::timeout_at(until, self.flush()).await.is_err()
            {
                return;
            }
            if lock(&self.book).held_until().is_some() {
                tokio::time::sleep(HELD_ASK_EVERY).await;
            }
        }
    }

    /// Enters a step or goes on in it.
    pub(super) async fn enter(&self, state: BuildState, percent: u32, step: &str) {
        let due = {
            let mut book = lock(&self.book);
            // Who goes to and fro between two of them is written down as rarely as everybody.
            let is_new_state = book.furthest < state;
            if book.state != state || book.percent != percent || book.step != step {
                book.is_told = false;
            }
            book.state = state;
            book.furthest = book.furthest.max(state);
            book.percent = percent;
            step.clone_into(&mut book.step);
            let rested = book.told.is_none_or(|told| told.elapsed() >= PROGRESS_EVERY);
            !book.is_told && (is_new_state || rested)
        };
        if due {
            self.flush().await;
        }
    }

    /// Writes what waits. What cannot be written now is kept for the next time; a lost lease is
    /// noticed by the next heartbeat. May be dropped at any point.
    pub(super) async fn flush(&self) {
        let mut writing = self.writing.lock().await;
        // That of a flush that was dropped.
        self.settle(&mut writing).await;
        let waiting = self.waiting();
        if waiting.lines.is_empty() && waiting.progress.is_none() {
            return;
        }
        let write = write(self.store.clone(), self.lease.clone(), waiting, self.clock.now());
        writing.spawn(write.in_current_span());
        self.settle(&mut writing).await;
    }

    /// Waits for the write that is under way, and crosses out what it wrote.
    async fn settle(&self, writing: &mut JoinSet<Written>) {
        while let Some(written) = writing.join_next().await {
            // Of one that panicked nothing is known to be written.
            let Written { lines, progress } = written.unwrap_or_default();
            let mut book = lock(&self.book);
            book.cross_out(lines);
            if let Some((state, percent, step)) = progress {
                book.is_told = book.state == state && book.percent == percent && book.step == step;
            }
        }
    }

    fn waiting(&self) -> Waiting {
        let mut book = lock(&self.book);
        let left_out = mem::take(&mut book.left_out);
        if left_out > 0 {
            let message = format!("{left_out} lines were left out: the log came too fast");
            book.push(self.clock.now(), "warn", "queue", message);
        }
        let progress = (!book.is_told).then(|| (book.state, book.percent, book.step.clone()));
        book.told = Some(Instant::now());
        Waiting { lines: book.lines.clone(), progress }
    }
}

/// Writes it, each half if it can.
async fn write(store: Store, lease: Lease, waiting: Waiting, now: Micros) -> Written {
    let (store, mut written) = (store.lease(&lease), Written::default());
    if let Some((state, percent, step)) = waiting.progress
        && store.progress(state, percent, &step, now).await.is_ok()
    {
        written.progress = Some((state, percent, step));
    }
    if !waiting.lines.is_empty() && store.append_log(&waiting.lines).await.is_ok() {
        written.lines = waiting.lines.len();
    }
    written
}

#[cfg(test)]
mod tests;
