//! What stands around a build's process that fetches, beside its view of files.

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
