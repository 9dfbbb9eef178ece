//! Images with many layers, and with one layer many times.

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

/// A layer that is named three times, with live blocks in two of the places: a hard link in
/// between keeps the file of the first.
fn repeated() -> TestImage {
    let lower = || Layer::new().file("dir/file", &noise(5, 2_000_000)).file("dir/other", b"small");
    let mut link = Layer::new();
    link = link.hard_link("kept", "dir/file");
    let mut image = TestImage::new(vec![lower(), link, lower(), lower()]);
    image.blobs[2] = image.blobs[0].clone();
    image.blobs[3] = image.blobs[0].clone();
    image
}

#[test]
fn a_layer_that_is_named_again_is_fetched_and_packed_once() {
    let image = repeated();
    let distinct_bytes = image.blobs[0].len() + image.blobs[1].len();
    let workshop = Workshop::with(&image);
    for (output, options) in [("stored", &["--no-cache"][..]), ("cold", &[]), ("warm", &[])] {
        let mut arguments = vec!["build", "oci:image", "--progress", "rawjson", "-o", output];
        arguments.extend(options);
        let result = workshop.run(&arguments);
        assert!(result.status.success(), "{}", stderr(&result));
        let text = String::from_utf8_lossy(&result.stdout);
        let events: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let count = |name| events.iter().filter(|event| event["event"] == name).count();
        let (started, fetched) = if output == "warm" { (0, 0) } else { (2, distinct_bytes) };
        assert_eq!(count("layer_started"), started, "{output}: {text}");
        assert_eq!(count("layer_ready"), 4, "{output}: {text}");
        let report = &events.last().unwrap()["report"];
        assert_eq!(report["fetched_bytes"], fetched, "{output}");
        let verified = workshop.run(&["inspect", output, "--verify"]);
        assert!(verified.status.success(), "{}", stderr(&verified));
        for path in ["/kept", "/dir/file"] {
            let file = workshop.run(&["inspect", output, "--cat", path]);
            assert_eq!(sha256(&file.stdout), sha256(&noise(5, 2_000_000)), "{output} {path}");
        }
    }
    let sums = ["stored", "cold", "warm"].map(|output| sha256(&workshop.read(output)));
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

#[test]
fn packs_of_an_empty_cache_become_the_image_and_nothing_is_copied() {
    /// `EXT4_SUPER_MAGIC` of linux/magic.h.
    const SHIFTING: u64 = 0xef53;
    let layers = [3_000_001, 5000].map(|bytes| Layer::new().file("file", &noise(bytes, 3_000_001)));
    let workshop = Workshop::with(&TestImage::new(layers.into()));
    let kind = rustix::fs::statfs(workshop.directory.path()).unwrap().f_type;
    if u64::try_from(kind) != Ok(SHIFTING) {
        eprintln!("skipped: the file system here cannot shift");
        return;
    }
    // A build of the service may have no file that is larger than its disk.
    let cases = [
        ("cold", "unlimited", "", false),
        ("warm", "unlimited", "", true),
        ("stored", "unlimited", "--no-cache", false),
        ("service", FILE_BLOCKS_MAX, "--no-cache", false),
    ];
    for (output, blocks_max, options, is_copied) in cases {
        let text = built_within(&workshop, blocks_max, &format!("{options} -o {output}"));
        assert_eq!(text.contains(r#""event":"write_progress""#), is_copied, "{output}: {text}");
        assert!(workshop.read(output) == workshop.read("cold"), "{output}");
    }
    let _ = std::fs::remove_dir_all(workshop.path("cache"));
    let text = built_within(&workshop, FILE_BLOCKS_MAX, "-o cached");
    assert!(!text.contains(r#""event":"write_progress""#), "{text}");
    assert!(workshop.read("cached") == workshop.read("cold"));
}

/// 128 MiB, as shells count.
const FILE_BLOCKS_MAX: &str = "262144";

/// What a build says that may write no file of more blocks.
fn built_within(workshop: &Workshop, blocks_max: &str, options: &str) -> String {
    let options = format!("--progress rawjson --checksum none {options}");
    built_under(workshop, &format!("-f {blocks_max}"), &options)
}

/// What a build says that has a limit of the shell's.
fn built_under(workshop: &Workshop, limit: &str, options: &str) -> String {
    let program = env!("CARGO_BIN_EXE_builderd");
    let result = std::process::Command::new("sh")
        .args(["-c", &format!("ulimit {limit} && exec {program} build oci:image {options}")])
        .current_dir(workshop.directory.path())
        .env("UNKEY_BUILDERD_CACHE_DIR", workshop.path("cache"))
        .output()
        .unwrap();
    assert!(result.status.success(), "{}", stderr(&result));
    String::from_utf8_lossy(&result.stdout).into_owned()
}

#[test]
fn a_layer_that_is_longer_than_its_part_of_the_files_limit_makes_the_same_image() {
    // 40 MiB that come to little, beside one that needs its part: 32 MiB is the half of the half.
    let text: Vec<u8> = b"all work and no play ".iter().copied().cycle().take(40 << 20).collect();
    let image = TestImage::new(vec![
        Layer::new().file("noise", &noise(3, 4_000_001)),
        Layer::new().file("text", &text),
    ]);
    let workshop = Workshop::with(&image);
    for (output, blocks_max, options) in [
        ("free", "unlimited", "--no-cache"),
        ("stored", FILE_BLOCKS_MAX, "--no-cache"),
        ("cold", FILE_BLOCKS_MAX, ""),
        ("warm", FILE_BLOCKS_MAX, ""),
    ] {
        built_within(&workshop, blocks_max, &format!("{options} -o {output}"));
        assert!(workshop.read(output) == workshop.read("free"), "{output}");
    }
}

#[test]
fn a_layer_named_again_must_be_what_each_of_its_places_claims() {
    let mut image = repeated();
    image.config["rootfs"]["diff_ids"][3] = image.config["rootfs"]["diff_ids"][1].clone();
    let workshop = Workshop::with(&image);
    for options in [&["--no-cache"][..], &[]] {
        let result = workshop.build("out", options);
        assert_eq!(result.status.code(), Some(3), "{}", stderr(&result));
        assert!(stderr(&result).contains("layer 4 "), "{}", stderr(&result));
    }
}

#[test]
fn an_image_may_have_more_layers_than_the_soft_limit_of_open_files() {
    let layers = (0..150).map(|n| Layer::new().file(&format!("f{n}"), format!("{n}").as_bytes()));
    let workshop = Workshop::with(&TestImage::new(layers.collect()));
    built_under(&workshop, "-S -n 64", "--progress plain -o out");
    assert_eq!(workshop.run(&["inspect", "out", "--cat", "/f149"]).stdout, b"149");
}
