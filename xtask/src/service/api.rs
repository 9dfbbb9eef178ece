//! The public API as one tenant uses it: Connect with JSON over HTTP/1.1.
//!
//! Answers are handed out as they came. Knows no code of builderd.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::wire::{Answer, Body, Connection, Head, Owned, Request};

/// Where the RPCs and the documented routes are.
pub(crate) const SERVICE: &str = "/builder.v1.BuilderService";

/// The order of the documentation's complete workflow, as it is printed there.
pub(crate) const PRINTED_ORDER: &str = r#"{
    "config": {
      "source": {
        "docker_image": {
          "image_uri": "ghcr.io/unkeyed/unkey:f4cfee5"
        }
      },
      "target": {
        "microvm_rootfs": {
          "format": "ext4",
          "init_strategy": "INIT_STRATEGY_DIRECT_EXEC"
        }
      },
      "tenant": {
        "tenant_id": "tenant-123",
        "customer_id": "customer-456",
        "tier": "TENANT_TIER_PRO"
      }
    }
  }"#;

/// What a registry calls the image of [`PRINTED_ORDER`].
pub(crate) const PRINTED_IMAGE: &str = "unkeyed/unkey:f4cfee5";

/// How often a build is looked at by who waits for it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Longest message of a stream.
const MESSAGE_BYTES_MAX: u32 = 4 << 20;

/// One tenant at one address.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) address: String,
    pub(crate) tenant: String,
    /// `PRO`, `ENTERPRISE`, …
    pub(crate) tier: &'static str,
    /// What is shown in the place of the tenant's name, which only development mode believes.
    pub(crate) authorization: Option<String>,
}

/// What is to be built.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) image: String,
    pub(crate) compression: &'static str,
    /// Two orders with the same key are one build.
    pub(crate) key: String,
}

impl Order {
    pub(crate) fn of(image: &str) -> Self {
        Self { image: image.to_owned(), compression: "none", key: String::new() }
    }
}

/// A call that can be sent again and again.
#[derive(Debug)]
pub(crate) struct Rpc<'a> {
    path: String,
    headers: [(&'static str, &'a str); 3],
    body: Vec<u8>,
}

impl Rpc<'_> {
    pub(crate) fn request(&self) -> Request<'_> {
        Request { method: "POST", path: &self.path, headers: &self.headers, body: &self.body }
    }
}

impl Api {
    pub(crate) fn new(address: &str, tenant: &str, tier: &'static str) -> Self {
        let (address, tenant) = (address.to_owned(), tenant.to_owned());
        Self { address, tenant, tier, authorization: None }
    }

    /// The same with a token.
    pub(crate) fn with_token(self, token: &str) -> Self {
        Self { authorization: Some(format!("Bearer {token}")), ..self }
    }

    /// The header that says who asks.
    fn credential(&self) -> (&'static str, &str) {
        match &self.authorization {
            Some(shown) => ("Authorization", shown),
            None => ("X-Tenant-ID", &self.tenant),
        }
    }

    /// An RPC in JSON, to be sent as often as wanted.
    pub(crate) fn rpc(&self, method: &str, message: &Value) -> Rpc<'_> {
        self.post(method, "application/json", message.to_string().into_bytes())
    }

    fn post(&self, method: &str, content_type: &'static str, body: Vec<u8>) -> Rpc<'_> {
        let headers =
            [("Content-Type", content_type), ("Connect-Protocol-Version", "1"), self.credential()];
        Rpc { path: format!("{SERVICE}/{method}"), headers, body }
    }

    /// An RPC's answer, whatever its status is.
    pub(crate) fn call(&self, method: &str, message: &Value) -> Result<Answer> {
        Connection::open(&self.address)?.send(self.rpc(method, message).request())
    }

    /// An RPC that is to succeed.
    pub(crate) fn ask(&self, method: &str, message: &Value) -> Result<Value> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let answer = self.call(method, message)?;
            match answer.status() {
                200 => return answer.json(),
                429 if answer.head.header("retry-after").is_some() && Instant::now() < end => {
                    std::thread::sleep(retry_after(&answer.head));
                }
                status => bail!("{method} answered {status}: {}", answer.text()),
            }
        }
    }

    /// A plain route's answer.
    pub(crate) fn get(&self, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let path = format!("{SERVICE}/{path}");
        let mut all = vec![self.credential()];
        all.extend_from_slice(headers);
        let request = Request { method: "GET", path: &path, headers: &all, body: b"" };
        Connection::open(&self.address)?.send(request)
    }

    /// The message of CreateBuild.
    pub(crate) fn message(&self, order: &Order) -> Value {
        json!({"config": {
            "tenant": {"tenantId": self.tenant, "tier": format!("TENANT_TIER_{}", self.tier)},
            "source": {"dockerImage": {"imageUri": order.image}},
            "target": {"microvmRootfs": {
                "initStrategy": "INIT_STRATEGY_DIRECT", "compression": order.compression,
            }},
            "strategy": {"dockerExtract": {}},
            "idempotencyKey": order.key,
        }})
    }

    /// Creates a build and returns its id.
    pub(crate) fn create(&self, order: &Order) -> Result<String> {
        let answer = self.ask("CreateBuild", &self.message(order))?;
        Ok(answer["buildId"].as_str().context("the answer names no build")?.to_owned())
    }

    /// A build as GetBuild gives it.
    pub(crate) fn build(&self, id: &str) -> Result<Value> {
        Ok(self.ask("GetBuild", &json!({"buildId": id}))?["build"].take())
    }

    /// Waits until a build is in one of these states (names without `BUILD_STATE_`).
    pub(crate) fn wait_for(&self, id: &str, states: &[&str], limit: Duration) -> Result<Value> {
        let end = Instant::now() + limit;
        loop {
            let build = self.build(id)?;
            let state = build["state"].as_str().unwrap_or_default();
            if states.iter().any(|wanted| state.strip_prefix("BUILD_STATE_") == Some(wanted)) {
                return Ok(build);
            }
            if Instant::now() > end || ended(&build) {
                bail!("{id} is {state}, not {states:?}: {}", build["errorMessage"]);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits until a build has its artifact.
    pub(crate) fn completed(&self, id: &str, limit: Duration) -> Result<Value> {
        self.wait_for(id, &["COMPLETED"], limit)
    }

    /// All builds of the tenant, page by page, and the total that the first page states.
    pub(crate) fn list(&self) -> Result<(Vec<Value>, u64)> {
        let (mut builds, mut token, mut total) = (Vec::new(), String::new(), None);
        loop {
            let message = json!({"tenantId": self.tenant, "pageSize": 20, "pageToken": token});
            let mut page = self.ask("ListBuilds", &message)?;
            total.get_or_insert(number(&page["totalCount"]));
            if let Value::Array(list) = page["builds"].take() {
                builds.extend(list);
            }
            token = page["nextPageToken"].as_str().unwrap_or_default().to_owned();
            if token.is_empty() {
                return Ok((builds, total.unwrap_or(0)));
            }
        }
    }

    /// Follows a log from its first line to its end and returns the lines.
    pub(crate) fn follow(&self, id: &str) -> Result<Vec<Value>> {
        let mut lines = Vec::new();
        self.follow_with(id, |line| {
            lines.push(line);
            Ok(())
        })?;
        Ok(lines)
    }

    /// The same, line by line as they come.
    pub(crate) fn follow_with(
        &self,
        id: &str,
        mut each: impl FnMut(Value) -> Result<()>,
    ) -> Result<()> {
        let mut body = self.open_log(id)?;
        loop {
            let mut prefix = [0; 5];
            body.read_exact(&mut prefix).context("the log ends without its end")?;
            let [flags, length @ ..] = prefix;
            let length = u32::from_be_bytes(length);
            if length > MESSAGE_BYTES_MAX {
                bail!("a message of {length} bytes");
            }
            let mut message = vec![0; length as usize];
            body.read_exact(&mut message)?;
            let message: Value = serde_json::from_slice(&message)?;
            if flags & 2 == 0 {
                each(message)?;
            } else if message["error"].is_null() {
                return Ok(());
            } else {
                bail!("the log ended with {message}");
            }
        }
    }

    /// Starts to follow a log. What goes wrong later comes as the stream's end.
    pub(crate) fn open_log(&self, id: &str) -> Result<Body<Owned>> {
        let message = json!({"buildId": id, "follow": true}).to_string();
        let length = u32::try_from(message.len())?;
        let mut enveloped = vec![0];
        enveloped.extend_from_slice(&length.to_be_bytes());
        enveloped.extend_from_slice(message.as_bytes());
        let rpc = self.post("StreamBuildLogs", "application/connect+json", enveloped);
        let (head, mut body) = Connection::open(&self.address)?.stream(rpc.request())?;
        if head.status != 200 {
            let mut text = String::new();
            body.read_to_string(&mut text)?;
            bail!("StreamBuildLogs answered {}: {text}", head.status);
        }
        Ok(body)
    }

    /// Downloads an artifact.
    pub(crate) fn download(&self, id: &str, file: &Path) -> Result<Head> {
        let path = format!("{SERVICE}/GetBuildArtifact/{id}");
        let headers = [self.credential()];
        let request = Request { method: "GET", path: &path, headers: &headers, body: b"" };
        let (head, mut body) = Connection::open(&self.address)?.stream(request)?;
        if head.status != 200 {
            bail!("GetBuildArtifact/{id} answered {}", head.status);
        }
        io::copy(&mut body, &mut File::create(file)?)?;
        Ok(head)
    }
}

/// Whether nothing more will happen to a build.
pub(crate) fn ended(build: &Value) -> bool {
    let state = build["state"].as_str().unwrap_or_default();
    ["COMPLETED", "FAILED", "CANCELLED"].iter().any(|end| state.ends_with(end))
}

/// A number of proto3 JSON: 64-bit ones are texts, zero is left out.
pub(crate) fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

/// What an answer of 429 or 503 asks for.
pub(crate) fn retry_after(head: &Head) -> Duration {
    let secs = head.header("retry-after").and_then(|text| text.parse().ok());
    Duration::from_secs(secs.unwrap_or(1)).max(Duration::from_millis(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_both_widths_are_read() {
        assert_eq!(number(&json!("12")), 12);
        assert_eq!(number(&json!(12)), 12);
        assert_eq!(number(&Value::Null), 0);
    }
}
