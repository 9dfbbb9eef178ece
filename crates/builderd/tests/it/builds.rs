//! What a good build gives.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

fn two_layers() -> TestImage {
    TestImage::new(vec![
        Layer::new()
            .directory("etc/")
            .file("etc/hostname", b"lower")
            .file("etc/motd", b"hello")
            .file("secret", b"CANARY-9c1f7a")
            .file("big", &noise(1, 3_000_000)),
        Layer::new().file(".wh.secret", b"").file("etc/hostname", b"upper").symlink("link", "etc"),
    ])
}

#[test]
fn the_files_of_the_image_are_what_an_overlay_shows() {
    let workshop = Workshop::with(&two_layers());
    workshop.build_well("out.ext4", &[]);
    let cat = |path| workshop.run(&["inspect", "out.ext4", "--cat", path]);
    assert_eq!(cat("/etc/hostname").stdout, b"upper");
    assert_eq!(cat("/etc/motd").stdout, b"hello");
    assert_eq!(cat("/big").stdout, noise(1, 3_000_000));
    assert!(!cat("/secret").status.success());
    let tree = workshop.run(&["inspect", "out.ext4", "--tree"]);
    let tree = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.contains("/link -> etc"), "{tree}");
    let verified = workshop.run(&["inspect", "out.ext4", "--verify"]);
    assert!(verified.status.success(), "{}", stderr(&verified));
}

#[test]
fn the_checker_of_e2fsprogs_finds_nothing_to_say() {
    let workshop = Workshop::with(&two_layers());
    for (name, options) in [("a", &[][..]), ("b", &["--no-journal"]), ("c", &["--size", "64M"])] {
        workshop.build_well(name, options);
        let check = Command::new("/sbin/e2fsck").arg("-fn").arg(workshop.path(name)).output();
        let check = check.expect("e2fsck is part of every Debian");
        assert!(check.status.success(), "{name}: {}", String::from_utf8_lossy(&check.stdout));
    }
    assert_eq!(std::fs::metadata(workshop.path("c")).unwrap().len(), 64 << 20);
}

#[test]
fn what_an_upper_layer_deleted_is_nowhere_in_the_image() {
    let workshop = Workshop::with(&two_layers());
    workshop.build_well("out.ext4", &[]);
    let image = workshop.read("out.ext4");
    let found = |needle: &[u8]| image.windows(needle.len()).any(|window| window == needle);
    assert!(found(b"hello") && found(b"upper"));
    assert!(!found(b"CANARY-9c1f7a"));
    assert!(!found(b"lower"), "the content of a file that was overwritten");
}

#[test]
fn the_bytes_depend_on_nothing_but_image_and_options() {
    let workshop = Workshop::with(&two_layers());
    workshop.build_well("first", &[]);
    let expected = sha256(&workshop.read("first"));
    type Variant = (&'static [&'static str], &'static [(&'static str, &'static str)]);
    let variants: [Variant; 5] = [
        (&[], &[]),
        (&["--jobs", "1"], &[("TZ", "Asia/Kathmandu"), ("LANG", "tr_TR.UTF-8")]),
        (&["--jobs", "7", "--no-cache"], &[("LC_ALL", "C")]),
        (&["--checksum", "none"], &[("HOME", "/nonexistent")]),
        (&["--cache-dir", "other-cache"], &[]),
    ];
    for (arguments, environment) in variants {
        let mut all = vec!["build", "oci:image", "-o", "next"];
        all.extend(arguments);
        let result = workshop.command(&all).envs(environment.iter().copied()).output().unwrap();
        assert!(result.status.success(), "{}", stderr(&result));
        assert_eq!(sha256(&workshop.read("next")), expected, "{arguments:?}");
    }
    workshop.build_well("smaller", &["--free-space", "1M"]);
    assert_ne!(sha256(&workshop.read("smaller")), expected, "options are part of the identity");
}

#[test]
fn an_image_that_was_made_in_the_future_is_clean() {
    let mut image = two_layers();
    image.config["created"] = "9999-01-01T00:00:00Z".into();
    let workshop = Workshop::with(&image);
    workshop.build_well("out", &[]);
    let check = Command::new("/sbin/e2fsck").arg("-fn").arg(workshop.path("out")).output();
    let said = String::from_utf8(check.expect("e2fsck is part of every Debian").stdout).unwrap();
    // What it only remarks on does not show in its exit code.
    let remarks: Vec<_> = said.lines().filter(|line| !line.starts_with("Pass ")).collect();
    assert!(remarks.len() == 1 && remarks[0].contains(" files ("), "{said}");
}

#[test]
fn no_time_in_the_image_is_later_than_source_date_epoch() {
    let workshop = Workshop::with(&two_layers());
    let build = |output, epoch| {
        let result = workshop
            .command(&["build", "oci:image", "-o", output])
            .env("SOURCE_DATE_EPOCH", epoch)
            .output()
            .unwrap();
        assert!(result.status.success(), "{}", stderr(&result));
        let tree = workshop.run(&["inspect", output, "--tree", "--json"]).stdout;
        let lines = String::from_utf8(tree).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap());
        let times = lines.map(|node: serde_json::Value| node["mtime"].as_i64().unwrap());
        times.max().unwrap()
    };
    assert_eq!(build("early", "1000"), 1000);
    assert_eq!(build("between", "1650000000"), 1_650_000_000, "lost+found");
    let refused = workshop
        .command(&["build", "oci:image", "-o", "bad"])
        .env("SOURCE_DATE_EPOCH", "yesterday")
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
}

#[test]
fn metadata_and_checksum_stand_beside_the_image() {
    let image = two_layers();
    let workshop = Workshop::new();
    let digest = image.write_layout(&workshop.path("image"));
    workshop.build_well("out.ext4", &[]);
    let sum = String::from_utf8(workshop.read("out.ext4.sha256")).unwrap();
    let expected = sha256(&workshop.read("out.ext4"));
    assert_eq!(sum, format!("{expected}  out.ext4\n"));
    let metadata: serde_json::Value =
        serde_json::from_slice(&workshop.read("out.ext4.metadata.json")).unwrap();
    assert_eq!(metadata["command"], serde_json::json!(["serve"]));
    assert_eq!(metadata["entrypoint"], serde_json::json!(["/bin/app"]));
    assert_eq!(metadata["working_dir"], "/srv");
    assert_eq!(metadata["env"], serde_json::json!({"PATH": "/bin", "EMPTY": ""}));
    assert_eq!(metadata["exposed_ports"], serde_json::json!(["53", "80"]));
    assert_eq!(metadata["user"], "app");
    assert_eq!(metadata["volumes"], serde_json::json!(["/data"]));
    assert_eq!(metadata["labels"], serde_json::json!({"a": "b"}));
    assert_eq!(metadata["image_digest"], digest);
    assert_eq!(metadata["artifact"]["sha256"], expected);
    let size = std::fs::metadata(workshop.path("out.ext4")).unwrap().len();
    assert_eq!(metadata["artifact"]["size_bytes"], size);
    let boot = String::from_utf8_lossy(&workshop.read("out.ext4")[..1024]).into_owned();
    assert!(boot.contains(&digest) && boot.contains("builderd "), "{boot}");
}

#[test]
fn a_compressed_image_unpacks_to_the_plain_one() {
    let workshop = Workshop::with(&two_layers());
    workshop.build_well("plain", &[]);
    let plain = workshop.read("plain");
    for (compression, unpack) in [("gzip", "gzip"), ("zstd", "zstd")] {
        workshop.build_well("packed", &["--compression", compression, "--jobs", "1"]);
        let one = workshop.read("packed");
        workshop.build_well("packed", &["--compression", compression, "--jobs", "3"]);
        assert_eq!(one, workshop.read("packed"), "threads do not show in the bytes");
        let file = std::fs::File::open(workshop.path("packed")).unwrap();
        let unpacked = Command::new(unpack).arg("-dc").stdin(file).output().unwrap();
        assert!(unpacked.stdout == plain, "{compression}");
        let sum = String::from_utf8(workshop.read("packed.sha256")).unwrap();
        assert!(sum.starts_with(&sha256(&one)));
    }
}

#[test]
fn the_metadata_of_a_compressed_image_has_both_sizes_and_both_sums() {
    let workshop = Workshop::with(&two_layers());
    // A block more than a group: neither the file system's size nor the stored file's.
    let size = (128 << 20) + 4096;
    let size_text = size.to_string();
    workshop.build_well("plain", &["--size", &size_text]);
    workshop.build_well("packed", &["--size", &size_text, "--compression", "zstd"]);
    let artifact = |name: &str| {
        let metadata = workshop.read(&format!("{name}.metadata.json"));
        serde_json::from_slice::<serde_json::Value>(&metadata).unwrap()["artifact"].clone()
    };
    let packed = artifact("packed");
    assert_eq!(packed["size_bytes"], workshop.read("packed").len());
    assert_eq!(packed["sha256"], sha256(&workshop.read("packed")));
    assert_eq!(packed["uncompressed_size_bytes"], size);
    assert_eq!(packed["uncompressed_sha256"], sha256(&workshop.read("plain")));
    let plain = artifact("plain");
    assert_eq!(plain["size_bytes"], size);
    assert_eq!(plain.get("uncompressed_size_bytes"), None, "there is but one size");
    workshop.build_well("unsummed", &["--compression", "gzip", "--checksum", "none"]);
    let unsummed = artifact("unsummed");
    assert!(unsummed["uncompressed_size_bytes"].is_u64() && unsummed.get("sha256").is_none());
}

#[test]
fn an_old_checksum_does_not_outlive_its_image() {
    let workshop = Workshop::with(&two_layers());
    workshop.build_well("out", &[]);
    assert!(workshop.path("out.sha256").exists());
    workshop.build_well("out", &["--checksum", "none"]);
    assert!(!workshop.path("out.sha256").exists());
}

/// A build that has made its files, and waits to name them: we hold the lock.
fn build_that_waits(
    workshop: &Workshop,
    arguments: &[&str],
) -> (Child, impl Iterator<Item = String>) {
    let mut build = workshop
        .command(&["build", "oci:image", "--progress", "rawjson"])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(build.stdout.take().unwrap()).lines().map(Result::unwrap);
    let waiting = lines.find(|line| line.contains("another build publishes"));
    assert!(waiting.is_some(), "it did not wait");
    (build, lines)
}

#[test]
fn builds_give_names_to_their_files_one_after_the_other() {
    let workshop = Workshop::with(&two_layers());
    std::fs::create_dir(workshop.path("to")).unwrap();
    let turn = File::open(workshop.path("to")).unwrap();
    turn.lock().unwrap();
    let (mut build, mut lines) = build_that_waits(&workshop, &["-o", "to/out"]);
    assert!(workshop.names("to").is_empty());
    drop(turn);
    assert!(lines.any(|line| line.contains("\"finished\"")));
    assert!(build.wait().unwrap().success());
    assert_eq!(workshop.names("to"), ["out", "out.metadata.json", "out.sha256"]);
}

#[test]
fn builds_that_share_a_metadata_file_alone_take_turns_as_well() {
    let workshop = Workshop::with(&two_layers());
    for directory in ["to", "about"] {
        std::fs::create_dir(workshop.path(directory)).unwrap();
    }
    std::os::unix::fs::symlink("about", workshop.path("same")).unwrap();
    let turn = File::open(workshop.path("about")).unwrap();
    turn.lock().unwrap();
    let (mut build, mut lines) =
        build_that_waits(&workshop, &["-o", "to/out", "--metadata-file", "same/about.json"]);
    assert!(workshop.names("to").is_empty());
    drop(turn);
    assert!(lines.any(|line| line.contains("\"finished\"")));
    assert!(build.wait().unwrap().success());
    assert_eq!(workshop.names("to"), ["out", "out.sha256"]);
    // One directory under two names is one.
    workshop.build_well("about/out", &["--metadata-file", "same/about.json"]);
}

#[test]
fn builds_that_name_files_in_the_same_places_do_not_wait_for_each_other_for_ever() {
    let workshop = Workshop::with(&two_layers());
    for directory in ["one", "two"] {
        std::fs::create_dir(workshop.path(directory)).unwrap();
    }
    workshop.build_well("out", &[]);
    for _ in 0..5 {
        let ways = [("one/out", "two/about.json"), ("two/out", "one/about.json")];
        let builds = ways.map(|(output, about)| {
            let arguments = ["build", "oci:image", "-o", output, "--metadata-file", about];
            workshop.command(&arguments).stderr(Stdio::null()).spawn().unwrap()
        });
        for mut build in builds {
            assert!(build.wait().unwrap().success());
        }
    }
}

#[test]
fn a_long_sum_is_told_beforehand_and_can_be_interrupted() {
    let workshop = Workshop::with(&two_layers());
    let arguments = ["build", "oci:image", "-o", "out", "--progress", "rawjson", "--no-journal"];
    let mut command = workshop.command(&arguments);
    let mut build = command
        .args(["--free-space", "64G"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(build.stdout.take().unwrap()).lines().map(Result::unwrap);
    let told = lines.find(|line| line.contains("hashing 6")).expect("it is told");
    assert!(told.contains("min; --checksum none skips it"), "{told}");
    // The data is there; what is left to hash are holes.
    let written = lines.find(|line| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["event"] == "write_progress" && line["bytes"] == line["total_bytes"]
    });
    assert!(written.is_some());
    let (pid, interrupted) = (build.id().to_string(), Instant::now());
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let result = build.wait_with_output().unwrap();
    assert!(interrupted.elapsed() < Duration::from_secs(5), "{:?}", interrupted.elapsed());
    assert_eq!(result.status.code(), Some(130));
    assert!(stderr(&result).contains("no output was written"), "{}", stderr(&result));
    assert!(!workshop.path("out").exists());
    let unsummed = workshop.build_well("out", &["--free-space", "64G", "--checksum", "none"]);
    assert!(!unsummed.contains("hashing"), "{unsummed}");
}

#[test]
fn a_build_interrupted_before_it_names_anything_says_so_and_leaves_nothing() {
    let workshop = Workshop::with(&two_layers());
    std::fs::create_dir(workshop.path("to")).unwrap();
    let turn = File::open(workshop.path("to")).unwrap();
    turn.lock().unwrap();
    let (build, _lines) = build_that_waits(&workshop, &["-o", "to/out"]);
    let pid = build.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let result = build.wait_with_output().unwrap();
    assert_eq!(result.status.code(), Some(130));
    assert!(stderr(&result).contains("no output was written"), "{}", stderr(&result));
    assert!(workshop.names("to").is_empty());
}

#[test]
fn metadata_tells_the_size_of_the_file_system_and_that_of_the_file() {
    let workshop = Workshop::with(&two_layers());
    // One block more than a group: too short to be a second one.
    let (group, file) = (128 << 20, (128 << 20) + 4096);
    workshop.build_well("out", &["--size", &file.to_string()]);
    let metadata: serde_json::Value =
        serde_json::from_slice(&workshop.read("out.metadata.json")).unwrap();
    assert_eq!(metadata["filesystem"]["size_bytes"], group);
    assert_eq!(metadata["artifact"]["size_bytes"], file);
    assert_eq!(std::fs::metadata(workshop.path("out")).unwrap().len(), file);
    let shown = workshop.run(&["inspect", "out", "--json"]).stdout;
    let shown: serde_json::Value = serde_json::from_slice(&shown).unwrap();
    assert_eq!(shown["blocks"].as_u64().unwrap() * 4096, group);
}

#[test]
fn an_image_without_layers_is_an_empty_file_system() {
    let workshop = Workshop::with(&TestImage::new(vec![]));
    workshop.build_well("out", &[]);
    let tree = workshop.run(&["inspect", "out", "--tree"]);
    assert!(String::from_utf8_lossy(&tree.stdout).contains("lost+found"));
}

#[test]
fn rawjson_is_one_object_for_each_event_and_ends_with_the_report() {
    let workshop = Workshop::with(&two_layers());
    let result = workshop.run(&["build", "oci:image", "-o", "out", "--progress", "rawjson"]);
    assert!(result.status.success(), "{}", stderr(&result));
    let events: Vec<serde_json::Value> = String::from_utf8(result.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let has = |name: &str| events.iter().any(|event| event["event"] == name);
    assert!(has("resolved") && has("layer_started") && has("layer_ready"));
    let last = events.last().unwrap();
    assert_eq!(last["event"], "finished");
    assert_eq!(last["report"]["layers_packed"], 2);
    assert!(
        result.stderr.is_empty(),
        "nothing for people: {}",
        String::from_utf8_lossy(&result.stderr)
    );
}

#[test]
fn the_first_kilobyte_says_which_image_options_and_engine_made_it() {
    let workshop = Workshop::with(&two_layers());
    let provenance = |output: &str, options: &[&str]| -> serde_json::Value {
        workshop.build_well(output, options);
        let text = workshop.read(output)[..1024].to_vec();
        let end = text.iter().rposition(|byte| *byte != 0).unwrap();
        assert_eq!(text[end], b'\n', "it was cut");
        serde_json::from_slice(&text[..end]).unwrap()
    };
    let metadata = |output: &str| -> serde_json::Value {
        serde_json::from_slice(&workshop.read(&format!("{output}.metadata.json"))).unwrap()
    };
    let plain = provenance("plain", &[]);
    assert_eq!(plain["image"], metadata("plain")["image_digest"]);
    assert_eq!(plain["engine"], metadata("plain")["engine"]);
    assert!(plain["engine"].as_str().unwrap().starts_with("builderd engine "));
    assert_eq!((&plain["journal"], &plain["size"]), (&true.into(), &serde_json::Value::Null));
    let sized = provenance("sized", &["--size", "64M", "--no-journal"]);
    assert_eq!((&sized["journal"], &sized["size"]), (&false.into(), &(64 << 20).into()));
    // Whoever compares images by UUID tells builds of one image with other options apart.
    let uuid = |output: &str| metadata(output)["filesystem"]["uuid"].clone();
    assert_ne!(uuid("plain"), uuid("sized"));
    provenance("again", &[]);
    assert_eq!(uuid("plain"), uuid("again"));
    // Nothing of it is in a file of the tree.
    let tree = workshop.run(&["inspect", "plain", "--tree", "--json"]).stdout;
    let mut paths: Vec<String> = String::from_utf8(tree)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["path"].to_string())
        .collect();
    paths.sort();
    let expected = ["/", "/big", "/etc", "/etc/hostname", "/etc/motd", "/link", "/lost+found"];
    assert_eq!(paths, expected.map(|path| format!("{path:?}")));
}

#[test]
fn a_build_tells_its_steps_and_ends_with_a_summary() {
    let workshop = Workshop::with(&two_layers());
    let first = workshop.build_well("out", &[]);
    for step in ["resolve", "layers", "flatten", "write", "publish"] {
        let is_told = |line: &str| line.starts_with(step) && line.contains(" done in ");
        assert!(first.lines().any(is_told), "{step}: {first}");
    }
    let summary = |text: &str, title: &str| -> String {
        let line = text.lines().find(|line| line.starts_with(&format!("{title} ")));
        line.unwrap_or_else(|| panic!("no {title} in {text}")).to_owned()
    };
    assert!(summary(&first, "layers      2,").contains("0 from the cache, 2 fetched"));
    assert!(summary(&first, "biggest").contains("files"), "{first}");
    assert!(summary(&first, "time").contains("layers "), "{first}");
    assert!(summary(&first, "filesystem").contains("ext4"), "{first}");
    assert!(summary(&first, "written").ends_with("out"), "{first}");
    let sum = sha256(&workshop.read("out"));
    assert!(sum.ends_with(summary(&first, "sha256").split_whitespace().last().unwrap()));
    let second = workshop.build_well("out", &[]);
    assert!(summary(&second, "layers      2,").contains("2 from the cache, 0 fetched"));
    let quiet = workshop.run(&["build", "oci:image", "-o", "out", "--progress", "quiet"]);
    assert!(quiet.status.success() && quiet.stdout.is_empty());
    assert_eq!(stderr(&quiet), "");
}

#[test]
fn help_has_examples_and_all_exit_codes_and_shells_complete_options() {
    let workshop = Workshop::new();
    let said = |arguments: &[&str]| -> String {
        let result = workshop.run(arguments);
        assert!(result.status.success(), "{arguments:?}: {}", stderr(&result));
        String::from_utf8(result.stdout).unwrap()
    };
    let help = said(&["build", "--help"]);
    assert!(help.contains("Examples:\n  builderd build nginx -o rootfs.ext4\n"), "{help}");
    for code in ["0", "1", "2", "3", "4", "5", "130"] {
        let is_listed = |line: &str| line.trim_start().starts_with(&format!("{code} "));
        assert!(help.lines().any(is_listed), "{code} is not in {help}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = said(&["completions", shell]);
        assert!(script.contains("free-space"), "{shell}");
    }
}

#[test]
fn on_a_terminal_a_build_draws_bars_and_ends_with_the_summary() {
    const SCRIPT: &str = "/usr/bin/script";
    if !std::path::Path::new(SCRIPT).exists() {
        eprintln!("SKIPPED: no script(1) to make a terminal");
        return;
    }
    let workshop = Workshop::with(&two_layers());
    let build = workshop.command(&["build", "oci:image", "-o", "out"]);
    let words = std::iter::once(build.get_program()).chain(build.get_args());
    let line: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    let mut terminal = Command::new(SCRIPT);
    terminal
        .args(["-qec", &line.join(" "), "/dev/null"])
        .current_dir(workshop.path(""))
        .env_clear()
        .env("UNKEY_BUILDERD_CACHE_DIR", workshop.path("cache"))
        .env("SHELL", "/bin/sh")
        .env("TERM", "xterm")
        .stdin(Stdio::null());
    let result = terminal.output().unwrap();
    let seen = String::from_utf8_lossy(&result.stdout);
    assert!(result.status.success(), "{seen}");
    let (bars, summary) = seen.split_once("filesystem  ext4").unwrap_or_else(|| panic!("{seen}"));
    // Lines are drawn over, and none of those for files is there.
    assert!(bars.contains("\u{1b}[") && !bars.contains("done in"), "{seen}");
    assert!(summary.contains("written     out"), "{seen}");
    assert!(!summary.contains("resolve  done"), "{seen}");
}
