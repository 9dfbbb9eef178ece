//! Builds that must fail: with the right code and words, and without a trace.

use std::process::Command;

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
    let left = workshop.names("cache/packs-v1/local");
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
    assert_eq!(result.status.code(), Some(1), "{}", stderr(&result));
    assert!(stderr(&result).contains("nowhere"), "{}", stderr(&result));
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
