//! Requests: what a caller wrote, checked and in the service's terms.

use api::v1;
use buffa::EnumValue;
use http::HeaderValue;
use secrecy::SecretString;
use v1::build_source::SourceType;

use super::bounds::{
    COMMAND_BYTES_MAX, COMMANDS_MAX, ECHO_BYTES_MAX, IMAGE_BYTES_MAX, LABELS_MAX, PULL_TAGS_MAX,
    REASON_BYTES_MAX, SECRET_BYTES_MAX, TEXT_BYTES_MAX, bounded, few, invalid, known, none_of,
    quoted,
};
use super::unimplemented::{docker, refuse_unimplemented, rootfs};
use crate::build::record::{BuildRequest, FailureCode, RetryPolicy};
use crate::build::service::{LowerLimits, Order, RegistryCredentials, ServiceError};
use crate::build::state::BuildState;
use crate::config::parse_duration;
use crate::store::Filter;

/// Builds on a page, unless the caller says how many.
const PAGE_DEFAULT: u32 = 50;
/// Builds on a page at most.
const PAGE_MAX: u32 = 1000;
const RETRIES_MAX: i32 = 10;
/// The longest wait for another try that may be asked for.
const DELAY_SECS_MAX: u64 = 24 * 3600;
/// What the smallest image takes to be built: with less no process of it starts.
const MEMORY_BYTES_MIN: u64 = 32 << 20;

/// Where a config names the key.
const KEY_FIELD: &str = "config.idempotency_key";
/// Where a request's head does.
const KEY_HEADER: &str = "Idempotency-Key";

/// What [`v1::CreateBuildRequest`] orders.
pub(in super::super) fn order(request: v1::CreateBuildRequest) -> Result<Order, ServiceError> {
    let Some(config) = request.config.into_option() else {
        return Err(invalid("config", "build config is required"));
    };
    check_shape(&config)?;
    check_words(&config)?;
    refuse_unimplemented(&config)?;
    let image = docker_image(&config)?;
    Ok(Order {
        credentials: credentials(image)?,
        lower: lower_limits(&config.limits)?,
        idempotency_key: key(KEY_FIELD, &config.idempotency_key)?,
        traceparent: None,
        request: BuildRequest {
            image: bounded(
                "config.source.docker_image.image_uri",
                &image.image_uri,
                IMAGE_BYTES_MAX,
            )?,
            pull_tags: pull_tags(image)?,
            compression: compression(&config)?,
            size_limit_bytes: size_limit(&config)?,
            commands: commands(&config)?,
            name: bounded("config.build_name", &config.build_name, TEXT_BYTES_MAX)?,
            labels: labels(&config)?,
            suggested_asset_id: bounded(
                "config.suggested_asset_id",
                &config.suggested_asset_id,
                TEXT_BYTES_MAX,
            )?,
            retry: retry_policy(&config)?,
            echo: echo(config)?,
        },
    })
}

/// What is to be run in the image.
fn commands(config: &v1::BuildConfig) -> Result<Vec<String>, ServiceError> {
    const FIELD: &str = "config.strategy.docker_strategy.custom_commands";
    let Some(strategy) = docker(config) else { return Ok(Vec::new()) };
    few(FIELD, strategy.custom_commands.len(), COMMANDS_MAX)?;
    let commands = strategy.custom_commands.iter().map(|command| {
        let problem = match command {
            command if command.trim().is_empty() => "has an empty command: leave it out",
            command if command.contains('\0') => "has a command with a NUL character",
            command => return bounded(FIELD, command, COMMAND_BYTES_MAX),
        };
        Err(invalid(FIELD, problem))
    });
    commands.collect()
}

/// An empty key is none.
fn key(field: &str, key: &str) -> Result<Option<String>, ServiceError> {
    Ok(Some(bounded(field, key, TEXT_BYTES_MAX)?).filter(|key| !key.is_empty()))
}

/// The one key that config and header `Idempotency-Key` name, if they name one.
pub(in super::super) fn idempotency_key(
    in_config: Option<String>,
    header: Option<&HeaderValue>,
) -> Result<Option<String>, ServiceError> {
    let text = header.map_or(Ok(""), HeaderValue::to_str);
    let text = text.map_err(|_| invalid(KEY_HEADER, "has other letters than ASCII's"))?;
    match (in_config, key(KEY_HEADER, text)?) {
        (Some(one), Some(other)) if one != other => {
            let problem = format!(
                "{one:?} is not what the header {KEY_HEADER} says, {other:?}: send one of them"
            );
            Err(invalid(KEY_FIELD, problem))
        }
        (in_config, in_header) => Ok(in_config.or(in_header)),
    }
}

/// Why a build is cancelled.
pub(in super::super) fn reason(text: &str) -> Result<String, ServiceError> {
    bounded("reason", text, REASON_BYTES_MAX)
}

fn pull_tags(image: &v1::DockerImageSource) -> Result<Vec<String>, ServiceError> {
    let field = "config.source.docker_image.pull_tags";
    few(field, image.pull_tags.len(), PULL_TAGS_MAX)?;
    image.pull_tags.iter().map(|tag| bounded(field, tag, TEXT_BYTES_MAX)).collect()
}

/// The parts that every request must have.
fn check_shape(config: &v1::BuildConfig) -> Result<(), ServiceError> {
    match &config.source.source_type {
        None => return Err(invalid("config.source", "build source is required")),
        Some(SourceType::DockerImage(image)) if image.image_uri.is_empty() => {
            let field = "config.source.docker_image.image_uri";
            return Err(invalid(field, "docker image URI is required"));
        }
        Some(SourceType::GitRepository(git))
            if git.repository_url.is_empty() && git.clone_url.is_empty() =>
        {
            let field = "config.source.git_repository.repository_url";
            return Err(invalid(field, "git repository URL is required"));
        }
        Some(SourceType::Archive(archive))
            if archive.archive_url.is_empty() && archive.download_url.is_empty() =>
        {
            let field = "config.source.archive.archive_url";
            return Err(invalid(field, "archive URL is required"));
        }
        Some(
            SourceType::DockerImage(_) | SourceType::GitRepository(_) | SourceType::Archive(_),
        ) => {}
    }
    match config.target.target_type {
        None => Err(invalid("config.target", "build target is required")),
        Some(_) => Ok(()),
    }
}

/// Enums mean what this service knows, or nothing is done.
fn check_words(config: &v1::BuildConfig) -> Result<(), ServiceError> {
    known("config.tenant.tier", config.tenant.tier)?;
    if let Some(target) = rootfs(config) {
        known("config.target.microvm_rootfs.init_strategy", target.init_strategy)?;
    }
    if let Some(SourceType::DockerImage(image)) = &config.source.source_type {
        known("config.source.docker_image.pull_policy", image.pull_policy)?;
    }
    Ok(())
}

fn docker_image(config: &v1::BuildConfig) -> Result<&v1::DockerImageSource, ServiceError> {
    let Some(SourceType::DockerImage(image)) = &config.source.source_type else {
        return Err(invalid("config.source", "unsupported source type"));
    };
    if image.pull_policy == v1::PullPolicy::PULL_POLICY_NEVER {
        return Err(invalid(
            "config.source.docker_image.pull_policy",
            "PULL_POLICY_NEVER cannot be kept: without asking the registry nobody knows whether \
             you may have the image; leave it out",
        ));
    }
    Ok(image)
}

/// `auth` and `registry_auth` are one field with two names.
fn credentials(image: &v1::DockerImageSource) -> Result<Option<RegistryCredentials>, ServiceError> {
    let empty = v1::DockerAuth::default();
    let given = |auth: &v1::DockerAuth| *auth != empty;
    let (auth, other) = (&*image.auth, &*image.registry_auth);
    if given(auth) && given(other) && auth != other {
        let field = "config.source.docker_image.registry_auth";
        return Err(invalid(field, "differs from auth: give one of them"));
    }
    let auth = if given(auth) { auth } else { other };
    if !given(auth) {
        return Ok(None);
    }
    let field = "config.source.docker_image.auth";
    let secret = match (auth.password.as_str(), auth.token.as_str()) {
        ("", "") => return Err(invalid(field, "a password or a token is required")),
        ("", secret) | (secret, "") => secret,
        (_, _) => return Err(invalid(field, "give a password or a token, not both")),
    };
    if auth.username.is_empty() && auth.token.is_empty() {
        return Err(invalid(field, "a password needs a username"));
    }
    Ok(Some(RegistryCredentials {
        registry: registry(auth)?,
        username: bounded(&format!("{field}.username"), &auth.username, TEXT_BYTES_MAX)?,
        secret: SecretString::from(bounded(field, secret, SECRET_BYTES_MAX)?),
    }))
}

/// Whose credentials they are, as references call it; empty for the image's own registry.
fn registry(auth: &v1::DockerAuth) -> Result<String, ServiceError> {
    if auth.registry.is_empty() {
        return Ok(String::new());
    }
    oci::registry_named(&auth.registry).ok_or_else(|| {
        let problem = "is no registry: write a host alone, such as docker.io or ghcr.io";
        invalid("config.source.docker_image.auth.registry", problem)
    })
}

fn compression(config: &v1::BuildConfig) -> Result<String, ServiceError> {
    let asked = rootfs(config).map_or("", |target| target.compression.as_str());
    match asked {
        "" => Ok("none".to_owned()),
        "none" | "gzip" | "zstd" => Ok(asked.to_owned()),
        other => Err(invalid(
            "config.target.microvm_rootfs.compression",
            format!("{} is no compression; none, gzip and zstd are", quoted(other)),
        )),
    }
}

fn size_limit(config: &v1::BuildConfig) -> Result<Option<u64>, ServiceError> {
    let asked = rootfs(config).map_or(0, |target| target.size_limit_bytes);
    let limit = count("config.target.microvm_rootfs.size_limit_bytes", asked)?;
    Ok(Some(limit).filter(|limit| *limit > 0))
}

fn lower_limits(limits: &v1::TenantResourceLimits) -> Result<LowerLimits, ServiceError> {
    let field = |name: &str| format!("config.limits.{name}");
    let small = |name: &str, value: i32| {
        u32::try_from(value).map_err(|_| invalid(&field(name), "must not be negative"))
    };
    let minutes = small("max_build_time_minutes", limits.max_build_time_minutes)?;
    let timeout = small("timeout_seconds", limits.timeout_seconds)?;
    let memory_bytes = count(&field("max_memory_bytes"), limits.max_memory_bytes)?;
    if (1..MEMORY_BYTES_MIN).contains(&memory_bytes) {
        let problem = format!(
            "{memory_bytes} bytes are too little for any build: at least {MEMORY_BYTES_MIN} are \
             needed, or 0 for the tenant's own limit"
        );
        return Err(invalid(&field("max_memory_bytes"), problem));
    }
    let both = [timeout, minutes.saturating_mul(60)].into_iter().filter(|secs| *secs > 0);
    Ok(LowerLimits {
        memory_bytes,
        cpu_cores: small("max_cpu_cores", limits.max_cpu_cores)?,
        disk_bytes: count(&field("max_disk_bytes"), limits.max_disk_bytes)?,
        timeout_secs: both.min().unwrap_or(0),
    })
}

fn count(field: &str, value: i64) -> Result<u64, ServiceError> {
    u64::try_from(value).map_err(|_| invalid(field, "must not be negative"))
}

fn labels(
    config: &v1::BuildConfig,
) -> Result<std::collections::BTreeMap<String, String>, ServiceError> {
    let field = "config.labels";
    few(field, config.labels.len(), LABELS_MAX)?;
    let text = |text: &str| bounded(field, text, TEXT_BYTES_MAX);
    config.labels.iter().map(|(key, value)| Ok((text(key)?, text(value)?))).collect()
}

fn retry_policy(config: &v1::BuildConfig) -> Result<RetryPolicy, ServiceError> {
    let default = RetryPolicy::default();
    let Some(asked) = config.retry_policy.as_option() else { return Ok(default) };
    let field = |name: &str| format!("config.retry_policy.{name}");
    if !matches!(asked.backoff_strategy.as_str(), "" | "exponential") {
        return Err(invalid(&field("backoff_strategy"), "must be \"exponential\""));
    }
    let max_retries = match asked.max_retries {
        None => default.max_retries,
        Some(retries @ 0..=RETRIES_MAX) => u32::try_from(retries).unwrap_or(0),
        Some(_) => {
            let problem = format!("must be 0 to {RETRIES_MAX}");
            return Err(invalid(&field("max_retries"), problem));
        }
    };
    let delay = |name: &str, text: &str, default: u64| match text {
        "" => Ok(default),
        text => match parse_duration(text).map(|delay| delay.as_secs()) {
            Ok(secs @ ..=DELAY_SECS_MAX) => Ok(secs),
            Ok(_) => {
                let hours = DELAY_SECS_MAX / 3600;
                let problem = format!("{} is too long: at most {hours}h", quoted(text));
                Err(invalid(&field(name), problem))
            }
            Err(_) => {
                let problem = format!("{} is no duration: write \"30s\"", quoted(text));
                Err(invalid(&field(name), problem))
            }
        },
    };
    let base_delay_secs = delay("base_delay", &asked.base_delay, default.base_delay_secs)?;
    let max_delay_secs = delay("max_delay", &asked.max_delay, default.max_delay_secs)?;
    let retry_on = match asked.retry_on.is_empty() {
        true => default.retry_on,
        false => {
            let codes = asked.retry_on.iter();
            codes.map(|name| retried_code(&field("retry_on"), name)).collect::<Result<_, _>>()?
        }
    };
    Ok(RetryPolicy { max_retries, base_delay_secs, max_delay_secs, retry_on })
}

/// Only what may pass by itself is worth another try.
fn retried_code(field: &str, name: &str) -> Result<FailureCode, ServiceError> {
    let passing = RetryPolicy::default().retry_on;
    let found = passing.iter().copied().find(|code| code.as_str() == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = passing.iter().map(|code| code.as_str()).collect();
        let problem = format!("{} is not tried again; {} are", quoted(name), names.join(", "));
        invalid(field, problem)
    })
}

/// The config as it was sent, without anything secret. Of credentials it tells that there were
/// some, so that whoever sends it again knows to bring them. The idempotency key is not part of
/// what is to be built: the same request may name it here or in its head.
fn echo(mut config: v1::BuildConfig) -> Result<String, ServiceError> {
    config.idempotency_key.clear();
    if let Some(SourceType::DockerImage(image)) =
        config.source.as_option_mut().and_then(|source| source.source_type.as_mut())
    {
        let empty = v1::DockerAuth::default();
        for auth in [&mut image.auth, &mut image.registry_auth] {
            *auth = auth.take().filter(|auth| *auth != empty).map(|_| empty.clone()).into();
        }
    }
    // By way of a value: the same maps must give the same text, for a request's hash is taken
    // over it. A message of plain data serialises.
    let text = serde_json::to_value(&config).unwrap_or_default().to_string();
    match text.len() <= ECHO_BYTES_MAX {
        true => Ok(text),
        false => {
            let problem = format!(
                "has {} bytes as JSON, of which at most {ECHO_BYTES_MAX} are kept: leave out what \
                 the build does not need",
                text.len(),
            );
            Err(invalid("config", problem))
        }
    }
}

/// Which builds [`v1::ListBuildsRequest`] asks for; none if its states are those of no build.
pub(in super::super) fn filter(
    request: &v1::ListBuildsRequest,
) -> Result<Option<Filter>, ServiceError> {
    for wanted in &request.state_filter {
        known("state_filter", *wanted)?;
    }
    let mut is_filtered = request.state_filter.iter().any(|wanted| wanted.to_i32() != 0);
    let is_wanted =
        |state: &BuildState| request.state_filter.contains(&EnumValue::from(super::state(*state)));
    let mut states: Vec<BuildState> = BuildState::ALL.into_iter().filter(is_wanted).collect();
    if !request.status.is_empty() {
        if is_filtered {
            return Err(invalid("status", "stands beside state_filter: give one of them"));
        }
        (is_filtered, states) = (true, states_of_status(&request.status)?);
    }
    if is_filtered && states.is_empty() {
        return Ok(None);
    }
    let before = match request.page_token.as_str() {
        "" => None,
        token => Some(token.parse().map_err(|_| {
            invalid("page_token", "is not one: take it from the answer's next_page_token")
        })?),
    };
    let (field, size) = match (request.page_size, request.limit) {
        (0, limit) => ("limit", limit),
        (size, 0) => ("page_size", size),
        (size, limit) if size == limit => ("page_size", size),
        _ => return Err(invalid("limit", "differs from page_size: give one of them")),
    };
    let limit = page_limit(field, i64::from(size))?;
    let offset =
        u64::try_from(request.offset).map_err(|_| invalid("offset", "must not be negative"))?;
    Ok(Some(Filter { states, before, offset, limit }))
}

/// How many builds a page gets.
pub(in super::super) fn page_limit(field: &str, asked: i64) -> Result<u32, ServiceError> {
    match asked {
        0 => Ok(PAGE_DEFAULT),
        asked => match u32::try_from(asked) {
            Ok(limit) => Ok(limit.min(PAGE_MAX)),
            Err(_) if asked > 0 => Ok(PAGE_MAX),
            Err(_) => Err(invalid(field, "must not be negative")),
        },
    }
}

/// The states that the documentation calls so, by the whole word or by its end alone.
pub(in super::super) fn states_of_status(name: &str) -> Result<Vec<BuildState>, ServiceError> {
    use buffa::Enumeration as _;
    const PREFIX: &str = "BUILD_STATUS_";
    let full = match name.starts_with(PREFIX) {
        true => name.to_owned(),
        false => format!("{PREFIX}{}", name.to_ascii_uppercase()),
    };
    let wanted = v1::BuildStatus::from_proto_name(&full).ok_or_else(|| {
        let whole: Vec<&str> =
            v1::BuildStatus::values().iter().map(v1::BuildStatus::proto_name).collect();
        let short = whole.iter().filter_map(|word| word.strip_prefix(PREFIX));
        let short: Vec<String> = short.map(str::to_ascii_lowercase).collect();
        let words: Vec<&str> =
            whole.iter().copied().chain(short.iter().map(String::as_str)).collect();
        none_of("status", quoted(name), &words)
    })?;
    let is_wanted = |state: &BuildState| super::status(*state) == wanted;
    Ok(BuildState::ALL.into_iter().filter(is_wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret as _;
    use serde_json::{Value, json};

    fn ordered(config: Value) -> Result<Order, ServiceError> {
        let request = serde_json::from_value(json!({ "config": config })).unwrap();
        order(request)
    }

    fn whole(change: impl FnOnce(&mut Value)) -> Value {
        let mut config = json!({
            "source": {"docker_image": {"image_uri": "nginx:alpine"}},
            "target": {"microvm_rootfs": {}},
        });
        change(&mut config);
        config
    }

    #[test]
    fn what_is_missing_is_named_as_ever() {
        let problem = |config: Value| match ordered(config) {
            Err(ServiceError::Invalid { problem, .. }) => problem,
            other => panic!("{other:?}"),
        };
        assert!(
            order(v1::CreateBuildRequest::default())
                .is_err_and(|error| error.to_string() == "config: build config is required")
        );
        assert_eq!(problem(json!({})), "build source is required");
        let source = |source: Value| json!({ "source": source });
        assert_eq!(problem(source(json!({"docker_image": {}}))), "docker image URI is required");
        assert_eq!(
            problem(source(json!({"git_repository": {}}))),
            "git repository URL is required"
        );
        assert_eq!(problem(source(json!({"archive": {}}))), "archive URL is required");
        let image = json!({"source": {"docker_image": {"image_uri": "a"}}});
        assert_eq!(problem(image), "build target is required");
    }

    #[test]
    fn both_names_of_the_credentials_are_one_field() {
        let secret = |config: Value| {
            let credentials = ordered(config).unwrap().credentials.unwrap();
            (credentials.username, credentials.secret.expose_secret().to_owned())
        };
        let auth = json!({"username": "me", "password": "canary"});
        for name in ["auth", "registry_auth", "registryAuth"] {
            let config = whole(|config| config["source"]["docker_image"][name] = auth.clone());
            assert_eq!(secret(config), ("me".into(), "canary".into()));
        }
        let config = whole(|config| {
            config["source"]["docker_image"]["auth"] = auth.clone();
            config["source"]["docker_image"]["registry_auth"] = json!({"token": "t"});
        });
        assert!(ordered(config).is_err());
        let config = whole(|config| {
            config["source"]["docker_image"]["auth"] = json!({"username": "me"});
        });
        assert!(ordered(config).is_err());
    }

    #[test]
    fn commands_are_taken_in_their_order_and_bounded() {
        let ordered = |commands: Value| {
            let strategy = json!({"docker_strategy": {"custom_commands": commands}});
            ordered(whole(|config| config["strategy"] = strategy))
        };
        let two = ordered(json!(["apt-get clean", "rm -rf /tmp/*"])).unwrap().request.commands;
        assert_eq!(two, ["apt-get clean", "rm -rf /tmp/*"]);
        assert!(ordered(json!([])).unwrap().request.commands.is_empty());
        let (many, long) = (vec!["true"; COMMANDS_MAX + 1], "x".repeat(COMMAND_BYTES_MAX + 1));
        for (wrong, words) in [
            (json!(["true", " "]), "has an empty command"),
            (json!(["a\u{0}b"]), "NUL"),
            (json!(many), "are more than 32"),
            (json!([long]), "is longer than 4096 bytes"),
        ] {
            let error = ordered(wrong).unwrap_err().to_string();
            assert!(error.contains("custom_commands: ") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn an_echo_holds_no_secret() {
        let config = whole(|config| {
            let auth = json!({"username": "me", "password": "canary"});
            config["source"]["docker_image"]["registry_auth"] = auth;
        });
        let echo = ordered(config).unwrap().request.echo;
        assert!(
            echo.contains("nginx:alpine") && !echo.contains("canary") && !echo.contains("me\"")
        );
    }

    #[test]
    fn an_echo_tells_that_there_were_credentials() {
        let echoed = |name: &str, auth: Value| {
            let config = whole(|config| config["source"]["docker_image"][name] = auth);
            let echo: Value = serde_json::from_str(&ordered(config).unwrap().request.echo).unwrap();
            echo["source"]["dockerImage"].clone()
        };
        let auth = json!({"username": "me", "password": "canary"});
        let image = |marked: Value| {
            let mut image = json!({"imageUri": "nginx:alpine"});
            image.as_object_mut().unwrap().append(&mut marked.as_object().unwrap().clone());
            image
        };
        assert_eq!(echoed("auth", auth.clone()), image(json!({"auth": {}})));
        assert_eq!(echoed("registry_auth", auth), image(json!({"registryAuth": {}})));
        assert_eq!(echoed("auth", json!({})), image(json!({})), "there were none");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_field_is_named() {
        let problem = |change: &dyn Fn(&mut Value)| match ordered(whole(change)) {
            Err(error @ ServiceError::Invalid { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        let long = "x".repeat(20_000);
        let image = |name: &'static str, value: Value| {
            problem(&move |config| config["source"]["docker_image"][name] = value.clone())
        };
        let many: Vec<String> = (0..17).map(|n| format!("t{n}")).collect();
        assert!(image("pull_tags", json!(many)).contains("docker_image.pull_tags: are more than"));
        assert!(image("pull_tags", json!([long])).contains("docker_image.pull_tags: is longer"));
        assert!(image("image_uri", json!(long)).contains("image_uri: is longer"));
        let auth = |auth: Value| image("auth", auth);
        assert!(auth(json!({"token": long})).contains("docker_image.auth: is longer"));
        let named = json!({"username": long, "password": "p"});
        assert!(auth(named).contains("auth.username: is longer"));

        let tenant = |tenant: Value| problem(&move |config| config["tenant"] = tenant.clone());
        let metadata = json!({"metadata": {"a": "x".repeat(ECHO_BYTES_MAX)}});
        let said = tenant(metadata);
        assert!(said.starts_with("config: has ") && said.contains("65536"), "{said}");
        assert!(tenant(json!({"permissions": vec![long; 4]})).starts_with("config: has "));
        assert!(reason(&"x".repeat(REASON_BYTES_MAX + 1)).is_err());
    }

    #[test]
    fn what_a_caller_wrote_is_told_again_in_part_and_what_is_right_in_whole() {
        let long = "x".repeat(1 << 20);
        let policy = |policy: Value| whole(|config| config["retry_policy"] = policy);
        let compression = json!({"compression": long});
        let target = whole(|config| config["target"]["microvm_rootfs"] = compression);
        for (config, words) in [
            (target, "none, gzip and zstd are"),
            (policy(json!({"base_delay": long})), "write \"30s\""),
            (policy(json!({"max_delay": format!("{}s", "0".repeat(1 << 20) + "99999999")})), "24h"),
            (policy(json!({"retry_on": [long]})), "NETWORK_ERROR"),
        ] {
            let error = ordered(config).unwrap_err().to_string();
            assert!(error.len() < 500 && error.contains(words), "{} bytes", error.len());
        }
        let error = states_of_status(&long).unwrap_err().to_string();
        assert!(error.len() < 500 && error.ends_with("timeout"), "{} bytes", error.len());
    }

    #[test]
    fn all_labels_that_may_be_may_be_at_once() {
        let label = |n: usize| (format!("{n:0>256}"), json!("\u{fffd}".repeat(85)));
        let config = whole(|config| config["labels"] = (0..LABELS_MAX).map(label).collect());
        assert_eq!(ordered(config).unwrap().request.labels.len(), LABELS_MAX);
    }

    #[test]
    fn credentials_are_for_a_registry_by_any_of_its_names() {
        let registry = |name: &str| {
            let auth = json!({"username": "me", "password": "secret", "registry": name});
            let order = ordered(whole(|config| config["source"]["docker_image"]["auth"] = auth));
            order.map(|order| order.credentials.unwrap().registry)
        };
        assert_eq!(registry("").unwrap(), "");
        assert_eq!(registry("https://index.docker.io/v1/").unwrap(), "docker.io");
        assert_eq!(registry("https://GHCR.io").unwrap(), "ghcr.io");
        for wrong in ["gcr.io/project", "no registry", "https://"] {
            let error = registry(wrong).unwrap_err().to_string();
            assert!(error.contains("docker_image.auth.registry: is no registry"), "{error}");
        }
    }

    #[test]
    fn the_same_request_is_the_same_text() {
        let config = whole(|config| {
            config["labels"] = (0..20).map(|n| (format!("l{n}"), json!("x"))).collect();
        });
        let echo = || ordered(config.clone()).unwrap().request.echo;
        let first = echo();
        assert!((0..20).all(|_| echo() == first));
    }

    #[test]
    fn limits_are_lowered_and_negative_ones_refused() {
        let limits = |limits: Value| ordered(whole(|config| config["limits"] = limits));
        let lower = limits(json!({
            "max_memory_bytes": MEMORY_BYTES_MIN.to_string(),
            "timeout_seconds": 600,
            "max_build_time_minutes": 5,
        }));
        let expected =
            LowerLimits { memory_bytes: 32 << 20, timeout_secs: 300, ..LowerLimits::default() };
        assert_eq!(lower.unwrap().lower, expected);
        let few = limits(json!({"max_memory_bytes": MEMORY_BYTES_MIN - 1})).unwrap_err();
        let few = few.to_string();
        assert!(
            few.contains("config.limits.max_memory_bytes") && few.contains("33554432"),
            "{few}"
        );
        assert!(limits(json!({"max_memory_bytes": -1})).is_err());
        assert_eq!(limits(json!({"max_memory_bytes": 0})).unwrap().lower.memory_bytes, 0);
        assert!(limits(json!({"max_cpu_cores": -1})).is_err());
        assert!(limits(json!({"max_disk_bytes": -1})).is_err());
    }

    #[test]
    fn a_retry_policy_is_taken_as_documented() {
        let retry = |policy: Value| {
            let order = ordered(whole(|config| config["retry_policy"] = policy));
            order.map(|order| order.request.retry)
        };
        let documented = json!({
            "max_retries": 3,
            "backoff_strategy": "exponential",
            "base_delay": "30s",
            "max_delay": "300s",
            "retry_on": ["NETWORK_ERROR", "TEMPORARY_RESOURCE_ERROR", "REGISTRY_RATE_LIMIT"],
        });
        assert_eq!(retry(documented).unwrap(), RetryPolicy::default());
        let delays = json!({"base_delay": "1m30s", "max_delay": "1.5h"});
        let delays = retry(delays).map(|retry| (retry.base_delay_secs, retry.max_delay_secs));
        assert_eq!(delays.unwrap(), (90, 5400));
        // What is left out is as documented; that nothing is tried again must be said.
        let partial = retry(json!({"base_delay": "10s"})).unwrap();
        assert_eq!(partial, RetryPolicy { base_delay_secs: 10, ..RetryPolicy::default() });
        assert_eq!(retry(json!({"max_retries": 0})).unwrap().max_retries, 0);
        for wrong in [
            json!({"backoff_strategy": "linear"}),
            json!({"max_retries": 11}),
            json!({"max_retries": -1}),
            json!({"base_delay": "soon"}),
            json!({"base_delay": "2562047h"}),
            json!({"max_delay": "24h1s"}),
            json!({"max_delay": "5 minutes"}),
            json!({"retry_on": ["INTERNAL"]}),
        ] {
            assert!(retry(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn odd_values_are_named() {
        let target =
            |target: Value| ordered(whole(|config| config["target"]["microvm_rootfs"] = target));
        assert_eq!(target(json!({})).unwrap().request.compression, "none");
        assert_eq!(target(json!({"compression": "zstd"})).unwrap().request.compression, "zstd");
        let error = target(json!({"compression": "xz"})).unwrap_err().to_string();
        assert!(error.contains("\"xz\""), "{error}");
        assert!(target(json!({"size_limit_bytes": -1})).is_err());
        let never = whole(|config| {
            config["source"]["docker_image"]["pull_policy"] = json!("PULL_POLICY_NEVER");
        });
        assert!(matches!(ordered(never), Err(ServiceError::Invalid { .. })));
    }

    #[test]
    fn numbers_without_a_word_are_refused_where_they_would_mean_something() {
        let field = |result: Result<(), ServiceError>| match result {
            Err(ServiceError::Invalid { field, problem }) => (field, problem),
            other => panic!("{other:?}"),
        };
        let asked = v1::ListBuildsRequest {
            state_filter: vec![v1::BuildState::BUILD_STATE_FAILED.into(), 77.into()],
            ..Default::default()
        };
        let (name, problem) = field(filter(&asked).map(drop));
        assert_eq!(name, "state_filter");
        let start = "77 is none of BUILD_STATE_UNSPECIFIED, BUILD_STATE_PENDING, ";
        assert!(problem.starts_with(start), "{problem}");
        for (place, path) in [
            ("tenant.tier", "/tenant/tier"),
            ("source.docker_image.pull_policy", "/source/docker_image/pull_policy"),
            ("target.microvm_rootfs.init_strategy", "/target/microvm_rootfs/init_strategy"),
        ] {
            let numbered = |number: i32| {
                ordered(whole(|config| {
                    config["tenant"] = json!({"tier": 0});
                    config["source"]["docker_image"]["pull_policy"] = json!(0);
                    config["target"]["microvm_rootfs"]["init_strategy"] = json!(0);
                    *config.pointer_mut(path).unwrap() = json!(number);
                }))
            };
            assert!(numbered(0).is_ok() && numbered(2).is_ok(), "{place}");
            let (name, problem) = field(numbered(77).map(drop));
            assert_eq!(name, format!("config.{place}"));
            assert!(problem.starts_with("77 is none of "), "{problem}");
        }
    }

    #[test]
    fn the_key_is_one_wherever_it_stands() {
        let header = |text: &'static str| Some(HeaderValue::from_static(text));
        let key = |field: Option<&str>, header: Option<HeaderValue>| {
            idempotency_key(field.map(str::to_owned), header.as_ref())
        };
        let is = |key: Result<Option<String>, ServiceError>| key.unwrap();
        assert_eq!(is(key(None, None)), None);
        assert_eq!(is(key(None, header(""))), None);
        for (field, header) in [
            (Some("k"), None),
            (Some("k"), header("")),
            (None, header("k")),
            (Some("k"), header("k")),
        ] {
            assert_eq!(is(key(field, header)).as_deref(), Some("k"));
        }
        let said = key(Some("k"), header("other")).unwrap_err().to_string();
        assert!(
            said.starts_with("config.idempotency_key: \"k\" is not what the header "),
            "{said}"
        );
        assert!(said.contains("Idempotency-Key says, \"other\""), "{said}");

        let keyed = whole(|config| config["idempotency_key"] = json!("k"));
        let (keyed, bare) = (ordered(keyed).unwrap(), ordered(whole(|_| ())).unwrap());
        assert_eq!(keyed.request, bare.request, "what is built is the same");
        assert_eq!(keyed.idempotency_key.as_deref(), Some("k"));
    }

    #[test]
    fn filters_name_states_of_both_vocabularies() {
        let filtered = |request: Value| {
            let request = serde_json::from_value(request).unwrap();
            filter(&request).map(|filter| filter.map(|filter| (filter.states, filter.limit)))
        };
        assert_eq!(filtered(json!({})).unwrap(), Some((vec![], 50)));
        let failed = filtered(json!({"state_filter": ["BUILD_STATE_FAILED"], "page_size": 5000}));
        let ended = vec![BuildState::Failed, BuildState::Timeout];
        assert_eq!(failed.unwrap(), Some((ended, 1000)));
        let often = vec!["BUILD_STATE_FAILED"; 1000];
        let states = filtered(json!({ "state_filter": often })).unwrap().unwrap().0;
        assert_eq!(states.len(), 2, "a state is asked for once");
        let none = filtered(json!({"state_filter": ["BUILD_STATE_CLEANING"]}));
        assert_eq!(none.unwrap(), None);
        assert!(filtered(json!({"page_size": -1})).is_err());
        assert!(filtered(json!({"page_token": "x"})).is_err());
        let plain = filtered(json!({"status": "failed", "limit": 7, "page_size": 7, "offset": 3}));
        assert_eq!(plain.unwrap(), Some((vec![BuildState::Failed], 7)));
        assert_eq!(filtered(json!({"status": "unknown"})).unwrap(), None);
        for wrong in [
            json!({"status": "sleeping"}),
            json!({"status": "failed", "state_filter": ["BUILD_STATE_FAILED"]}),
            json!({"limit": 7, "page_size": 8}),
            json!({"limit": -1}),
            json!({"offset": -1}),
        ] {
            assert!(filtered(wrong.clone()).is_err(), "{wrong}");
        }
        let states = |status: &str| states_of_status(status).map_err(|error| error.to_string());
        assert_eq!(states("BUILD_STATUS_TIMEOUT"), Ok(vec![BuildState::Timeout]));
        assert_eq!(states("running").map(|states| states.len()), Ok(5));
        assert_eq!(states("BUILD_STATUS_UNKNOWN"), Ok(vec![]));
        for wrong in ["sleeping", "BUILD_STATUS_SLEEPING", "BUILD_STATUS_running", "\u{fffd}"] {
            let said = states(wrong).unwrap_err();
            assert!(said.starts_with(&format!("status: {wrong:?} is none of ")), "{said}");
            assert!(said.contains(", BUILD_STATUS_RUNNING, ") && said.contains(", running, "));
        }
    }
}
