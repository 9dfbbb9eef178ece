//! Commands for a process that has left the host's files, and one that a registry has taken over.

use std::fs;

use commands::{Event, Scratch};

use crate::network::KNOCK;
use crate::support::{Ended, Run, can_run};

fn put(run: &Run, name: &str) {
    fs::write(run.directory.path().join(name), "").unwrap();
}

#[test]
fn commands_run_for_a_process_that_has_left_the_hosts_files_and_processes() {
    if !can_run() {
        return;
    }
    for scratch in [Scratch::Sized, Scratch::Watched] {
        let with = |commands: &[&str]| {
            let mut run = Run::busybox(commands);
            run.order.scratch = scratch;
            put(&run, "narrow");
            run
        };
        let ended = with(&["echo one > /made; cat /made"]).end().well();
        assert_eq!(ended.output(), ["one"], "{scratch:?}");
        assert_eq!(ended.changed()["made"].contents, b"one\n");
        let mut run = with(&["dd if=/dev/zero of=/dev/null bs=100M count=1"]);
        run.order.limits.memory_bytes = 32 << 20;
        let error = run.end().error.unwrap();
        assert!(error.contains("needs more memory than commands may have"), "{error}");
        let run = with(&[KNOCK]);
        fs::write(run.directory.path().join("door"), "come in\n").unwrap();
        assert_eq!(run.end().well().output(), ["come in"], "{scratch:?}");
    }
}

/// What came of a run of which nothing may have begun.
fn refused(run: Run) -> String {
    let Ended { events, error, tar } = run.end();
    let has_begun = |event: &Event| matches!(event, Event::Unpacked | Event::Started { .. });
    assert!(!events.iter().any(has_begun) && tar.is_empty(), "{events:?}");
    error.unwrap()
}

#[test]
fn a_process_that_was_taken_over_orders_nothing_but_layers_that_it_may_read() {
    if !can_run() {
        return;
    }
    let run = |change: &dyn Fn(&mut Run)| {
        let mut run = Run::busybox(&["echo never"]);
        change(&mut run);
        refused(run)
    };
    let alone = "open to be read alone";
    let error = run(&|run| put(run, "writable"));
    assert!(error.starts_with("ours: ") && error.contains(alone), "{error}");
    for path in ["/", "/dev/zero"] {
        let error = run(&|run| {
            fs::remove_file(run.directory.path().join("0")).unwrap();
            std::os::unix::fs::symlink(path, run.directory.path().join("0")).unwrap();
        });
        assert!(error.contains(alone), "{path}: {error}");
    }
    let error = run(&|run| run.base.packs[0].length += 1);
    assert!(error.contains("not in its file"), "{error}");
    let error = run(&|run| run.base.packs[0].file = 1);
    assert!(error.contains("more layers than an image may have"), "{error}");
    let error = run(&|run| run.base.packs = vec![run.base.packs[0].clone(); 1025]);
    assert!(error.contains("more layers than an image may have"), "{error}");
    let error = run(&|run| run.base.environment.push("X=".to_owned() + &"x".repeat(16 << 20)));
    assert!(error.contains("cannot be read"), "{error}");
}
