//! Stories about artifacts in buckets of Google Cloud Storage; builds on several nodes, which
//! `crash` tells of, have theirs in one of S3.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::json;

use super::Verdict;
use super::lab::{Lab, same_bytes};
use super::service::place;
use crate::service::api::{Api, Order};
use crate::service::objects::{BUCKET, Google};
use crate::service::until;

/// How long a build, or the removal of what it made, may take.
const SECS_MAX: Duration = Duration::from_secs(60);
/// What goes into the image: enough for an upload in several parts.
const NOISE_BYTES: u64 = 20 << 20;

pub(super) fn an_artifact_lives_its_life_in_a_bucket_of_google_cloud_storage(
    lab: &Lab,
) -> Result<Verdict> {
    let corner = lab.corner()?;
    let google = Google::start()?;
    let place = place(lab, &corner)?
        .set("STORAGE_BACKEND", "gcs")
        .set("GCS_BUCKET", BUCKET)
        .set("GCS_CREDENTIALS_FILE", &google.account().display().to_string())
        .set("STORAGE_PREFIX", "some/where")
        .set("CLEANUP_INTERVAL", "1s")
        .env("SSL_CERT_FILE", google.certificate().display().to_string());
    let server = place.start()?;
    let api = Api::new(server.address(), "google", "PRO");
    let image = format!("{}/{}", lab.registry().address(), lab.numbered(1, NOISE_BYTES)?);
    let mut order = api.message(&Order::of(&image));
    order["config"]["retryPolicy"] = json!({"maxRetries": 1, "baseDelay": "1s"});
    let created = api.ask("CreateBuild", &order)?;
    let id = created["buildId"].as_str().unwrap_or_default();

    // The first upload breaks off: nothing of it stays, and the second try is whole.
    let build = api.completed(id, SECS_MAX)?;
    let failure = build["attempts"][0]["failure"]["cause"].as_str().unwrap_or_default();
    if !failure.contains("the artifact could not be stored") {
        bail!("the attempts are {}", build["attempts"]);
    }
    if google.objects.answered(&["DELETE ", "?uploadId=", " 204 "])? != 1 {
        bail!("the upload that broke off was not aborted");
    }
    if google.objects.holds_parts()? {
        bail!("parts of an upload that broke off have stayed");
    }
    let keys = google.objects.keys()?;
    let [key] = &keys[..] else { bail!("the objects are {keys:?}") };
    if build["rootfsPath"] != format!("gs://{BUCKET}/{key}") || !key.starts_with("some/where/") {
        bail!("the artifact {} is stored as {key}", build["rootfsPath"]);
    }

    let (file, wanted) = (corner.output("service.ext4"), corner.output("command.ext4"));
    corner.build(&image, &wanted, &[])?;
    api.download(id, &file)?;
    same_bytes(&file, &wanted)?;
    let piece = api.get(&format!("GetBuildArtifact/{id}"), &[("Range", "bytes=1000-1999")])?;
    if piece.status() != 206 || piece.body != std::fs::read(&wanted)?[1000..2000] {
        bail!("a range answered {} with {} bytes", piece.status(), piece.body.len());
    }

    // Every object there is older than it is, but a build names this one.
    let sweeps = || google.objects.answered(&["GET ", "list-type=2", "prefix=some/where/"]);
    let before = sweeps()?;
    until("three sweeps", SECS_MAX, || Ok((sweeps()? >= before + 3).then_some(())))?;
    if google.objects.keys()?.is_empty() {
        bail!("the artifact of a build was removed");
    }
    api.ask("DeleteBuild", &json!({"buildId": id}))?;
    until("the object is gone", SECS_MAX, || Ok(google.objects.keys()?.is_empty().then_some(())))?;
    place.nothing_staged()?;
    Ok(Verdict::Passed)
}
