//! Requests in JSON, read as the doors read them, but from anybody: a fuzz target has no other way
//! in. Nothing is done with them.

use api::v1;
use serde::de::DeserializeOwned;

use super::convert::{filter, order, reason};
use super::shape;
use crate::build::record::BuildRequest;

/// Reads the request of the method of that place in the service, from 0; of another one there is
/// no method.
///
/// # Panics
/// When one that was understood does not mean the same in the words in which it is kept.
pub fn read_request(method: usize, json: &[u8]) {
    let Some(method) = api::METHODS.get(method) else { return };
    if shape::check(api::message(method.input), json).is_err() {
        return;
    }
    match method.name {
        "CreateBuild" => {
            let Some(ordered) = read(json).and_then(|request| order(request).ok()) else { return };
            let kept = format!("{{\"config\": {}}}", ordered.request.echo);
            let Some(again) = read(kept.as_bytes()) else { panic!("it cannot be read: {kept}") };
            match order(again) {
                // Only of credentials, which are not kept, it says something else.
                Ok(again) => {
                    let echo = again.request.echo.clone();
                    assert_eq!(again.request, BuildRequest { echo, ..ordered.request });
                }
                Err(error) => panic!("it is refused: {error}: {kept}"),
            }
        }
        "ListBuilds" => drop(read(json).map(|request| filter(&request))),
        "CancelBuild" => {
            drop(read::<v1::CancelBuildRequest>(json).map(|request| reason(&request.reason)));
        }
        _ => {}
    }
}

fn read<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    serde_json::from_slice(json).ok()
}
