//! Workers that somebody has taken over, from their first instruction: shells that say and do what
//! they like. Each must come to an end that is told, in little time.

use std::io::Read as _;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::samples::{Watcher, image_task, pack_task};
use super::*;
use crate::build::disk::{AlignedBuffer, direct_twin, is_writable};
use crate::build::hex;
use crate::build::shift::can_shift;
use crate::causes::chain;

/// Much longer than any of this takes, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What somebody who is kept waiting would call at once.
const SOON: Duration = Duration::from_secs(10);

/// A worker that runs `script`.
fn shell(script: &str) -> Program {
    let arguments = ["sh", "-c", script].map(|word| std::ffi::CString::new(word).unwrap());
    Program::new(File::open("/bin/sh").unwrap(), arguments.into())
}

/// What `work` gives, if it comes to an end.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    match is_done.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("it hangs"),
        Err(RecvTimeoutError::Disconnected) => panic!("it panicked"),
    }
}

/// What comes of a worker that packs a layer of some megabytes by `script`, and what is known of
/// the disk afterwards.
fn packed_with(script: &str, walls: &'static [Wall]) -> (Result<PackMade, BuildError>, Disk) {
    packed_as(shell(script), walls)
}

fn packed_as(program: Program, walls: &'static [Wall]) -> (Result<PackMade, BuildError>, Disk) {
    in_time(move || {
        let (sender, chunks) = mpsc::channel(4);
        let feeder = std::thread::spawn(move || {
            let chunk = Bytes::from(vec![7; 1 << 20]);
            while sender.blocking_send(Ok(chunk.clone())).is_ok() {}
        });
        let (file, disk) = (tempfile::tempfile().unwrap(), Disk::default());
        let tally = Tally::default();
        let result = pack_by(&program, pack_task(), &[&file], chunks, walls, &tally, &disk);
        feeder.join().unwrap();
        (result, disk)
    })
}

fn packed(script: &str) -> Result<PackMade, BuildError> {
    packed_with(script, &[]).0
}

/// The error of a worker that packs by `script`, with its causes, and how long it took.
fn refused(script: &str) -> (String, Duration) {
    let started = Instant::now();
    let error = packed(script).expect_err(script);
    (chain(&error), started.elapsed())
}

fn line(value: &Value) -> String {
    format!("echo '{value}'")
}

#[test]
fn no_worker_starts_any_more_when_they_were_ended() {
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("started");
    let program = shell(&format!("echo > {}", mark.display()));
    program.end_workers();
    let error = chain(&packed_as(program, &[]).0.expect_err("it was ended"));
    assert!(error.ends_with("the work is over") && !mark.exists(), "{error}");
}

#[test]
fn a_worker_that_says_no_more_but_lives_is_ended_and_says_what_it_complained_of() {
    // Its standard error stays open, and the blob is not read.
    for script in
        ["echo why >&2; exec >&-; sleep 1000", "printf half; echo why >&2; exec >&-; sleep 1000"]
    {
        let (error, took) = refused(script);
        let wanted = "the process of the layers step stopped talking, and was ended: why";
        assert_eq!(error, wanted);
        assert!(took < SOON, "{took:?}");
    }
}

#[test]
fn a_worker_that_does_not_make_sense_is_ended_at_once() {
    let event = json!({"Event": {"event": "warning", "message": "a packer warns of nothing"}});
    for script in [
        "echo nonsense".to_owned(),
        "head -c 3000000 /dev/zero".to_owned(),
        line(&event),
        line(&json!({"Tally": {"blob_bytes": -1, "tar_bytes": 0, "data_bytes": 0}})),
        line(&json!({"Tally": {"blob_bytes": 1e40, "tar_bytes": 0, "data_bytes": 0}})),
    ] {
        let (error, took) = refused(&format!("{script}; sleep 1000"));
        let wanted = "the process of the layers step did not make sense, and was ended";
        assert_eq!(error, wanted, "{script}");
        assert!(took < SOON, "{script}: {took:?}");
    }
}

#[test]
fn a_worker_that_died_is_told_as_it_died() {
    let (error, _) = refused("echo why >&2; exit 7");
    let wanted = "the process of the layers step ended without a result (exit code 7): why";
    assert_eq!(error, wanted);
    // In the middle of a line.
    let (error, _) = refused("printf '{\"Tally'; exit 7");
    assert!(error.contains("(exit code 7)"), "{error}");
    let starved = packed("echo 'memory allocation of 9 bytes failed' >&2; exit 134").unwrap_err();
    assert!(matches!(starved, BuildError::OutOfMemory { .. }), "{starved}");
}

#[test]
fn complaints_are_bounded_and_hold_nobody_up() {
    let flood = "trap '' PIPE; yes complaint >&2";
    let (error, took) = refused(&format!("exec >&-; {flood}"));
    assert!(error.contains("stopped talking") && error.len() < 1000, "{error}");
    assert!(took < SOON, "{took:?}");
    // More than a pipe holds, before it goes on with its work.
    let told = json!({"Failed": {
        "words": {"text": "no", "cause": null},
        "blame": "yours",
        "code": "INVALID_SOURCE",
        "hint": null,
        "is_out_of_space": false,
    }});
    let (error, _) = refused(&format!("yes '\u{1b}[2J' | head -c 1000000 >&2; {}", line(&told)));
    assert_eq!(error, "no");
    let (error, _) = refused("printf '\\033[2J' >&2; exit 1");
    assert!(error.ends_with(": \\u{1b}[2J"), "{error}");
}

#[test]
fn a_worker_that_talks_for_ever_is_ended() {
    let tally = json!({"Tally": {"blob_bytes": 1, "tar_bytes": 1, "data_bytes": 1}});
    let (error, _) = refused(&format!("yes '{tally}'"));
    assert_eq!(error, "the process of the layers step talked without end, and was ended");
}

#[test]
fn sums_that_a_layer_cannot_have_are_refused_and_those_that_shrink_count_once() {
    let tally = |bytes: u64| {
        line(&json!({"Tally": {"blob_bytes": bytes, "tar_bytes": bytes, "data_bytes": bytes}}))
    };
    let huge = [tally(u64::MAX), tally(1), tally(u64::MAX)].join(";");
    for script in [huge, tally(300 << 30)] {
        let (error, _) = refused(&script);
        assert!(error.contains("all layers together are larger"), "{error}");
    }
    let mut counted = [5; 3];
    assert_eq!(grown(&mut counted, [9, 4, 5]), [4, 0, 0]);
    assert_eq!(grown(&mut counted, [9, 5, 6]), [0, 0, 1]);
}

/// A last word about a pack, with numbers that cannot be.
fn packed_line(number: u64) -> Value {
    let pace = json!({"bytes": number, "nanos": number});
    json!({"Packed": {
        "summary": {
            "diff_id": vec![7; 32],
            "compression": "Gzip",
            "blob_bytes": number,
            "tar_bytes": number,
            "data_bytes": number,
            "toc_bytes": number,
            "pack_bytes": number,
            "entries": number,
        },
        "is_placed": true,
        "writes": {
            "cached": pace,
            "direct": pace,
            "accesses": u32::MAX,
            "cached_bytes": number,
            "direct_bytes": number,
        },
        "taken": {"cpu_ms": number, "memory_peak_bytes": number},
    }})
}

#[test]
fn numbers_that_cannot_be_are_no_numbers_to_add_up() {
    // Nor does it read the blob, or end.
    let script = format!("{}; sleep 1000", line(&packed_line(u64::MAX)));
    let (made, disk) = packed_with(&script, &[]);
    let PackMade { summary, taken, .. } = made.unwrap();
    assert_eq!(summary.pack_bytes, u64::MAX, "that is for who opens the pack");
    assert!(taken.cpu_ms.checked_mul(1000).is_some());
    assert!(taken.memory_peak_bytes.checked_mul(1000).is_some());
    disk.is_nearly_written();
    let file = tempfile::tempfile_in(".").unwrap();
    let buffer = AlignedBuffer::new(1 << 20);
    for place in 0..64 {
        disk.attach(&file, Liking::Faster).write(buffer.bytes(), place << 20).unwrap();
    }
    disk.is_nearly_written();
}

#[test]
fn a_blob_that_does_not_come_is_the_reason_and_no_signal() {
    let program = shell("sleep 1000");
    let error = in_time(move || {
        let (sender, chunks) = mpsc::channel(4);
        sender.blocking_send(Ok(Bytes::from_static(b"some"))).unwrap();
        sender.blocking_send(Err(io::Error::other("the cable is out"))).unwrap();
        let (file, disk) = (tempfile::tempfile().unwrap(), Disk::default());
        pack_by(&program, pack_task(), &[&file], chunks, &[], &Tally::default(), &disk).unwrap_err()
    });
    let text = chain(&error);
    assert!(text.ends_with("after 4 bytes: the cable is out"), "{text}");
}

#[test]
fn a_worker_behind_fewer_walls_than_wanted_gets_no_foreign_byte() {
    const WALLS: &[Wall] = &[Wall::Seccomp, Wall::Landlock, Wall::NoCapabilities];
    let script = format!("{}; sleep 1000", line(&json!({"Walls": ["seccomp"]})));
    let refused = packed_with(&script, WALLS).0.unwrap_err();
    let BuildError::Walls { missing } = refused else { panic!("{refused}") };
    assert_eq!(missing, &WALLS[1..]);
    // Nor one that goes to work without a word about them.
    let script = line(&packed_line(1));
    let error = packed_with(&script, WALLS).0.unwrap_err().to_string();
    assert!(error.contains("did not make sense"), "{error}");
    let script = format!("{}; {script}", line(&json!({"Walls": WALLS})));
    assert!(packed_with(&script, WALLS).0.is_ok());
}

/// Two files to make, a pack that others use too, and what comes of a worker that makes an image
/// of them by a script, which knows their descriptors as `$image`, `$result` and `$pack`.
struct Made {
    files: [File; 3],
    result: Result<(ImageMade, Taken), BuildError>,
    events: Vec<BuildEvent>,
}

fn made(script: &str, is_summed_here: bool) -> Made {
    let files = [(); 3].map(|()| tempfile::tempfile_in(".").unwrap());
    let step = 1 + usize::from(direct_twin(&files[0]).is_some());
    let (result, pack) = (3 + step, 3 + 2 * step);
    let program = shell(&format!("image=3; result={result}; pack={pack}; {script}"));
    in_time(move || {
        let task = image_task(!is_summed_here);
        let (open, watcher): (Vec<&File>, _) = (files.iter().collect(), Watcher::default());
        let result = image_by(&program, task, &open, &[], &watcher, is_summed_here);
        Made { files, result, events: watcher.events() }
    })
}

/// What an honest worker would say of an image of 8192 bytes that becomes 5.
fn honest() -> Value {
    json!({
        "file": 1,
        "image": 0,
        "image_bytes": 8192,
        "image_sha256": null,
        "compressed_bytes": 5,
        "compressed_sha256": null,
        "uuid": "01234567-89ab-8def-8123-456789abcdef",
        "filesystem_bytes": 8192,
        "free_bytes": 4096,
        "data_bytes": 4096,
        "inodes_used": 11,
        "inodes_total": 16,
        "biggest_directories": [["/", 1, 1]],
    })
}

fn made_line(made: &Value) -> String {
    line(&json!({"Made": {"made": made, "taken": {"cpu_ms": 1, "memory_peak_bytes": 1}}}))
}

/// Makes both files as [`honest`] says.
const MAKE: &str = "head -c 8192 /dev/zero >&$image; printf 12345 >&$result";

fn content(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn sum_of(file: &File) -> Option<String> {
    Some(hex(&Sha256::digest(content(file))))
}

#[test]
fn the_sum_of_an_image_is_that_of_its_file_whatever_its_worker_says_and_does_afterwards() {
    // It goes on writing, for as long as it lives, over what it has made.
    let behind = "while :; do printf 54321 >&$result; done";
    let script = format!("{MAKE}; {}; {behind}", made_line(&honest()));
    for _ in 0..4 {
        let Made { files, result, .. } = made(&script, true);
        match result {
            Ok((made, _)) => {
                assert_eq!(made.image_sha256, sum_of(&files[0]));
                assert_eq!(made.compressed_sha256, sum_of(&files[1]));
            }
            // What it wrote behind its last word has made the file longer.
            Err(error) => assert!(error.to_string().contains("lied"), "{error}"),
        }
        let then = files.iter().map(content).collect::<Vec<_>>();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(then, files.iter().map(content).collect::<Vec<_>>(), "it lives on");
    }
    let Made { files, result, .. } = made(&format!("{MAKE}; {}", made_line(&honest())), true);
    assert_eq!(result.unwrap().0.compressed_sha256, sum_of(&files[1]));
    let mut lie = honest();
    lie["compressed_sha256"] = "0".repeat(64).into();
    lie["image_sha256"] = "0".repeat(64).into();
    let Made { result, .. } = made(&format!("{MAKE}; {}", made_line(&lie)), true);
    assert!(result.unwrap_err().to_string().contains("lied"), "it was not asked");
}

#[test]
fn a_worker_that_lies_about_what_it_has_made_has_made_nothing() {
    for (name, value) in [
        ("file", json!(0)),
        ("file", json!(2)),
        ("file", json!(u64::MAX)),
        ("image", json!(1)),
        ("image", json!(2)),
        ("image_bytes", json!(8191)),
        ("image_bytes", json!(u64::MAX)),
        ("compressed_bytes", json!(null)),
        ("compressed_bytes", json!(6)),
        ("filesystem_bytes", json!(8193)),
        ("free_bytes", json!(8193)),
        ("data_bytes", json!(u64::MAX)),
        ("inodes_used", json!(17)),
        ("inodes_total", json!(u64::MAX)),
        ("uuid", json!("01234567-89ab-8def-8123-456789abcde\u{1b}")),
        ("uuid", json!("")),
    ] {
        let mut lie = honest();
        lie[name] = value.clone();
        let Made { result, .. } = made(&format!("{MAKE}; {}", made_line(&lie)), true);
        let error = result.expect_err(name).to_string();
        assert!(error.contains("lied about what it had made"), "{name} {value}: {error}");
    }
    // A sum that was wanted of it must be one.
    let Made { result, .. } = made(&format!("{MAKE}; {}", made_line(&honest())), false);
    assert!(result.unwrap_err().to_string().contains("lied"));
    // Larger than the build may have, which the worker should have found.
    let mut large = honest();
    large["image_bytes"] = ((1 << 20) + 1).into();
    let more = "head -c 1040385 /dev/zero >&$image";
    let script = format!("{MAKE}; {more}; {}", made_line(&large));
    assert!(made(&script, true).result.unwrap_err().to_string().contains("lied"));
}

/// What comes of a worker that makes an image and asks for the file of all packs to be cut to `runs` of
/// whole blocks, so often; and that file, of eight blocks that each hold their number.
fn cut(runs: &Value, times: usize) -> (Result<(ImageMade, Taken), BuildError>, Vec<u8>) {
    let files = [(); 2].map(|()| tempfile::tempfile_in(".").unwrap());
    let blocks: Vec<u8> = (0..8u8).flat_map(|number| [number; 4096]).collect();
    (&files[0]).write_all(&blocks).unwrap();
    let ask = line(&json!({"Shift": runs}));
    // The order comes before the answer.
    let order = "head -c $(head -c 4 | od -An -tu4) >/dev/null";
    let answer = "test $(head -c 1 | od -An -tu1) = 1 || exit 9";
    let asks = vec![format!("{ask}; {answer}"); times].join("; ");
    let mut honest = honest();
    for (name, value) in
        [("file", json!(0)), ("image_bytes", json!(8192)), ("compressed_bytes", json!(null))]
    {
        honest[name] = value;
    }
    let script = format!("{order}; {asks}; {}", made_line(&honest));
    in_time(move || {
        let task = ImageTask { slabs: Some(0), image: 1, compressed: None, ..image_task(false) };
        let open: Vec<&File> = files.iter().collect();
        let result = image_by(&shell(&script), task, &open, &[], &Watcher::default(), false);
        (result, content(&files[0]))
    })
}

/// The number that each block holds.
fn numbers(blocks: &[u8]) -> Vec<u8> {
    blocks.chunks(4096).map(|block| block[0]).collect()
}

#[test]
fn the_file_of_all_packs_is_cut_as_its_worker_asks_once_and_within_bounds() {
    if !can_shift(&tempfile::tempfile_in(".").unwrap(), 1 << 30) {
        eprintln!("skipped: the file system here cannot shift");
        return;
    }
    let run = |from: u64, to: u64, blocks: u64| json!({"from": from, "to": to, "blocks": blocks});
    let (result, file) = cut(&json!([run(6, 1, 1)]), 1);
    assert!(result.is_ok(), "{}", chain(&result.unwrap_err()));
    assert_eq!(numbers(&file), [0, 6]);
    let (result, file) = cut(&json!([run(1, 0, 1), run(3, 3, 2), run(6, 7, 1)]), 1);
    assert!(result.unwrap_err().to_string().contains("lied"), "it is longer than that");
    assert_eq!(numbers(&file), [1, 0, 0, 3, 4, 0, 0, 6]);
    let most = u64::MAX;
    for runs in [
        json!([]),
        json!([run(0, 0, 0)]),
        json!([run(0, 0, 9)]),
        json!([run(8, 0, 1)]),
        json!([run(0, 0, most)]),
        json!([run(1, most, 1)]),
        json!([run(most, 0, 1)]),
        json!([run(0, most / 4096, 1)]),
        json!([run(2, 0, 1), run(1, 2, 1)]),
        json!([run(1, 2, 1), run(2, 0, 1)]),
        json!([run(0, 0, 2), run(1, 4, 1)]),
        json!([run(0, 0, 2), run(4, 1, 1)]),
    ] {
        let (result, file) = cut(&runs, 1);
        assert!(result.unwrap_err().to_string().contains("did not make sense"), "{runs}");
        assert_eq!(numbers(&file), [0, 1, 2, 3, 4, 5, 6, 7], "{runs}");
    }
    let (result, _) = cut(&json!([run(6, 1, 1)]), 2);
    assert!(result.unwrap_err().to_string().contains("did not make sense"), "a second time");
}

#[test]
fn the_worker_that_makes_an_image_cannot_write_the_packs() {
    let try_it = "if (printf x >&$pack) 2>/dev/null; then exit 5; fi";
    let script = format!("{try_it}; {MAKE}; {}", made_line(&honest()));
    let Made { files, result, .. } = made(&script, true);
    assert!(result.is_ok(), "{}", chain(&result.unwrap_err()));
    assert_eq!(content(&files[2]), b"");
    // Nor by the twin past the page cache.
    let file = tempfile::tempfile_in(".").unwrap();
    let lesser = read_only(&file).unwrap();
    let twin = direct_twin(&lesser);
    for file in [Some(lesser), twin].into_iter().flatten() {
        assert!(!is_writable(&file));
        assert_eq!((&file).write(&[0; 4096]).unwrap_err().raw_os_error(), Some(9), "EBADF");
    }
}

#[test]
fn events_of_a_worker_are_those_of_an_image_and_no_more_than_it_has() {
    let event = |event: Value| line(&json!({"Event": event}));
    let phase = |name: &str, phase: &str, secs: f64| {
        event(json!({"event": name, "phase": phase, "secs": secs}))
    };
    let warning = event(json!({"event": "warning", "message": "\u{1b}[2J"}));
    let progress = |bytes: u64, total_bytes: u64| {
        event(json!({"event": "write_progress", "bytes": bytes, "total_bytes": total_bytes}))
    };
    let sound = [
        phase("phase_started", "flatten", 0.0),
        phase("phase_finished", "flatten", 1e300),
        phase("phase_started", "write", 0.0),
        progress(u64::MAX, u64::MAX),
        progress(1, 2),
        warning.clone(),
        MAKE.to_owned(),
        made_line(&honest()),
    ];
    let Made { result, events, .. } = made(&sound.join(";"), true);
    assert!(result.is_ok(), "{}", chain(&result.unwrap_err()));
    for event in &events {
        if let BuildEvent::PhaseFinished { secs, .. } = event {
            assert!(*secs < 60.0, "{secs}");
        }
        if let BuildEvent::WriteProgress { bytes, total_bytes } = event {
            assert!(bytes <= total_bytes && total_bytes.checked_mul(1000).is_some());
        }
        if let BuildEvent::Warning { message } = event {
            assert_eq!(message, "\\u{1b}[2J");
        }
    }
    assert_eq!(events.len(), 6);
    let output = json!({"event": "command_output", "command": 0, "line": "\u{1b}"});
    for script in [
        event(output),
        phase("phase_started", "publish", 0.0),
        phase("phase_finished", "flatten", 0.0),
        [phase("phase_started", "write", 0.0), phase("phase_started", "layout", 0.0)].join(";"),
        format!("while :; do {warning}; done"),
    ] {
        let Made { result, events, .. } = made(&format!("{script}; sleep 1000"), true);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("did not make sense"), "{script}: {error}");
        assert!(events.len() <= 16, "{script}: {}", events.len());
    }
}
