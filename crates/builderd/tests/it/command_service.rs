//! The commands against the service itself: tokens made beside a running server, and a build
//! from the order to the file.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use oci::testing::TestRegistry;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sqlx::Connection as _;

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server that wants tokens, and a registry.
struct Site {
    workshop: Workshop,
    registry: TestRegistry,
    server: Child,
    /// What the server says.
    lines: Receiver<String>,
    address: String,
}

impl Site {
    fn new() -> Self {
        let registry = TestRegistry::start().unwrap();
        let layer =
            Layer::new().directory("bin").file("bin/app", b"app").file("d", &noise(7, 500_000));
        let image = TestImage::new(vec![layer]);
        let config = serde_json::to_vec(&image.config).unwrap();
        for blob in image.blobs.iter().chain([&config]) {
            registry.put_blob(blob.clone());
        }
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = image.manifest(&config);
        registry.put_manifest_bytes("app", Some("latest"), media_type, manifest);
        let workshop = Workshop::new();
        let mut command = workshop.command(&["serve", "--listen", "127.0.0.1:0"]);
        settings(&mut command, &workshop);
        let insecure = "UNKEY_BUILDERD_DOCKER_INSECURE_REGISTRIES";
        command.env(insecure, registry.host()).stderr(Stdio::piped());
        let mut server = command.spawn().unwrap();
        let mut lines = BufReader::new(server.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("no server:\n{said}")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["message"] == "listening" {
                break event["address"].as_str().unwrap().to_owned();
            }
            said.push_str(&line);
        };
        // The server must not wait for a full pipe, nor for whoever reads what it says.
        let (said, lines_said) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| drop(said.send(line)));
        });
        Self { workshop, registry, server, lines: lines_said, address }
    }

    /// A command of the operator, on the server's database.
    fn operate(&self, arguments: &[&str]) -> Output {
        let mut command = self.workshop.command(arguments);
        settings(&mut command, &self.workshop);
        command.output().unwrap()
    }

    /// A command of a user.
    fn ask(&self, token: &str, arguments: &[&str]) -> Output {
        let mut command = self.workshop.command(arguments);
        command.env("UNKEY_BUILDERD_SERVER_ADDRESS", &self.address);
        command.env("UNKEY_BUILDERD_TOKEN", token).env("NO_PROXY", "127.0.0.1");
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn token(&self, arguments: &[&str]) -> String {
        let all = [&["token", "create", "--tenant", "acme"], arguments].concat();
        let output = self.operate(&all);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).trim().to_owned()
    }

    fn image(&self) -> String {
        format!("{}/app:latest", self.registry.host())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn settings(command: &mut Command, workshop: &Workshop) {
    command
        .env("UNKEY_BUILDERD_DATABASE_DATA_DIR", workshop.path("data"))
        .env("UNKEY_BUILDERD_ROOTFS_OUTPUT_DIR", workshop.path("rootfs"))
        .env("UNKEY_BUILDERD_OTEL_PROMETHEUS_ENABLED", "false");
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_build_from_the_order_to_the_file() {
    let site = Site::new();
    let token = site.token(&["--tier", "pro"]);
    let output = site.ask(&token, &["builds", "create", &site.image(), "--follow", "--name", "n"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let id = stdout(&output).trim().to_owned();
    assert!(stderr(&output).contains("completed"), "{}", stderr(&output));
    let output = site.ask(&token, &["builds", "download", &id, "-o", "out.ext4"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let build: Value =
        serde_json::from_str(&stdout(&site.ask(&token, &["builds", "get", &id, "-o", "json"])))
            .unwrap();
    assert_eq!(build["rootfsChecksum"], sha256(&site.workshop.read("out.ext4")), "{build:#}");
    let own = site.workshop.run(&["inspect", "out.ext4", "--cat", "/bin/app"]);
    assert_eq!(own.stdout, b"app");
    let log = stdout(&site.ask(&token, &["builds", "logs", &id]));
    assert!(log.lines().count() > 1, "{log}");
    let tail = stdout(&site.ask(&token, &["builds", "logs", &id, "--from", "1"]));
    assert_eq!(tail.lines().collect::<Vec<_>>(), log.lines().skip(1).collect::<Vec<_>>());
    let list = stdout(&site.ask(&token, &["builds", "list", "--state", "completed"]));
    assert!(list.contains(&id) && list.contains(&site.image()), "{list}");
    let output = site.ask(&token, &["builds", "retry", &id, "--follow"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_ne!(stdout(&output).trim(), id, "another build");
    let quotas = stdout(&site.ask(&token, &["quotas"]));
    assert!(quotas.contains("builds today     2 of 100"), "{quotas}");
    let stats = stdout(&site.ask(&token, &["stats"]));
    assert!(stats.contains("2: 2 completed, 0 failed"), "{stats}");
    let output = site.ask(&token, &["builds", "delete", &id]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = site.ask(&token, &["builds", "get", &id]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
}

#[test]
fn a_failed_build_fails_the_command_that_follows_it() {
    let site = Site::new();
    let token = site.token(&["--tier", "pro"]);
    let missing = format!("{}/app:missing", site.registry.host());
    let output = site.ask(&token, &["builds", "create", &missing, "--follow"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("missing"), "{}", stderr(&output));
}

#[test]
fn a_token_opens_the_door_of_its_tenant_until_it_is_revoked() {
    let site = Site::new();
    let token = site.token(&["--expires", "90d", "--note", "build farm"]);
    assert!(token.starts_with("bld_"), "{token}");
    assert!(site.ask(&token, &["quotas"]).status.success());
    let list = stdout(&site.operate(&["token", "list", "-o", "json"]));
    assert!(!list.contains(&token), "the secret is shown once");
    let tokens: Value = serde_json::from_str(&list).unwrap();
    let row = &tokens[0];
    assert_eq!((&row["tenant"], &row["note"]), (&"acme".into(), &"build farm".into()));
    assert_eq!(row["state"], "valid");
    assert!(row["expiresAt"].is_string() && row["permissions"].as_array().unwrap().len() == 5);
    let id = row["id"].as_str().unwrap();
    assert!(site.operate(&["token", "revoke", id]).status.success());
    let refused = site.ask(&token, &["quotas"]);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    assert!(stdout(&site.operate(&["token", "list"])).contains("revoked"));
    assert_eq!(site.operate(&["token", "revoke", "tok_none"]).status.code(), Some(3));
    let nobody = site.ask("", &["quotas"]);
    assert_eq!(nobody.status.code(), Some(3), "{}", stderr(&nobody));
    assert!(stderr(&nobody).contains("UNKEY_BUILDERD_TOKEN"), "{}", stderr(&nobody));
}

#[test]
fn the_audit_log_tells_who_did_what_and_that_it_is_whole() {
    let site = Site::new();
    let token = site.token(&["--tier", "pro"]);
    assert!(site.ask(&token, &["builds", "create", &site.image()]).status.success());
    assert!(site.operate(&["tenant", "set", "other", "--tier", "pro"]).status.success());
    let copy = site.workshop.path("copy.db");
    assert!(site.operate(&["admin", "backup", copy.to_str().unwrap()]).status.success());
    let export = |arguments: &[&str]| {
        let output = site.operate(&[&["admin", "audit", "export"], arguments].concat());
        let rows = stdout(&output);
        assert!(!rows.contains(&token[4..]), "a secret in the log");
        rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let actions = |rows: &[Value]| {
        rows.iter().map(|row| row["action"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let rows = export(&["-o", "jsonl"]);
    let expected = [
        "tenant.set",
        "token.create",
        "build.create",
        "tenant.set",
        "admin.backup",
        "admin.audit-export",
    ];
    assert_eq!(actions(&rows), expected, "{rows:#?}");
    assert!(rows[1]["subject"].as_str().unwrap().starts_with("command uid="), "{}", rows[1]);
    assert_eq!(rows[2]["subject"], rows[1]["object"], "the token that was made");
    assert_eq!((&rows[2]["tenant"], &rows[2]["outcome"]), (&"acme".into(), &"done".into()));
    assert_eq!(rows[4]["object"], copy.to_str().unwrap());
    let mine = export(&["--tenant", "acme", "--since", "1h"]);
    assert_eq!(actions(&mine), expected[..3]);
    assert!(export(&["--until", "2024-01-01T00:00:00Z"]).is_empty());
    let verified = site.operate(&["admin", "audit", "verify"]);
    assert!(stdout(&verified).contains("as it was written"), "{}", stdout(&verified));
    assert!(stdout(&site.operate(&["admin", "check"])).contains("every rule holds"));
}

#[test]
fn a_token_allows_what_it_names() {
    let site = Site::new();
    let reader = site.token(&["--permission", "build:read"]);
    assert!(site.ask(&reader, &["builds", "list"]).status.success());
    let output = site.ask(&reader, &["builds", "create", &site.image()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("build:create"), "{}", stderr(&output));
    let unknown = site.operate(&["token", "create", "--tenant", "a", "--permission", "build:eat"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("artifact:read"), "{}", stderr(&unknown));
    let over = site.operate(&["token", "create", "--tenant", "a", "--expires", "0s"]);
    assert_eq!(over.status.code(), Some(2), "{}", stderr(&over));
}

#[test]
fn a_tenants_tier_and_limits_are_the_operators() {
    let site = Site::new();
    let token = site.token(&["--tier", "pro"]);
    let daily = |token: &str| {
        let said = stdout(&site.ask(token, &["quotas", "-o", "json"]));
        serde_json::from_str::<Value>(&said).unwrap()["currentLimits"]["maxDailyBuilds"].clone()
    };
    assert_eq!(daily(&token), 100);
    assert!(site.operate(&["tenant", "set", "acme", "--tier", "enterprise"]).status.success());
    assert_eq!(daily(&token), 1000);
    let set = site.operate(&["tenant", "set", "acme", "--daily-builds", "7"]);
    assert!(stdout(&set).contains("own"), "{}", stderr(&set));
    assert_eq!(daily(&token), 7);
    // A new token leaves all that as it is.
    let second = site.token(&[]);
    assert_eq!(daily(&second), 7);
    assert!(site.operate(&["tenant", "set", "acme", "--tier-limits"]).status.success());
    assert_eq!(daily(&token), 1000);
    let list = stdout(&site.operate(&["tenant", "list"]));
    assert!(list.contains("acme") && list.contains("enterprise"), "{list}");
}

#[test]
fn a_hangup_ends_no_server() {
    let site = Site::new();
    let token = site.token(&["--tier", "pro"]);
    kill_process(Pid::from_child(&site.server), Signal::HUP).unwrap();
    while !site.lines.recv_timeout(PATIENCE).expect("a word about it").contains("SIGHUP") {}
    let output = site.ask(&token, &["builds", "list"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Changes a row past the rules.
fn write(workshop: &Workshop, statement: &'static str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let file = workshop.path("data/builderd.db").display().to_string();
        let mut database = sqlx::SqliteConnection::connect(&file).await.unwrap();
        let written = sqlx::query(statement).execute(&mut database).await.unwrap();
        assert_eq!(written.rows_affected(), 1);
        database.close().await.unwrap();
    });
}

#[test]
fn a_tenant_that_cannot_be_read_is_listed_as_that_and_can_be_set_anew() {
    let workshop = Workshop::new();
    let run = |arguments: &[&str]| {
        let mut command = workshop.command(arguments);
        settings(&mut command, &workshop);
        command.output().unwrap()
    };
    for tenant in ["acme", "beta"] {
        assert!(run(&["tenant", "set", tenant, "--daily-builds", "7"]).status.success());
    }
    // A limit that a newer version keeps to.
    write(
        &workshop,
        "UPDATE tenant SET limits = REPLACE(limits, '{', '{\"gpus\":1,') WHERE id = 'acme'",
    );
    let list = run(&["tenant", "list"]);
    assert!(list.status.success(), "{}", stderr(&list));
    let (listed, unread) = ("beta ", "cannot be read: limits cannot be read: unknown field `gpus`");
    let lines = stdout(&list);
    assert!(lines.lines().any(|line| line.starts_with(listed)), "{lines}");
    let last = lines.lines().last().unwrap();
    assert!(last.starts_with("acme ") && last.contains(unread), "{lines}");
    let rows = stdout(&run(&["tenant", "list", "-o", "json"]));
    let rows: Value = serde_json::from_str(&rows).unwrap();
    assert_eq!((&rows[0]["tenant"], &rows[1]["tenant"]), (&"beta".into(), &"acme".into()));
    assert!(rows[1]["unreadable"].as_str().unwrap().contains("gpus"), "{rows}");

    // No limit is dropped by a command that does not know it.
    let refused = run(&["tenant", "set", "acme", "--daily-builds", "8"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("--tier-limits"), "{}", stderr(&refused));
    assert!(run(&["tenant", "set", "acme", "--tier", "pro", "--tier-limits"]).status.success());
    let lines = stdout(&run(&["tenant", "list"]));
    assert!(!lines.contains("cannot be read") && lines.contains("acme"), "{lines}");
}

#[test]
fn a_command_that_looks_at_a_database_makes_none() {
    let workshop = Workshop::new();
    let (data, empty) = (workshop.path("data"), workshop.path("empty"));
    let run = |arguments: &[&str]| {
        let mut command = workshop.command(arguments);
        settings(&mut command, &workshop);
        command.output().unwrap()
    };
    std::fs::create_dir(&empty).unwrap();
    let from = empty.to_str().unwrap();
    let to = "postgres://nobody@127.0.0.1:1/none";
    for arguments in [
        &["token", "list"][..],
        &["token", "revoke", "x"],
        &["tenant", "list"],
        &["admin", "check"],
        &["admin", "audit", "verify"],
        &["admin", "audit", "export"],
        &["admin", "rotate-key", "acme"],
        &["admin", "destroy-keys", "acme"],
        &["admin", "forget-key"],
        &["admin", "migrate-store", "--from", from, "--to", to],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("there is no database"), "{}", stderr(&output));
        assert!(!data.exists() && std::fs::read_dir(&empty).unwrap().next().is_none());
    }
    // Who prepares the first start makes it. Where a flag stands makes no difference.
    assert!(run(&["tenant", "set", "acme", "--tier", "pro"]).status.success());
    let first = stdout(&run(&["tenant", "--dev", "list"]));
    assert_eq!(stdout(&run(&["tenant", "list", "--dev"])), first);
    let (head, row) = first.trim_end().split_once('\n').unwrap();
    assert_eq!(row.split_whitespace().next(), Some("acme"), "{first}");
    assert_eq!(row.find("pro"), head.find("TIER"), "columns stand below each other: {first}");
    assert!(stdout(&run(&["admin", "check"])).contains("every rule holds"));
}

#[test]
fn a_list_of_tokens_tells_whose_they_are_and_until_when() {
    let workshop = Workshop::new();
    let run = |arguments: &[&str]| {
        let mut command = workshop.command(arguments);
        settings(&mut command, &workshop);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let whose = ["--customer", "team-1", "--organization", "group-1"];
    run(&[&["token", "create", "--tenant", "acme", "--expires", "90d"], &whose[..]].concat());
    run(&["token", "create", "--tenant", "beta"]);
    let all: Value = serde_json::from_str(&run(&["token", "list", "-o", "json"])).unwrap();
    let expiry = |tenant: &str| {
        let row = all.as_array().unwrap().iter().find(|row| row["tenant"] == tenant).unwrap();
        row["expiresAt"].as_str().unwrap_or("never").to_owned()
    };
    let lines = run(&["token", "list"]);
    let head = lines.lines().next().unwrap();
    for (tenant, customer, organization) in [("acme", "team-1", "group-1"), ("beta", "-", "-")] {
        let row = lines.lines().find(|line| line.contains(tenant)).unwrap();
        let values =
            [("CUSTOMER", customer), ("ORGANIZATION", organization), ("EXPIRES", &expiry(tenant))];
        for (column, value) in values {
            let place = head.find(&format!(" {column} ")).expect("a column");
            assert!(row[place..].starts_with(&format!(" {value} ")), "{column}: {lines}");
        }
    }
}

#[test]
fn a_database_that_lets_nobody_in_is_named_with_the_cause_and_without_the_password() {
    let workshop = Workshop::new();
    let list = |url: &str| {
        let mut command = workshop.command(&["token", "list"]);
        settings(&mut command, &workshop);
        command.env("UNKEY_BUILDERD_DATABASE_URL", url).output().unwrap()
    };
    let refused = list("postgres://me:canary@127.0.0.1:1/none");
    let said = stderr(&refused);
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("127.0.0.1:1") && said.contains("Connection refused"), "{said}");
    assert!(!said.contains("canary") && !said.contains("pool"), "{said}");
    let wrong = list("postgres://me:canary@127.0.0.1:99999/none");
    let said = stderr(&wrong);
    assert_eq!(wrong.status.code(), Some(2), "{said}");
    assert!(said.contains("UNKEY_BUILDERD_DATABASE_URL") && said.contains("port"), "{said}");
    assert!(!said.contains("canary"), "{said}");
    let mut command = workshop.command(&["tenant", "set", "acme", "--tier", "pro"]);
    settings(&mut command, &workshop);
    assert!(command.output().unwrap().status.success());
    let from = workshop.path("data").display().to_string();
    let to = "postgres://me:canary@127.0.0.1:99999/none";
    let wrong = workshop.run(&["admin", "migrate-store", "--from", &from, "--to", to]);
    let said = stderr(&wrong);
    assert_eq!(wrong.status.code(), Some(2), "{said}");
    assert!(said.contains("URL") && said.contains("port") && !said.contains("canary"), "{said}");
}

#[test]
fn a_directory_that_cannot_be_made_is_told_with_the_setting_that_names_it() {
    let workshop = Workshop::new();
    for name in ["DATABASE_DATA_DIR", "ROOTFS_OUTPUT_DIR", "CACHE_DIR", "WORKSPACE_DIR"] {
        let mut command = workshop.command(&["serve", "--listen", "127.0.0.1:0", "--dev"]);
        settings(&mut command, &workshop);
        command.env_remove("UNKEY_BUILDERD_CACHE_DIR");
        let output = command.env(format!("UNKEY_BUILDERD_{name}"), "/proc/x").output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains("/proc/x") && said.contains(name), "{name}: {said}");
    }
}
