//! The image config: what to run and which layers make up the root file system.
//!
//! Reads the OCI form (image spec `config.md`) and Docker's, which differ in nothing we use.
//! `null` stands for "empty" everywhere, as Go writes it. It does not know whether the user,
//! the working directory or the command exist in the image.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;
use crate::platform::Platform;
use crate::spelling::{self, Shape};

/// An image config, with absent and `null` fields as empty ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
pub struct ImageConfig {
    /// Operating system as written, empty if absent.
    pub os: String,
    /// Architecture as written, empty if absent.
    pub architecture: String,
    /// Architecture variant as written.
    pub variant: Option<String>,
    /// When the image was made, RFC 3339, as written.
    pub created: Option<String>,
    /// `USER`: name or number, with an optional `:group`.
    pub user: String,
    /// `EXPOSE`: `port[/protocol]`.
    pub exposed_ports: BTreeSet<String>,
    /// `ENV`: usually `NAME=value`, not checked.
    pub env: Vec<String>,
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
    /// `VOLUME`: paths.
    pub volumes: BTreeSet<String>,
    /// `WORKDIR`.
    pub working_dir: String,
    /// `LABEL`.
    pub labels: BTreeMap<String, String>,
    /// `STOPSIGNAL`: name or number.
    pub stop_signal: Option<String>,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
    /// How each layer came to be; not every entry has a layer.
    pub history: Vec<HistoryEntry>,
}

/// One step of an image's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct HistoryEntry {
    /// When, RFC 3339, as written.
    #[serde(default)]
    pub created: Option<String>,
    /// The command.
    #[serde(default, deserialize_with = "null_as_default")]
    pub created_by: String,
    /// A comment.
    #[serde(default, deserialize_with = "null_as_default")]
    pub comment: String,
    /// Whether the step made no layer.
    #[serde(default, deserialize_with = "null_as_default")]
    pub empty_layer: bool,
}

/// Why an image config is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON we expect.
    #[error("not a valid image config")]
    Json(#[source] serde_json::Error),
    /// `rootfs.type` is not `layers`.
    #[error("rootfs type {0:?} is not supported, only \"layers\" is")]
    RootfsType(String),
}

impl ConfigError {
    /// Puts `changed` in place of every text of the document that it quotes.
    pub(crate) fn change_quotes(&mut self, changed: &dyn Fn(&str) -> String) {
        match self {
            ConfigError::Json(source) => {
                *source = serde::de::Error::custom(changed(&source.to_string()));
            }
            ConfigError::RootfsType(kind) => *kind = changed(kind),
        }
    }
}

#[derive(Deserialize)]
struct RawImage {
    #[serde(default, deserialize_with = "null_as_default")]
    os: String,
    #[serde(default, deserialize_with = "null_as_default")]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    config: RawConfig,
    #[serde(default, deserialize_with = "null_as_default")]
    rootfs: RawRootfs,
    #[serde(default, deserialize_with = "null_as_default")]
    history: Vec<HistoryEntry>,
}

/// Images made by hand spell these in lower case, and Docker, which does not mind, runs them.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RawConfig {
    #[serde(default, alias = "user", deserialize_with = "null_as_default")]
    user: String,
    #[serde(
        default,
        alias = "exposedPorts",
        alias = "exposedports",
        deserialize_with = "null_as_default"
    )]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(default, alias = "env", deserialize_with = "null_as_default")]
    env: Vec<String>,
    #[serde(default, alias = "entrypoint", deserialize_with = "null_as_default")]
    entrypoint: Words,
    #[serde(default, alias = "cmd", deserialize_with = "null_as_default")]
    cmd: Words,
    #[serde(default, alias = "volumes", deserialize_with = "null_as_default")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(
        default,
        alias = "workingDir",
        alias = "workingdir",
        deserialize_with = "null_as_default"
    )]
    working_dir: String,
    #[serde(default, alias = "labels", deserialize_with = "null_as_default")]
    labels: BTreeMap<String, Option<String>>,
    #[serde(default, alias = "stopSignal", alias = "stopsignal")]
    stop_signal: Option<String>,
}

#[derive(Deserialize, Default)]
struct RawRootfs {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    diff_ids: Vec<Digest>,
}

const CONFIG: Shape = Shape(&[
    ("User", None),
    ("user", None),
    ("ExposedPorts", None),
    ("exposedPorts", None),
    ("exposedports", None),
    ("Env", None),
    ("env", None),
    ("Entrypoint", None),
    ("entrypoint", None),
    ("Cmd", None),
    ("cmd", None),
    ("Volumes", None),
    ("volumes", None),
    ("WorkingDir", None),
    ("workingDir", None),
    ("workingdir", None),
    ("Labels", None),
    ("labels", None),
    ("StopSignal", None),
    ("stopSignal", None),
    ("stopsignal", None),
]);
const ROOTFS: Shape = Shape(&[("type", None), ("diff_ids", None)]);
static IMAGE: Shape = Shape(&[
    ("os", None),
    ("architecture", None),
    ("variant", None),
    ("created", None),
    ("config", Some(&CONFIG)),
    ("rootfs", Some(&ROOTFS)),
]);

/// Old Docker versions wrote a command of one word as a plain string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Many(Vec<String>),
    One(String),
}

impl Default for Words {
    fn default() -> Words {
        Words::Many(Vec::new())
    }
}

impl From<Words> for Vec<String> {
    fn from(words: Words) -> Vec<String> {
        match words {
            Words::Many(words) => words,
            Words::One(word) => vec![word],
        }
    }
}

fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl ImageConfig {
    /// Reads an image config.
    ///
    /// # Errors
    /// When the bytes are no JSON of the right shape or the root file system is of a kind
    /// other than layers.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig, ConfigError> {
        let raw: RawImage = crate::manifest::object(bytes).map_err(ConfigError::Json)?;
        spelling::check(bytes, &IMAGE).map_err(ConfigError::Json)?;
        if let Some(kind) = raw.rootfs.kind.filter(|kind| !kind.is_empty() && kind != "layers") {
            return Err(ConfigError::RootfsType(crate::manifest::shown(&kind)));
        }
        let config = raw.config;
        let filled = |text: &String| !text.is_empty();
        let labels = config.labels.into_iter();
        Ok(ImageConfig {
            os: raw.os,
            architecture: raw.architecture,
            variant: raw.variant.filter(filled),
            created: raw.created.filter(filled),
            user: config.user,
            exposed_ports: config.exposed_ports.into_keys().collect(),
            env: config.env,
            entrypoint: config.entrypoint.into(),
            cmd: config.cmd.into(),
            volumes: config.volumes.into_keys().collect(),
            working_dir: config.working_dir,
            labels: labels.map(|(key, value)| (key, value.unwrap_or_default())).collect(),
            stop_signal: config.stop_signal.filter(filled),
            diff_ids: raw.rootfs.diff_ids,
            history: raw.history,
        })
    }

    /// The platform the config names, none when it names no architecture.
    #[must_use]
    pub fn platform(&self) -> Option<Platform> {
        if self.os.is_empty() || self.architecture.is_empty() {
            return None;
        }
        Some(Platform::new(&self.os, &self.architecture, self.variant.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(value: &serde_json::Value) -> Result<ImageConfig, ConfigError> {
        ImageConfig::parse(value.to_string().as_bytes())
    }

    #[test]
    fn every_field_we_use_is_read() {
        let config = parse(&json!({
            "os": "linux", "architecture": "arm", "variant": "v6",
            "created": "2024-01-02T03:04:05Z", "docker_version": "27", "container": "x",
            "config": {
                "User": "nginx:101", "ExposedPorts": {"80/tcp": {}, "443": {}},
                "Env": ["PATH=/bin", "ODD"], "Entrypoint": ["/e"], "Cmd": ["a", "b"],
                "Volumes": {"/data": {}}, "WorkingDir": "/srv", "Labels": {"a": "b"},
                "StopSignal": "SIGQUIT", "Healthcheck": {"Test": ["NONE"]},
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{HEX}")]},
            "history": [{"created_by": "RUN x", "empty_layer": true}],
        }))
        .unwrap();
        assert_eq!(config.platform().unwrap().to_string(), "linux/arm/v6");
        assert_eq!(config.user, "nginx:101");
        assert_eq!(config.exposed_ports.iter().collect::<Vec<_>>(), ["443", "80/tcp"]);
        assert_eq!(config.env, ["PATH=/bin", "ODD"]);
        assert_eq!(config.entrypoint, ["/e"]);
        assert_eq!(config.cmd, ["a", "b"]);
        assert!(config.volumes.contains("/data"));
        assert_eq!(config.working_dir, "/srv");
        assert_eq!(config.labels["a"], "b");
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert_eq!(config.diff_ids, [HEX].map(|hex| Digest::from_hex(hex).unwrap()));
        assert!(config.history[0].empty_layer);
    }

    #[test]
    fn null_and_absence_mean_empty_everywhere() {
        let nulls = parse(&json!({
            "os": null, "architecture": null, "variant": null, "created": null,
            "config": {"User": null, "ExposedPorts": null, "Env": null, "Entrypoint": null,
                "Cmd": null, "Volumes": null, "WorkingDir": null, "Labels": null,
                "StopSignal": null},
            "rootfs": {"type": null, "diff_ids": null}, "history": null,
        }))
        .unwrap();
        assert_eq!(nulls, ImageConfig::default());
        assert_eq!(parse(&json!({"config": null, "rootfs": null})).unwrap(), nulls);
        assert_eq!(parse(&json!({})).unwrap(), nulls);
        assert_eq!(nulls.platform(), None);
    }

    #[test]
    fn a_command_may_be_a_plain_string_as_old_docker_wrote_it() {
        let config = parse(&json!({"config": {"Cmd": "/bin/sh", "Entrypoint": ""}})).unwrap();
        assert_eq!((config.cmd, config.entrypoint), (vec!["/bin/sh".into()], vec![String::new()]));
    }

    #[test]
    fn lower_case_is_read_and_of_two_spellings_none() {
        let config = parse(&json!({"config": {
            "user": "u", "env": ["A=b"], "cmd": ["c"], "entrypoint": ["e"], "workingDir": "/w",
            "exposedports": {"80/tcp": {}}, "stopSignal": "SIGINT", "labels": {"a": "b"},
            "volumes": {"/v": {}},
        }}))
        .unwrap();
        assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("u", "/w"));
        assert_eq!((config.env, config.cmd), (vec!["A=b".into()], vec!["c".into()]));
        assert_eq!(config.entrypoint, ["e"]);
        assert_eq!((config.exposed_ports.len(), config.volumes.len()), (1, 1));
        assert_eq!((config.labels.len(), config.stop_signal.as_deref()), (1, Some("SIGINT")));
        for bad in [
            json!({"config": {"User": "nobody", "user": "root"}}),
            json!({"config": {"USER": "root"}}),
            json!({"config": {"User": "nobody"}, "Config": {"User": "root"}}),
            json!({"rootfs": {"Diff_IDs": []}}),
            json!({"Architecture": "arm64"}),
        ] {
            assert!(matches!(parse(&bad), Err(ConfigError::Json(_))), "{bad}");
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        for bad in [
            json!([]),
            json!({"config": {"Env": "A=b"}}),
            json!({"config": {"Env": [1]}}),
            json!({"rootfs": {"diff_ids": ["sha256:short"]}}),
            json!({"rootfs": {"diff_ids": [HEX]}}),
        ] {
            assert!(matches!(parse(&bad), Err(ConfigError::Json(_))), "{bad}");
        }
        assert!(ImageConfig::parse(b"{").is_err());
        assert!(matches!(
            parse(&json!({"rootfs": {"type": "squashfs"}})),
            Err(ConfigError::RootfsType(_))
        ));
    }
}
