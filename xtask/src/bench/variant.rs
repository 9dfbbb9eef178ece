//! An image that differs from another one in its top layer. Knows no contender.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::images::generated::noise;
use crate::images::layout::LayoutWriter;
use crate::images::tar::Node;

/// How much an application's own layer weighs in the changed image.
const TOP_BYTES: u64 = 4 << 20;

/// Writes a layout with all layers of `from` but the top one, and a new top of its own.
pub(crate) fn changed_top(from: &Path, to: &Path, turn: u64) -> Result<()> {
    let json =
        |path: &Path| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let blob = |descriptor: &Value| -> Result<_> {
        let digest = descriptor["digest"].as_str().context("a descriptor without a digest")?;
        Ok(from.join("blobs").join(digest.replace(':', "/")))
    };
    let index = json(&from.join("index.json"))?;
    let manifest = json(&blob(&index["manifests"][0])?)?;
    let config = json(&blob(&manifest["config"])?)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().context("no diff_ids")?;
    let mut writer = LayoutWriter::create(to)?;
    let known = layers.len().saturating_sub(1);
    for (layer, diff_id) in layers.iter().zip(diff_ids).take(known) {
        writer.adopt(&blob(layer)?, layer, diff_id)?;
    }
    writer.layer(|tar| {
        tar.add("srv/changed", &Node::file(noise(turn, TOP_BYTES)))?;
        tar.add("etc/changed", &Node::file(format!("turn {turn}\n")))
    })?;
    writer.finish(&config["config"])
}
