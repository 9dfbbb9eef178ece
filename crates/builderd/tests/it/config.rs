//! What the settings are, as an operator meets them: `builderd config`, and a start that is
//! refused.

use std::process::Output;

use crate::support::{Workshop, stderr};

fn config(workshop: &Workshop, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut all = vec!["config"];
    all.extend(arguments);
    let mut command = workshop.command(&all);
    command.env_remove("UNKEY_BUILDERD_CACHE_DIR");
    command.envs(variables.iter().map(|(name, value)| (format!("UNKEY_BUILDERD_{name}"), value)));
    command.output().unwrap()
}

fn line(output: &Output, name: &str) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let beginning = format!("UNKEY_BUILDERD_{name}=");
    let line = text.lines().find(|line| line.starts_with(&beginning));
    line.unwrap_or_else(|| panic!("{name} in\n{text}")).to_owned()
}

#[test]
fn each_value_says_where_it_comes_from() {
    let workshop = Workshop::new();
    std::fs::write(workshop.path("b.toml"), "port = 1\nrate_limit = 7\nlog_level = 'warn'\n")
        .unwrap();
    let variables = [("RATE_LIMIT", "8"), ("DEFAULT_TENANT_TIER", "pro")];
    let output = config(&workshop, &["--config", "b.toml", "--origin"], &variables);
    assert!(line(&output, "PORT").ends_with("# b.toml: port"));
    assert!(line(&output, "RATE_LIMIT").starts_with("UNKEY_BUILDERD_RATE_LIMIT=8 "));
    assert!(line(&output, "RATE_LIMIT").ends_with("# UNKEY_BUILDERD_RATE_LIMIT"));
    assert!(line(&output, "TENANT_DEFAULT_TIER").ends_with("# UNKEY_BUILDERD_DEFAULT_TENANT_TIER"));
    assert!(line(&output, "LOG_LEVEL").contains("=warn"));
    assert!(line(&output, "BUILD_TIMEOUT").ends_with("# default"));
    let output = config(&workshop, &[], &[("CONFIG", "b.toml")]);
    assert_eq!(line(&output, "PORT"), "UNKEY_BUILDERD_PORT=1");
}

#[test]
fn a_flag_is_before_everything_else() {
    let workshop = Workshop::new();
    let output = config(&workshop, &["--dev", "--origin"], &[("DEV", "false")]);
    assert!(line(&output, "DEV").starts_with("UNKEY_BUILDERD_DEV=true "), "{output:?}");
    assert!(line(&output, "DEV").ends_with("# --dev"));
    assert!(line(&output, "ADDRESS").contains("=127.0.0.1 "));
}

#[test]
fn secrets_are_stars() {
    let workshop = Workshop::new();
    let variables = [
        ("DATABASE_URL", "postgres://me:canary-1@db/builds"),
        ("STORAGE_BACKEND", "s3"),
        ("S3_BUCKET", "b"),
        ("S3_ACCESS_KEY_ID", "key"),
        ("S3_SECRET_ACCESS_KEY", "canary-2"),
    ];
    let output = config(&workshop, &["--origin"], &variables);
    assert!(line(&output, "DATABASE_URL").contains("=*** "));
    assert!(line(&output, "S3_SECRET_ACCESS_KEY").contains("=*** "));
    assert!(!String::from_utf8_lossy(&output.stdout).contains("canary"));
}

#[test]
fn the_start_is_refused_with_every_problem_by_name() {
    let workshop = Workshop::new();
    let variables = [
        ("UNKEY_BUILDERD_ASSETMANAGER_ENABLED", "true"),
        ("UNKEY_BUILDERD_BUILD_TIMEOUT", "15"),
        ("UNKEY_BUILDERD_PROT", "8082"),
        ("UNKEY_BUILDERD_STORAGE_MAX_SIZE_GB", "100"),
        ("UNKEY_BUILDERD_MAX_STORAGE_SIZE", "1TB"),
    ];
    for command in [&["serve"][..], &["config"], &["token", "list"]] {
        let output = workshop.command(command).envs(variables).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{command:?}: {said}");
        for part in [
            "UNKEY_BUILDERD_ASSETMANAGER_ENABLED is `true`: unimplemented",
            "UNKEY_BUILDERD_BUILD_TIMEOUT is `15`, expected a duration",
            "UNKEY_BUILDERD_PROT is no setting: did you mean UNKEY_BUILDERD_PORT?",
            "UNKEY_BUILDERD_STORAGE_MAX_SIZE_GB",
            "two names of one setting",
            "4 settings cannot be used",
        ] {
            assert!(said.contains(part), "{command:?}: no {part:?} in\n{said}");
        }
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let workshop = Workshop::new();
    let output = config(&workshop, &["--config", "nowhere.toml"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("nowhere.toml"), "{}", stderr(&output));
}

#[test]
fn development_mode_is_not_for_the_network() {
    let workshop = Workshop::new();
    let output = workshop.run(&["serve", "--dev", "--listen", "0.0.0.0:0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("development mode"), "{}", stderr(&output));
}

#[test]
fn settings_are_explained() {
    let workshop = Workshop::new();
    let output = config(&workshop, &["--explain", "retention"], &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("UNKEY_BUILDERD_STORAGE_RETENTION_DAYS"), "{text}");
    assert!(text.contains("default 30"), "{text}");
    assert_eq!(config(&workshop, &["--explain", "xyzzy"], &[]).status.code(), Some(2));
}

/// The values of a directive of the unit in `contrib`.
fn of_the_unit(directive: &str) -> Vec<String> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../../contrib/systemd/builderd.service");
    let text = std::fs::read_to_string(unit).unwrap();
    let values = text.lines().filter_map(|line| line.strip_prefix(directive)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

#[test]
fn the_unit_of_systemd_fits_the_server() {
    let workshop = Workshop::new();
    let variables = of_the_unit("Environment");
    let variables: Vec<(&str, &str)> = variables
        .iter()
        .map(|variable| variable.strip_prefix("UNKEY_BUILDERD_").unwrap().split_once('=').unwrap())
        .collect();
    let shown = config(&workshop, &[], &variables);
    for (name, value) in variables {
        assert_eq!(line(&shown, name), format!("UNKEY_BUILDERD_{name}={value}"));
        if name == "ACCEPT_MISSING_WALLS" {
            // No more than who is not root must do without.
            assert_eq!((value, of_the_unit("User")), ("own-users", vec!["builderd".to_owned()]));
            continue;
        }
        // What StateDirectory= makes, for the user that runs the server.
        assert!(value.starts_with("/var/lib/builderd/"), "{name}: nobody may write to {value}");
    }
    let elsewhere = "/opt/builderd";
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(!shown.contains(elsewhere), "a directory that nobody may write to:\n{shown}");
    // The server alone is told to stop, and one build that needs too much is not the end.
    assert_eq!(of_the_unit("KillMode"), ["mixed"]);
    assert_eq!(of_the_unit("OOMPolicy"), ["continue"]);
    let start = of_the_unit("ExecStart").remove(0);
    let start = start.replace("/etc/builderd/builderd.toml", "missing.toml");
    let arguments: Vec<&str> = start.split(' ').skip(1).collect();
    let missing = workshop.run(&arguments);
    let code = missing.status.code().map(|code| code.to_string());
    assert!(stderr(&missing).contains("missing.toml"), "{}", stderr(&missing));
    assert_eq!(code, of_the_unit("RestartPreventExitStatus").pop());
}
