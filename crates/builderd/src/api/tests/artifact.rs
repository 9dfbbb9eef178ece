//! Downloads: whole, in parts, compressed, and their checksums.

use reqwest::{Method, StatusCode};

use super::{Reply, Server, send};
use crate::api::Mode;

struct Download {
    server: Server,
    id: String,
    content: Vec<u8>,
}

impl Download {
    async fn of(content: Vec<u8>, compression: &str) -> Self {
        let server = Server::start(Mode::Development).await;
        let id = server.create("t").await;
        let claimed = server.claim().await;
        server.complete(&claimed, &content, compression).await;
        Self { server, id, content }
    }

    async fn get(&self, suffix: &str, headers: &[(&str, &str)]) -> Reply {
        self.ask(Method::GET, suffix, headers).await
    }

    async fn ask(&self, method: Method, suffix: &str, headers: &[(&str, &str)]) -> Reply {
        let path = format!("/{}/GetBuildArtifact/{}{suffix}", api::SERVICE, self.id);
        let mut request = self.server.request(method, &path).header("x-tenant-id", "t");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        send(request).await
    }
}

/// More than one piece of a read, and no multiple of it.
fn content() -> Vec<u8> {
    (0..700_001u32).map(|index| index.to_le_bytes()[index as usize % 3]).collect()
}

#[tokio::test]
async fn an_artifact_downloads_whole_with_its_checksum() {
    let download = Download::of(content(), "none").await;
    let whole = download.get("", &[]).await;
    assert_eq!(whole.status, StatusCode::OK);
    assert!(whole.body == download.content);
    assert_eq!(whole.header("content-type"), "application/octet-stream");
    assert_eq!(whole.header("content-length"), "700001");
    assert_eq!(whole.header("content-disposition"), "attachment; filename=\"rootfs.ext4\"");
    assert_eq!(whole.header("accept-ranges"), "bytes");
    let sum = whole.header("x-checksum-sha256");
    assert_eq!(whole.header("etag"), format!("\"{sum}\""));

    let line = download.get(".sha256", &[]).await;
    assert_eq!(String::from_utf8(line.body).unwrap(), format!("{sum}  rootfs.ext4\n"));

    let head = download.ask(Method::HEAD, "", &[("range", "bytes=0-1")]).await;
    assert_eq!((head.status, head.header("content-length")), (StatusCode::OK, "700001"));
    assert!(head.body.is_empty());

    let tag = whole.header("etag");
    for tags in [tag, "*", &format!("\"x\", W/{tag}")] {
        let known = download.get("", &[("if-none-match", tags)]).await;
        assert_eq!(known.status, StatusCode::NOT_MODIFIED, "{tags}");
        assert!(known.body.is_empty());
        let head = download.ask(Method::HEAD, "", &[("if-none-match", tags)]).await;
        assert_eq!(head.status, StatusCode::NOT_MODIFIED, "{tags}");
        assert_ne!(head.header("content-length"), "0", "it has not become empty");
        let wanted = download.ask(Method::HEAD, "", &[("if-match", tags)]).await;
        let has_it = tags != format!("\"x\", W/{tag}");
        assert_eq!(wanted.status == StatusCode::OK, has_it, "{tags}");
    }
    let other = download.get("", &[("if-match", "\"x\""), ("range", "bytes=5-")]).await;
    assert_eq!((other.status, other.body.len()), (StatusCode::PRECONDITION_FAILED, 0));
    download.server.stop().await;
}

#[tokio::test]
async fn parts_of_an_artifact_are_the_bytes_that_were_asked_for() {
    let download = Download::of(content(), "none").await;
    let size = download.content.len();
    for (range, start, end) in [
        ("bytes=0-0", 0, 1),
        ("bytes=262143-262144", 262_143, 262_145),
        ("bytes=700000-", 700_000, size),
        ("bytes=-5", size - 5, size),
        ("bytes=1-999999999", 1, size),
    ] {
        let part = download.get("", &[("range", range)]).await;
        assert_eq!(part.status, StatusCode::PARTIAL_CONTENT, "{range}");
        assert!(part.body == download.content[start..end], "{range}");
        let said = format!("bytes {start}-{}/{size}", end - 1);
        assert_eq!(part.header("content-range"), said);
    }
    let nowhere = download.get("", &[("range", "bytes=700001-")]).await;
    assert_eq!(nowhere.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(nowhere.header("content-range"), "bytes */700001");
    let several = download.get("", &[("range", "bytes=0-1,5-6")]).await;
    assert_eq!((several.status, several.body.len()), (StatusCode::OK, size));

    let tag = download.get("", &[("range", "bytes=0-0")]).await.header("etag").to_owned();
    let resumed = download.get("", &[("range", "bytes=5-"), ("if-range", &tag)]).await;
    assert_eq!(resumed.status, StatusCode::PARTIAL_CONTENT);
    for stale in ["\"other\"", "Mon, 15 Jan 2024 10:30:00 GMT", &format!("W/{tag}")] {
        let whole = download.get("", &[("range", "bytes=5-"), ("if-range", stale)]).await;
        assert_eq!((whole.status, whole.body.len()), (StatusCode::OK, size), "{stale}");
    }
    download.server.stop().await;
}

#[tokio::test]
async fn a_compressed_artifact_is_named_so() {
    for (compression, name) in [("gzip", "rootfs.ext4.gz"), ("zstd", "rootfs.ext4.zst")] {
        let download = Download::of(b"compressed".to_vec(), compression).await;
        let whole = download.get("", &[]).await;
        assert!(whole.header("content-disposition").ends_with(&format!("\"{name}\"")));
        assert_eq!(whole.body, b"compressed");
        let line = download.get(".sha256", &[]).await;
        assert!(String::from_utf8(line.body).unwrap().ends_with(&format!("  {name}\n")));
        download.server.stop().await;
    }
}
