//! Stories about operators who have a PostgreSQL, or a key that is not the right one: every
//! command as a process of its own, and the servers that live with what the commands did.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Output, Stdio};

use oci::testing::TestRegistry;
use serde_json::Value;

use crate::support::postgres::Postgres;
use crate::support::{Workshop, stderr};

/// Settings by their short names.
type Settings<'a> = &'a [(&'a str, &'a str)];

/// A server that wants tokens.
struct Node {
    child: Child,
    address: String,
}

impl Node {
    /// Starts a server whose files lie in `home` below the workshop; what it said when it does
    /// not start.
    fn start(workshop: &Workshop, home: &str, settings: Settings<'_>) -> Result<Self, String> {
        let mut command = workshop.command(&["serve", "--listen", "127.0.0.1:0"]);
        command
            .env("UNKEY_BUILDERD_DATABASE_DATA_DIR", workshop.path(home).join("data"))
            .env("UNKEY_BUILDERD_ROOTFS_OUTPUT_DIR", workshop.path(home).join("rootfs"))
            .env("UNKEY_BUILDERD_OTEL_PROMETHEUS_ENABLED", "false")
            .envs(settings.iter().map(|(name, value)| (format!("UNKEY_BUILDERD_{name}"), value)))
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let address = loop {
            let Some(line) = lines.next() else {
                assert!(!child.wait().unwrap().success(), "it ended well: {said}");
                return Err(said);
            };
            let line = line.unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["message"] == "listening" {
                break event["address"].as_str().unwrap().to_owned();
            }
            said.push_str(&line);
            said.push('\n');
        };
        // The server must not wait for a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Ok(Self { child, address })
    }

    /// A command of a user.
    fn ask(&self, workshop: &Workshop, token: &str, arguments: &[&str]) -> Output {
        let mut command = workshop.command(arguments);
        command.env("UNKEY_BUILDERD_SERVER_ADDRESS", &self.address);
        command.env("UNKEY_BUILDERD_TOKEN", token).env("NO_PROXY", "127.0.0.1");
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command of the operator.
fn operate(workshop: &Workshop, home: &str, settings: Settings<'_>, arguments: &[&str]) -> Output {
    let mut command = workshop.command(arguments);
    command
        .env("UNKEY_BUILDERD_DATABASE_DATA_DIR", workshop.path(home).join("data"))
        .envs(settings.iter().map(|(name, value)| (format!("UNKEY_BUILDERD_{name}"), value)));
    command.stdin(Stdio::null()).output().unwrap()
}

/// What it printed; it must have ended well.
fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn an_operators_commands_work_on_postgresql() {
    let Some(postgres) = Postgres::start() else { return };
    let (workshop, url) = (Workshop::new(), postgres.database());
    let settings = [("DATABASE_TYPE", "postgres"), ("DATABASE_URL", url.as_str())];
    let run = |arguments: &[&str]| operate(&workshop, "node", &settings, arguments);
    said(&run(&["tenant", "set", "acme", "--tier", "pro", "--daily-builds", "7"]));
    let token = said(&run(&["token", "create", "--tenant", "acme", "--note", "farm"]));
    let token = token.trim();
    assert!(token.starts_with("bld_"), "{token}");
    assert!(said(&run(&["tenant", "list"])).contains("acme"));
    let list: Value = serde_json::from_str(&said(&run(&["token", "list", "-o", "json"]))).unwrap();
    let id = list[0]["id"].as_str().unwrap();
    assert!(said(&run(&["admin", "check"])).contains("every rule holds"));
    for arguments in [["admin", "backup", "file"], ["admin", "restore", "file"]] {
        let refused = run(&arguments);
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        assert!(stderr(&refused).contains("pg_dump"), "{}", stderr(&refused));
    }

    let node = Node::start(&workshop, "node", &settings).unwrap();
    let quotas = said(&node.ask(&workshop, token, &["quotas"]));
    assert!(quotas.contains("builds today     0 of 7"), "{quotas}");
    // Beside a server, too, and it heeds what was done.
    said(&run(&["token", "revoke", id]));
    let refused = node.ask(&workshop, token, &["quotas"]);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    said(&run(&["admin", "check"]));
    node.stop();
}

#[test]
fn a_service_moves_from_sqlite_to_postgresql() {
    let Some(postgres) = Postgres::start() else { return };
    let (workshop, url) = (Workshop::new(), postgres.database());
    let sqlite = |arguments: &[&str]| operate(&workshop, "old", &[], arguments);
    let registry = TestRegistry::start().unwrap();
    let host = registry.host();
    let insecure = [("DOCKER_INSECURE_REGISTRIES", host.as_str())];
    let node = Node::start(&workshop, "old", &insecure).unwrap();
    let create = ["token", "create", "--tenant", "acme", "--tier", "pro"];
    let token = said(&sqlite(&create)).trim().to_owned();
    // The registry does not have it: the build fails, with rows for its events and its log.
    let image = format!("{host}/app:missing");
    let build = node.ask(&workshop, &token, &["builds", "create", &image, "--follow"]);
    assert!(!build.status.success());
    let id = String::from_utf8(build.stdout).unwrap().trim().to_owned();
    let migrate = |to: &str| {
        let from = workshop.path("old/data").display().to_string();
        sqlite(&["admin", "migrate-store", "--from", &from, "--to", to])
    };
    let busy = migrate(&url);
    let told = stderr(&busy);
    assert!(told.contains("a server uses it") && told.contains("hint: stop the server"), "{told}");
    node.stop();
    let copied = said(&migrate(&url));
    assert!(copied.contains("1 rows of build\n") && copied.contains("1 rows of api_token"));
    assert!(stderr(&migrate(&url)).contains("copy to an empty database"));

    let mut settings = vec![("DATABASE_TYPE", "postgres"), ("DATABASE_URL", url.as_str())];
    // The key went along by name: a node that would make its own is stopped in time.
    let refused = Node::start(&workshop, "new", &settings).map(|_| ()).unwrap_err();
    assert!(
        refused.contains("there is none") && refused.contains("copy the key file"),
        "{refused}"
    );
    let key = workshop.path("old/data/master.key").display().to_string();
    settings.push(("MASTER_KEY_FILE", &key));
    let nodes = ["new", "other"].map(|home| Node::start(&workshop, home, &settings).unwrap());
    for node in nodes {
        let list = said(&node.ask(&workshop, &token, &["builds", "list"]));
        assert!(list.contains(&id), "{list}");
        node.stop();
    }
    assert!(said(&operate(&workshop, "new", &settings, &["admin", "check"])).contains("holds"));
}

#[test]
fn nodes_of_a_fleet_have_one_key() {
    let Some(postgres) = Postgres::start() else { return };
    let (workshop, url) = (Workshop::new(), postgres.database());
    let settings = [("DATABASE_TYPE", "postgres"), ("DATABASE_URL", url.as_str())];
    let first = Node::start(&workshop, "one", &settings).unwrap();
    let refused = Node::start(&workshop, "two", &settings).map(|_| ()).unwrap_err();
    let path = workshop.path("two/data/master.key");
    assert!(refused.contains(path.to_str().unwrap()), "{refused}");
    assert!(refused.contains("copy the key file") && refused.contains("forget-key"), "{refused}");
    assert!(!path.exists(), "a key that is of no use is not made");
    std::fs::copy(workshop.path("one/data/master.key"), &path).unwrap();
    Node::start(&workshop, "two", &settings).unwrap().stop();
    first.stop();
}

#[test]
fn a_lost_key_is_replaced_on_purpose_alone() {
    let workshop = Workshop::new();
    let key = workshop.path("home/data/master.key");
    Node::start(&workshop, "home", &[]).unwrap().stop();
    let bytes = std::fs::read(&key).unwrap();
    std::fs::write(&key, [7; 32]).unwrap();
    let refused = Node::start(&workshop, "home", &[]).map(|_| ()).unwrap_err();
    assert!(refused.contains(key.to_str().unwrap()), "{refused}");
    assert!(refused.contains("builderd admin forget-key"), "{refused}");
    // The right key opens again, and no server loses its key while it runs.
    std::fs::write(&key, &bytes).unwrap();
    let node = Node::start(&workshop, "home", &[]).unwrap();
    let forget = || operate(&workshop, "home", &[], &["admin", "forget-key"]);
    let refused = stderr(&forget());
    assert!(refused.contains("a server uses it"), "{refused}");
    assert!(refused.contains("stop the server") && !refused.contains("set UNKEY"), "{refused}");
    node.stop();
    std::fs::remove_file(&key).unwrap();
    Node::start(&workshop, "home", &[]).map(|_| ()).unwrap_err();
    assert!(said(&forget()).contains("no build waits"));
    Node::start(&workshop, "home", &[]).unwrap().stop();
    assert_ne!(std::fs::read(&key).unwrap(), bytes);
}

#[test]
fn a_backup_is_made_and_brought_back_by_command() {
    let workshop = Workshop::new();
    let node = Node::start(&workshop, "home", &[]).unwrap();
    let token = said(&operate(&workshop, "home", &[], &["token", "create", "--tenant", "acme"]));
    said(&operate(&workshop, "home", &[], &["admin", "backup", "backup.db"]));
    node.stop();
    said(&operate(&workshop, "other", &[], &["admin", "restore", "backup.db"]));
    let key = "data/master.key";
    std::fs::copy(workshop.path("home").join(key), workshop.path("other").join(key)).unwrap();
    let node = Node::start(&workshop, "other", &[]).unwrap();
    said(&node.ask(&workshop, token.trim(), &["quotas"]));
    node.stop();
}
