//! `cargo xtask fuzz [TARGET...] [--seconds N]`: every parser of foreign bytes, for a while.
//!
//! The targets live in `fuzz/`, a workspace of its own. Seeds are made here, by code.

use std::fs::File;

use anyhow::{Result, bail};

use crate::arguments::Arguments;
use crate::images::tar::{Node, What};
use crate::images::{self, generated};
use crate::process::{self, Program};
use crate::workspace;

/// All of them; a test compares with `fuzz/fuzz_targets`.
pub(crate) const TARGETS: &[&str] = &[
    "reference",
    "manifest",
    "archive",
    "registry_answer",
    "tar",
    "whiteout_path",
    "pack",
    "ext4_reader",
    "sealed_file",
    "worker_lines",
    "build_lines",
    "overseer",
    "request",
];

/// How long each target runs unless the caller says.
const SECONDS_DEFAULT: u64 = 60;

/// The largest input that is tried.
const INPUT_BYTES_MAX: usize = 256 * 1024;

/// `cargo check` of the targets, without the fuzzer's instrumentation. Their libraries are those of the
/// workspace, which clippy has checked already.
pub(crate) fn compile_check() -> Result<Program> {
    let program = workspace::cargo().env("CARGO_TARGET_DIR", workspace::cargo_target()?);
    Ok(program.args(["check", "--quiet", "--manifest-path", "fuzz/Cargo.toml"]))
}

pub(crate) fn run(mut arguments: Arguments) -> Result<()> {
    let seconds = arguments.number("--seconds")?.unwrap_or(SECONDS_DEFAULT);
    let named = arguments.rest()?;
    for name in &named {
        if !TARGETS.contains(&name.as_str()) {
            bail!("no fuzz target is called {name}: {}", TARGETS.join(", "));
        }
    }
    if !process::found("cargo-fuzz") {
        eprintln!("installing cargo-fuzz");
        workspace::cargo()
            .args(["install", "--locked", "--profile=dev", "cargo-fuzz"])
            .loud_checked()?;
    }
    seeds()?;
    let mut found = Vec::new();
    for target in
        TARGETS.iter().filter(|target| named.is_empty() || named.iter().any(|n| n == *target))
    {
        println!("\n=== {target}, {seconds} s");
        // The sanitizer flags are unstable; the stable compiler takes them when told to.
        let status = Program::new("cargo")
            .args(["fuzz", "run", target, "--"])
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={INPUT_BYTES_MAX}"))
            .args(["-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"])
            .env("RUSTC_BOOTSTRAP", "1")
            .dir(workspace::top())
            .loud()?;
        if !status.success() {
            found.push(*target);
        }
    }
    if !found.is_empty() {
        bail!("inputs that break {} lie in fuzz/artifacts", found.join(", "));
    }
    println!("\nno target broke");
    Ok(())
}

/// Writes the seed corpus, so that no run starts from nothing.
fn seeds() -> Result<()> {
    let corpus = workspace::top().join("fuzz/corpus");
    let put = |target: &str, name: &str, bytes: &[u8]| -> Result<()> {
        let dir = corpus.join(target);
        std::fs::create_dir_all(&dir)?;
        if bytes.len() <= INPUT_BYTES_MAX {
            std::fs::write(dir.join(name), bytes)?;
        }
        Ok(())
    };
    for (target, texts) in [
        ("reference", REFERENCES),
        ("whiteout_path", WHITEOUTS),
        ("registry_answer", ANSWERS),
        ("worker_lines", WORKER_LINES),
        ("build_lines", BUILD_LINES),
        ("overseer", BASES),
        ("request", REQUESTS),
    ] {
        for (index, text) in texts.iter().enumerate() {
            put(target, &format!("seed{index}"), text.as_bytes())?;
        }
    }
    let layout = images::layout(images::TINY)?;
    for file in std::fs::read_dir(layout.join("blobs/sha256"))? {
        let bytes = std::fs::read(file?.path())?;
        if bytes.starts_with(b"{") {
            put("manifest", &format!("seed{}", bytes.len()), &bytes)?;
        }
    }
    put("manifest", "index", &std::fs::read(layout.join("index.json"))?)?;
    put("archive", "layout", ARCHIVE.as_bytes())?;
    put("archive", "tar", &tar_of_layout(&layout)?)?;
    let tar = tar_seed()?;
    put("tar", "tar", &tar)?;
    put("tar", "gzip", &gzip(&tar)?)?;
    put("pack", "tar", &tar)?;
    for (index, (block_bytes, features)) in FILESYSTEMS.iter().enumerate() {
        put("ext4_reader", &format!("seed{index}"), &filesystem(block_bytes, features)?)?;
    }
    Ok(())
}

const REFERENCES: &[&str] = &[
    "nginx",
    "ghcr.io/a/b:tag",
    "host:5000/x@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "oci:dir:latest",
    "docker-archive:file.tar",
    "localhost/a__b/c-d.e:v1",
    "-",
];

const WHITEOUTS: &[&str] =
    &["a/.wh.b", ".wh..wh..opq", "a/.wh..wh.plnk/x", "./../a//b/", ".wh.", "/.wh...", "a/.wh.."];

/// A layer, a configuration, a manifest, the list of a `docker save` archive and the index of a
/// layout; `@`, `%` and `#` with a number stand for an earlier line, as the target says.
const ARCHIVE: &str = r##"layer
{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["@0"]}}
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"@1","size":#1},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"@0","size":#0}]}
[{"Config":"blobs/sha256/%1","RepoTags":["a:t"],"Layers":["blobs/sha256/%0"]}]
{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"@2","size":#2,"annotations":{"org.opencontainers.image.ref.name":"t"}}]}"##;

/// The documents of a layout, as another tool's archive has them; its layers are too large.
fn tar_of_layout(layout: &std::path::Path) -> Result<Vec<u8>> {
    let outcome = Program::new("tar")
        .args(["--create", "--exclude=*.part", "--file=-", "--directory"])
        .arg(layout)
        .args(["oci-layout", "index.json"])
        .checked()?;
    Ok(outcome.stdout)
}

const ANSWERS: &[&str] = &[
    "www-authenticate: Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",\
     scope=\"repository:library/nginx:pull\"\nwww-authenticate: Basic realm=\"x\"\n\n\
     {\"token\":\"a\",\"expires_in\":300,\"issued_at\":\"2026-01-01T00:00:00Z\"}",
    "content-range: bytes 5-9/10\nretry-after: 120\n\n{\"access_token\":\"b\"}",
    "date: Wed, 21 Oct 2015 07:28:00 GMT\nretry-after: Wed, 21 Oct 2015 07:28:30 GMT\n",
];

/// Of a layer, of an image of the sizes that the target has files of, and of neither.
const WORKER_LINES: &[&str] = &[
    r#"{"Walls":["seccomp","landlock"]}
{"Tally":{"blob_bytes":10,"tar_bytes":20,"data_bytes":5}}
{"Packed":{"summary":{"diff_id":[7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7,7],"compression":"Gzip","blob_bytes":10,"tar_bytes":20,"data_bytes":5,"toc_bytes":1,"pack_bytes":4096,"entries":1},"is_placed":true,"writes":{"cached":{"bytes":1,"nanos":1},"direct":{"bytes":1,"nanos":1},"accesses":1,"cached_bytes":1,"direct_bytes":1},"taken":{"cpu_ms":1,"memory_peak_bytes":1}}}
"#,
    r#"{"Event":{"event":"phase_started","phase":"flatten"}}
{"Event":{"event":"phase_finished","phase":"flatten","secs":0.5}}
{"Event":{"event":"phase_started","phase":"write"}}
{"Event":{"event":"write_progress","bytes":1,"total_bytes":2}}
{"Event":{"event":"warning","message":"\u001b[2J"}}
{"Made":{"made":{"file":1,"image":0,"image_bytes":8192,"image_sha256":"5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5","compressed_bytes":5,"compressed_sha256":"5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5","uuid":"01234567-89ab-8def-8123-456789abcdef","filesystem_bytes":8192,"free_bytes":4096,"data_bytes":4096,"inodes_used":11,"inodes_total":16,"biggest_directories":[["/",1,1]]},"taken":{"cpu_ms":1,"memory_peak_bytes":1}}}
"#,
    r#"{"Failed":{"words":{"text":"no","cause":{"text":"none","cause":null}},"blame":"yours","code":"INVALID_SOURCE","hint":"x","is_out_of_space":false}}
"#,
];

const BUILD_LINES: &[&str] = &[
    r#"{"event":{"event":"phase_started","phase":"layers"}}
{"event":{"event":"layer_started","layer":0,"digest":"sha256:ab","size_bytes":5}}
{"event":{"event":"layer_progress","layer":0,"bytes":5}}
{"event":{"event":"layer_ready","layer":0,"digest":"sha256:ab","origin":"packed"}}
{"event":{"event":"phase_finished","phase":"layers","secs":0.5}}
{"event":{"event":"command_started","command":0,"text":"make"}}
{"event":{"event":"command_output","command":0,"line":"made"}}
{"event":{"event":"write_progress","bytes":1,"total_bytes":2}}
{"done":{"metadata":{},"artifact_bytes":5,"image_bytes":5,"fetched_bytes":5,"layers_cached":0,"phase_secs":[["layers",0.5]],"memory_peak_bytes":1,"cpu_ms":1}}
"#,
    r#"{"event":{"event":"warning","message":"x"}}
{"failed":{"code":"INTERNAL","step":"write","cause":"no","blame":"ours","remedy":""}}
"#,
];

/// The first two letters stand for the sizes of the files that are handed over.
const BASES: &[&str] = &[
    r#"zz{"environment":["PATH=/bin","http_proxy=http://x","X","=y"],"working_directory":"/srv","packs":[{"file":0,"base":0,"length":5},{"file":1,"base":4096,"length":0}]}"#,
    r#"0z{"environment":["A=\u0000"],"working_directory":"","packs":[{"file":1,"base":18446744073709551615,"length":1}]}"#,
    r#"zz{"environment":[],"working_directory":"../..","packs":[{"file":18446744073709551615,"base":0,"length":1}]}"#,
];

/// The first letter says of which method: `a` creates, `c` lists, `d` cancels.
const REQUESTS: &[&str] = &[
    r#"a{"config":{"tenant":{"tenant_id":"t","tier":"TENANT_TIER_PRO"},"source":{"docker_image":{"image_uri":"nginx:alpine","pull_tags":["a"],"auth":{"username":"u","password":"p","registry":"ghcr.io"}}},"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_DIRECT","compression":"zstd","size_limit_bytes":"5"}},"strategy":{"docker_strategy":{"custom_commands":["make"]}},"limits":{"max_memory_bytes":7,"timeout_seconds":5},"build_name":"n","labels":{"a":"b"},"retry_policy":{"max_retries":2,"base_delay":"30s","retry_on":["NETWORK_ERROR"]},"idempotency_key":"k"}}"#,
    r#"a{"config":{"source":{"dockerImage":{"imageUri":"nginx"}},"target":{"microvmRootfs":{}}}}"#,
    r#"c{"state_filter":["BUILD_STATE_FAILED"],"page_size":5,"page_token":"x"}"#,
    r#"c{"status":"failed","limit":7,"offset":3}"#,
    r#"d{"build_id":"build_1","reason":"why"}"#,
];

fn tar_seed() -> Result<Vec<u8>> {
    Ok(generated::tar_bytes(|tar| {
        tar.add("d", &Node::directory().mtime(-1, 5))?;
        tar.add("d/f", &Node::file("content").xattr("user.a", "b"))?;
        tar.add("d/l", &Node::link("d/f"))?;
        tar.add("s", &Node::symlink("d/f"))?;
        tar.add("c", &Node::new(What::CharDevice(1, 3)))?;
        tar.whiteout("gone")?;
        tar.opaque("d")?;
        tar.add("n".repeat(120), &Node::file("long"))
    })?)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Block sizes and features of the seeds: where nothing is summed, a fuzzer gets far.
const FILESYSTEMS: &[(&str, &str)] = &[
    ("1024", "^has_journal"),
    ("1024", "^has_journal,^metadata_csum,^64bit"),
    ("4096", "^has_journal,^resize_inode"),
    ("4096", "^has_journal,^metadata_csum,^64bit,^resize_inode"),
];

/// A file system small enough to be an input, made by a tool that is not ours.
fn filesystem(block_bytes: &str, features: &str) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("fs");
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("d"))?;
    std::fs::write(tree.join("d/f"), "content")?;
    std::os::unix::fs::symlink("d/f", tree.join("link"))?;
    File::create(&file)?.set_len(INPUT_BYTES_MAX as u64)?;
    Program::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", block_bytes, "-N", "16", "-O", features, "-d"])
        .args([tree, file.clone()])
        .run()?;
    Ok(std::fs::read(file)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_file_is_listed_and_every_listed_target_has_a_file() {
        let dir = workspace::top().join("fuzz/fuzz_targets");
        let mut files: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        let mut listed = TARGETS.to_vec();
        listed.sort_unstable();
        assert_eq!(files, listed);
    }
}
