//! Stories about a host that lacks walls, or has too little of something.

use std::fs;

use super::*;

/// A program with arguments behind it, on a host whose kernel gives no user namespaces: the number
/// of them is a setting of the one that this one starts in.
fn without_namespaces(stage: &Stage) -> Command {
    let mut command = Command::new("unshare");
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    command
        .args(["--user", "--map-root-user", "/bin/sh", "-c", script, "sh"])
        .arg(env!("CARGO_BIN_EXE_builderd"))
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env("UNKEY_BUILDERD_DATABASE_DATA_DIR", stage.workshop.path("data"))
        .env("UNKEY_BUILDERD_ROOTFS_OUTPUT_DIR", stage.workshop.path("rootfs"))
        .env("UNKEY_BUILDERD_OTEL_PROMETHEUS_ENABLED", "false")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Whether this host gives namespaces at all: only then can they be taken away.
fn has_namespaces() -> bool {
    let status = Command::new("unshare").args(["--user", "--map-root-user", "true"]).status();
    let has_them = status.is_ok_and(|status| status.success());
    if !has_them {
        eprintln!("SKIPPED: no user namespaces, or no unshare(1)");
    }
    has_them
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: this needs root");
    }
    is_root
}

/// What a service says that does not start, the settings being as they are, and these.
fn refused(stage: &Stage, accepted: &str) -> String {
    let mut command = without_namespaces(stage);
    command.env("UNKEY_BUILDERD_ACCEPT_MISSING_WALLS", accepted);
    let result = command.output().unwrap();
    assert_eq!(result.status.code(), Some(1), "{}", stderr(&result));
    stderr(&result)
}

/// The walls that a refusal names.
fn named(said: &str) -> Vec<&str> {
    let Some((_, said)) = said.split_once("cannot give builds: ") else { panic!("{said}") };
    sandbox::Wall::ALL
        .into_iter()
        .map(sandbox::Wall::as_str)
        .filter(|wall| said.contains(&format!("{wall} (")))
        .collect()
}

#[test]
fn a_host_without_a_wall_is_refused_by_its_name_until_the_operator_accepts_it() {
    if !has_namespaces() {
        return;
    }
    let stage = Stage::new();
    let said = refused(&stage, "");
    let missing = named(&said);
    for wall in ["user-namespace", "pid-namespace", "network-namespace"] {
        assert!(missing.contains(&wall), "{said}");
    }
    for wall in ["seccomp", "no-new-privileges", "no-capabilities"] {
        assert!(!missing.contains(&wall), "{said}");
    }
    assert!(said.contains("UNKEY_BUILDERD_ACCEPT_MISSING_WALLS"), "{said}");
    // All but one are as good as none.
    for (place, wall) in missing.iter().enumerate() {
        let mut others = missing.clone();
        others.remove(place);
        assert_eq!(named(&refused(&stage, &others.join(","))), [*wall]);
    }
    let mut command = without_namespaces(&stage);
    command.env("UNKEY_BUILDERD_ACCEPT_MISSING_WALLS", missing.join(","));
    let mut server = command.spawn().unwrap();
    let mut said = Vec::new();
    let lines = BufReader::new(server.stderr.take().unwrap()).lines().map_while(Result::ok);
    for line in lines {
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        if event["message"] == "listening" {
            break;
        }
        said.push(event);
    }
    server.kill().unwrap();
    server.wait().unwrap();
    let warned: Vec<&str> = said.iter().filter_map(|event| event["wall"].as_str()).collect();
    assert_eq!(warned, missing, "each start says what is missing: {said:#?}");
}

/// A service whose images lie on a file system of so many MiB, which nobody else sees.
fn serve_on_a_small_disk(stage: &Stage, size_mib: u32, settings: &[(&str, &str)]) -> Server {
    let place = stage.workshop.path("rootfs");
    fs::create_dir_all(&place).unwrap();
    let script = "mount -t tmpfs -o size=$1m none \"$2\" && shift 2 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "/bin/sh", "-c", script, "sh", &size_mib.to_string()]);
    command.arg(&place).arg(env!("CARGO_BIN_EXE_builderd"));
    let host = stage.registry.host();
    let mut all = vec![("DOCKER_INSECURE_REGISTRIES", host.as_str())];
    all.extend(settings);
    Server::start_by(command, stage.workshop.directory.path(), &all)
}

impl Stage {
    /// Another image, under its own name.
    pub(super) fn push_other(&mut self, repository: &str, layers: Vec<Layer>) -> String {
        self.image = TestImage::new(layers);
        self.push(repository, &["latest"]);
        format!("{}/{repository}:latest", self.registry.host())
    }
}

const BESIDE: &str = "waiting until disk and memory are free beside other builds";

/// Waits until `second` is held up by `first`, and sees that it does nothing; then lets it run.
fn one_after_the_other(stage: &Stage, server: &Server, first: &str, second: &str) {
    eventually("it waits", || server.log("t1", second).contains(BESIDE));
    assert!(!server.log("t1", first).contains(BESIDE));
    assert_eq!(stage.children(), 1, "the first one's process");
    assert_ne!(server.build("t1", second)["state"], "BUILD_STATE_COMPLETED");
    server.well("t1", "CancelBuild", &json!({"build_id": first}));
    server.wait("t1", first, &["BUILD_STATE_CANCELLED"]);
}

#[test]
fn builds_that_do_not_fit_on_the_disk_together_run_one_after_the_other() {
    if !is_root() {
        return;
    }
    let mut stage = Stage::new();
    // Each needs some 128 MiB, or what its manifest tells.
    let server = serve_on_a_small_disk(&stage, 200, &[]);
    stage.stall(1);
    let first = server.create("t1", &stage.reference("latest"));
    eventually("the first one runs", || stage.children() == 1);
    let small = stage.push_other("small", vec![Layer::new().file("it", b"small")]);
    let second = server.create("t1", &small);
    one_after_the_other(&stage, &server, &first, &second);
    let build = server.finished("t1", &second);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let large = crate::support::noise(3, 10_000_000);
    let large = stage.push_other("large", vec![Layer::new().file("it", &large)]);
    let build = server.finished("t1", &server.create("t1", &large));
    assert_eq!(build["failure"]["code"], "STORAGE_FULL", "{build:#}");
    assert_eq!(build["failure"]["step"], "start", "{build:#}");
    let cause = build["failure"]["cause"].as_str().unwrap();
    assert!(cause.contains("of disk") && cause.contains("are free"), "{cause}");
    assert_eq!(stage.children(), 0, "it was never begun");
}

#[test]
fn builds_that_do_not_fit_into_memory_together_run_one_after_the_other() {
    let mut stage = Stage::new();
    let sysinfo = rustix::system::sysinfo();
    let all_bytes = u64::from(sysinfo.mem_unit) * sysinfo.totalram;
    let (most, disk) = ((all_bytes / 100 * 60).to_string(), (1u64 << 30).to_string());
    let mut settings = vec![
        ("TENANT_DEFAULT_TIER", "pro"),
        ("TENANT_DEFAULT_MAX_DISK_BYTES", disk.as_str()),
        // In GB: what manifests tell here is not there.
        ("DOCKER_MAX_IMAGE_SIZE_GB", "100000"),
    ];
    let each =
        [settings.clone(), vec![("TENANT_DEFAULT_MAX_MEMORY_BYTES", most.as_str())]].concat();
    // So large that it would take all the memory that it may have.
    let mut told = |name: &str| {
        stage.push_other(name, vec![Layer::new().file(name, b"x")]);
        let config = serde_json::to_vec(&stage.image.config).unwrap();
        let mut manifest: Value = serde_json::from_slice(&stage.image.manifest(&config)).unwrap();
        manifest["layers"][0]["size"] = (all_bytes * 16).into();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::to_vec(&manifest).unwrap();
        stage.registry.put_manifest_bytes(name, Some("latest"), media_type, manifest);
        let layer = crate::support::sha256(&stage.image.blobs[0]);
        // Its layer is always about to come.
        let later = Fault::Status(503, vec![("Retry-After".to_owned(), "30".to_owned())]);
        (0..10).for_each(|_| stage.registry.fault(&layer, later.clone()));
        json!({"config": {
            "source": {"docker_image": {"image_uri": format!("{}/{name}:latest", stage.registry.host())}},
            "target": {"microvm_rootfs": {"init_strategy": "INIT_STRATEGY_DIRECT"}},
            "strategy": {"docker_extract": {}},
        }})
    };
    let (one, other) = (told("one"), told("other"));
    let id = |answer: Value| answer["build_id"].as_str().unwrap().to_owned();
    {
        let server = stage.serve(&each);
        let first = id(server.well("t1", "CreateBuild", &one));
        eventually("the first one runs", || stage.children() == 1);
        let second = id(server.well("t1", "CreateBuild", &other));
        one_after_the_other(&stage, &server, &first, &second);
        eventually("the second one runs", || stage.children() == 1);
        server.well("t1", "CancelBuild", &json!({"build_id": second}));
        server.wait("t1", &second, &["BUILD_STATE_CANCELLED"]);
    }
    // More than the machine has.
    let most = (2 * all_bytes).to_string();
    settings.push(("TENANT_DEFAULT_MAX_MEMORY_BYTES", most.as_str()));
    let server = stage.serve(&settings);
    let never = id(server.well("t2", "CreateBuild", &one));
    eventually("it fails", || {
        let log = server.log("t2", &never);
        log.contains("of memory, and there are") && !log.contains(BESIDE)
    });
    assert_eq!(stage.children(), 0, "it was never begun");
}

/// The groups of a build's processes.
fn groups(build: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut todo: Vec<PathBuf> = mounts
        .filter(|fields| fields[2].starts_with("cgroup"))
        .map(|fields| PathBuf::from(fields[1]))
        .collect();
    let mut found = Vec::new();
    while let Some(directory) = todo.pop() {
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        if name.strip_prefix(build).is_some_and(|rest| rest.starts_with('-')) {
            found.push(directory);
            continue;
        }
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        todo.extend(below.map(|entry| entry.path()));
    }
    found
}

/// The failure of a build of an image of its own, of which `meanwhile` makes something scarce
/// between its start and the rest of its work.
fn failure(
    stage: &mut Stage,
    server: &Server,
    name: &str,
    limits: Value,
    meanwhile: impl FnOnce(&str),
) -> Value {
    let layers = vec![Layer::new().file(name, &crate::support::noise(9, 2_000_000))];
    let mut order = order(&stage.push_other(name, layers));
    order["config"]["limits"] = limits;
    let layer = crate::support::sha256(&stage.image.blobs[0]);
    let later = Fault::Status(503, vec![("Retry-After".to_owned(), "3".to_owned())]);
    stage.registry.fault(&layer, later);
    let answer = server.well("t1", "CreateBuild", &order);
    let id = answer["build_id"].as_str().unwrap();
    eventually("it waits for its layer", || {
        stage.registry.faults_left() == 0 && !groups(id).is_empty()
    });
    meanwhile(id);
    let build = server.finished("t1", id);
    assert_eq!(build["state"], "BUILD_STATE_FAILED", "{build:#}");
    build["failure"].clone()
}

/// Leaves a build little more memory than what waits for the layer has already.
fn starve(build: &str) {
    let names =
        [("memory.usage_in_bytes", "memory.limit_in_bytes"), ("memory.current", "memory.max")];
    let files = groups(build)
        .into_iter()
        .flat_map(|group| names.map(|(used, most)| (group.join(used), group.join(most))));
    let (used, most) = files.into_iter().find(|(used, _)| used.exists()).unwrap();
    // Refused if more is used by then.
    eventually("the limit is set", || {
        let used: u64 = fs::read_to_string(&used).unwrap().trim().parse().unwrap();
        fs::write(&most, (used + (128 << 10)).to_string()).is_ok()
    });
}

fn cause(failure: &Value) -> &str {
    failure["cause"].as_str().unwrap()
}

#[test]
fn what_a_build_ran_out_of_is_told_apart() {
    if !is_root() {
        return;
    }
    let (mut stage, none) = (Stage::new(), json!({}));
    let place = stage.workshop.path("rootfs/filler");
    let server = serve_on_a_small_disk(&stage, 200, &[]);
    let pids = failure(&mut stage, &server, "pids", none.clone(), |id| {
        let files = groups(id).into_iter().map(|group| group.join("pids.max"));
        let file = files.into_iter().find(|file| file.exists()).unwrap();
        fs::write(file, "1").unwrap();
    });
    assert_eq!(pids["code"], "QUOTA_EXCEEDED", "{pids:#}");
    assert!(cause(&pids).contains("more processes than it may have"), "{pids:#}");
    let memory = failure(&mut stage, &server, "memory", none.clone(), starve);
    assert_eq!(memory["code"], "QUOTA_EXCEEDED", "{memory:#}");
    assert!(cause(&memory).contains("more memory than"), "{memory:#}");
    let disk = failure(&mut stage, &server, "disk", none, |_| {
        let place = place.strip_prefix("/").unwrap();
        let root = format!("/proc/{}/root", server.child.id());
        let mut file = fs::File::create(Path::new(&root).join(place)).unwrap();
        let chunk = vec![1; 1 << 16];
        let full = (0..1 << 14).find_map(|_| file.write_all(&chunk).err()).expect("it is full");
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    });
    assert_eq!(disk["code"], "STORAGE_FULL", "{disk:#}");
    assert!(cause(&disk).contains("No space left"), "{disk:#}");
    drop(server);
    let server = stage.serve(&[]);
    let short = json!({"timeout_seconds": 2});
    let time = failure(&mut stage, &server, "time", short, |_| ());
    assert_eq!(time["code"], "BUILD_TIMEOUT", "{time:#}");
    assert!(cause(&time).contains("longer than 2 seconds"), "{time:#}");
}
