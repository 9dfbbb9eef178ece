//! What a build's process that fetches sees of the host.

use super::*;

/// What the process of a build that fetches has of the host, as the host shows it.
pub(super) fn sees_its_own_files_alone(stage: &Stage, process: &Path, id: &str) {
    // What another tenant has had built.
    std::fs::create_dir_all(stage.workshop.path("cache/packs-v3/tenant-other")).unwrap();
    // The host's files as this process sees them.
    let seen = |path: PathBuf| process.join("root").join(path.strip_prefix("/").unwrap());
    let names = |path: &str| -> Vec<String> {
        let list = std::fs::read_dir(seen(stage.workshop.path(path))).unwrap();
        list.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names("").len(), 2, "only what leads to its directories: {:?}", names(""));
    assert_eq!(names("rootfs"), ["staging"]);
    assert_eq!(names("rootfs/staging").len(), 1);
    assert!(names("rootfs/staging")[0].starts_with(id));
    let all = std::fs::read_dir(stage.workshop.path("cache/packs-v3")).unwrap().count();
    assert_eq!((names("cache/packs-v3").len(), all), (1, 2), "layers that it may use alone");
    assert!(!seen(stage.workshop.path("cache/packs-v3/tenant-other")).exists());
    assert!(stage.workshop.path("data/builderd.db").exists());
    assert!(!seen(stage.workshop.path("data")).exists());
    assert!(!seen("/etc/shadow".into()).exists());
    let status = std::fs::read_to_string(process.join("status")).unwrap();
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned()).unwrap_or_default()
    };
    assert_eq!((value("NoNewPrivs:"), value("Seccomp:")), ("1".into(), "2".into()));
    // CAP_DAC_OVERRIDE, CAP_SETGID and CAP_SETUID: capabilities(7).
    let root = rustix::process::geteuid().is_root();
    assert_eq!(value("CapEff:"), if root { "00000000000000c2" } else { "0000000000000000" });
}

#[test]
fn the_process_of_a_build_sees_its_own_files_alone() {
    if !sandbox::can_isolate() {
        println!("skipped: this needs namespaces");
        return;
    }
    let stage = Stage::new();
    let server = stage.serve(&[]);
    stage.stall(10);
    let id = server.create("t1", &stage.reference("latest"));
    server.wait("t1", &id, &["BUILD_STATE_EXTRACTING"]);
    eventually("a build process", || stage.children() == 1);
    sees_its_own_files_alone(&stage, &stage.processes().remove(0), &id);
    server.well("t1", "CancelBuild", &json!({"build_id": id}));
    eventually("no build process", || stage.children() == 0);
}

#[test]
fn the_whole_cache_is_held_to_its_limit_though_a_build_sees_its_own_part() {
    let mut stage = Stage::new();
    let server = stage.serve(&[("STORAGE_CACHE_MAX_SIZE_GB", "1")]);
    let id = server.create("t1", &stage.reference("latest"));
    server.finished("t1", &id);
    // What the service looks at by itself it has looked at.
    let other = stage.workshop.path("cache/packs-v3/tenant-other");
    std::fs::create_dir_all(&other).unwrap();
    let pack = other.join(format!("{}.pack", "a".repeat(64)));
    let made = std::fs::File::create(&pack).unwrap();
    made.set_len(2 << 30).unwrap();
    made.set_modified(std::time::UNIX_EPOCH).unwrap();
    // Another image of the same layers: its artifact is not there yet.
    stage.image.config["author"] = json!("somebody");
    stage.push("other", &["latest"]);
    let id = server.create("t1", &format!("{}/other", stage.registry.host()));
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    eventually("the pack of somebody else is gone", || !pack.exists());
}

#[test]
fn a_cache_with_a_relative_path_lies_where_the_server_was_started() {
    let stage = Stage::new();
    let server = stage.serve(&[("CACHE_DIR", "layers")]);
    let id = server.create("t1", &stage.reference("latest"));
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let path = stage.workshop.path("layers").display().to_string();
    let output = stage.workshop.command(&["cache", "ls", "--cache-dir", &path]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.lines().filter(|line| line.contains("sha256:")).count(), 2, "{said}");
}
