//! What settings come to, and which are refused.

use secrecy::ExposeSecret as _;

use super::*;

fn read(variables: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let owned = |(name, text): &(&str, &str)| (format!("{PREFIX}{name}"), (*text).to_owned());
    let environment = variables.iter().map(owned).collect();
    let sources = Sources { environment, ..Sources::default() };
    Config::load(&sources).map(|(_, config)| config).map_err(|error| error.problems)
}

fn refused(variables: &[(&str, &str)], word: &str) {
    let problems = read(variables).expect_err("should be refused");
    assert!(problems.iter().any(|problem| problem.contains(word)), "{word}: {problems:?}");
}

#[test]
fn nothing_set_gives_the_documented_defaults() {
    let config = read(&[]).unwrap();
    assert_eq!(config.listen.to_string(), "0.0.0.0:8082");
    assert!(!config.dev);
    assert_eq!(config.shutdown_timeout, Duration::from_secs(15));
    assert_eq!(config.health_rate_per_sec, 100);
    assert_eq!((config.max_concurrent_builds, config.build_timeout.as_secs()), (5, 900));
    assert_eq!(config.data_dir, Path::new("/opt/builderd/data"));
    assert_eq!(config.master_key, KeyPlace::File("/opt/builderd/data/master.key".into()));
    assert_eq!(config.storage.cache_dir, Path::new("/opt/builderd/workspace/cache"));
    assert_eq!((config.storage.max_bytes, config.storage.retention_days), (100 << 30, 30));
    assert_eq!(config.storage.cache_max_bytes, 50 << 30);
    assert!(matches!(config.storage.backend, StorageBackend::Local));
    assert!(matches!(config.database, DatabaseConfig::Sqlite));
    assert_eq!(config.docker.image_bytes_max, 5 << 30);
    assert_eq!(config.docker.pull_timeout, Duration::from_secs(600));
    assert_eq!(config.telemetry.otlp, None);
    let prometheus = config.telemetry.prometheus.map(|address| address.to_string());
    assert_eq!(prometheus.as_deref(), Some("127.0.0.1:9466"));
    let free = read(&[("PORT", "0"), ("OTEL_PROMETHEUS_PORT", "0")]).unwrap();
    assert_eq!(free.telemetry.prometheus.map(|address| address.port()), Some(0));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.tenants.limits, Tier::ALL.map(Tier::limits));
}

#[test]
fn development_mode_stays_on_this_machine() {
    let config = read(&[("DEV", "true")]).unwrap();
    assert!(config.dev && config.listen.ip().is_loopback());
    assert_eq!(config.data_dir, Path::new("builderd-data/data"));
    assert!(read(&[("DEV", "1"), ("ADDRESS", "::1")]).is_ok());
    refused(&[("DEV", "1"), ("HOST", "0.0.0.0")], "development mode");
}

#[test]
fn the_audit_log_is_always_written_and_kept_for_a_year() {
    assert_eq!(read(&[]).unwrap().audit_retention_days, 365);
    let kept = read(&[("ENABLE_AUDIT_LOGGING", "true"), ("AUDIT_RETENTION_DAYS", "30")]);
    assert_eq!(kept.unwrap().audit_retention_days, 30);
    refused(&[("ENABLE_AUDIT_LOGGING", "false")], "always written");
    refused(&[("AUDIT_LOG_FILE", "/var/log/audit")], "admin audit export");
    refused(&[("AUDIT_RETENTION_DAYS", "0")], "AUDIT_RETENTION_DAYS");
}

#[test]
fn missing_walls_are_accepted_by_name_alone() {
    const NAME: &str = "ACCEPT_MISSING_WALLS";
    assert_eq!(read(&[]).unwrap().accept_missing_walls, []);
    let two = read(&[(NAME, "cgroup, landlock")]).unwrap().accept_missing_walls;
    assert_eq!(two, [Wall::Cgroup, Wall::Landlock]);
    refused(&[(NAME, "cgroup,moat")], "\"moat\" is none of user-namespace, ");
}

#[test]
fn holes_of_the_runtime_are_accepted_by_name_alone() {
    const NAME: &str = "OCI_RUNTIME_ACCEPT_VULNERABLE";
    assert_eq!(read(&[]).unwrap().oci_runtime, "runc");
    let one = read(&[(NAME, "CVE-2025-31133")]).unwrap().accept_vulnerable;
    assert_eq!(one, ["CVE-2025-31133"]);
    refused(&[(NAME, "all")], "\"all\" is none of CVE-2025-31133, ");
}

#[test]
fn the_master_key_is_a_named_file_or_a_credential_or_our_own() {
    let directory = tempfile::tempdir().unwrap();
    let place = |file: &str| {
        let name = format!("{PREFIX}MASTER_KEY_FILE");
        let credentials = Some(directory.path().to_owned());
        let environment = vec![(name, file.to_owned())];
        let sources = Sources { environment, credentials, ..Sources::default() };
        Config::load(&sources).unwrap().1.master_key
    };
    assert_eq!(place(""), KeyPlace::File("/opt/builderd/data/master.key".into()));
    let credential = directory.path().join("builderd-master-key");
    std::fs::write(&credential, [7; 32]).unwrap();
    assert_eq!(place(""), KeyPlace::Credential(credential));
    assert_eq!(place("/etc/key"), KeyPlace::File("/etc/key".into()));
}

#[test]
fn encryption_is_for_some_tiers_or_for_all() {
    assert!(!read(&[]).unwrap().storage.encrypts_all);
    assert!(read(&[("ENABLE_ENCRYPTION", "true")]).unwrap().storage.encrypts_all);
    let required = Tier::ALL.map(Tier::requires_encryption);
    assert_eq!(required, [false, false, true, true]);
}

#[test]
fn pages_of_other_origins_are_let_in_by_name() {
    let origins = |variables: &[(&str, &str)]| read(variables).unwrap().cors_allowed_origins;
    const NAME: &str = "CORS_ALLOWED_ORIGINS";
    assert_eq!(origins(&[]), Origins::NONE);
    let two = (NAME, "https://app.example.com, http://localhost:5173");
    let Origins::Named(named) = origins(&[two]) else { panic!("they are named") };
    assert_eq!(named, ["https://app.example.com", "http://localhost:5173"]);
    assert_eq!(origins(&[(NAME, "*")]), Origins::Any);
    refused(&[(NAME, "https://app.example.com/")], "UNKEY_BUILDERD_CORS_ALLOWED_ORIGINS");
    refused(&[(NAME, "*"), ("DEV", "true")], "development mode");
    assert_eq!(origins(&[two, ("DEV", "true")]), Origins::Named(named));
}

#[test]
fn no_setting_is_read_by_nobody() {
    let all = [
        &[][..],
        &[("STORAGE_BACKEND", "s3"), ("S3_BUCKET", "b")],
        &[("STORAGE_BACKEND", "gcs"), ("GCS_BUCKET", "b")],
        &[("DATABASE_TYPE", "postgres")],
    ];
    let mut unread: Option<std::collections::BTreeSet<&str>> = None;
    for variables in all {
        let owned = |(name, text): &(&str, &str)| (format!("{PREFIX}{name}"), (*text).into());
        let environment = variables.iter().map(owned).collect();
        let sources = Sources { environment, ..Sources::default() };
        let (settings, _) = Config::load(&sources).unwrap();
        let these = settings.unread();
        unread = Some(match unread {
            Some(unread) => unread.intersection(&these).copied().collect(),
            None => these,
        });
    }
    let unread: Vec<&str> = unread.unwrap().into_iter().collect();
    let elsewhere: Vec<&str> = {
        let others = table::all()
            .filter(|setting| setting.is_refused() || setting.reader != table::Reader::Server);
        // Read by the command that reads the file.
        let mut names: Vec<&str> = others.map(|setting| setting.name).chain(["CONFIG"]).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(unread, elsewhere);
}

#[test]
fn the_limits_of_the_default_tier_can_be_changed() {
    let config = read(&[
        ("TENANT_DEFAULT_TIER", "pro"),
        ("TENANT_DEFAULT_MAX_MEMORY_BYTES", "2147483648"),
        ("TENANT_DEFAULT_MAX_CPU_CORES", "7"),
        ("TENANT_DEFAULT_MAX_DISK_BYTES", "10737418240"),
        ("TENANT_DEFAULT_TIMEOUT_SECONDS", "901"),
        ("TENANT_DEFAULT_MAX_CONCURRENT_BUILDS", "4"),
        ("TENANT_DEFAULT_MAX_DAILY_BUILDS", "0"),
        ("TENANT_DEFAULT_MAX_STORAGE_BYTES", "50GB"),
        ("TENANT_DEFAULT_MAX_BUILD_TIME_MINUTES", "31"),
    ])
    .unwrap();
    let [free, pro, enterprise, dedicated] = config.tenants.limits;
    assert_eq!(config.tenants.default_tier, Tier::Pro);
    assert_eq!((pro.cpu_cores, pro.timeout_secs, pro.concurrent_builds), (7, 901, 4));
    assert_eq!((pro.daily_builds, pro.build_minutes), (0, 31));
    assert_eq!((pro.memory_bytes, pro.storage_bytes), (2 << 30, 50 << 30));
    assert_eq!(free, Tier::Free.limits());
    assert_eq!(enterprise, Tier::Enterprise.limits());
    assert_eq!(dedicated, Tier::Dedicated.limits());
}

#[test]
fn object_stores_say_what_they_need() {
    refused(&[("STORAGE_BACKEND", "s3")], "S3_BUCKET");
    refused(&[("STORAGE_BACKEND", "gcs")], "GCS_BUCKET");
    refused(&[("STORAGE_BACKEND", "minio"), ("MINIO_BUCKET", "b")], "S3_ENDPOINT");
    let plain = ("MINIO_ENDPOINT", "http://127.0.0.1:9000");
    let minio = [("STORAGE_BACKEND", "minio"), ("MINIO_BUCKET", "b"), plain];
    refused(&minio, "S3_ALLOW_HTTP");
    refused(&[minio[0], minio[1], ("S3_ENDPOINT", "minio:9000")], "expected a URL");
    let allowed = ("S3_ALLOW_HTTP", "true");
    refused(&[minio[0], minio[1], plain, allowed, ("MINIO_ACCESS_KEY", "a")], "set both");
    let keys = [("MINIO_ACCESS_KEY", "a"), ("MINIO_SECRET_KEY", "s")];
    let config = read(&[minio[0], minio[1], plain, allowed, keys[0], keys[1]]).unwrap();
    let StorageBackend::S3 { bucket, endpoint, secret, allow_http, .. } = config.storage.backend
    else {
        panic!("{:?}", config.storage.backend)
    };
    assert_eq!((bucket.as_str(), endpoint.as_deref()), ("b", Some("http://127.0.0.1:9000")));
    assert!(allow_http && secret.is_some_and(|secret| secret.expose_secret() == "s"));
}

#[test]
fn what_another_store_or_database_is_told_is_refused_by_name() {
    let (s3, gcs) = (("STORAGE_BACKEND", "s3"), ("STORAGE_BACKEND", "gcs"));
    let (bucket_s3, bucket_gcs) = (("S3_BUCKET", "b"), ("GCS_BUCKET", "b"));
    let keys = [("S3_ACCESS_KEY_ID", "k"), ("S3_SECRET_ACCESS_KEY", "canary")];
    let others =
        [("S3_REGION", "eu-west-1"), ("S3_ENDPOINT", "https://h"), ("S3_ALLOW_HTTP", "true")];
    for one in others.into_iter().chain(keys).chain([bucket_s3]) {
        refused(&[one], one.0);
        refused(&[("STORAGE_BACKEND", "local"), one], one.0);
        refused(&[gcs, bucket_gcs, one], one.0);
    }
    for one in [bucket_gcs, ("GCS_CREDENTIALS_FILE", "/key")] {
        refused(&[one], one.0);
        refused(&[s3, bucket_s3, one], one.0);
    }
    let prefix = ("STORAGE_PREFIX", "some/where");
    refused(&[prefix], "STORAGE_PREFIX");
    assert!(read(&[s3, bucket_s3, prefix]).is_ok() && read(&[gcs, bucket_gcs, prefix]).is_ok());
    let secret = ("DATABASE_PASSWORD", "canary");
    for one in [
        ("DATABASE_HOST", "db"),
        ("DATABASE_PORT", "5433"),
        ("DATABASE_NAME", "builds"),
        ("DATABASE_USERNAME", "me"),
        secret,
        ("DATABASE_SSL_MODE", "require"),
    ] {
        refused(&[one], one.0);
        refused(&[("DATABASE_TYPE", "sqlite"), one], one.0);
        assert!(read(&[("DATABASE_TYPE", "postgres"), one]).is_ok(), "{}", one.0);
    }
    let problems = read(&[keys[1], secret]).unwrap_err().join("");
    assert!(problems.contains("DATABASE_TYPE is `sqlite`"), "{problems}");
    assert!(!problems.contains("canary"), "{problems}");
    // By the name that was written.
    refused(&[("MINIO_BUCKET", "b")], "MINIO_BUCKET");
}

#[test]
fn what_stands_there_anyway_may_be_said_of_a_store_or_database_that_is_not_used() {
    let config = read(&[
        ("S3_REGION", "us-east-1"),
        ("S3_ALLOW_HTTP", "false"),
        ("S3_BUCKET", ""),
        ("DATABASE_HOST", "localhost"),
        ("DATABASE_PORT", "5432"),
        ("DATABASE_NAME", "builderd"),
        ("DATABASE_SSL_MODE", "disable"),
        ("DATABASE_MAX_CONNECTIONS", "7"),
    ])
    .unwrap();
    assert!(matches!(config.database, DatabaseConfig::Sqlite));
    assert!(matches!(config.storage.backend, StorageBackend::Local));
}

#[test]
fn an_address_of_postgresql_that_is_none_is_refused_with_its_setting() {
    for (url, word) in [
        ("postgres://me:canary@h:99999/n", "invalid port number"),
        ("postgres://me:canary@/n", "host"),
        ("postgres://me:canary@h/n?sslmode=maybe", "maybe"),
        ("postgresql://me:canary/1@h/n", "port"),
    ] {
        let problems = read(&[("DATABASE_URL", url)]).unwrap_err().join("");
        assert!(problems.contains("UNKEY_BUILDERD_DATABASE_URL"), "{url}: {problems}");
        assert!(problems.contains(word), "{url}: {problems}");
        assert!(!problems.contains("canary"), "{url}: {problems}");
    }
    refused(&[("DATABASE_TYPE", "postgres"), ("DATABASE_HOST", "a b")], "DATABASE_HOST");
    refused(&[("DATABASE_TYPE", "postgres"), ("DATABASE_HOST", "db:5433")], "DATABASE_HOST");
}

#[test]
fn the_database_is_one_url_or_its_parts() {
    let url = |variables: &[(&str, &str)]| match read(variables).unwrap().database {
        DatabaseConfig::Postgres { url, .. } => url.expose_secret().to_owned(),
        DatabaseConfig::Sqlite => "sqlite".to_owned(),
    };
    let parts = [
        ("DATABASE_TYPE", "postgresql"),
        ("DATABASE_HOST", "db"),
        ("DATABASE_PASSWORD", "p@ss/1:"),
        ("DATABASE_SSL_MODE", "require"),
    ];
    let expected = "postgres://builderd:p%40ss%2F1%3A@db:5432/builderd?sslmode=require";
    assert_eq!(url(&parts), expected);
    assert_eq!(url(&[("DATABASE_URL", "postgres://u@h/n")]), "postgres://u@h/n");
    assert_eq!(url(&[("DATABASE_URL", "file:/opt/builderd/data/builderd.db")]), "sqlite");
    refused(&[("DATABASE_URL", "file:/elsewhere/builderd.db")], "DATABASE_DATA_DIR");
    let mixed = [("DATABASE_TYPE", "sqlite"), ("DATABASE_URL", "postgres://u:canary@h/n")];
    refused(&mixed, "DATABASE_URL");
    assert!(!read(&mixed).unwrap_err().join("").contains("canary"));
    refused(&[("DATABASE_TYPE", "postgres"), ("DATABASE_URL", "file:x")], "DATABASE_URL");
}

#[test]
fn mirrors_may_be_urls_but_plain_http_needs_leave() {
    let mirrors = |variables: &[(&str, &str)]| read(variables).unwrap().docker.mirrors;
    let https = [("DOCKER_REGISTRY_MIRROR", "https://mirror.example.com/")];
    assert_eq!(mirrors(&https), ["mirror.example.com"]);
    assert!(mirrors(&[]).is_empty());
    let plain = ("DOCKER_REGISTRY_MIRROR", "ghcr.io=http://127.0.0.1:5000, a=b:1");
    refused(&[plain], "DOCKER_INSECURE_REGISTRIES");
    refused(&[("DOCKER_REGISTRY_MIRROR", "http://a.b=c.d")], "write `a.b`");
    refused(&[("DOCKER_REGISTRY_MIRROR", "c d")], "expected `HOST[:PORT]`");
    refused(&[("DOCKER_INSECURE_REGISTRIES", "http://a.b:1")], "write `a.b:1`");
    refused(&[("DOCKER_REGISTRY_MIRROR", "a.b/../c")], "DOCKER_REGISTRY_MIRROR");
    let below = ("DOCKER_REGISTRY_MIRROR", "http://Mirror.example:5000/hub/");
    let named = ("DOCKER_INSECURE_REGISTRIES", "mirror.example:5000");
    assert_eq!(mirrors(&[below, named]), ["Mirror.example:5000/hub"]);
    let both = [plain, ("DOCKER_INSECURE_REGISTRIES", "127.0.0.1:5000")];
    assert_eq!(mirrors(&both), ["ghcr.io=127.0.0.1:5000", "a=b:1"]);
}

#[test]
fn what_is_wrong_with_one_setting_and_with_several_together_is_told_at_once() {
    let problems = |variables: &[(&str, &str)]| read(variables).unwrap_err();
    let all = problems(&[
        ("PORT", "x"),
        ("DOCKER_ALLOWED_REGISTRIES", "https://ghcr.io,https://quay.io"),
        ("DOCKER_REGISTRY_MIRROR", "c d,http://a.b:1"),
        ("STORAGE_BACKEND", "s3"),
        ("PROT", "1"),
    ]);
    for name in
        ["PORT is `x`", "write `ghcr.io`", "write `quay.io`", "`c d,", "`a.b:1`", "S3_BUCKET"]
    {
        assert!(all.iter().any(|problem| problem.contains(name)), "{name}: {all:#?}");
    }
    assert_eq!(all.len(), 6, "{all:#?}");
    // What follows from what cannot be read is nobody's fault.
    let one = problems(&[("STORAGE_BACKEND", "floppy"), ("S3_BUCKET", "b"), ("DEV", "maybe")]);
    assert_eq!(one.len(), 2, "{one:#?}");
    let insecure = ("DOCKER_INSECURE_REGISTRIES", "http://a.b:1");
    let one = problems(&[("DOCKER_REGISTRY_MIRROR", "http://a.b:1"), insecure]);
    assert_eq!(one.len(), 1, "{one:#?}");
    let file = Some(("x.toml".into(), "port = ".to_owned()));
    let environment = vec![(format!("{PREFIX}STORAGE_BACKEND"), "s3".to_owned())];
    let unread = Config::load(&Sources { file, environment, ..Sources::default() }).unwrap_err();
    assert_eq!(unread.problems.len(), 1, "{unread}");
}

#[test]
fn registries_that_no_image_could_come_from_are_refused_by_name() {
    for name in ["DOCKER_ALLOWED_REGISTRIES", "ALLOWED_REGISTRIES"] {
        let problems = read(&[(name, "quay.io,https://ghcr.io")]).unwrap_err().join("");
        assert!(problems.contains(&format!("{PREFIX}{name} is `quay.io,https")), "{problems}");
        assert!(problems.contains("write `ghcr.io`"), "{problems}");
        refused(&[(name, "ghcr.io/org")], "such as `localhost:5000`");
    }
    let allowed = read(&[("DOCKER_ALLOWED_REGISTRIES", "registry-1.docker.io, *")]).unwrap();
    assert_eq!(allowed.docker.allowed_registries, ["docker.io", "*"]);
}

#[test]
fn the_collector_may_be_a_host_or_a_url() {
    let otlp = |variables: &[(&str, &str)]| {
        let all = [&[("OTEL_ENABLED", "true")], variables].concat();
        read(&all).unwrap().telemetry.otlp
    };
    assert_eq!(otlp(&[]).as_deref(), Some("http://localhost:4318"));
    let secure = ("OTEL_INSECURE", "false");
    assert_eq!(otlp(&[secure]).as_deref(), Some("https://localhost:4318"));
    assert_eq!(otlp(&[("OTEL_ENDPOINT", "https://c:1/x/")]).as_deref(), Some("https://c:1/x"));
    refused(&[("OTEL_ENDPOINT", "http://c:1"), secure], "OTEL_INSECURE");
    refused(&[("OTEL_ENDPOINT", "grpc://c:1")], "expected `host:port`");
}

#[test]
fn secrets_do_not_show_in_debug_output() {
    let config = read(&[
        ("STORAGE_BACKEND", "s3"),
        ("S3_BUCKET", "b"),
        ("S3_ACCESS_KEY_ID", "k"),
        ("S3_SECRET_ACCESS_KEY", "canary-1"),
        ("DATABASE_URL", "postgres://u:canary-2@h/n"),
    ])
    .unwrap();
    assert!(!format!("{config:?}").contains("canary"));
}
