//! Stories about commands that a build runs in its image. They need root, runc and loop devices;
//! where a host has none, that is said.

use super::*;

const BUSYBOX: &str = "/bin/busybox";

fn accepted() -> String {
    ::commands::accepted_names().join(",")
}

/// A stage whose image has a shell; none where commands cannot be run.
fn stage() -> Option<Stage> {
    let names: Vec<String> = accepted().split(',').map(str::to_owned).collect();
    if let Err(error) = ::commands::check("runc", &names) {
        eprintln!("SKIPPED: {error}");
        return None;
    }
    let Ok(busybox) = std::fs::read(BUSYBOX) else {
        eprintln!("SKIPPED: no {BUSYBOX}: apt-get install busybox-static");
        return None;
    };
    let mut layer = Layer::new().directory("bin").directory("srv").program("bin/busybox", &busybox);
    for applet in ["sh", "echo", "rm", "id", "sleep", "cat", "wget", "nc"] {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    let mut stage = Stage::new();
    stage.image = TestImage::new(vec![layer, Layer::new().file("etc/conf", b"x=1")]);
    stage.push("app", &["latest"]);
    Some(stage)
}

fn serve(stage: &Stage) -> Server {
    stage.serve(&[("OCI_RUNTIME_ACCEPT_VULNERABLE", &accepted())])
}

fn order_with(stage: &Stage, commands: &[&str]) -> Value {
    let mut order = order(&stage.reference("latest"));
    order["config"]["strategy"] = json!({"docker_strategy": {"custom_commands": commands}});
    order
}

fn built(server: &Server, stage: &Stage, tenant: &str, commands: &[&str]) -> Value {
    let answer = server.well(tenant, "CreateBuild", &order_with(stage, commands));
    server.finished(tenant, answer["build_id"].as_str().unwrap())
}

#[test]
fn what_commands_change_is_in_the_image_and_in_no_other_build() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let commands = ["echo made of $PATH > made; id -u", "rm /etc/conf && echo done"];
    let build = built(&server, &stage, "t1", &commands);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let id = build["build_id"].as_str().unwrap();
    std::fs::write(stage.workshop.path("image"), server.artifact("t1", id)).unwrap();
    let verified = stage.workshop.run(&["inspect", "image", "--verify"]);
    assert!(verified.status.success(), "{}", stderr(&verified));
    let made = stage.workshop.run(&["inspect", "image", "--cat", "/srv/made"]);
    assert_eq!(String::from_utf8_lossy(&made.stdout), "made of /bin\n", "{}", stderr(&made));
    assert!(!stage.workshop.run(&["inspect", "image", "--cat", "/etc/conf"]).status.success());
    let log = server.log("t1", id);
    assert!(log.contains("command 2: rm /etc/conf") && log.contains("done"), "{log}");
    let took = ["the artifact's sum took", "storing the artifact took"];
    assert!(took.iter().all(|what| log.contains(what)), "what is no phase is named, too: {log}");

    let sum = |build: &Value| build["rootfs_checksum"].as_str().unwrap().to_owned();
    let path = |build: &Value| build["rootfs_path"].as_str().unwrap().to_owned();
    let again = built(&server, &stage, "t1", &commands);
    assert_eq!(path(&again), path(&build), "the same commands for the same tenant");
    let log = server.log("t1", again["build_id"].as_str().unwrap());
    assert!(!log.contains("command 2:"), "they are not run again: {log}");
    let other = built(&server, &stage, "t1", &["rm /etc/conf && echo done"]);
    assert_ne!(sum(&other), sum(&build), "other commands");
    let plain = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_ne!(sum(&plain), sum(&build), "no commands");
    let theirs = built(&server, &stage, "t2", &commands);
    assert_ne!(path(&theirs), path(&build), "commands of another tenant");
    let log = server.log("t2", theirs["build_id"].as_str().unwrap());
    assert!(log.contains("command 2:"), "they were run: {log}");
    assert_eq!(stage.staged(), Vec::<String>::new());
}

#[test]
fn a_command_that_fails_fails_the_build_by_its_name() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let build = built(&server, &stage, "t1", &["echo fine", "echo broken >&2; exit 4"]);
    assert_eq!(build["state"], "BUILD_STATE_FAILED", "{build:#}");
    let text = build.to_string();
    assert!(
        text.contains("command 2 (`echo broken >&2; exit 4`) ended with exit code 4"),
        "{text}"
    );
    let log = server.log("t1", build["build_id"].as_str().unwrap());
    assert!(log.contains("fine") && log.contains("broken"), "{log}");
}

#[test]
fn a_command_that_needs_more_memory_than_the_build_may_have_fails_it_by_that_limit() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let built = |command: &str| {
        let mut order = order_with(&stage, &[command]);
        order["config"]["limits"] = json!({"max_memory_bytes": 64 << 20});
        let answer = server.well("t1", "CreateBuild", &order);
        server.finished("t1", answer["build_id"].as_str().unwrap())
    };
    // What the runtime reserves for itself is no memory.
    let small = built("echo small > small");
    assert_eq!(small["state"], "BUILD_STATE_COMPLETED", "{small:#}");
    let large = built("text=x; while :; do text=$text$text; done");
    assert_eq!(large["failure"]["code"], "QUOTA_EXCEEDED", "{large:#}");
    assert_eq!(large["failure"]["blame"], "yours");
    assert_eq!(large["failure"]["step"], "commands");
    let (cause, remedy) = (&large["failure"]["cause"], &large["failure"]["remedy"]);
    assert!(cause.as_str().unwrap().contains("more memory"), "{large:#}");
    assert!(remedy.as_str().unwrap().contains("limits.max_memory_bytes"), "{large:#}");
    assert!(large["attempts"].as_array().is_none_or(Vec::is_empty), "it would end so again");
    assert_eq!(stage.staged(), Vec::<String>::new());
}

#[test]
fn what_a_command_says_last_is_in_the_log_however_much_it_said() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let flood =
        "n=0; while [ $n -lt 30000 ]; do echo line $n; n=$((n+1)); done; echo FATAL; exit 7";
    let build = built(&server, &stage, "t1", &[flood]);
    assert_eq!(build["failure"]["step"], "commands", "{build:#}");
    let id = build["build_id"].as_str().unwrap();
    let (mut log, mut next) = (Vec::new(), 0);
    loop {
        let page = server.log("t1", &format!("{id}?offset={next}&limit=1000"));
        let page: Value = serde_json::from_str(&page).unwrap();
        let lines = page["logs"].as_array().unwrap();
        log.extend(lines.iter().map(|line| line["message"].as_str().unwrap().to_owned()));
        next = page["next_offset"].as_u64().unwrap();
        if page["is_end"] == true {
            break;
        }
    }
    let said = log.iter().filter(|line| line.starts_with("line ")).count();
    let left_out = log.iter().find_map(|line| line.split_once(" lines of the output of command 1"));
    let left_out: usize = left_out.expect("it says how many are missing").0.parse().unwrap();
    assert_eq!(said + left_out, 30_000);
    let end = &log[log.len() - 3..];
    assert_eq!((&*end[0], &*end[1]), ("line 29999", "FATAL"), "{end:?}");
    assert!(end[2].starts_with("commands failed: command 1 ("), "{end:?}");
}

#[test]
fn a_build_that_is_cancelled_while_a_command_runs_leaves_nothing() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let mark = format!("8{}", std::process::id());
    let command = format!("sleep {mark}");
    let answer = server.well("t1", "CreateBuild", &order_with(&stage, &[&command]));
    let id = answer["build_id"].as_str().unwrap();
    let sleeping = || {
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let lines = all.map(|pid| std::fs::read(pid.path().join("cmdline")).unwrap_or_default());
        let line = format!("sleep\0{mark}\0").into_bytes();
        lines.filter(|words| *words == line).count()
    };
    eventually("the command", || sleeping() > 0);
    server.well("t1", "CancelBuild", &json!({"build_id": id}));
    server.wait("t1", id, &["BUILD_STATE_CANCELLED"]);
    eventually("no command", || sleeping() == 0);
    eventually("no staged file", || stage.staged().is_empty());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains("/scratch"), "{mounts}");
}

/// The flags of the files from 3 on that a process has open on layer packs: proc_pid_fdinfo(5).
fn flags_of_packs(process: &Path, cache: &Path) -> Vec<u32> {
    let open = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let packs = open
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|file| file.starts_with(cache)));
    let flags = packs.filter_map(|entry| {
        let info = std::fs::read_to_string(process.join("fdinfo").join(entry.file_name())).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        u32::from_str_radix(flags.trim(), 8).ok()
    });
    flags.collect()
}

#[test]
fn the_keeper_of_commands_cannot_write_the_packs_that_others_use() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let mark = format!("6{}", std::process::id());
    let command = format!("sleep {mark}");
    let answer = server.well("t1", "CreateBuild", &order_with(&stage, &[&command]));
    let id = answer["build_id"].as_str().unwrap();
    let words = |process: &Path| std::fs::read(process.join("cmdline")).unwrap_or_default();
    let processes = || std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let line = format!("sleep\0{mark}\0").into_bytes();
    eventually("the command", || processes().any(|process| words(&process) == line));
    let staging = stage.workshop.path("rootfs/staging");
    let is_keeper = |process: &PathBuf| {
        let place = std::fs::read_link(process.join("cwd"));
        place.is_ok_and(|place| place.starts_with(&staging))
            && words(process).ends_with(b"\0keeper\0")
    };
    let keepers: Vec<PathBuf> = processes().filter(is_keeper).collect();
    assert_eq!(keepers.len(), 1, "{keepers:?}");
    let flags = flags_of_packs(&keepers[0], &stage.workshop.path("cache"));
    assert_eq!(flags.len(), 2, "the packs of two layers: {flags:?}");
    // O_WRONLY and O_RDWR: open(2).
    assert!(flags.iter().all(|flags| flags & 3 == 0), "{flags:?}");
    server.well("t1", "CancelBuild", &json!({"build_id": id}));
    server.wait("t1", id, &["BUILD_STATE_CANCELLED"]);
    eventually("no staged file", || stage.staged().is_empty());
}

/// A build of t1 in which a command waits, and its own process that fetches.
fn waiting(stage: &Stage, server: &Server, mark: &str) -> (String, PathBuf) {
    let command = format!("sleep {mark}");
    let answer = server.well("t1", "CreateBuild", &order_with(stage, &[&command]));
    let words = |process: &Path| std::fs::read(process.join("cmdline")).unwrap_or_default();
    let line = format!("sleep\0{mark}\0").into_bytes();
    eventually("the command", || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes.into_iter().any(|entry| words(&entry.path()) == line)
    });
    let fetches = |process: &PathBuf| words(process).ends_with(b"\0build-child\0");
    let fetching: Vec<PathBuf> = stage.processes().into_iter().filter(fetches).collect();
    let [process] = &fetching[..] else { panic!("{fetching:?}") };
    (answer["build_id"].as_str().unwrap().to_owned(), process.clone())
}

#[test]
fn the_process_of_a_build_with_commands_sees_its_own_files_alone() {
    let Some(stage) = stage() else { return };
    let server = serve(&stage);
    let (id, process) = waiting(&stage, &server, &format!("5{}", std::process::id()));
    assert_eq!(
        stage.staged().len(),
        2,
        "the disk of the commands lies beside: {:?}",
        stage.staged()
    );
    view::sees_its_own_files_alone(&stage, &process, &id);
    for place in ["sys", "dev/loop-control", "var", "root"] {
        assert!(!process.join("root").join(place).exists(), "{place}");
    }
    let status = std::fs::read_to_string(process.join("status")).unwrap();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    assert!(numbers.split_whitespace().count() > 1, "it is in a PID namespace: {numbers}");
    let mine = |name: String| name.parse::<u32>().ok();
    let seen = std::fs::read_dir(process.join("root/proc")).unwrap();
    let seen: Vec<u32> =
        seen.filter_map(|entry| mine(entry.unwrap().file_name().into_string().ok()?)).collect();
    assert_eq!(seen.len(), 2, "itself and who waits for it, and nobody of the commands: {seen:?}");
    server.well("t1", "CancelBuild", &json!({"build_id": id}));
    server.wait("t1", &id, &["BUILD_STATE_CANCELLED"]);
    eventually("no build process", || stage.children() == 0);
    eventually("no staged file", || stage.staged().is_empty());
}

#[test]
fn where_there_is_no_runtime_commands_are_refused_before_there_is_a_build() {
    let stage = Stage::new();
    let server = stage.serve(&[("OCI_RUNTIME", "no-such-runtime")]);
    let (status, error) = server.call("t1", "CreateBuild", &order_with(&stage, &["true"]));
    assert_eq!(status, 400, "{error}");
    let text = error.to_string();
    assert!(text.contains("custom_commands") && text.contains("no commands here"), "{text}");
    let plain = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_eq!(plain["state"], "BUILD_STATE_COMPLETED", "others are built");
}

/// A server on this machine that answers every request with `come in`.
fn neighbour() -> std::net::SocketAddr {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\ncome in\n");
        }
    });
    address
}

#[test]
fn commands_reach_what_the_operator_allows_their_tenant_and_nothing_else() {
    let Some(stage) = stage() else { return };
    let (address, other) = (neighbour(), neighbour());
    let fetch = format!("wget -q -O - http://{address}/");
    let server = stage.serve(&[
        ("OCI_RUNTIME_ACCEPT_VULNERABLE", &accepted()),
        ("COMMANDS_EGRESS_OF_TENANTS", &format!("t1={address}, t1=*")),
        ("EGRESS_ALLOWED_PRIVATE", &address.to_string()),
    ]);
    let build = built(&server, &stage, "t1", &[&format!("{fetch} > got; cat got")]);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let id = build["build_id"].as_str().unwrap();
    assert!(server.log("t1", id).contains("come in"), "{}", server.log("t1", id));
    let again = built(&server, &stage, "t1", &[&format!("{fetch} > got; cat got")]);
    let log = server.log("t1", again["build_id"].as_str().unwrap());
    assert!(log.contains("come in"), "what came from the network is fetched anew: {log}");

    for (place, rule) in [
        (other.to_string(), "no rule lets"),
        ("169.254.169.254".to_owned(), "metadata"),
        ("127.0.0.1".to_owned(), "loopback"),
    ] {
        let commands = ["echo fine", &format!("wget -q -O - http://{place}/")];
        let build = built(&server, &stage, "t1", &commands);
        assert_eq!(build["state"], "BUILD_STATE_FAILED", "{build:#}");
        assert_eq!(build["failure"]["code"], "NETWORK_DENIED", "{build:#}");
        let cause = build["failure"].to_string();
        assert!(cause.contains("command 2") && cause.contains(rule), "{cause}");
        assert!(cause.contains("COMMANDS_EGRESS"), "the remedy: {cause}");
        let log = server.log("t1", build["build_id"].as_str().unwrap());
        assert!(log.contains("refused the network") && log.contains(rule), "{log}");
    }
    // A refusal that a command gets over is no failure of it, nor of the next one.
    let commands = ["wget -q -O - http://169.254.169.254/ || true", "exit 3"];
    let build = built(&server, &stage, "t1", &commands);
    assert_eq!(build["failure"]["code"], "INVALID_SOURCE", "{build:#}");
    // Another tenant has no way out at all, not even to the proxy.
    let commands = ["echo ${http_proxy:-none}; nc -w 2 127.0.0.1 80 < /dev/null || echo alone"];
    let build = built(&server, &stage, "t2", &commands);
    let log = server.log("t2", build["build_id"].as_str().unwrap());
    assert!(log.contains("none") && log.contains("alone"), "{log}");
    assert_eq!(stage.staged(), Vec::<String>::new());
}
