//! A watched directory is counted while commands work in it: what has a name by the measurer, what
//! has none by what their processes hold. It makes lines for who listens, and judges no sum.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use sandbox::{Sandbox, Users};

use crate::held::{HOLDS_MAX, Held, Holders};
use crate::order::{self, Event, LINE_BYTES_MAX, Line, MeasureOrder};
use crate::scratch::WatchedDirectory;
use crate::{CommandsError, measure};

/// Bytes of disk for each file, as mkfs.ext4 has it: a watched directory has no more files than a
/// file system of its size.
pub(crate) const BYTES_PER_FILE: u64 = 16 << 10;
/// How often a watched directory is measured at most, and how much of the time.
const MEASURE_EVERY: Duration = Duration::from_millis(200);
const MEASURE_SHARE: u32 = 4;
/// In how many counts, one after the other, descriptors may be on their way between processes.
/// Whoever is handed one takes it at once; how large its file is cannot be told until then.
const IN_FLIGHT_COUNTS: u32 = 10;
/// What commands leave of the host's file system at least, as the share and as the number of bytes
/// that is smaller.
const FREE_SHARE: u64 = 20;
const FREE_BYTES: u64 = 1 << 30;

/// What counts a watched directory.
pub(crate) struct Counting<'a> {
    pub(crate) watched: &'a WatchedDirectory,
    /// The process that counts what has a name.
    pub(crate) sandbox: Sandbox,
    pub(crate) count: Count,
}

impl<'a> Counting<'a> {
    pub(crate) fn start(
        program: &File,
        watched: &'a WatchedDirectory,
        users: Users,
        keeper: u32,
        disk_bytes: u64,
    ) -> Result<Self, CommandsError> {
        let action = "make the directory of the commands";
        let tree = watched.tree(users).map_err(CommandsError::io(action))?;
        let tree = sandbox::without_parent(tree.as_fd())?;
        let word = std::ffi::CString::new(measure::ROLE)
            .map_err(|source| CommandsError::io(action)(source.into()))?;
        let arguments = [c"builderd", c"commands-process", &*word];
        let (sandbox, mut pipes) = Sandbox::spawn_as(users, program, &arguments, &[tree.as_fd()])?;
        let order = MeasureOrder { bytes_max: disk_bytes, files_max: disk_bytes / BYTES_PER_FILE };
        // One that has ended already says so by its end.
        let _ = order::send(&mut pipes.stdin, &order);
        let answers = BufReader::new(pipes.stdout);
        let holders = Holders::below(keeper, users).map(Some);
        let count = Count { stdin: pipes.stdin, answers, holders, in_flight: 0 };
        Ok(Self { watched, sandbox, count })
    }
}

/// Counts what the commands have on disk, whether it has a name or not.
pub(crate) struct Count {
    stdin: PipeWriter,
    answers: BufReader<PipeReader>,
    /// None where the host does not show what they hold, and it has been told why.
    holders: io::Result<Option<Holders>>,
    /// Counts in a row that found descriptors on their way.
    in_flight: u32,
}

impl Count {
    /// Counts now and then, and passes on what comes of it, until nobody listens or `stop` ends.
    pub(crate) fn pass_on(mut self, lines: &mpsc::SyncSender<Vec<u8>>, stop: &mpsc::Receiver<()>) {
        loop {
            let started = Instant::now();
            // What has no name comes first: what loses it meanwhile is counted next time, and
            // nothing twice.
            let counted = self.held().and_then(|held| self.named(&held));
            let line = counted.unwrap_or_else(|line| line);
            let pause = (started.elapsed() * MEASURE_SHARE).max(MEASURE_EVERY);
            let warned = self.warning().map_or(Ok(()), |warning| lines.send(warning));
            let is_over = warned.and_then(|()| lines.send(line)).is_err();
            if is_over || stop.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    /// What their processes hold without a name; or the line that ends them.
    fn held(&mut self) -> Result<Held, Vec<u8>> {
        let Ok(Some(holders)) = &self.holders else { return Ok(Held::default()) };
        let held = match holders.count() {
            Ok(held) => held,
            Err(error) => {
                self.holders = Err(error);
                return Ok(Held::default());
            }
        };
        self.judge(held)
    }

    /// What is held, if it can be counted at all.
    fn judge(&mut self, held: Held) -> Result<Held, Vec<u8>> {
        if held.holds > HOLDS_MAX {
            let text = format!("the commands hold more than {HOLDS_MAX} files open or mapped");
            return Err(failed_line(&text, true));
        }
        self.in_flight = if held.in_flight > 0 { self.in_flight + 1 } else { 0 };
        match self.in_flight > IN_FLIGHT_COUNTS {
            false => Ok(held),
            true => {
                let text = "the commands keep open files on their way between processes, where \
                            what they take of the disk cannot be counted";
                Err(failed_line(text, true))
            }
        }
    }

    /// What lies in the directory, and `held` beside it; or the line that ends the commands.
    fn named(&mut self, held: &Held) -> Result<Vec<u8>, Vec<u8>> {
        let mut line = Vec::new();
        let asked = self.stdin.write_all(&[1]);
        let read = asked
            .and_then(|()| (&mut self.answers).take(LINE_BYTES_MAX).read_until(b'\n', &mut line));
        if !read.is_ok_and(|count| count > 0) {
            return Err(failed_line("what the commands have on disk cannot be counted", false));
        }
        match serde_json::from_slice(&line) {
            Ok(Line::Used { bytes, files }) => {
                let bytes = bytes.saturating_add(held.bytes);
                let files = files.saturating_add(held.files);
                Ok(serde_json::to_vec(&Line::Used { bytes, files }).unwrap_or_default())
            }
            Ok(Line::Failed { .. }) => Ok(line),
            // Who has taken it over ends no command, and no build before its time.
            Ok(_) | Err(_) => Err(failed_line("who counts what lies there makes no sense", false)),
        }
    }

    /// A line that says once why not all is counted.
    fn warning(&mut self) -> Option<Vec<u8>> {
        let error = std::mem::replace(&mut self.holders, Ok(None));
        match error {
            Ok(holders) => {
                self.holders = Ok(holders);
                None
            }
            Err(error) => {
                let message = format!(
                    "files that commands remove and still hold are not counted: this host does \
                     not show them ({error})"
                );
                serde_json::to_vec(&Line::Event(Event::Warning { message })).ok()
            }
        }
    }
}

/// Ends the commands when the host's file system has hardly anything left, however long it takes
/// to count what is theirs.
pub(crate) fn guard(
    watched: &WatchedDirectory,
    lines: &mpsc::SyncSender<Vec<u8>>,
    stop: &mpsc::Receiver<()>,
) {
    while stop.recv_timeout(MEASURE_EVERY) == Err(RecvTimeoutError::Timeout) {
        if is_nearly_full(watched) {
            // Nobody listens: they have ended.
            let _ = lines.send(failed_line("the disk of this host is nearly full", false));
            return;
        }
    }
}

/// Whether the host's file system has less left than is to stay free.
fn is_nearly_full(watched: &WatchedDirectory) -> bool {
    let Ok((free, all)) = watched.room() else { return false };
    free < (all / FREE_SHARE).min(FREE_BYTES)
}

/// A line that ends the commands.
fn failed_line(text: &str, is_theirs: bool) -> Vec<u8> {
    serde_json::to_vec(&Line::Failed { text: text.to_owned(), is_theirs }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_counted_ends_the_commands_when_it_stays_so() {
        let (answers, stdin) = io::pipe().unwrap();
        let answers = BufReader::new(answers);
        let mut count = Count { stdin, answers, holders: Ok(None), in_flight: 0 };
        let mut judge = |holds, in_flight| {
            let ended = count.judge(Held { holds, in_flight, ..Held::default() }).err();
            ended.map(|line| String::from_utf8(line).unwrap())
        };
        assert_eq!(judge(HOLDS_MAX, 0), None);
        let ended = judge(HOLDS_MAX + 1, 0).unwrap();
        assert!(
            ended.contains("open or mapped") && ended.contains("\"is_theirs\":true"),
            "{ended}"
        );
        for _ in 0..3 {
            for _ in 0..IN_FLIGHT_COUNTS {
                assert_eq!(judge(1, 5), None);
            }
            assert_eq!(judge(1, 0), None, "they have arrived");
        }
        let ends: Vec<_> = (0..=IN_FLIGHT_COUNTS).map(|_| judge(1, 1).is_some()).collect();
        assert!(ends.ends_with(&[false, true]), "{ends:?}");
    }

    #[test]
    fn who_counts_says_how_much_or_why_not_and_nothing_else() {
        let named = |said: &str| {
            let (answers, mut says) = io::pipe().unwrap();
            let (_asked, stdin) = io::pipe().unwrap();
            writeln!(says, "{said}").unwrap();
            let answers = BufReader::new(answers);
            let mut count = Count { stdin, answers, holders: Ok(None), in_flight: 0 };
            let line = count.named(&Held { bytes: 1, ..Held::default() });
            String::from_utf8(line.unwrap_or_else(|line| line)).unwrap()
        };
        assert_eq!(named(r#"{"Used":{"bytes":2,"files":1}}"#), r#"{"Used":{"bytes":3,"files":1}}"#);
        let failed = r#"{"Failed":{"text":"deep","is_theirs":true}}"#;
        assert_eq!(named(failed), format!("{failed}\n"));
        for said in [
            r#"{"Done":{"warnings":[]}}"#,
            r#"{"Ended":{"index":7,"code":0,"complaint":null,"is_full":false}}"#,
            r#"{"Event":{"Started":{"index":7}}}"#,
            "no JSON",
        ] {
            assert!(named(said).contains("makes no sense"), "{said}");
        }
    }

    #[test]
    fn a_host_that_shows_nothing_is_told_of_once() {
        let (answers, stdin) = io::pipe().unwrap();
        let answers = BufReader::new(answers);
        let holders = Err(io::ErrorKind::PermissionDenied.into());
        let mut count = Count { stdin, answers, holders, in_flight: 0 };
        assert_eq!(count.held().unwrap().files, 0);
        let warning = String::from_utf8(count.warning().unwrap()).unwrap();
        assert!(warning.contains("does not show them"), "{warning}");
        assert!(count.warning().is_none() && count.held().is_ok());
    }
}
