//! What a running build tells the store: its log and its progress, gathered so that a chatty
//! build costs a few writes a second. Secrets are blotted out before anything is kept.
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
use super::record::{LogLine, Micros};
use super::state::BuildState;
use crate::clock::Clock;
use crate::store::{Lease, Store};

/// Progress is written at most so often, unless the state changes.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// Lines that wait for the store; more are counted and left out.
const LINES_WAITING_MAX: usize = 4096;
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
    left_out: u64,
    state: BuildState,
    percent: u32,
    step: String,
    is_told: bool,
    told: Option<Instant>,
    secrets: Vec<SecretString>,
}

impl<'a> Journal<'a> {
    pub(super) fn new(store: &'a Store, lease: &'a Lease, clock: &'a dyn Clock) -> Self {
        let book = Book {
            lines: Vec::new(),
            left_out: 0,
            state: BuildState::Preparing,
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

    /// The step the build is at.
    pub(super) fn step(&self) -> String {
        lock(&self.book).step.clone()
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
        if book.lines.len() >= LINES_WAITING_MAX {
            book.left_out += 1;
            return;
        }
        let (level, component) = (level.to_owned(), component.to_owned());
        book.lines.push(LogLine { offset: 0, at, level, component, message });
    }

    /// Enters a step or goes on in it.
    pub(super) async fn enter(&self, state: BuildState, percent: u32, step: &str) {
        let due = {
            let mut book = lock(&self.book);
            let is_new_state = book.state != state;
            if is_new_state || book.percent != percent || book.step != step {
                book.is_told = false;
            }
            book.state = state;
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
            book.lines.drain(..lines);
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
            let (level, component) = ("warn".to_owned(), "queue".to_owned());
            let at = self.clock.now();
            book.lines.push(LogLine { offset: 0, at, level, component, message });
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
