//! What stands around a build's process that fetches, beside its view of files.

use std::os::unix::fs::MetadataExt as _;

use super::*;

/// A server and a build of it that waits for its layer; none on a host without namespaces.
fn waiting(stage: &Stage, server: &Server) -> Option<(String, PathBuf)> {
    if !sandbox::can_isolate() {
        println!("skipped: this needs namespaces");
        return None;
    }
    stage.stall(10);
    let id = server.create("t1", &stage.reference("latest"));
    server.wait("t1", &id, &["BUILD_STATE_EXTRACTING"]);
    eventually("a build process", || stage.children() == 1);
    Some((id, stage.processes().remove(0)))
}

fn status(process: &Path, name: &str) -> String {
    let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.map(|value| value.trim().to_owned()).unwrap_or_default()
}

fn cancel(stage: &Stage, server: &Server, id: &str) {
    server.well("t1", "CancelBuild", &json!({"build_id": id}));
    eventually("no build process", || stage.children() == 0);
}

#[test]
fn the_process_of_a_build_names_its_own_processes_alone() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let Some((id, process)) = waiting(&stage, &server) else { return };
    let numbers = status(&process, "NSpid:");
    assert!(numbers.split_whitespace().count() > 1, "it is in a PID namespace: {numbers}");
    // Its /proc, as it sees it.
    let names = std::fs::read_dir(process.join("root/proc")).unwrap();
    let names: Vec<String> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let others: Vec<&String> =
        names.iter().filter(|name| name.parse::<u32>().is_ok_and(|number| number > 64)).collect();
    assert!(others.is_empty() && names.iter().any(|name| name == "1"), "{names:?}");
    assert!(!names.iter().any(|name| name == "sys"), "nothing of the host: {names:?}");
    cancel(&stage, &server, &id);
}

#[test]
fn a_build_works_where_a_link_leads_to_the_servers_directories() {
    let stage = Stage::new();
    let (link, place) = (stage.workshop.path("link"), stage.workshop.path("place"));
    std::fs::create_dir(&place).unwrap();
    std::os::unix::fs::symlink(&place, &link).unwrap();
    let below = |name: &str| link.join(name).display().to_string();
    let (rootfs, cache) = (below("rootfs"), below("cache"));
    let server =
        stage.serve(&[("ROOTFS_OUTPUT_DIR", rootfs.as_str()), ("CACHE_DIR", cache.as_str())]);
    let build = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
}

#[test]
fn a_server_that_is_killed_takes_the_processes_of_its_builds_with_it() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let Some((_, process)) = waiting(&stage, &server) else { return };
    let server_id = server.child.id().to_string();
    let parent = PathBuf::from("/proc").join(status(&process, "PPid:"));
    let outside = PathBuf::from("/proc").join(status(&parent, "PPid:"));
    assert_eq!(status(&outside, "PPid:"), server_id, "two stand between");
    let names = [process, parent, outside].map(|one| (one.clone(), status(&one, "PPid:")));
    // Nothing is told to anybody.
    drop(server);
    eventually("all are gone", || {
        names.iter().all(|(one, parent)| status(one, "PPid:") != *parent)
    });
}

#[test]
fn who_fetches_for_two_builds_are_two_users_and_their_files_are_the_servers() {
    let stage = Stage::new();
    if !rustix::process::geteuid().is_root() || !sandbox::can_isolate() {
        println!("skipped: this needs root and namespaces");
        return;
    }
    let server = stage.serve(&[("STORAGE_CACHE_ENABLED", "false")]);
    stage.stall(10);
    let ids = ["t1", "t2"].map(|tenant| server.create(tenant, &stage.reference("latest")));
    eventually("two build processes", || stage.children() == 2);
    eventually("two layers that stand still", || stage.registry.faults_left() <= 8);
    let users: Vec<u32> = stage.processes().iter().map(|process| user(process)).collect();
    assert!(users.iter().all(|user| *user >= 0x6400_0000), "{users:?}");
    assert_ne!(users[0], users[1]);
    for (tenant, id) in ["t1", "t2"].iter().zip(&ids) {
        server.well(tenant, "CancelBuild", &json!({"build_id": id}));
    }
    eventually("no build process", || stage.children() == 0);
    drop(server);

    let stage = Stage::new();
    let server = stage.serve(&[]);
    let build = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let mut places = vec![stage.workshop.path("rootfs"), stage.workshop.path("cache")];
    places.retain(|place| place.exists());
    while let Some(place) = places.pop() {
        let metadata = std::fs::symlink_metadata(&place).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (0, 0), "{}", place.display());
        if metadata.is_dir() {
            places.extend(std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

/// Whose a process is, outside of every namespace.
fn user(process: &Path) -> u32 {
    status(process, "Uid:").split_whitespace().next().unwrap().parse().unwrap()
}

/// Where the server's directories are on a file system without idmapped mounts.
#[test]
fn a_server_whose_file_system_has_no_idmapped_mounts_starts_where_that_is_accepted() {
    let stage = Stage::new();
    if !rustix::process::geteuid().is_root() || !sandbox::can_isolate() {
        println!("skipped: this needs root and namespaces");
        return;
    }
    let (below, place) = (stage.workshop.path("below"), stage.workshop.path("place"));
    for directory in ["lower", "upper", "work"] {
        std::fs::create_dir_all(below.join(directory)).unwrap();
    }
    std::fs::create_dir(&place).unwrap();
    let script = "mount -t overlay -o lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work none \"$2\" \
                  && shift 2 && exec \"$@\"";
    let command = || {
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "/bin/sh", "-c", script, "sh"]).args([&below, &place]);
        command.arg(env!("CARGO_BIN_EXE_builderd"));
        command
    };
    let (rootfs, host) = (place.join("rootfs").display().to_string(), stage.registry.host());
    let mut refused = command();
    let output = refused
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env("UNKEY_BUILDERD_DATABASE_DATA_DIR", stage.workshop.path("data"))
        .env("UNKEY_BUILDERD_ROOTFS_OUTPUT_DIR", &rootfs)
        .env("UNKEY_BUILDERD_CACHE_DIR", stage.workshop.path("cache"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let named = said.split_once("cannot give builds: ").map(|(_, named)| named).unwrap_or_default();
    assert!(named.contains("own-users (") && named.contains("idmapped"), "{said}");

    let settings =
        [("DOCKER_INSECURE_REGISTRIES", host.as_str()), ("ROOTFS_OUTPUT_DIR", rootfs.as_str())];
    let server = Server::start_by(command(), stage.workshop.directory.path(), &settings);
    let build = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let said = &server.said;
    assert!(said.contains("\"own-users\"") && said.contains("idmapped"), "{said}");
    let stats = server.http.get(format!("http://{}/stats", server.address)).send().unwrap();
    let stats: Value = serde_json::from_slice(&stats.bytes().unwrap()).unwrap();
    let missing = stats["walls"]["missing"].as_array().unwrap();
    let is_it = |missing: &Value| missing["wall"] == "own-users";
    assert!(missing.iter().any(is_it), "{stats:#}");
}

#[test]
fn a_cache_that_a_server_of_another_user_has_made_is_used_by_a_root_that_takes_over() {
    let mut stage = Stage::new();
    if !rustix::process::geteuid().is_root() || !sandbox::can_isolate() {
        println!("skipped: this needs root and namespaces");
        return;
    }
    let server = stage.serve(&[]);
    let build = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let mut places = vec![stage.workshop.path("cache")];
    while let Some(place) = places.pop() {
        std::os::unix::fs::lchown(&place, Some(4321), Some(4321)).unwrap();
        if place.is_dir() {
            places.extend(std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    let layers = [Layer::new().file("more", b"more")];
    let image = stage.push_other("more", layers.into());
    let build = server.finished("t1", &server.create("t1", &image));
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
}
