//! Requests: what a caller wrote, checked and in the service's terms.

use api::v1;
use buffa::EnumValue;
use secrecy::SecretString;
use v1::build_source::SourceType;

use super::unimplemented::{refuse_unimplemented, rootfs};
use crate::build::record::{BuildRequest, FailureCode, RetryPolicy};
use crate::build::service::{LowerLimits, Order, RegistryCredentials, ServiceError};
use crate::build::state::BuildState;
use crate::store::Filter;

/// Builds on a page, unless the caller says how many.
const PAGE_DEFAULT: u32 = 50;
/// Builds on a page at most.
const PAGE_MAX: u32 = 1000;
const RETRIES_MAX: i32 = 10;
/// Longest idempotency key and name, in bytes.
const TEXT_BYTES_MAX: usize = 256;
const LABELS_MAX: usize = 64;

fn invalid(field: &str, problem: impl ToString) -> ServiceError {
    ServiceError::Invalid { field: field.to_owned(), problem: problem.to_string() }
}

/// What [`v1::CreateBuildRequest`] orders.
pub(in super::super) fn order(request: v1::CreateBuildRequest) -> Result<Order, ServiceError> {
    let Some(config) = request.config.into_option() else {
        return Err(invalid("config", "build config is required"));
    };
    check_shape(&config)?;
    refuse_unimplemented(&config)?;
    let image = docker_image(&config)?;
    Ok(Order {
        credentials: credentials(image)?,
        lower: lower_limits(&config.limits)?,
        idempotency_key: Some(bounded("config.idempotency_key", &config.idempotency_key)?)
            .filter(|key| !key.is_empty()),
        traceparent: None,
        request: BuildRequest {
            image: image.image_uri.clone(),
            pull_tags: image.pull_tags.clone(),
            compression: compression(&config)?,
            size_limit_bytes: size_limit(&config)?,
            name: bounded("config.build_name", &config.build_name)?,
            labels: labels(&config)?,
            suggested_asset_id: bounded("config.suggested_asset_id", &config.suggested_asset_id)?,
            retry: retry_policy(&config)?,
            echo: echo(config),
        },
    })
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
        registry: auth.registry.clone(),
        username: auth.username.clone(),
        secret: SecretString::from(secret),
    }))
}

fn compression(config: &v1::BuildConfig) -> Result<String, ServiceError> {
    let asked = rootfs(config).map_or("", |target| target.compression.as_str());
    match asked {
        "" => Ok("none".to_owned()),
        "none" | "gzip" | "zstd" => Ok(asked.to_owned()),
        other => Err(invalid(
            "config.target.microvm_rootfs.compression",
            format!("{other:?} is no compression; none, gzip and zstd are"),
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
    let both = [timeout, minutes.saturating_mul(60)].into_iter().filter(|secs| *secs > 0);
    Ok(LowerLimits {
        memory_bytes: count(&field("max_memory_bytes"), limits.max_memory_bytes)?,
        cpu_cores: small("max_cpu_cores", limits.max_cpu_cores)?,
        disk_bytes: count(&field("max_disk_bytes"), limits.max_disk_bytes)?,
        timeout_secs: both.min().unwrap_or(0),
    })
}

fn count(field: &str, value: i64) -> Result<u64, ServiceError> {
    u64::try_from(value).map_err(|_| invalid(field, "must not be negative"))
}

fn bounded(field: &str, text: &str) -> Result<String, ServiceError> {
    match text.len() <= TEXT_BYTES_MAX {
        true => Ok(text.to_owned()),
        false => Err(invalid(field, format!("is longer than {TEXT_BYTES_MAX} bytes"))),
    }
}

fn labels(
    config: &v1::BuildConfig,
) -> Result<std::collections::BTreeMap<String, String>, ServiceError> {
    let field = "config.labels";
    if config.labels.len() > LABELS_MAX {
        return Err(invalid(field, format!("are more than {LABELS_MAX}")));
    }
    let pairs = config.labels.iter();
    pairs.map(|(key, value)| Ok((bounded(field, key)?, bounded(field, value)?))).collect()
}

fn retry_policy(config: &v1::BuildConfig) -> Result<RetryPolicy, ServiceError> {
    let default = RetryPolicy::default();
    let Some(asked) = config.retry_policy.as_option() else { return Ok(default) };
    let field = |name: &str| format!("config.retry_policy.{name}");
    if !matches!(asked.backoff_strategy.as_str(), "" | "exponential") {
        return Err(invalid(&field("backoff_strategy"), "must be \"exponential\""));
    }
    let max_retries = match asked.max_retries {
        retries @ 0..=RETRIES_MAX => u32::try_from(retries).unwrap_or(0),
        _ => {
            let problem = format!("must be 0 to {RETRIES_MAX}");
            return Err(invalid(&field("max_retries"), problem));
        }
    };
    let delay = |name: &str, text: &str, default: u64| match text {
        "" => Ok(default),
        text => humantime::parse_duration(text)
            .map(|delay| delay.as_secs())
            .map_err(|error| invalid(&field(name), format!("{text:?}: {error}; write \"30s\""))),
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
        invalid(field, format!("{name:?} is not tried again; {} are", names.join(", ")))
    })
}

/// The config as it was sent, without anything secret.
fn echo(mut config: v1::BuildConfig) -> String {
    if let Some(SourceType::DockerImage(image)) =
        config.source.as_option_mut().and_then(|source| source.source_type.as_mut())
    {
        image.auth.take();
        image.registry_auth.take();
    }
    // By way of a value: the same maps must give the same text, for a request's hash is taken
    // over it. A message of plain data serialises.
    serde_json::to_value(&config).unwrap_or_default().to_string()
}

/// Which builds [`v1::ListBuildsRequest`] asks for; none if its states are those of no build.
pub(in super::super) fn filter(
    request: &v1::ListBuildsRequest,
) -> Result<Option<Filter>, ServiceError> {
    let mut states = Vec::new();
    let mut is_filtered = false;
    for wanted in &request.state_filter {
        is_filtered |= wanted.to_i32() != 0;
        states.extend(states_of(*wanted));
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
    let limit = page_limit("page_size", i64::from(request.page_size))?;
    Ok(Some(Filter { states, before, offset: 0, limit }))
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

/// The states that the wire calls so.
fn states_of(wanted: EnumValue<v1::BuildState>) -> Vec<BuildState> {
    let is_wanted = |state: &BuildState| EnumValue::from(super::state(*state)) == wanted;
    BuildState::ALL.into_iter().filter(is_wanted).collect()
}

/// The states that the documentation calls so; none if it knows no such status.
pub(in super::super) fn states_of_status(name: &str) -> Option<Vec<BuildState>> {
    use buffa::Enumeration as _;
    let full = match name.starts_with("BUILD_STATUS_") {
        true => name.to_owned(),
        false => format!("BUILD_STATUS_{}", name.to_ascii_uppercase()),
    };
    let wanted = v1::BuildStatus::from_proto_name(&full)?;
    let is_wanted = |state: &BuildState| super::status(*state) == wanted;
    Some(BuildState::ALL.into_iter().filter(is_wanted).collect())
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
            "max_memory_bytes": "1024",
            "timeout_seconds": 600,
            "max_build_time_minutes": 5,
        }));
        let expected =
            LowerLimits { memory_bytes: 1024, timeout_secs: 300, ..LowerLimits::default() };
        assert_eq!(lower.unwrap().lower, expected);
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
        for wrong in [
            json!({"backoff_strategy": "linear"}),
            json!({"max_retries": 11}),
            json!({"max_retries": -1}),
            json!({"base_delay": "soon"}),
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
    fn filters_name_states_of_both_vocabularies() {
        let filtered = |request: Value| {
            let request = serde_json::from_value(request).unwrap();
            filter(&request).map(|filter| filter.map(|filter| (filter.states, filter.limit)))
        };
        assert_eq!(filtered(json!({})).unwrap(), Some((vec![], 50)));
        let failed = filtered(json!({"state_filter": ["BUILD_STATE_FAILED"], "page_size": 5000}));
        let ended = vec![BuildState::Failed, BuildState::Timeout];
        assert_eq!(failed.unwrap(), Some((ended, 1000)));
        let none = filtered(json!({"state_filter": ["BUILD_STATE_CLEANING"]}));
        assert_eq!(none.unwrap(), None);
        assert!(filtered(json!({"page_size": -1})).is_err());
        assert!(filtered(json!({"page_token": "x"})).is_err());
        assert_eq!(states_of_status("BUILD_STATUS_TIMEOUT"), Some(vec![BuildState::Timeout]));
        assert_eq!(states_of_status("running").map(|states| states.len()), Some(5));
        assert_eq!(states_of_status("BUILD_STATUS_UNKNOWN"), Some(vec![]));
        assert_eq!(states_of_status("sleeping"), None);
    }
}
