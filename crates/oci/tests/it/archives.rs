//! `docker save` archives and tars of layouts.

use std::path::PathBuf;

use oci::{ArchiveError, Digest, PullError, TarError};
use serde_json::json;
use tempfile::TempDir;

use crate::layouts::LayoutOnDisk;
use crate::support::{drain, gzip, noise, options, pull_layer, resolve, told};

/// A tar that is being written, one header at a time, right or wrong.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(&mut self, kind: u8, name: &str, link: &str, data: &[u8]) -> &mut Tar {
        let mut header = [0_u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        self.sealed(header).data(data)
    }

    fn sealed(&mut self, mut header: [u8; 512]) -> &mut Tar {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self
    }

    fn data(&mut self, data: &[u8]) -> &mut Tar {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(&mut self, name: &str, data: &[u8]) -> &mut Tar {
        self.entry(b'0', name, "", data)
    }

    fn pax(&mut self, records: &[(&str, &str)]) -> &mut Tar {
        let mut data = String::new();
        for (key, value) in records {
            let rest = format!(" {key}={value}\n");
            let mut length = rest.len() + 1;
            while length.to_string().len() + rest.len() != length {
                length += 1;
            }
            data.push_str(&format!("{length}{rest}"));
        }
        self.entry(b'x', "PaxHeaders/x", "", data.as_bytes())
    }

    fn end(&self) -> Vec<u8> {
        [self.0.as_slice(), &[0; 1024]].concat()
    }
}

fn config(diff_ids: &[Digest]) -> Vec<u8> {
    let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": diff_ids}});
    config.to_string().into_bytes()
}

fn manifest(config: &str, tags: &[&str], layers: &[&str]) -> serde_json::Value {
    json!({"Config": config, "RepoTags": tags, "Layers": layers})
}

struct Saved {
    dir: TempDir,
}

impl Saved {
    fn new(bytes: &[u8]) -> Saved {
        let saved = Saved { dir: tempfile::tempdir().unwrap() };
        std::fs::write(saved.path(), bytes).unwrap();
        saved
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image.tar")
    }

    fn source(&self, transport: &str) -> String {
        format!("{transport}:{}", self.path().display())
    }

    async fn refused(&self, transport: &str) -> ArchiveError {
        match resolve(&self.source(transport), &options(&[]).0).await.unwrap_err() {
            PullError::Archive { source, .. } => source,
            other => panic!("{other:?}"),
        }
    }
}

/// What old Docker saves: `<id>/layer.tar`, one of them a link to another image's.
fn legacy() -> (Tar, [Vec<u8>; 2]) {
    let layers = [noise(1, 5000), noise(2, 700_000)];
    let config = config(&[Digest::of(&layers[0]), Digest::of(&layers[1])]);
    let name = format!("{}.json", Digest::of(&config).hex());
    let mut tar = Tar::default();
    tar.entry(b'5', "aaa/", "", b"")
        .file("aaa/VERSION", b"1.0")
        .file("aaa/layer.tar", &layers[0])
        .entry(b'2', "bbb/layer.tar", "../ccc/layer.tar", b"")
        .entry(b'1', "ccc/layer.tar", "ddd/layer.tar", b"")
        .file("ddd/layer.tar", &layers[1])
        .file(&name, &config)
        .file("repositories", b"{}");
    let entries = json!([manifest(&name, &["app:v1"], &["aaa/layer.tar", "bbb/layer.tar"])]);
    tar.file("manifest.json", entries.to_string().as_bytes());
    (tar, layers)
}

#[tokio::test]
async fn a_saved_image_of_old_docker_is_read_through_its_links() {
    let (tar, layers) = legacy();
    for bytes in
        [tar.end(), gzip(&tar.end()), [gzip(&tar.end()[..999]), gzip(&tar.end()[999..])].concat()]
    {
        let saved = Saved::new(&bytes);
        let (fetcher, image) =
            resolve(&saved.source("docker-archive"), &options(&[]).0).await.unwrap();
        assert_eq!(image.manifest_digest, image.config_digest, "there is no manifest");
        assert!(!image.anonymous);
        for (layer, expected) in image.layers.iter().zip(&layers) {
            assert_eq!(layer.digest, layer.diff_id);
            assert_eq!(layer.compression, oci::Compression::None);
            let mut stream = fetcher.blob(&image, layer).await.unwrap();
            assert_eq!(drain(&mut stream).await.unwrap(), *expected);
        }
        assert_eq!(image.layers.len(), 2);
        assert_eq!(std::fs::read_dir(saved.dir.path()).unwrap().count(), 1);
    }
}

#[tokio::test]
async fn a_layer_that_is_not_what_the_config_says_is_noticed() {
    let layer = noise(1, 5000);
    let config = config(&[Digest::of(b"another layer")]);
    let mut tar = Tar::default();
    let entries = json!([manifest("c.json", &[], &["l.tar"])]).to_string();
    tar.file("l.tar", &layer).file("c.json", &config).file("manifest.json", entries.as_bytes());
    let saved = Saved::new(&tar.end());
    let error = pull_layer(&saved.source("docker-archive"), &options(&[]).0).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { .. }));
}

#[tokio::test]
async fn a_compressed_layer_in_an_archive_has_its_own_digest() {
    let plain = noise(1, 5000);
    let blob = gzip(&plain);
    let config = config(&[Digest::of(&plain)]);
    let mut tar = Tar::default();
    let entries = json!([manifest("c.json", &[], &["l.tar"])]).to_string();
    tar.file("l.tar", &blob).file("c.json", &config).file("manifest.json", entries.as_bytes());
    let saved = Saved::new(&tar.end());
    let source = saved.source("docker-archive");
    let (_, image) = resolve(&source, &options(&[]).0).await.unwrap();
    assert_eq!(image.layers[0].digest, Digest::of(&blob));
    assert_eq!(image.layers[0].diff_id, Digest::of(&plain));
    assert_eq!(image.layers[0].compression, oci::Compression::Gzip);
    assert_eq!(pull_layer(&source, &options(&[]).0).await.unwrap(), blob);
}

#[tokio::test]
async fn a_config_that_is_not_the_one_its_name_says_is_refused() {
    let config = config(&[]);
    let name = format!("{}.json", Digest::of(b"other").hex());
    let entries = json!([manifest(&name, &[], &[])]).to_string();
    let mut tar = Tar::default();
    tar.file(&name, &config).file("manifest.json", entries.as_bytes());
    let saved = Saved::new(&tar.end());
    let error = resolve(&saved.source("docker-archive"), &options(&[]).0).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { .. }));
}

#[tokio::test]
async fn an_image_is_chosen_by_any_spelling_of_its_tag() {
    let (one, two) = (config(&[]), br#"{"os":"linux","architecture":"amd64","config":{}}"#);
    let entries = json!([
        manifest("one.json", &["app:v1", "app:latest"], &[]),
        manifest("two.json", &["docker.io/library/app:v2"], &[]),
    ]);
    let mut tar = Tar::default();
    tar.file("one.json", &one)
        .file("two.json", two)
        .file("manifest.json", entries.to_string().as_bytes());
    let saved = Saved::new(&tar.end());
    for (tag, config) in [("app", &one[..]), ("docker.io/library/app:v1", &one), ("app:v2", two)] {
        let source = format!("{}:{tag}", saved.source("docker-archive"));
        let (_, image) = resolve(&source, &options(&[]).0).await.unwrap();
        assert_eq!(image.config_digest, Digest::of(config), "{tag}");
    }
    let error = resolve(&saved.source("docker-archive"), &options(&[]).0).await.unwrap_err();
    assert!(matches!(&error, PullError::SeveralImages { available, .. } if available.len() == 3));
    let advised = format!("{}:app:v1", saved.source("docker-archive"));
    assert!(error.hint().unwrap().ends_with(&advised), "{:?}", error.hint());
    resolve(&advised, &options(&[]).0).await.unwrap();
    let source = format!("{}:app:v3", saved.source("docker-archive"));
    let error = resolve(&source, &options(&[]).0).await.unwrap_err();
    assert!(matches!(error, PullError::NoSuchTag { .. }));
}

/// A layout as a tar, with or without the `manifest.json` that new Docker adds.
fn layout_tar(with_manifest_json: bool) -> (Vec<u8>, Digest, Digest) {
    let mut layout = LayoutOnDisk::new();
    let (manifest_digest, layer) = layout.put_image(Some("v1"), "amd64", 1);
    let mut tar = Tar::default();
    let mut config = None;
    tar.entry(b'5', "./blobs/sha256/", "", b"");
    for blob in std::fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
        let path = blob.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let name = format!("./blobs/sha256/{}", Digest::of(&bytes).hex());
        if bytes.starts_with(b"{\"architecture\"") {
            config = Some(name.clone());
        }
        tar.file(&name, &bytes);
    }
    for name in ["oci-layout", "index.json"] {
        tar.file(&format!("./{name}"), &std::fs::read(layout.path().join(name)).unwrap());
    }
    if with_manifest_json {
        let layer = format!("blobs/sha256/{}", layer.hex());
        let entries = json!([manifest(&config.unwrap(), &["app:v1"], &[&layer])]);
        tar.file("manifest.json", entries.to_string().as_bytes());
    }
    (tar.end(), manifest_digest, layer)
}

#[tokio::test]
async fn a_layout_in_a_tar_is_read_in_place() {
    let (bytes, manifest_digest, layer_digest) = layout_tar(false);
    for bytes in [gzip(&bytes), bytes] {
        let saved = Saved::new(&bytes);
        for tag in ["", ":v1"] {
            let source = format!("{}{tag}", saved.source("oci-archive"));
            let (_, image) = resolve(&source, &options(&[]).0).await.unwrap();
            assert_eq!(image.manifest_digest, manifest_digest);
            let layer = pull_layer(&source, &options(&[]).0).await.unwrap();
            assert_eq!(Digest::of(&layer), layer_digest);
        }
    }
}

#[tokio::test]
async fn a_saved_image_of_new_docker_keeps_its_manifest_digest() {
    let (bytes, manifest_digest, _) = layout_tar(true);
    let saved = Saved::new(&bytes);
    for source in [
        saved.source("docker-archive"),
        format!("{}:app:v1", saved.source("docker-archive")),
        saved.source("oci-archive"),
    ] {
        let (_, image) = resolve(&source, &options(&[]).0).await.unwrap();
        assert_eq!(image.manifest_digest, manifest_digest, "{source}");
        pull_layer(&source, &options(&[]).0).await.unwrap();
    }
}

#[tokio::test]
async fn the_wrong_kind_of_archive_is_told_apart() {
    let (bytes, ..) = layout_tar(false);
    let saved = Saved::new(&bytes);
    let error = resolve(&saved.source("docker-archive"), &options(&[]).0).await.unwrap_err();
    assert!(error.hint().unwrap().contains("oci-archive:"));
    let saved = Saved::new(&legacy().0.end());
    let error = resolve(&saved.source("oci-archive"), &options(&[]).0).await.unwrap_err();
    assert!(error.hint().unwrap().contains("docker-archive:"));
    let ancient = Tar::default().file("repositories", b"{}").end();
    assert!(matches!(Saved::new(&ancient).refused("docker-archive").await, ArchiveError::Ancient));
    let exported = Tar::default().file("etc/passwd", b"").end();
    let refusal = Saved::new(&exported).refused("docker-archive").await;
    assert!(matches!(refusal, ArchiveError::NotAnImage));
    for (magic, name) in
        [(&b"\x28\xb5\x2f\xfd"[..], "zstd"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz")]
    {
        let refusal = Saved::new(magic).refused("docker-archive").await;
        assert!(matches!(refusal, ArchiveError::Compression(found) if found == name));
    }
}

#[tokio::test]
async fn long_names_of_both_kinds_are_understood() {
    let long = format!("{}/config.json", "d".repeat(150));
    let entries = json!([manifest(&long, &[], &[])]).to_string();
    let wrong_size = "0".repeat(3);
    let pax = |tar: &mut Tar| {
        tar.pax(&[("path", &long), ("size", &format!("{wrong_size}{}", config(&[]).len()))]);
    };
    let gnu = |tar: &mut Tar| {
        tar.entry(b'L', "././@LongLink", "", format!("{long}\0").as_bytes());
    };
    for extend in [&pax as &dyn Fn(&mut Tar), &gnu] {
        let mut tar = Tar::default();
        extend(&mut tar);
        tar.file("short", &config(&[])).file("manifest.json", entries.as_bytes());
        let saved = Saved::new(&tar.end());
        resolve(&saved.source("docker-archive"), &options(&[]).0).await.unwrap();
    }
}

#[tokio::test]
async fn broken_tars_are_refused_without_reading_on() {
    let file = |data: &[u8]| {
        let mut tar = Tar::default();
        tar.file("manifest.json", data);
        tar.0
    };
    let mut bad_sum = file(b"[]");
    bad_sum[0] ^= 1;
    let mut huge = [0_u8; 512];
    huge[0] = b'x';
    huge[124..136].fill(0xff);
    huge[156] = b'0';
    let mut huge_tar = Tar::default();
    huge_tar.sealed(huge);
    let mut sparse = Tar::default();
    sparse.entry(b'S', "manifest.json", "", b"");
    let mut pax_sparse = Tar::default();
    pax_sparse.pax(&[("GNU.sparse.major", "1")]).file("manifest.json", b"[]");
    let mut bad_pax = Tar::default();
    bad_pax.entry(b'x', "x", "", b"99 path=x\n").file("manifest.json", b"[]");
    let mut fat_link = Tar::default();
    fat_link.entry(b'1', "manifest.json", "x", b"data");
    type Check = fn(&TarError) -> bool;
    let cases: [(Vec<u8>, Check); 11] = [
        (Vec::new(), |e| matches!(e, TarError::Header(0))),
        (vec![0; 1024], |e| matches!(e, TarError::Header(0))),
        (vec![7; 100], |e| matches!(e, TarError::Truncated(0))),
        (bad_sum, |e| matches!(e, TarError::Header(0))),
        (file(&[1; 600])[..1000].to_vec(), |e| matches!(e, TarError::Truncated(0))),
        (huge_tar.0, |e| matches!(e, TarError::Number(0) | TarError::Truncated(0))),
        (sparse.end(), |e| matches!(e, TarError::Kind { kind: 'S', .. })),
        (pax_sparse.end(), |e| matches!(e, TarError::Extension(0))),
        (bad_pax.end(), |e| matches!(e, TarError::Extension(0))),
        (fat_link.end(), |e| matches!(e, TarError::Kind { kind: '1', .. })),
        ([file(b"[]"), vec![0; 512], file(b"[]")].concat(), |e| {
            matches!(e, TarError::Header(1024))
        }),
    ];
    for (position, (bytes, check)) in cases.into_iter().enumerate() {
        match Saved::new(&bytes).refused("docker-archive").await {
            ArchiveError::Tar(error) => assert!(check(&error), "case {position}: {error:?}"),
            other => panic!("case {position}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn links_in_a_circle_or_out_of_the_archive_lead_nowhere() {
    for (from, to) in [
        ("manifest.json", "manifest.json"),
        ("manifest.json", "../../etc/passwd"),
        ("manifest.json", "/etc/passwd"),
    ] {
        let tar = Tar::default().entry(b'2', from, to, b"").end();
        let refusal = Saved::new(&tar).refused("docker-archive").await;
        assert!(matches!(refusal, ArchiveError::NotAnImage), "{to}");
    }
}

#[tokio::test]
async fn limits_hold_for_archives_too() {
    let (tar, _) = legacy();
    let saved = Saved::new(&tar.end());
    let (mut few, _) = options(&[]);
    few.limits.archive_entries_max = 3;
    let error = resolve(&saved.source("docker-archive"), &few).await.unwrap_err();
    assert!(told(&error).contains("more than 3 entries"));
    let bomb = Saved::new(&gzip(&Tar::default().file("zeros", &vec![0; 4 << 20]).end()));
    let (mut small, _) = options(&[]);
    small.limits.spool_bytes_max = 1 << 20;
    let error = resolve(&bomb.source("docker-archive"), &small).await.unwrap_err();
    assert!(told(&error).contains("larger than the limit"), "{error:?}");
    let (mut steep, _) = options(&[]);
    steep.limits.spool_ratio_free_bytes = 1 << 20;
    steep.limits.spool_ratio_max = 100;
    let error = resolve(&bomb.source("docker-archive"), &steep).await.unwrap_err();
    assert!(told(&error).contains("no image is compressed like that"), "{error:?}");
    assert_eq!(error.blame(), oci::Blame::Yours);
    let honest = Saved::new(&gzip(&tar.end()));
    steep.limits.spool_ratio_free_bytes = 1000;
    resolve(&honest.source("docker-archive"), &steep).await.unwrap();
    let (mut layers, _) = options(&[]);
    layers.limits.layers_max = 1;
    let error = resolve(&saved.source("docker-archive"), &layers).await.unwrap_err();
    assert!(matches!(error, PullError::Archive { source: ArchiveError::Layers { .. }, .. }));
}

#[tokio::test]
async fn a_gzip_of_no_tar_is_refused_before_it_is_copied() {
    let (mut small, _) = options(&[]);
    small.limits.spool_bytes_max = 1 << 20;
    for bytes in [vec![0; 4 << 20], noise(1, 4 << 20)] {
        let saved = Saved::new(&gzip(&bytes));
        let error = resolve(&saved.source("docker-archive"), &small).await.unwrap_err();
        let PullError::Archive { source: ArchiveError::Tar(error), .. } = error else {
            panic!("{error:?}");
        };
        assert!(matches!(error, TarError::Header(0)), "{error:?}");
    }
}

#[tokio::test]
async fn a_gzip_that_ends_early_is_an_error() {
    let bytes = gzip(&legacy().0.end());
    let saved = Saved::new(&bytes[..bytes.len() - 20]);
    let error = resolve(&saved.source("docker-archive"), &options(&[]).0).await.unwrap_err();
    assert!(matches!(error, PullError::Spool { .. }), "{error:?}");
    assert_eq!(error.blame(), oci::Blame::Yours);
}

#[tokio::test]
async fn an_archive_that_comes_through_a_pipe_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (tar, layers) = legacy();
    for bytes in [tar.end(), gzip(&tar.end())] {
        let fifo = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).unwrap();
        let writer = {
            let fifo = fifo.clone();
            std::thread::spawn(move || std::fs::write(fifo, bytes).unwrap())
        };
        let source = format!("docker-archive:{}", fifo.display());
        let layer = pull_layer(&source, &options(&[]).0).await.unwrap();
        assert_eq!(layer, layers[0]);
        writer.join().unwrap();
        std::fs::remove_file(&fifo).unwrap();
    }
}

#[test]
fn standard_input_may_be_either_archive_from_a_file_or_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [
        ("docker", legacy().0.end()),
        ("oci", layout_tar(false).0),
        ("gz", gzip(&layout_tar(true).0)),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        for command in [
            format!("exec \"$0\" \"$@\" < {0}", path.display()),
            format!("cat {} | \"$0\" \"$@\"", path.display()),
        ] {
            #[expect(clippy::disallowed_methods, reason = "the child needs a stdin of its own")]
            let output = std::process::Command::new("sh")
                .args(["-c", &command])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", "archives::inside_a_child_with_an_archive_on_stdin", "--ignored"])
                .output()
                .unwrap();
            let told = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && told.contains("1 passed"), "{command}: {told}");
        }
    }
}

#[tokio::test]
#[ignore = "runs inside standard_input_may_be_either_archive_from_a_file_or_a_pipe"]
async fn inside_a_child_with_an_archive_on_stdin() {
    let layer = pull_layer("-", &options(&[]).0).await.unwrap();
    assert!(layer.len() > 1000);
}
