//! What workers say, read as their parent reads it, but from anybody: a fuzz target has no other way
//! in. What is passed on must be what can be; anything else is a panic here.

use std::cell::RefCell;
use std::fs::File;
use std::path::Path;

use rootfs::Tally;

use super::claims::NUMBER_MAX;
use super::samples::{Watcher, image_task, pack_task};
use super::worker::{Heard, hear};
use super::{Events, Imaging, Packing, Wanted};
use crate::build::disk::Disk;
use crate::build::shift::Shift;
use crate::build::{BuildError, BuildEvent, Phase};

/// Bytes of the files that a worker may have made, by number: the image, its compressed form, and
/// one that it only reads.
const FILES: [u64; 3] = [8192, 5, 0];
/// Of the file of all packs.
const SLABS_BYTES: u64 = 1 << 20;
/// Letters of all that a build may pass on at once: of an error with its causes.
const LETTERS_MAX: usize = 400_000;

/// Reads the lines of a worker that packs a layer.
///
/// # Panics
/// When something is passed on that cannot be.
pub fn read_pack(lines: &[u8]) {
    let (tally, disk) = (Tally::default(), Disk::default());
    let mut packing = Packing::of(&pack_task(), &tally, &disk);
    match hear(&mut &*lines, &[], &[], |line| packing.take(line)) {
        Ok(Heard::Last(made)) => {
            assert!(made.taken.cpu_ms <= NUMBER_MAX && made.taken.memory_peak_bytes <= NUMBER_MAX);
        }
        Ok(Heard::Ended | Heard::Stopped(_)) => {}
        Err(error) => check_error(&error, Phase::Layers),
    }
    // Two at once, as of two layers.
    disk.learn(&disk.writes());
    let _ = (disk.is_nearly_written(), disk.is_too_slow());
    let (blob, tar, data) = tally.totals();
    assert!(blob.checked_add(tar).and_then(|sum| sum.checked_add(data)).is_some());
}

/// Reads the lines of a worker that makes an image and its compressed form.
///
/// # Panics
/// As [`read_pack`].
pub fn read_image(lines: &[u8]) {
    thread_local! {
        static MADE: RefCell<Option<[File; 3]>> = const { RefCell::new(None) };
    }
    let (wanted, watcher) = (Wanted::by(&image_task(true)), Watcher::default());
    let slabs = file_of(SLABS_BYTES);
    let mut imaging = Imaging {
        events: Events::new(&watcher),
        shift: Shift::of(Some(&slabs)),
        answers: None,
        sandbox: None,
        output: Path::new("out"),
    };
    let heard = hear(&mut &*lines, &[], &[], |line| imaging.take(line));
    match heard {
        Ok(Heard::Last((made, taken))) => MADE.with_borrow_mut(|files| {
            let files = files.get_or_insert_with(|| FILES.map(file_of));
            assert!(taken.cpu_ms <= NUMBER_MAX && taken.memory_peak_bytes <= NUMBER_MAX);
            let Some(made) = wanted.checked(&files.each_ref(), made) else { return };
            assert_eq!((made.image, made.image_bytes), (0, FILES[0]));
            assert_eq!((made.file, made.compressed_bytes), (1, Some(FILES[1])));
            let sums = [made.image_sha256, made.compressed_sha256].map(Option::unwrap_or_default);
            assert!(sums.iter().all(|sum| sum.len() == 64 && sum.is_ascii()));
            let texts = made.biggest_directories.iter().map(|(path, ..)| path);
            texts.chain([&made.uuid]).for_each(|text| check_text(text));
        }),
        Ok(Heard::Ended | Heard::Stopped(_)) => {}
        Err(error) => check_error(&error, imaging.events.phase()),
    }
    drop(imaging);
    watcher.events().iter().for_each(check_event);
}

#[expect(clippy::expect_used, reason = "a fuzz target ends where there is no memory")]
fn file_of(size_bytes: u64) -> File {
    let file = rustix::fs::memfd_create("made", rustix::fs::MemfdFlags::CLOEXEC);
    let file = File::from(file.expect("memory has files"));
    file.set_len(size_bytes).expect("a file has any length");
    file
}

fn check_event(event: &BuildEvent) {
    match event {
        BuildEvent::PhaseStarted { .. } => {}
        BuildEvent::PhaseFinished { secs, .. } => check_secs(*secs),
        BuildEvent::WriteProgress { bytes, total_bytes } => check_written(*bytes, *total_bytes),
        BuildEvent::Warning { message } => check_text(message),
        BuildEvent::Resolved { .. }
        | BuildEvent::LayerWaiting { .. }
        | BuildEvent::LayerStarted { .. }
        | BuildEvent::LayerProgress { .. }
        | BuildEvent::LayerReady { .. }
        | BuildEvent::CommandStarted { .. }
        | BuildEvent::CommandOutput { .. } => panic!("no worker says that: {event:?}"),
    }
}

/// A time that has passed since a process began.
pub(in crate::build) fn check_secs(secs: f64) {
    assert!((0.0..1e6).contains(&secs), "{secs}");
}

/// How much is written, and of how much.
pub(in crate::build) fn check_written(bytes: u64, total_bytes: u64) {
    assert!(bytes <= total_bytes && total_bytes <= NUMBER_MAX);
}

/// What everybody is told who asks about the build.
fn check_error(error: &BuildError, phase: Phase) {
    let failure = error.failure(phase);
    check_text(&failure.cause);
    check_text(&failure.remedy);
}

fn check_text(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?} steers a terminal");
    assert!(text.chars().count() <= LETTERS_MAX, "{} letters", text.len());
}
