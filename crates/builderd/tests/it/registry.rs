//! Builds from a registry that is slow to please.

use std::io::{BufRead as _, BufReader};

use oci::testing::{Access, Fault, TestRegistry};

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

fn image() -> TestImage {
    TestImage::new(vec![
        Layer::new().file("base", &noise(1, 900_000)),
        Layer::new().file("app", &noise(2, 10_000)),
    ])
}

fn serve(image: &TestImage) -> TestRegistry {
    let registry = TestRegistry::start().unwrap();
    let config = serde_json::to_vec(&image.config).unwrap();
    for blob in image.blobs.iter().chain([&config]) {
        registry.put_blob(blob.clone());
    }
    let manifest = image.manifest(&config);
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    registry.put_manifest_bytes("team/app", Some("v1"), media_type, manifest);
    registry
}

fn build(workshop: &Workshop, registry: &TestRegistry, output: &str, more: &[&str]) -> String {
    let (host, source) = (registry.host(), format!("{}/team/app:v1", registry.host()));
    let mut all = vec!["build", &source, "-o", output, "--plain-http", &host];
    all.extend(["--progress", "plain"]);
    all.extend(more);
    let result = workshop.run(&all);
    assert!(result.status.success(), "{}", stderr(&result));
    stderr(&result)
}

fn blob_requests(registry: &TestRegistry, image: &TestImage) -> usize {
    let layers: Vec<String> = image.blobs.iter().map(|blob| sha256(blob)).collect();
    let is_layer = |path: &str| layers.iter().any(|layer| path.contains(layer.as_str()));
    registry.requests().iter().filter(|request| is_layer(&request.path)).count()
}

#[test]
fn a_known_layer_costs_no_download() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    build(&workshop, &registry, "first", &[]);
    assert_eq!(blob_requests(&registry, &image), 2);
    build(&workshop, &registry, "second", &[]);
    assert_eq!(blob_requests(&registry, &image), 2);
    assert_eq!(workshop.read("first"), workshop.read("second"));
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_ended() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    registry.fault(&sha256(&image.blobs[0]), Fault::CutAfter(300_000));
    build(&workshop, &registry, "cut", &["--no-cache"]);
    assert_eq!(registry.faults_left(), 0);
    assert_eq!(blob_requests(&registry, &image), 3);
    build(&workshop, &registry, "whole", &[]);
    assert_eq!(workshop.read("cut"), workshop.read("whole"));
}

#[test]
fn a_blob_that_was_swapped_is_upstreams_fault_and_leaves_no_pack() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    let mut swapped = image.blobs[1].clone();
    *swapped.last_mut().unwrap() ^= 1;
    registry.corrupt_blob(oci::Digest::of(&image.blobs[1]), swapped);
    let (host, source) = (registry.host(), format!("{}/team/app:v1", registry.host()));
    let result = workshop.run(&["build", &source, "-o", "out", "--plain-http", &host]);
    assert_eq!(result.status.code(), Some(4), "{}", stderr(&result));
    assert!(!workshop.path("out").exists());
    let swapped = sha256(&image.blobs[1]);
    assert!(workshop.packs().iter().all(|pack| !pack.to_string_lossy().contains(&swapped)));
}

#[test]
fn plain_http_is_never_tried_unless_named() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    let source = format!("{}/team/app:v1", registry.host());
    let result = workshop.run(&["build", &source, "-o", "out"]);
    assert!(!result.status.success());
    assert!(registry.requests().is_empty());
    assert!(stderr(&result).contains("hint:"), "{}", stderr(&result));
}

#[test]
fn a_mirror_that_is_passed_over_is_named() {
    let (image, workshop) = (image(), Workshop::new());
    let (registry, mirror) = (serve(&image), serve(&image));
    let gone = TestRegistry::start().unwrap().host();
    let mirrored = format!("{}={gone}", registry.host());
    let text = build(&workshop, &registry, "out", &["--mirror", &mirrored, "--plain-http", &gone]);
    assert_eq!(text.matches(&format!("mirror {gone} was passed over: ")).count(), 1, "{text}");
    // One that has the manifest and lacks a layer.
    mirror.delete_blob(oci::Digest::of(&image.blobs[0]));
    let (host, more) = (mirror.host(), format!("{}={}", registry.host(), mirror.host()));
    let more = ["--mirror", &more, "--plain-http", &host, "--no-cache"];
    let text = build(&workshop, &registry, "out", &more);
    assert_eq!(text.matches(&format!("mirror {host} was passed over: ")).count(), 1, "{text}");
    // Nor is it forgotten when the registry has no such image either.
    let source = format!("{}/team/none:v1", registry.host());
    let plain = [registry.host(), host.clone()].join(",");
    let arguments = ["build", &source, "-o", "none", more[0], more[1], "--plain-http", &plain];
    let result = workshop.run(&arguments);
    assert_eq!(result.status.code(), Some(3), "{}", stderr(&result));
    let told = stderr(&result);
    assert!(told.contains(&format!("mirror {host} was passed over: ")), "{told}");
}

#[test]
fn a_mirror_that_is_passed_over_is_named_while_the_registry_is_waited_for() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    let gone = TestRegistry::start().unwrap().host();
    registry.fault("manifests", Fault::StallAfter(0));
    let (host, source) = (registry.host(), format!("{}/team/app:v1", registry.host()));
    let (mirror, plain) = (format!("{host}={gone}"), format!("{host},{gone}"));
    let arguments = ["build", &source, "-o", "out", "--mirror", &mirror, "--plain-http", &plain];
    let mut command = workshop.command(&arguments);
    let mut build =
        command.args(["--progress", "plain"]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(build.stderr.take().unwrap()).lines().map(Result::unwrap);
    let note = format!("mirror {gone} was passed over: ");
    let told = lines.any(|line| line.contains(&note));
    let is_waiting = build.try_wait().unwrap().is_none();
    build.kill().unwrap();
    build.wait().unwrap();
    assert!(told && is_waiting, "{told} {is_waiting}");
    let rest: Vec<String> = lines.collect();
    assert!(rest.is_empty(), "it came when the wait was over: {rest:?}");
}

#[test]
fn a_docker_config_that_is_named_must_be_there() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    let (host, source) = (registry.host(), format!("{}/team/app:v1", registry.host()));
    let mut arguments = vec!["build", &source, "-o", "out", "--plain-http", &host];
    let usual = workshop.command(&arguments).env("DOCKER_CONFIG", workshop.path("none")).output();
    assert!(usual.is_ok_and(|usual| usual.status.success()), "the usual one need not");
    arguments.extend(["--docker-config", "nosuch.json"]);
    let result = workshop.run(&arguments);
    assert_eq!(result.status.code(), Some(2), "{}", stderr(&result));
    assert!(stderr(&result).contains("--docker-config nosuch.json"), "{}", stderr(&result));
}

#[test]
fn registries_that_no_name_could_match_are_refused_with_what_to_write() {
    let workshop = Workshop::with(&image());
    for (option, value, advice) in [
        ("--plain-http", "http://localhost:5077", "write `localhost:5077`"),
        ("--plain-http", "ok.example,https://b.example/", "write `b.example`"),
        ("--plain-http", "host/path", "such as `localhost:5000`"),
        ("--mirror", "http://localhost:5077", "write `localhost:5077`"),
        ("--mirror", "https://docker.io=localhost:5077", "write `docker.io`"),
        ("--mirror", "docker.io=b c", "such as `localhost:5000`"),
    ] {
        let result = workshop.build("out", &[option, value]);
        let text = stderr(&result);
        assert_eq!(result.status.code(), Some(2), "{value}: {text}");
        assert!(text.contains(option) && text.contains(advice), "{value}: {text}");
    }
    for (option, value) in [
        ("--plain-http", "localhost:5077, [::1]:5000"),
        ("--mirror", "localhost:5077/prefix"),
        ("--mirror", "*=localhost:5077"),
        ("--mirror", ""),
    ] {
        workshop.build_well("out", &[option, value]);
    }
}

#[test]
fn credentials_come_from_dockers_config_and_appear_nowhere() {
    let (image, workshop) = (image(), Workshop::new());
    let registry = serve(&image);
    registry.set_access(Access::Basic("me".into(), "hunter2-canary".into()));
    let (host, source) = (registry.host(), format!("{}/team/app:v1", registry.host()));
    let arguments = ["build", &source, "-o", "out", "--plain-http", &host];
    let refused = workshop.run(&arguments);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("docker login"), "{}", stderr(&refused));
    // "me:hunter2-canary" in base64.
    let config = serde_json::json!({"auths": {&host: {"auth": "bWU6aHVudGVyMi1jYW5hcnk="}}});
    std::fs::create_dir(workshop.path("docker")).unwrap();
    std::fs::write(workshop.path("docker/config.json"), config.to_string()).unwrap();
    let allowed = workshop
        .command(&arguments)
        .env("DOCKER_CONFIG", workshop.path("docker"))
        .output()
        .unwrap();
    assert!(allowed.status.success(), "{}", stderr(&allowed));
    let everything = [allowed.stdout, allowed.stderr, workshop.read("out.metadata.json")].concat();
    assert!(!String::from_utf8_lossy(&everything).contains("hunter2"));
}
