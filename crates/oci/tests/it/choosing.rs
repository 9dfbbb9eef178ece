//! Which image of an index is taken.

use oci::testing::{TestRegistry, descriptor};
use oci::{Digest, Platform, PullError, media_type};
use serde_json::{Value, json};

use crate::support::{layer, open, options};

struct Story {
    registry: TestRegistry,
    entries: Vec<Value>,
}

impl Story {
    fn new() -> Story {
        Story { registry: TestRegistry::start().unwrap(), entries: Vec::new() }
    }

    /// Adds an image whose layer depends on `seed`; gives its manifest's digest.
    fn image(&mut self, platform: Option<&str>, config: (&str, &str), seed: u64) -> Digest {
        let digest = self.registry.put_image("app", None, config, &[layer(seed, 50)]);
        self.entry(media_type::OCI_MANIFEST, digest, platform);
        digest
    }

    fn entry(&mut self, media_type: &str, digest: Digest, platform: Option<&str>) {
        let mut entry = descriptor(media_type, digest, 0);
        if let Some(platform) = platform {
            let mut words = platform.split('/');
            entry["platform"] = json!({"os": words.next(), "architecture": words.next()});
            if let Some(variant) = words.next() {
                entry["platform"]["variant"] = json!(variant);
            }
        }
        self.entries.push(entry);
    }

    /// Turns the entries so far into an index; its digest.
    fn index(&mut self, tag: Option<&str>) -> (Digest, Value) {
        let mut entries = std::mem::take(&mut self.entries);
        for entry in &mut entries {
            let digest = entry["digest"].as_str().unwrap().to_owned();
            entry["size"] = json!(self.size_of(&digest));
        }
        let index = json!({
            "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": entries,
        });
        let digest = self.registry.put_manifest("app", tag, media_type::OCI_INDEX, &index);
        (digest, index)
    }

    /// Sizes are asked of the registry as a client would see them.
    fn size_of(&self, digest: &str) -> usize {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(self.registry.host()).unwrap();
        let request = format!("GET /v2/app/manifests/{digest} HTTP/1.1\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.len()
    }

    async fn choose(&self, platform: &str) -> Result<oci::Image, PullError> {
        let (options, _) = options(&[&self.registry]);
        let fetcher = open(&format!("{}/app:v1", self.registry.host()), &options).await.unwrap();
        fetcher.resolve(&platform.parse().unwrap()).await
    }
}

#[tokio::test]
async fn the_best_variant_wins_wherever_it_stands() {
    let mut story = Story::new();
    let v5 = story.image(Some("linux/arm/v5"), ("linux", "arm"), 1);
    let amd64 = story.image(Some("linux/amd64"), ("linux", "amd64"), 2);
    let v7 = story.image(Some("linux/arm/v7"), ("linux", "arm"), 3);
    let v6 = story.image(Some("linux/arm/v6"), ("linux", "arm"), 4);
    let arm64 = story.image(Some("linux/arm64/v8"), ("linux", "arm64"), 5);
    let v3 = story.image(Some("linux/amd64/v3"), ("linux", "amd64"), 6);
    let (index, _) = story.index(Some("v1"));
    for (wanted, expected) in [
        ("linux/arm/v7", v7),
        ("linux/arm", v7),
        ("linux/arm/v6", v6),
        ("linux/arm/v5", v5),
        ("linux/arm/v8", v7),
        ("linux/amd64", amd64),
        ("linux/amd64/v2", amd64),
        ("linux/amd64/v3", v3),
        ("linux/amd64/v4", v3),
        ("linux/arm64", arm64),
    ] {
        let image = story.choose(wanted).await.unwrap();
        assert_eq!(image.manifest_digest, expected, "{wanted}");
        assert_eq!(image.index_digest, Some(index));
    }
}

#[tokio::test]
async fn a_missing_platform_is_an_error_that_lists_what_there_is() {
    let mut story = Story::new();
    story.image(Some("linux/arm64/v8"), ("linux", "arm64"), 1);
    story.image(Some("linux/arm/v7"), ("linux", "arm"), 2);
    story.image(Some("unknown/unknown"), ("unknown", "unknown"), 3);
    story.index(Some("v1"));
    let error = story.choose("linux/s390x").await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.ends_with("no image for linux/s390x, only for linux/arm/v7, linux/arm64"),
        "{text}"
    );
    assert!(error.hint().unwrap().contains("--platform linux/arm"));
}

#[tokio::test]
async fn attestations_are_never_taken_even_if_they_look_right() {
    let mut story = Story::new();
    story.image(Some("linux/amd64"), ("linux", "amd64"), 1);
    let first = story.entries.first_mut().unwrap();
    first["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let real = story.image(Some("linux/amd64"), ("linux", "amd64"), 2);
    story.index(Some("v1"));
    assert_eq!(story.choose("linux/amd64").await.unwrap().manifest_digest, real);
}

#[tokio::test]
async fn an_entry_without_platform_is_judged_by_its_config() {
    let mut story = Story::new();
    story.image(None, ("linux", "arm64"), 1);
    let amd64 = story.image(None, ("linux", "amd64"), 2);
    story.index(Some("v1"));
    assert_eq!(story.choose("linux/amd64").await.unwrap().manifest_digest, amd64);
    let error = story.choose("linux/riscv64").await.unwrap_err();
    assert!(matches!(error, PullError::NoSuchPlatform { available, .. } if available.len() == 2));
}

#[tokio::test]
async fn a_single_image_for_another_platform_is_refused() {
    let story = Story::new();
    story.registry.put_image("app", Some("v1"), ("linux", "arm64"), &[]);
    let error = story.choose("linux/amd64").await.unwrap_err();
    let only: Vec<Platform> = vec!["linux/arm64".parse().unwrap()];
    assert!(matches!(error, PullError::NoSuchPlatform { available, .. } if available == only));
    assert!(story.choose("linux/arm64").await.unwrap().index_digest.is_none());
}

#[tokio::test]
async fn nested_indexes_are_searched_to_a_limited_depth() {
    let mut story = Story::new();
    let image = story.image(Some("linux/amd64"), ("linux", "amd64"), 1);
    let mut outermost = None;
    for depth in 1..=5 {
        let (digest, _) = story.index(Some("v1"));
        story.entry(media_type::OCI_INDEX, digest, None);
        let found = story.choose("linux/amd64").await;
        if depth <= 4 {
            let found = found.unwrap();
            assert_eq!(found.manifest_digest, image);
            assert_eq!(found.index_digest, Some(digest));
            outermost = Some(digest);
        } else {
            assert!(matches!(found.unwrap_err(), PullError::IndexTooDeep { .. }));
        }
    }
    assert!(outermost.is_some());
}

#[tokio::test]
async fn an_index_cannot_make_us_fetch_documents_without_end() {
    let mut story = Story::new();
    for seed in 0..70 {
        let digest = story.registry.put_image("app", None, ("linux", &format!("x{seed}")), &[]);
        story.entry(media_type::OCI_MANIFEST, digest, None);
    }
    story.index(Some("v1"));
    let error = story.choose("linux/amd64").await.unwrap_err();
    assert!(matches!(error, PullError::IndexTooDeep { .. }));
    let fetched = story.registry.requests().len();
    assert!(fetched < 70 + 2 * 64 + 2, "{fetched}");
}

#[tokio::test]
async fn an_entry_whose_size_or_type_is_wrong_is_refused() {
    for (field, value) in [("size", json!(7)), ("mediaType", json!(media_type::DOCKER_MANIFEST))] {
        let mut story = Story::new();
        story.image(Some("linux/amd64"), ("linux", "amd64"), 1);
        let (_, mut index) = story.index(None);
        index["manifests"][0][field] = value;
        story.registry.put_manifest("app", Some("v1"), media_type::OCI_INDEX, &index);
        let error = story.choose("linux/amd64").await.unwrap_err();
        let expected = matches!(error, PullError::SizeMismatch { .. } | PullError::Manifest { .. });
        assert!(expected, "{error:?}");
    }
}

#[tokio::test]
async fn other_things_beside_the_images_of_an_index_are_passed_over() {
    let mut story = Story::new();
    let chart = json!({
        "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "layers": [],
        "config": descriptor("application/vnd.cncf.helm.config.v1+json", Digest::of(b""), 0),
    });
    let chart = story.registry.put_manifest("app", None, media_type::OCI_MANIFEST, &chart);
    story.entry(media_type::OCI_MANIFEST, chart, None);
    story.entry("application/vnd.example.thing", chart, Some("linux/amd64"));
    let real = story.image(None, ("linux", "amd64"), 1);
    story.index(Some("v1"));
    assert_eq!(story.choose("linux/amd64").await.unwrap().manifest_digest, real);
}
