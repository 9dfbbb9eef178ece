//! What the stories share: options without waiting, images made on the spot.

use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci::testing::{Recorded, TestRegistry};
use oci::{BlobStream, ClientOptions, Digest, Fetcher, Image, Platform, PullError, Sleep, Source};

/// Waits that were asked for and not done.
#[derive(Clone, Default)]
pub(crate) struct Waits(Arc<Mutex<Vec<Duration>>>);

impl Waits {
    pub(crate) fn seen(&self) -> Vec<Duration> {
        self.0.lock().unwrap().clone()
    }

    fn sleep(&self) -> Sleep {
        let waits = Arc::clone(&self.0);
        Sleep::new(move |wait| {
            waits.lock().unwrap().push(wait);
            std::future::ready(())
        })
    }
}

/// Options for these registries, which speak plain HTTP, and the waits they lead to.
pub(crate) fn options(registries: &[&TestRegistry]) -> (ClientOptions, Waits) {
    let waits = Waits::default();
    let options = ClientOptions {
        plain_http: registries.iter().map(|registry| registry.host()).collect(),
        system_proxy: false,
        sleep: waits.sleep(),
        ..ClientOptions::default()
    };
    (options, waits)
}

pub(crate) fn amd64() -> Platform {
    "linux/amd64".parse().unwrap()
}

/// Bytes that do not repeat and are the same every time.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layer for [`TestRegistry::put_image`].
pub(crate) fn layer(seed: u64, length: usize) -> (String, Vec<u8>, Digest) {
    let plain = noise(seed, length);
    (GZIP_LAYER.to_owned(), gzip(&plain), Digest::of(&plain))
}

/// A registry with the image `app:v1` of one layer, and that layer's blob.
pub(crate) fn registry_with_app(layer_bytes: usize) -> (TestRegistry, Vec<u8>) {
    let registry = TestRegistry::start().unwrap();
    let layer = layer(1, layer_bytes);
    let blob = layer.1.clone();
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &[layer]);
    (registry, blob)
}

pub(crate) async fn open(source: &str, options: &ClientOptions) -> Result<Fetcher, PullError> {
    let source: Source = source.parse().unwrap();
    Fetcher::open(&source, options, &std::env::temp_dir()).await
}

pub(crate) async fn resolve(
    source: &str,
    options: &ClientOptions,
) -> Result<(Fetcher, Image), PullError> {
    let fetcher = open(source, options).await?;
    let image = fetcher.resolve(&amd64()).await?;
    Ok((fetcher, image))
}

pub(crate) async fn drain(stream: &mut BlobStream) -> Result<Vec<u8>, PullError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await? {
        assert!(!chunk.is_empty());
        bytes.extend_from_slice(&chunk);
    }
    assert!(stream.next().await?.is_none(), "the end stays the end");
    Ok(bytes)
}

/// Resolves an image and reads its first layer.
pub(crate) async fn pull_layer(
    source: &str,
    options: &ClientOptions,
) -> Result<Vec<u8>, PullError> {
    let (fetcher, image) = resolve(source, options).await?;
    drain(&mut fetcher.blob(&image, &image.layers[0]).await?).await
}

/// The requests whose path contains this.
pub(crate) fn requests(registry: &TestRegistry, part: &str) -> Vec<Recorded> {
    registry.requests().into_iter().filter(|request| request.path.contains(part)).collect()
}

/// An error with all its causes, as a user may see it, and as a log may.
pub(crate) fn told(error: &PullError) -> String {
    let mut text = format!("{error:?} {error} {:?}", error.hint());
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
