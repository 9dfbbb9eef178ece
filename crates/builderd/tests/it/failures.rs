//! Builds that must fail: with the right code and words, and without a trace.

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
    fails(&workshop, &["--size", "1000"], 3, &["cannot be laid out"]);
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
