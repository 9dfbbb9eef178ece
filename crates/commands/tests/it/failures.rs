//! Commands that do not end well, and that nothing of them stays.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{Layer, Run, can_run};
use commands::Event;

#[test]
fn the_first_command_that_fails_is_named_and_the_rest_is_not_run() {
    if !can_run() {
        return;
    }
    let ended = Run::busybox(&["echo one", "echo two; exit 3", "echo three"]).end();
    assert_eq!(ended.output(), ["one", "two"]);
    let error = ended.error.unwrap();
    assert_eq!(error, "theirs: command 2 (`echo two; exit 3`) ended with exit code 3");
}

#[test]
fn a_signal_a_time_out_and_a_want_of_memory_are_told_apart() {
    if !can_run() {
        return;
    }
    let eat = "dd if=/dev/zero of=/dev/null bs=100M count=1";
    for (command, words) in [
        ("sh -c 'kill -9 $$'; exit $?", "was ended by signal 9"),
        (eat, "needs more memory than commands may have"),
        ("setsid sleep 600 & sleep 600", "takes longer than a command may"),
    ] {
        let mut run = Run::busybox(&[command]);
        run.order.limits.memory_bytes = 32 << 20;
        run.order.limits.secs_max = Some(3);
        let error = run.end().error.unwrap();
        assert!(error.starts_with("theirs: ") && error.contains(words), "{command}: {error}");
    }
    let mut run = Run::busybox(&["dd if=/dev/zero of=/dev/null bs=100M count=1; true"]);
    run.order.limits.memory_bytes = 32 << 20;
    let ended = run.end().well();
    let words = "want of memory";
    let warned =
        |event: &Event| matches!(event, Event::Warning { message } if message.contains(words));
    assert!(ended.events.iter().any(warned), "{:?}", ended.events);
}

#[test]
fn the_disk_and_the_number_of_processes_have_an_end() {
    if !can_run() {
        return;
    }
    let mut run = Run::busybox(&["dd if=/dev/zero of=/big bs=1M count=200"]);
    run.order.disk_bytes = 64 << 20;
    let ended = run.end();
    assert!(ended.output().iter().any(|line| line.contains("No space left")), "{:?}", ended.events);
    let error = ended.error.unwrap();
    assert!(error.ends_with("needs more disk than commands may have"), "{error}");

    let mut run = Run::busybox(&["i=0; while echo > /tmp/$i; do i=$((i+1)); done; exit 1"]);
    run.order.disk_bytes = 64 << 20;
    let error = run.end().error.unwrap();
    assert!(error.ends_with("needs more disk than commands may have"), "{error}");

    let mut run = Run::busybox(&["dd if=/dev/zero of=/big bs=1M count=1 seek=100"]);
    run.order.layer_bytes_max = 50 << 20;
    let error = run.end().error.unwrap();
    assert!(error.contains("/big") && error.starts_with("theirs"), "{error}");

    let forks = "i=0; while [ $i -lt 50 ]; do sleep 5 & i=$((i+1)); done; wait; exit 1";
    let mut run = Run::busybox(&[forks]);
    run.order.limits.pids_max = 10;
    let ended = run.end();
    assert!(ended.output().iter().any(|line| line.contains("fork")), "{:?}", ended.events);
    let error = ended.error.unwrap();
    assert!(error.ends_with("needs more processes than commands may have"), "{error}");
}

#[test]
fn images_that_no_command_can_run_on_are_refused_by_name() {
    if !can_run() {
        return;
    }
    let empty = Layer::new().file("file", 0o644, b"x").bytes();
    let error = Run::on(vec![empty], &["true"]).end().error.unwrap();
    assert_eq!(error, "theirs: the image has no /bin/sh, which commands are run by");

    let foreign = Layer::new().file("bin/sh", 0o755, b"\x7fELF of another machine").bytes();
    let ended = Run::on(vec![foreign], &["true"]).end();
    assert!(ended.output()[0].contains("exec format error"), "{:?}", ended.events);
    assert!(ended.error.unwrap().starts_with("theirs: command 1 "));

    let kind = tar::EntryType::Regular;
    let odd = Layer::busybox().entry("odd", kind, 0o644, (0o7_777_777, 0), b"x", "").bytes();
    let error = Run::on(vec![odd], &["true"]).end().error.unwrap();
    assert!(error.starts_with("theirs: /odd belongs to the user or group 2097151"), "{error}");
}

/// A process group's worth of things that could stay: processes, mounts, loop devices, cgroups.
fn traces(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(mark) {
            found.push(line);
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    found.extend(mounts.lines().filter(|line| line.contains(mark)).map(str::to_owned));
    for entry in std::fs::read_dir("/sys/block").unwrap().flatten() {
        let file = entry.path().join("loop/backing_file");
        let file = std::fs::read_to_string(file).unwrap_or_default();
        if file.contains(mark) {
            found.push(file);
        }
    }
    found
}

#[test]
fn when_the_build_is_killed_nothing_stays() {
    if !can_run() {
        return;
    }
    let number = std::process::id();
    let command = format!("setsid sleep 7{number} & sleep 7{number}");
    let run = Run::busybox(&[&command]);
    let directory = run.place.path().file_name().unwrap().to_str().unwrap().to_owned();
    let mut build = run.start();
    let mut lines = BufReader::new(build.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("Started")));
    let sleeping = format!("sleep 7{number}");
    let until = Instant::now() + Duration::from_secs(20);
    while traces(&sleeping).len() < 2 {
        assert!(Instant::now() < until, "the command never ran");
        std::thread::yield_now();
    }
    assert!(!traces(&directory).is_empty(), "the loop device is seen while it is there");
    let overseer = children(build.id());
    build.kill().unwrap();
    build.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !traces(&sleeping).is_empty() || !traces(&directory).is_empty() {
        assert!(Instant::now() < until, "{:?} {:?}", traces(&sleeping), traces(&directory));
        std::thread::yield_now();
    }
    // The empty group of the killed build goes when the next one starts.
    let [overseer] = overseer[..] else { panic!("{overseer:?}") };
    let groups = || {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let places = text.lines().filter(|line| line.contains(" - cgroup"));
        let places = places.filter_map(|line| line.split(' ').nth(4)).map(str::to_owned);
        places.filter(|place| has_group(Path::new(place), &format!("{overseer}-"))).count()
    };
    Run::busybox(&["true"]).end().well();
    assert_eq!(groups(), 0);
}

/// The processes that the main thread of one has started.
fn children(pid: u32) -> Vec<u32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    listed.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

fn has_group(place: &Path, prefix: &str) -> bool {
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    let mut below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.any(|entry| {
        let is_it = entry.file_name().to_string_lossy().starts_with(prefix);
        is_it || has_group(&entry.path(), prefix)
    })
}

#[test]
fn a_runtime_with_known_holes_is_refused_until_each_is_accepted_by_name() {
    if !can_run() {
        return;
    }
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runc");
    let check = |version: &str, accepted: &[&str]| {
        std::fs::write(&path, format!("#!/bin/sh\necho runc version {version}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let accepted: Vec<String> = accepted.iter().map(|&name| name.to_owned()).collect();
        commands::check(path.to_str().unwrap(), &accepted).map_err(|error| error.to_string())
    };
    let all = commands::accepted_names();
    let error = check("1.1.5+ds1", &[]).unwrap_err();
    assert!(all.iter().all(|hole| error.contains(hole)), "{error}");
    let error = check("1.1.5+ds1", &all[..2]).unwrap_err();
    assert!(error.contains(all[2]) && !error.contains(all[0]), "{error}");
    assert_eq!(check("1.1.5+ds1", all).unwrap().accepted, all);
    assert!(check("1.3.3", &[]).unwrap().accepted.is_empty());
    assert!(check("", &[]).unwrap_err().contains("commands need the program"), "no version");
}

#[test]
fn a_directory_or_an_environment_that_no_program_can_have_is_the_images_fault() {
    if !can_run() {
        return;
    }
    let loop_of_links =
        |layer: Layer| layer.entry("loop", tar::EntryType::Symlink, 0o777, (0, 0), b"", "loop");
    let on = |directory: &str, environment: Vec<String>| {
        let lower = loop_of_links(Layer::busybox()).file("file", 0o644, b"x").bytes();
        let mut run = Run::on(vec![lower], &["echo begun"]);
        run.base.working_directory = directory.to_owned();
        run.base.environment.extend(environment);
        run.end()
    };
    let deep = "/d".repeat(2048);
    for (directory, words) in [
        ("/srv\0x", "has a NUL character"),
        (deep.as_str(), "has 4096 bytes"),
        ("/file/below", "WorkingDir"),
        ("/file", "WorkingDir"),
        ("/loop/below", "WorkingDir"),
        ("/proc/none", "WorkingDir"),
    ] {
        let ended = on(directory, Vec::new());
        let error = ended.error.unwrap();
        assert!(error.starts_with("theirs: ") && error.contains(words), "{directory:?}: {error}");
        assert!(error.contains("build the image with another one"), "{error}");
        assert!(ended.tar.is_empty());
    }
    let word = |bytes: usize, number: usize| {
        let name = format!("LONG{number}=");
        format!("{name}{}", "x".repeat(bytes - name.len()))
    };
    let most = 32 * rustix::param::page_size() - 1;
    let error = on("/", vec![word(most + 1, 0)]).error.unwrap();
    assert!(error.starts_with("theirs: ") && error.contains("\"LONG0\""), "{error}");
    let many = (0..64).map(|number| word(most, number)).collect();
    let error = on("/", many).error.unwrap();
    assert!(error.starts_with("theirs: ") && error.contains("Env of its config"), "{error}");
    // What the kernel takes is taken: the longest variable, and as many as there is room for.
    let stack = rustix::process::getrlimit(rustix::process::Resource::Stack).current;
    let all = usize::try_from(stack.map_or(6 << 20, |stack| (stack / 4).min(6 << 20))).unwrap();
    let many = (0..(all - (32 << 10)) / (most + 16)).map(|number| word(most, number)).collect();
    let ended = on("/", many).well();
    assert_eq!(ended.output(), ["begun"]);
}
