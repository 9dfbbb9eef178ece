//! The layer cache: what it saves, what it survives.

use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

fn image() -> TestImage {
    TestImage::new(vec![
        Layer::new().file("base", &noise(1, 1_500_000)),
        Layer::new().file("app", &noise(2, 10_000)),
    ])
}

fn overwrite(path: &Path, offset: SeekFrom, bytes: &[u8]) {
    let mut file = std::fs::File::options().write(true).open(path).unwrap();
    file.seek(offset).unwrap();
    file.write_all(bytes).unwrap();
}

/// Writes the stamp that says the pack is good as it is now.
fn vouch_for(pack: &Path) {
    let good = std::fs::metadata(pack).unwrap();
    let stamp = pack.with_extension("stamp");
    let old = std::fs::read_to_string(&stamp).unwrap();
    let boot = old.split(' ').next().unwrap();
    let (inode, size) = (good.ino(), good.len());
    let modified = format!("{}.{:09}", good.mtime(), good.mtime_nsec());
    let changed = format!("{}.{:09}", good.ctime(), good.ctime_nsec());
    std::fs::write(stamp, format!("{boot} {inode} {size} {modified} {changed}\n")).unwrap();
}

#[test]
fn a_known_layer_is_not_read_again() {
    let image = image();
    let workshop = Workshop::with(&image);
    let first = workshop.build_well("out", &[]);
    assert_eq!(first.matches(" packed\n").count(), 2, "{first}");
    // Without the blobs only the cache can serve.
    for blob in &image.blobs {
        std::fs::remove_file(workshop.path("image/blobs/sha256").join(sha256(blob))).unwrap();
    }
    let one = workshop.build_well("again", &[]);
    assert_eq!(one.matches("from the cache\n").count(), 2, "{one}");
    assert_eq!(workshop.read("out"), workshop.read("again"));
}

/// Holds the lock of a layer as a build does that makes its pack.
fn lock_layer(workshop: &Workshop, blob: &[u8]) -> std::fs::File {
    let directory = workshop.path("cache/packs-v3/local");
    std::fs::create_dir_all(&directory).unwrap();
    let lock = std::fs::File::create(directory.join(format!("{}.lock", sha256(blob)))).unwrap();
    lock.lock().unwrap();
    lock
}

#[test]
fn an_error_does_not_wait_for_the_lock_of_another_build() {
    let mut image = image();
    image.blobs[1].truncate(1000);
    let workshop = Workshop::with(&image);
    let lock = lock_layer(&workshop, &image.blobs[0]);
    let arguments = ["build", "oci:image", "-o", "out", "--jobs", "2", "--progress", "plain"];
    let mut command = workshop.command(&arguments);
    let (done, ended) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || done.send(command.output().unwrap()));
    let result = ended.recv_timeout(std::time::Duration::from_secs(60));
    // Whatever came of it, nobody is to wait for ever.
    drop(lock);
    waiter.join().unwrap().unwrap_or_default();
    let result = result.expect("the error came while the lock was held");
    assert_eq!(result.status.code(), Some(3), "{}", stderr(&result));
    assert!(stderr(&result).contains("layer 2 (sha256:"), "{}", stderr(&result));
}

#[test]
fn a_build_that_waits_for_another_says_so_and_goes_on_after_it() {
    let image = image();
    let workshop = Workshop::with(&image);
    let lock = lock_layer(&workshop, &image.blobs[0]);
    let mut build = workshop
        .command(&["build", "oci:image", "-o", "out", "--progress", "rawjson"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(build.stdout.take().unwrap()).lines().map(Result::unwrap);
    let waiting = lines.find(|line| line.contains("\"layer_waiting\"")).expect("it says so");
    assert!(waiting.contains(&sha256(&image.blobs[0])), "{waiting}");
    drop(lock);
    assert!(lines.any(|line| line.contains("\"finished\"")));
    assert!(build.wait().unwrap().success());
}

#[test]
fn damage_anywhere_in_a_pack_is_found_and_the_pack_made_anew() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    let expected = sha256(&workshop.read("out"));
    let packs = workshop.packs();
    let big = packs.iter().max_by_key(|path| std::fs::metadata(path).unwrap().len()).unwrap();
    let damages: [(&str, &dyn Fn()); 5] = [
        ("a byte of data", &|| overwrite(big, SeekFrom::Start(700_000), b"!!")),
        ("the table of contents", &|| overwrite(big, SeekFrom::End(-150), b"!!")),
        ("the footer", &|| overwrite(big, SeekFrom::End(-100), b"!!")),
        ("a cut", &|| {
            std::fs::File::options().write(true).open(big).unwrap().set_len(1000).unwrap()
        }),
        ("nothing left", &|| std::fs::write(big, b"").unwrap()),
    ];
    for (what, damage) in damages {
        damage();
        let text = workshop.build_well("out", &[]);
        assert!(text.contains("was damaged and is made anew"), "{what}: {text}");
        assert_eq!(sha256(&workshop.read("out")), expected, "{what}");
    }
    let healthy = workshop.build_well("out", &[]);
    assert!(!healthy.contains("damaged"), "{healthy}");
}

#[test]
fn something_else_under_a_packs_name_is_put_aside() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    let pack = workshop.packs().remove(0);
    let others: [&dyn Fn(); 3] = [
        &|| assert!(std::process::Command::new("mkfifo").arg(&pack).status().unwrap().success()),
        &|| std::fs::create_dir_all(pack.join("below")).unwrap(),
        &|| std::os::unix::fs::symlink("/etc/passwd", &pack).unwrap(),
    ];
    for other in others {
        std::fs::remove_file(&pack).unwrap();
        other();
        let text = workshop.build_well("out", &[]);
        assert!(text.contains("was damaged and is made anew"), "{text}");
    }
}

#[test]
fn a_write_that_hides_its_time_is_noticed() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    let expected = sha256(&workshop.read("out"));
    let pack = workshop.packs().remove(0);
    let modified = std::fs::metadata(&pack).unwrap().modified().unwrap();
    overwrite(&pack, SeekFrom::Start(10), b"!!");
    std::fs::File::options().write(true).open(&pack).unwrap().set_modified(modified).unwrap();
    assert!(workshop.build_well("out", &[]).contains("was damaged"));
    assert_eq!(sha256(&workshop.read("out")), expected);
}

#[test]
fn verify_finds_damage_that_hides_behind_a_good_stamp() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    assert!(workshop.run(&["cache", "verify"]).status.success());
    let pack = workshop.packs().remove(0);
    overwrite(&pack, SeekFrom::Start(10), b"!!");
    vouch_for(&pack);
    let text = workshop.build_well("out", &[]);
    assert!(!text.contains("damaged"), "the stamp should be believed: {text}");
    let found = workshop.run(&["cache", "verify"]);
    assert_eq!(found.status.code(), Some(1), "{}", stderr(&found));
    assert_eq!(workshop.packs().len(), 1);
    assert!(workshop.run(&["cache", "verify"]).status.success());
}

#[test]
fn ls_shows_packs_and_prune_keeps_the_limit() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &[]);
    let list = workshop.run(&["cache", "ls", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    // The flags may stand on either side of the word.
    let elsewhere = workshop.path("elsewhere");
    let elsewhere = ["cache", "ls", "--json", "--cache-dir", elsewhere.to_str().unwrap()];
    let list = workshop.run(&elsewhere);
    assert_eq!(String::from_utf8_lossy(&list.stdout), "[]\n", "{}", stderr(&list));
    let pruned = workshop.run(&["cache", "--cache-limit", "1G", "prune"]);
    assert!(pruned.status.success() && workshop.packs().len() == 2);
    let pruned = workshop.run(&["cache", "prune", "--cache-limit", "1M"]);
    assert!(pruned.status.success());
    let left: u64 = workshop.packs().iter().map(|p| std::fs::metadata(p).unwrap().len()).sum();
    assert!(left <= 1 << 20, "{left}");
    workshop.run(&["cache", "prune", "--all"]);
    assert!(workshop.names("cache/packs-v3/local").is_empty());
    workshop.build_well("out", &["--cache-limit", "0"]);
    assert!(workshop.packs().is_empty(), "the limit holds after a build as well");
}

#[test]
fn packs_in_an_earlier_format_are_pruned_and_those_of_a_later_one_are_not() {
    let workshop = Workshop::with(&image());
    let pack = format!("{}.pack", "a".repeat(64));
    for domain in ["packs-v1/local", "packs-v1/other", "packs-v9/local", "packs-vx/local"] {
        let directory = workshop.path("cache").join(domain);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(&pack), "of another engine").unwrap();
        std::fs::write(directory.join(pack.replace("pack", "stamp")), "").unwrap();
    }
    std::fs::write(workshop.path("cache/packs-v1/other/somebodys"), "").unwrap();
    std::os::unix::fs::symlink("packs-v9", workshop.path("cache/packs-v0")).unwrap();
    workshop.build_well("out", &[]);
    assert_eq!(
        workshop.names("cache"),
        ["packs-v0", "packs-v1", "packs-v3", "packs-v9", "packs-vx"]
    );
    assert_eq!(workshop.names("cache/packs-v1"), ["other"]);
    assert_eq!(workshop.names("cache/packs-v1/other"), ["somebodys"]);
    assert_eq!(workshop.names("cache/packs-v9/local").len(), 2);
    assert_eq!(workshop.packs().len(), 2);
}

#[test]
fn prune_removes_what_killed_builds_have_left_and_nothing_else() {
    let image = image();
    let workshop = Workshop::with(&image);
    workshop.build_well("out", &[]);
    let before = workshop.names("cache/packs-v3/local");
    let directory = workshop.path("cache/packs-v3/local");
    let name = |digit: &str, kind| directory.join(format!("{}.{kind}", digit.repeat(64)));
    for left in [name("a", "lock"), name("b", "stamp"), name("c", "lock"), name("c", "stamp")] {
        std::fs::write(left, "").unwrap();
    }
    std::fs::write(directory.join(format!("{}.lock", sha256(&image.blobs[0]))), "").unwrap();
    // Of a build that makes the pack just now: its stamp is not to be judged.
    std::fs::write(name("d", "stamp"), "").unwrap();
    let lock = std::fs::File::create(name("d", "lock")).unwrap();
    lock.lock().unwrap();
    // Nothing that anybody here has written.
    std::fs::write(directory.join("somebodys.lock"), "").unwrap();
    std::fs::create_dir(name("e", "lock")).unwrap();
    let pruned = workshop.run(&["cache", "prune", "--cache-limit", "1G"]);
    assert!(pruned.status.success(), "{}", stderr(&pruned));
    let kept = [name("d", "lock"), name("d", "stamp"), name("e", "lock")];
    let kept = kept.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
    let mut expected = [&before[..], &kept, &["somebodys.lock".to_owned()]].concat();
    expected.sort();
    assert_eq!(workshop.names("cache/packs-v3/local"), expected);
    drop(lock);
    workshop.run(&["cache", "prune", "--cache-limit", "1G"]);
    assert!(!name("d", "lock").exists() && !name("d", "stamp").exists());
}

#[test]
fn many_processes_make_each_pack_once() {
    let workshop = Workshop::with(&image());
    let children: Vec<_> = (0..6)
        .map(|number| {
            let output = format!("out{number}");
            workshop
                .command(&["build", "oci:image", "--progress", "plain", "-o", &output])
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut packed = 0;
    for child in children {
        let result = child.wait_with_output().unwrap();
        assert!(result.status.success(), "{}", stderr(&result));
        packed += stderr(&result).matches(" packed\n").count();
    }
    assert_eq!(packed, 2);
    let sums: std::collections::BTreeSet<String> =
        (0..6).map(|number| sha256(&workshop.read(&format!("out{number}")))).collect();
    assert_eq!(sums.len(), 1);
    let names = workshop.names("cache/packs-v3/local");
    assert!(names.iter().all(|name| !name.ends_with(".lock")), "{names:?}");
}

#[test]
fn without_a_cache_nothing_but_the_output_appears() {
    let workshop = Workshop::with(&image());
    workshop.build_well("out", &["--no-cache"]);
    assert_eq!(workshop.names(""), ["image", "out", "out.metadata.json", "out.sha256"]);
}
