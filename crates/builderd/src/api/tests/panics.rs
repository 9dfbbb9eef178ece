//! What becomes of a call whose handler has a bug, and who is told.

use std::sync::{Arc, Mutex};

use axum::response::IntoResponse as _;
use http_body_util::BodyExt as _;
use reqwest::StatusCode;

use crate::api::{Observe, PANICKED, caught};

#[tokio::test]
async fn a_panic_of_a_plain_route_is_answered_and_counted_and_tells_nothing() {
    let seen = Arc::<Mutex<Vec<(String, String)>>>::default();
    let observe: Observe = Arc::new({
        let seen = Arc::clone(&seen);
        move |path, code, _| seen.lock().unwrap().push((path.to_owned(), code.to_owned()))
    });
    let well = caught(&observe, "/x/GetBuildStatus/1", async { "well".into_response() }).await;
    assert_eq!((well.status(), seen.lock().unwrap().len()), (StatusCode::OK, 0));
    let path = "/x/GetBuildStatus/2";
    let answer = caught(&observe, path, async { panic!("a defect") }).await;
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8_lossy(&body);
    assert!(!text.contains("a defect"), "{text}");
    let told = [PANICKED, "500"].map(|code| (path.to_owned(), code.to_owned()));
    assert_eq!(*seen.lock().unwrap(), told);
}
