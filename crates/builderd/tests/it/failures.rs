//! Builds that must fail: with the right code and words, and without a trace.

use std::process::{Command, Stdio};

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

fn image() -> TestImage {
    TestImage::new(vec![Layer::new().file("file", &noise(3, 200_000))])
}

/// Fails with `code`, says `words`, and leaves neither output nor pack.
fn fails(workshop: &Workshop, arguments: &[&str], code: i32, words: &[&str]) {
    let result = workshop.build("out", arguments);
    let text = stderr(&result);
    assert_eq!(result.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(!workshop.path("out").exists());
    let left = workshop.names("cache/packs-v3/local");
    assert!(
        left.iter().all(|name| name.ends_with(".pack") || name.ends_with(".stamp")),
        "{left:?}"
    );
}

#[test]
fn a_config_that_lies_about_a_layer_is_refused_and_nothing_is_cached() {
    let mut image = image();
    image.config["rootfs"]["diff_ids"][0] = format!("sha256:{}", "0".repeat(64)).into();
    let workshop = Workshop::with(&image);
    fails(&workshop, &[], 3, &["layer 1 ", "claims sha256:000", "hint:"]);
    assert!(workshop.packs().is_empty());
    fails(&workshop, &["--no-cache"], 3, &["claims sha256:000"]);
}

#[test]
fn a_known_layer_does_not_cover_for_a_lying_config() {
    let workshop = Workshop::with(&image());
    workshop.build_well("good", &[]);
    let mut liar = image();
    liar.config["rootfs"]["diff_ids"][0] = format!("sha256:{}", "1".repeat(64)).into();
    liar.write_layout(&workshop.path("image"));
    fails(&workshop, &[], 3, &["claims sha256:111"]);
}

#[test]
fn a_blob_that_is_not_what_its_name_says_is_refused() {
    let image = image();
    let workshop = Workshop::with(&image);
    let name = sha256(&image.blobs[0]);
    let mut blob = image.blobs[0].clone();
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    std::fs::write(workshop.path("image/blobs/sha256").join(name), blob).unwrap();
    fails(&workshop, &[], 3, &["is not what was asked for"]);
    assert!(workshop.packs().is_empty());
}

#[test]
fn a_truncated_layer_is_named() {
    let mut image = image();
    image.blobs[0].truncate(100_000);
    let workshop = Workshop::with(&image);
    fails(&workshop, &[], 3, &["layer 1 (sha256:", "cut short"]);
}

#[test]
fn an_image_that_does_not_fit_says_what_it_needs() {
    let workshop = Workshop::with(&image());
    fails(&workshop, &["--size", "1M"], 3, &["cannot be laid out"]);
    fails(&workshop, &["--size", "1000"], 2, &["--size", "4096"]);
}

#[test]
fn a_failed_build_leaves_the_old_output_as_it_was() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    let before = ["out", "out.sha256", "out.metadata.json"].map(|name| workshop.read(name));
    assert_eq!(workshop.build("out", &["--size", "1M"]).status.code(), Some(3));
    assert!(before == ["out", "out.sha256", "out.metadata.json"].map(|name| workshop.read(name)));
}

#[test]
fn an_output_directory_that_does_not_exist_is_named() {
    let workshop = Workshop::with(&image());
    let result = workshop.build("nowhere/out", &[]);
    assert_eq!(result.status.code(), Some(3), "{}", stderr(&result));
    assert!(stderr(&result).contains("nowhere"), "{}", stderr(&result));
}

#[test]
fn places_that_take_no_file_are_refused_before_any_work() {
    let workshop = Workshop::with(&image());
    std::fs::write(workshop.path("file"), "").unwrap();
    let before = workshop.names("");
    // With what is appended the last three have 255, 256 and 256 bytes or more.
    let [fits, sum, metadata] = [248, 249, 242].map(|length| "n".repeat(length));
    let refused = [
        ("nowhere/out", None),
        ("/proc/out", None),
        ("file/out", None),
        ("out", Some("nowhere/m.json")),
        ("out", Some("file/m.json")),
        (&sum, Some("m.json")),
        (&metadata, None),
    ];
    for (output, metadata) in refused {
        let mut arguments = Vec::new();
        arguments.extend(metadata.map(|path| ["--metadata-file", path]).into_iter().flatten());
        let result = workshop.build(output, &arguments);
        let text = stderr(&result);
        assert_eq!(result.status.code(), Some(3), "{output} {metadata:?}: {text}");
        assert!(text.contains("cannot be written") && text.contains("caused by"), "{text}");
        assert!(!text.contains("resolve"), "work was done: {text}");
    }
    assert!(workshop.packs().is_empty());
    let mut after = workshop.names("");
    after.retain(|name| name != "cache");
    assert_eq!(after, before);
    workshop.build_well(&fits, &["--metadata-file", "m.json"]);
}

#[test]
fn rawjson_ends_with_the_failure_when_a_build_fails() {
    let workshop = Workshop::with(&image());
    let last = |arguments: &[&str]| {
        let mut all = vec!["build", "oci:image", "--progress", "rawjson"];
        all.extend(arguments);
        let result = workshop.run(&all);
        assert!(!result.status.success());
        let text = String::from_utf8(result.stdout).unwrap();
        serde_json::from_str::<serde_json::Value>(text.lines().last().unwrap()).unwrap()
    };
    let size = last(&["-o", "out", "--size", "1M"]);
    assert_eq!(size["event"], "failed", "{size}");
    assert_eq!(size["code"], "INVALID_SOURCE");
    assert_eq!(size["step"], "layout");
    assert!(size["cause"].as_str().unwrap().contains("cannot be laid out"), "{size}");
    let name = last(&["-o", "nowhere/out"]);
    assert_eq!((&name["event"], &name["step"]), (&"failed".into(), &"resolve".into()));
    assert!(name["remedy"].as_str().unwrap().contains("--output"), "{name}");
}

#[test]
fn names_that_cannot_be_files_are_refused_before_any_work() {
    let workshop = Workshop::with(&image());
    std::fs::create_dir(workshop.path("directory")).unwrap();
    let fifo = Command::new("mkfifo").arg(workshop.path("fifo")).status().unwrap();
    assert!(fifo.success());
    let before = workshop.names("");
    for output in ["directory", "directory/", "fifo", ".", "..", "/", "new/."] {
        let result = workshop.build(output, &[]);
        assert_eq!(result.status.code(), Some(3), "{output}: {}", stderr(&result));
    }
    for metadata in ["out", "./out", "out.sha256", "fifo"] {
        fails(&workshop, &["--metadata-file", metadata], 3, &["cannot be written"]);
    }
    let mut after = workshop.names("");
    after.retain(|name| name != "cache");
    assert_eq!(after, before);
}

#[test]
fn a_reader_that_went_away_does_not_make_a_build_fail() {
    let workshop = Workshop::with(&image());
    for progress in ["plain", "tty", "rawjson"] {
        let (closed, pipe) = std::io::pipe().unwrap();
        drop(closed);
        let status = workshop
            .command(&["build", "oci:image", "-o", "out", "--progress", progress])
            .stdout(pipe.try_clone().unwrap())
            .stderr(pipe)
            .status()
            .unwrap();
        assert!(status.success(), "{progress}: {status}");
    }
    for arguments in [&["cache", "ls"][..], &["completions", "bash"], &["inspect", "out", "--tree"]]
    {
        let (closed, pipe) = std::io::pipe().unwrap();
        drop(closed);
        let status = workshop.command(arguments).stdout(pipe).status().unwrap();
        assert!(status.success(), "{arguments:?}: {status}");
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let status = workshop.command(arguments).stdout(full).status().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
    }
}

#[test]
fn wrong_command_lines_end_with_code_2() {
    let workshop = Workshop::with(&image());
    for arguments in [
        &["build", "Not A Reference", "-o", "out"][..],
        &["build", "oci:image"],
        &["build", "oci:image", "-o", "out", "--size", "1X"],
        &["build", "oci:image", "-o", "out", "--platform", "//"],
        &["build", "oci:image", "-o", "out", "--size", "1G", "--free-space", "1G"],
    ] {
        let result = workshop.run(arguments);
        assert_eq!(result.status.code(), Some(2), "{arguments:?}: {}", stderr(&result));
    }
}

#[test]
fn the_hint_of_standard_input_with_several_images_works() {
    let workshop = Workshop::new();
    let config = serde_json::to_vec(&TestImage::new(Vec::new()).config).unwrap();
    let entries = serde_json::json!([
        {"Config": "c.json", "RepoTags": ["app:1"], "Layers": []},
        {"Config": "c.json", "RepoTags": ["app:2"], "Layers": []},
    ]);
    let archive = Layer::new()
        .file("c.json", &config)
        .file("manifest.json", entries.to_string().as_bytes())
        .tar();
    std::fs::write(workshop.path("image.tar"), archive).unwrap();
    let piped = |source: &str| {
        let mut reader = Command::new("cat");
        reader.arg(workshop.path("image.tar")).stdout(Stdio::piped());
        let mut cat = reader.spawn().unwrap();
        let mut build = workshop.command(&["build", source, "-o", "out"]);
        let result = build.stdin(cat.stdout.take().unwrap()).output().unwrap();
        cat.wait().unwrap();
        result
    };
    let refused = piped("-");
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    let advised = "docker-archive:/dev/stdin:app:1";
    assert!(stderr(&refused).contains(advised), "{}", stderr(&refused));
    let made = piped(advised);
    assert!(made.status.success(), "{}", stderr(&made));
}

#[test]
fn what_cannot_be_inspected_is_told_apart() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    workshop.build_well("packed", &["--compression", "gzip"]);
    let mut damaged = workshop.read("out");
    let at = damaged.iter().position(|byte| *byte != 0).unwrap();
    let superblock = 1024 + 0x28;
    assert!(at < superblock);
    damaged[superblock] ^= 1;
    std::fs::write(workshop.path("damaged"), damaged).unwrap();
    std::fs::create_dir(workshop.path("directory")).unwrap();
    for (arguments, is_perhaps_packed) in [
        (&["packed"][..], true),
        (&["damaged", "--verify"], false),
        (&["directory"], false),
        (&["nosuch"], false),
    ] {
        let result = workshop.run(&[&["inspect"], arguments].concat());
        let text = stderr(&result);
        assert_eq!(result.status.code(), Some(3), "{text}");
        assert_eq!(text.contains("--compression"), is_perhaps_packed, "{text}");
    }
}

#[test]
fn an_unreachable_registry_is_upstreams_fault() {
    let workshop = Workshop::new();
    let result = workshop.run(&[
        "build",
        "127.0.0.1:1/x",
        "--plain-http",
        "127.0.0.1:1",
        "-o",
        "out",
        "--progress",
        "plain",
    ]);
    assert_eq!(result.status.code(), Some(4), "{}", stderr(&result));
    assert!(!workshop.path("out").exists());
}

#[test]
fn a_file_that_ext4_cannot_hold_is_named() {
    let workshop = Workshop::with(&TestImage::new(vec![Layer::new().file("lost+found", b"x")]));
    fails(&workshop, &[], 3, &["cannot be laid out: ", "lost+found"]);
}
