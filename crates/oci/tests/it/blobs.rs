//! Streams that break, stall, lie or end early.

use std::time::Duration;

use oci::testing::Fault;
use oci::{Blame, PullError};

use crate::support::{
    drain, layer, noise, options, pull_layer, registry_with_app, requests, resolve,
};

#[tokio::test]
async fn a_layer_arrives_whole() {
    let (registry, blob) = registry_with_app(300_000);
    let (options, waits) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    assert!(image.anonymous);
    assert_eq!(image.layers[0].size_bytes, blob.len() as u64);
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(stream.digest(), image.layers[0].digest);
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    assert_eq!(stream.position_bytes(), blob.len() as u64);
    assert!(waits.seen().is_empty());
}

#[tokio::test]
async fn a_cut_download_goes_on_at_the_byte_where_it_stopped() {
    let (registry, blob) = registry_with_app(300_000);
    let (options, waits) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    registry.fault(&name, Fault::CutAfter(100_000));
    registry.fault(&name, Fault::CutAfter(50_000));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    let ranges: Vec<_> =
        requests(&registry, &name).iter().map(|r| r.headers.get("range").cloned()).collect();
    let expected = [None, Some("bytes=100000-".to_owned()), Some("bytes=150000-".to_owned())];
    assert_eq!(ranges, expected);
    assert_eq!(waits.seen(), [250, 500].map(Duration::from_millis));
}

#[tokio::test]
async fn a_server_without_ranges_is_read_again_from_the_start() {
    let (registry, blob) = registry_with_app(300_000);
    registry.ignore_ranges(true);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    for cut in [100_000, 40_000, 200_000] {
        registry.fault(&name, Fault::CutAfter(cut));
    }
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    assert_eq!(requests(&registry, &name).len(), 4);
}

#[tokio::test]
async fn a_server_that_refuses_ranges_is_asked_without_one() {
    let (registry, blob) = registry_with_app(300_000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    registry.fault(&name, Fault::CutAfter(100_000));
    registry.fault(&name, Fault::Status(416, Vec::new()));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    let last = requests(&registry, &name).pop().unwrap();
    assert_eq!(last.headers.get("range"), None);
}

#[tokio::test]
async fn a_range_that_starts_elsewhere_is_refused() {
    let (registry, _) = registry_with_app(300_000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    registry.fault(&name, Fault::CutAfter(100_000));
    let size = image.layers[0].size_bytes;
    let lie = format!("bytes 99999-{}/{size}", size - 1);
    registry.fault(&name, Fault::Header("content-range".to_owned(), lie));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = drain(&mut stream).await.unwrap_err();
    assert!(matches!(error, PullError::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn a_download_that_is_cut_again_and_again_fails_after_the_allowed_attempts() {
    let (registry, _) = registry_with_app(300_000);
    let (options, waits) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    for _ in 0..20 {
        registry.fault(&name, Fault::CutAfter(10));
    }
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = drain(&mut stream).await.unwrap_err();
    assert!(matches!(error, PullError::Cut { received_bytes: 60, .. }), "{error:?}");
    assert!(error.is_retryable());
    assert_eq!(error.blame(), Blame::Upstream);
    assert_eq!(waits.seen(), [250, 500, 1000, 2000, 4000].map(Duration::from_millis));
}

#[tokio::test]
async fn real_progress_renews_patience() {
    let (registry, blob) = registry_with_app(300_000);
    let (mut options, waits) = options(&[&registry]);
    options.retry.progress_bytes = 20_000;
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let name = image.layers[0].digest.to_string();
    for _ in 0..10 {
        registry.fault(&name, Fault::CutAfter(25_000));
    }
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    assert_eq!(waits.seen(), [Duration::from_millis(250); 10]);
}

#[tokio::test]
async fn a_stalled_download_is_cut_and_resumed() {
    let (registry, blob) = registry_with_app(300_000);
    let (mut options, _) = options(&[&registry]);
    options.timeouts.stall = Duration::from_millis(50);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    registry.fault(&image.layers[0].digest.to_string(), Fault::StallAfter(1000));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
}

#[tokio::test]
async fn a_server_that_never_answers_is_named_with_the_time_waited() {
    let (registry, _) = registry_with_app(1000);
    let (mut options, _) = options(&[&registry]);
    options.timeouts.stall = Duration::from_millis(5);
    options.retry.retries = 1;
    for _ in 0..2 {
        registry.fault("manifests/v1", Fault::StallAfter(3));
    }
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(&error, PullError::Timeout { host, .. } if *host == registry.host()));
}

#[tokio::test]
async fn errors_of_the_server_are_tried_again() {
    let (registry, blob) = registry_with_app(1000);
    let (options, waits) = options(&[&registry]);
    for part in ["manifests/v1", "blobs/"] {
        for status in [500, 502, 503, 504] {
            registry.fault(part, Fault::Status(status, Vec::new()));
        }
        registry.fault(part, Fault::Hangup);
    }
    let layer = pull_layer(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    assert_eq!(layer, blob);
    assert_eq!(waits.seen().len(), 10);
    assert_eq!(registry.faults_left(), 0);
}

#[tokio::test]
async fn errors_of_ours_are_not_tried_again() {
    let (registry, _) = registry_with_app(1000);
    let (options, waits) = options(&[&registry]);
    registry.fault("manifests/v1", Fault::Status(400, Vec::new()));
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(error, PullError::Status { status: 400, .. }));
    assert!(waits.seen().is_empty());
}

#[tokio::test]
async fn a_server_that_asks_for_patience_gets_it() {
    let (registry, blob) = registry_with_app(1000);
    let (options, waits) = options(&[&registry]);
    let after = |value: &str| vec![("retry-after".to_owned(), value.to_owned())];
    registry.fault("blobs/", Fault::Status(429, after("7")));
    let mut dated = after("Wed, 21 Oct 2015 07:28:33 GMT");
    dated.push(("date".to_owned(), "Wed, 21 Oct 2015 07:28:00 GMT".to_owned()));
    registry.fault("blobs/", Fault::Status(503, dated));
    let layer = pull_layer(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    assert_eq!(layer, blob);
    assert_eq!(waits.seen(), [7, 33].map(Duration::from_secs));
}

#[tokio::test]
async fn a_server_that_asks_for_too_much_patience_is_an_error_at_once() {
    let (registry, _) = registry_with_app(1000);
    let (options, waits) = options(&[&registry]);
    let hours = vec![("retry-after".to_owned(), "21600".to_owned())];
    registry.fault("manifests/v1", Fault::Status(429, hours));
    let error = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap_err();
    assert!(matches!(error, PullError::RateLimited { .. }));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(21_600)));
    assert!(error.hint().unwrap().contains("docker login"));
    assert!(waits.seen().is_empty());
}

#[tokio::test]
async fn wrong_bytes_of_the_right_length_end_in_an_error() {
    let (registry, _) = registry_with_app(100_000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    registry.fault("blobs/", Fault::WrongBytes);
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = drain(&mut stream).await.unwrap_err();
    let expected_digest = image.layers[0].digest;
    assert!(
        matches!(error, PullError::DigestMismatch { expected, .. } if expected == expected_digest)
    );
}

#[tokio::test]
async fn wrong_bytes_after_a_cut_end_in_an_error() {
    let (registry, _) = registry_with_app(100_000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    registry.fault("blobs/", Fault::CutAfter(5000));
    registry.fault("blobs/", Fault::WrongBytes);
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = drain(&mut stream).await.unwrap_err();
    assert!(matches!(error, PullError::DigestMismatch { .. }));
}

#[tokio::test]
async fn a_blob_that_is_announced_longer_or_shorter_is_refused_before_its_bytes() {
    let (registry, blob) = registry_with_app(10_000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    for (fault, length) in [
        (Fault::Extra(vec![0]), blob.len() + 1),
        (Fault::Body(blob[..9].to_vec()), 9),
        (Fault::Body(Vec::new()), 0),
    ] {
        registry.fault("blobs/", fault);
        let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
        assert!(
            matches!(error, PullError::SizeMismatch { actual_bytes, .. }
                if actual_bytes == length as u64),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_blob_longer_than_its_descriptor_is_refused_though_no_length_was_announced() {
    let (registry, blob) = registry_with_app(10_000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let digest = image.layers[0].digest;
    registry.corrupt_blob(digest, [blob, vec![1]].concat());
    registry.fault("blobs/", Fault::ChunkedUpTo(u64::MAX));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let error = drain(&mut stream).await.unwrap_err();
    assert!(matches!(error, PullError::SizeMismatch { .. }), "{error:?}");
}

#[tokio::test]
async fn a_body_that_ends_early_in_good_order_is_resumed_like_a_cut() {
    let (registry, blob) = registry_with_app(10_000);
    let (options, waits) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    registry.fault("blobs/", Fault::ChunkedUpTo(4000));
    let mut stream = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    assert_eq!(drain(&mut stream).await.unwrap(), blob);
    assert_eq!(waits.seen().len(), 1);
}

#[tokio::test]
async fn a_blob_in_an_encoding_nobody_asked_for_is_refused() {
    let (registry, _) = registry_with_app(1000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    registry.fault("blobs/", Fault::Header("content-encoding".to_owned(), "gzip".to_owned()));
    let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    assert!(matches!(error, PullError::Protocol { .. }));
    let asked = requests(&registry, "blobs/").pop().unwrap();
    assert_eq!(asked.headers["accept-encoding"], "identity");
}

#[tokio::test]
async fn an_empty_blob_is_a_blob() {
    let registry = oci::testing::TestRegistry::start().unwrap();
    let plain = "application/vnd.oci.image.layer.v1.tar".to_owned();
    let empty = oci::Digest::of(b"");
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &[(plain, Vec::new(), empty)]);
    let (options, _) = options(&[&registry]);
    let source = format!("{}/app:v1", registry.host());
    assert_eq!(pull_layer(&source, &options).await.unwrap(), b"");
}

#[tokio::test]
async fn a_missing_blob_is_named() {
    let (registry, _) = registry_with_app(1000);
    let (options, _) = options(&[&registry]);
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let digest = image.layers[0].digest;
    registry.delete_blob(digest);
    let error = fetcher.blob(&image, &image.layers[0]).await.unwrap_err();
    assert!(matches!(&error, PullError::NotFound { .. }));
    assert!(error.to_string().contains(&digest.to_string()));
}

#[tokio::test]
async fn parallel_blobs_of_one_registry_are_limited_and_all_arrive() {
    let registry = oci::testing::TestRegistry::start().unwrap();
    let layers: Vec<_> = (0..12).map(|seed| layer(seed + 10, 50_000)).collect();
    registry.put_image("app", Some("v1"), ("linux", "amd64"), &layers);
    let (mut options, _) = options(&[&registry]);
    options.connections_per_host = 2;
    let (fetcher, image) = resolve(&format!("{}/app:v1", registry.host()), &options).await.unwrap();
    let fetcher = std::sync::Arc::new(fetcher);
    let mut tasks = tokio::task::JoinSet::new();
    for (position, layer) in image.layers.iter().cloned().enumerate() {
        let (fetcher, image) = (fetcher.clone(), image.clone());
        tasks.spawn(async move {
            let mut stream = fetcher.blob(&image, &layer).await.unwrap();
            (position, drain(&mut stream).await.unwrap())
        });
    }
    for (position, bytes) in tasks.join_all().await {
        assert_eq!(bytes, layers[position].1);
    }
    // With both places taken, a third stream has to wait.
    let _first = fetcher.blob(&image, &image.layers[0]).await.unwrap();
    let _second = fetcher.blob(&image, &image.layers[1]).await.unwrap();
    let third = fetcher.blob(&image, &image.layers[2]);
    let waited = tokio::time::timeout(Duration::from_millis(20), third).await;
    assert!(waited.is_err());
    assert_ne!(noise(1, 10), noise(2, 10));
}
