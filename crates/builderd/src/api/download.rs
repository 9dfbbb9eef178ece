//! `GET …/GetBuildArtifact/{id}`: the image itself, whole or in parts (RFC 9110), and with
//! `.sha256` behind the id the line that `sha256sum -c` reads.

use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    ETAG, IF_MATCH, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use super::auth::Caller;
use super::error::Answer;
use super::open::{Place, holding};
use super::rest::{Asked, Named, TenantQuery, admitted, asked};
use super::{Answered, ApiState};
use crate::artifact::OpenArtifact;
use crate::build::record::BuildResult;
use crate::tenant::TenantId;

/// Behind an id: the checksum in the place of the image.
const CHECKSUM_SUFFIX: &str = ".sha256";

/// Which bytes of the artifact are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    Part(Range<u64>),
    /// A part that the artifact does not have.
    Nowhere,
}

/// See the module.
pub(super) async fn artifact(
    State(state): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    Named(id): Named,
    query: Asked<TenantQuery>,
    method: Method,
    headers: HeaderMap,
) -> Answered<Response> {
    let tenant = asked(query)?.tenant_id;
    let state = &*state;
    admitted(state, &caller, &tenant, |who| async move {
        let (id, is_checksum) = match id.strip_suffix(CHECKSUM_SUFFIX) {
            Some(id) => (id, true),
            None => (id.as_str(), false),
        };
        let (result, open) = state.service.artifact(&who, id).await?;
        match is_checksum {
            true => Ok(checksum(&result)),
            false => {
                let place = state.open.artifacts.take(who.tenant())?;
                let response = image(&result, open, &method, &headers, place)?;
                let has_bytes =
                    matches!(response.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT);
                if has_bytes && method == Method::GET {
                    let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
                    state.note_download(&who, id, is_part).await?;
                }
                Ok(response)
            }
        }
    })
    .await
}

/// The name under which a download is kept.
fn file_name(result: &BuildResult) -> &'static str {
    match result.metadata["artifact"]["compression"].as_str() {
        Some("gzip") => "rootfs.ext4.gz",
        Some("zstd") => "rootfs.ext4.zst",
        _ => "rootfs.ext4",
    }
}

fn checksum(result: &BuildResult) -> Response {
    format!("{}  {}\n", result.sha256, file_name(result)).into_response()
}

fn image(
    result: &BuildResult,
    open: OpenArtifact,
    method: &Method,
    headers: &HeaderMap,
    place: Place<TenantId>,
) -> Answered<Response> {
    let size = open.size_bytes;
    let tag = format!("\"{}\"", result.sha256);
    let mut response = Response::new(Body::empty());
    write_headers(response.headers_mut(), result, &tag)?;
    if text(headers, IF_MATCH).is_some_and(|tags| !holds(tags, &tag)) {
        *response.status_mut() = StatusCode::PRECONDITION_FAILED;
        return Ok(response);
    }
    if text(headers, IF_NONE_MATCH).is_some_and(|tags| matches(tags, &tag)) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        // Else a HEAD would be told that there is nothing.
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(size));
        return Ok(response);
    }
    let wanted = match text(headers, RANGE) {
        // Ranges are for GET alone, and only for the very bytes the caller has a part of.
        Some(range) if method == Method::GET && same(headers, &tag) => wanted(range, size),
        _ => Wanted::Whole,
    };
    let range = match wanted {
        Wanted::Whole => 0..size,
        Wanted::Part(range) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let said = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            response.headers_mut().insert(CONTENT_RANGE, value(&said)?);
            range
        }
        Wanted::Nowhere => {
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            let said = value(&format!("bytes */{size}"))?;
            response.headers_mut().insert(CONTENT_RANGE, said);
            return Ok(response);
        }
    };
    let length = HeaderValue::from(range.end - range.start);
    response.headers_mut().insert(CONTENT_LENGTH, length);
    if method != Method::HEAD {
        // Taken for as long as somebody reads.
        *response.body_mut() = holding(Body::from_stream(open.read(range)), place);
    }
    Ok(response)
}

fn write_headers(headers: &mut HeaderMap, result: &BuildResult, tag: &str) -> Answered<()> {
    let disposition = format!("attachment; filename=\"{}\"", file_name(result));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_DISPOSITION, value(&disposition)?);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    headers.insert(ETAG, value(tag)?);
    headers.insert(HeaderName::from_static("x-checksum-sha256"), value(&result.sha256)?);
    Ok(())
}

/// What the database says of an artifact is plain text, or it is damaged.
fn value(text: &str) -> Answered<HeaderValue> {
    HeaderValue::from_str(text).map_err(|_| Answer::corrupt("an artifact's checksum is no text"))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `If-None-Match`: whether one of the tags is ours; a weak one says the same here.
fn matches(tags: &str, ours: &str) -> bool {
    let mut tags = tags.split(',').map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == ours)
}

/// `If-Match`: whether one of the tags is ours; a weak one is not.
fn holds(tags: &str, ours: &str) -> bool {
    tags.split(',').map(str::trim).any(|tag| tag == "*" || tag == ours)
}

/// `If-Range`: only the strong tag counts; an artifact's date says nothing of its bytes.
fn same(headers: &HeaderMap, ours: &str) -> bool {
    !headers.contains_key(IF_RANGE) || text(headers, IF_RANGE) == Some(ours)
}

/// One range of bytes. What is no such range, or is several, means the whole (RFC 9110, 14.2).
fn wanted(header: &str, size: u64) -> Wanted {
    let unit = header.split_once('=').filter(|(unit, _)| unit.trim().eq_ignore_ascii_case("bytes"));
    let Some((first, last)) = unit.and_then(|(_, range)| range.trim().split_once('-')) else {
        return Wanted::Whole;
    };
    // More digits than any size has mean "far behind the end".
    let number = |digits: &str| match digits.bytes().all(|byte| byte.is_ascii_digit()) {
        true if !digits.is_empty() => Some(digits.parse::<u64>().unwrap_or(u64::MAX)),
        _ => None,
    };
    match (first, last) {
        ("", last) => match number(last) {
            None => Wanted::Whole,
            Some(0) => Wanted::Nowhere,
            Some(_) if size == 0 => Wanted::Nowhere,
            Some(count) => Wanted::Part(size.saturating_sub(count)..size),
        },
        (first, last) => match (number(first), last, number(last)) {
            (Some(first), "", _) if first < size => Wanted::Part(first..size),
            (Some(first), _, Some(last)) if first > last => Wanted::Whole,
            (Some(first), _, Some(last)) if first < size => {
                Wanted::Part(first..last.saturating_add(1).min(size))
            }
            (Some(_), "", _) | (Some(_), _, Some(_)) => Wanted::Nowhere,
            _ => Wanted::Whole,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_standard() {
        let part = Wanted::Part;
        for (header, expected) in [
            ("bytes=0-0", part(0..1)),
            ("bytes=0-99", part(0..100)),
            ("bytes=10-", part(10..100)),
            ("bytes=99-", part(99..100)),
            ("bytes=90-1000", part(90..100)),
            ("bytes=90-99999999999999999999999", part(90..100)),
            ("bytes=-1", part(99..100)),
            ("bytes=-100", part(0..100)),
            ("bytes=-1000", part(0..100)),
            ("Bytes = 1-2", part(1..3)),
            ("bytes=100-", Wanted::Nowhere),
            ("bytes=100-200", Wanted::Nowhere),
            ("bytes=99999999999999999999999-", Wanted::Nowhere),
            ("bytes=-0", Wanted::Nowhere),
            ("bytes=5-4", Wanted::Whole),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("bytes=1", Wanted::Whole),
            ("lines=1-2", Wanted::Whole),
            ("", Wanted::Whole),
        ] {
            assert_eq!(wanted(header, 100), expected, "{header:?}");
        }
        assert_eq!(wanted("bytes=0-", 0), Wanted::Nowhere);
        assert_eq!(wanted("bytes=-5", 0), Wanted::Nowhere);
    }

    #[test]
    fn tags_match_as_the_standard_says() {
        assert!(matches("\"a\"", "\"a\"") && matches("*", "\"a\""));
        assert!(matches("\"b\", W/\"a\"", "\"a\"") && !matches("\"b\"", "\"a\""));
        assert!(holds("\"b\", \"a\"", "\"a\"") && holds("*", "\"a\""));
        assert!(!holds("W/\"a\"", "\"a\"") && !holds("\"b\"", "\"a\""));
        let mut headers = HeaderMap::new();
        assert!(same(&headers, "\"a\""));
        headers.insert(IF_RANGE, HeaderValue::from_static("W/\"a\""));
        assert!(!same(&headers, "\"a\""));
        headers.insert(IF_RANGE, HeaderValue::from_static("\"a\""));
        assert!(same(&headers, "\"a\""));
    }
}
