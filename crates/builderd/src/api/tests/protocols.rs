//! The same service over Connect (proto, GET), gRPC and gRPC-Web, and what stands beside it.

use api::v1;
use buffa::Message;
use http_body_util::BodyExt as _;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::json;

use super::{Server, send};
use crate::api::Mode;

/// One message in the frame that gRPC and Connect's streams share.
fn framed(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    [&[0], &length[..], &bytes].concat()
}

/// The frames of a body: flags and payload.
fn frames(mut body: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = body.split_at_checked(5) {
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let (payload, rest) = rest.split_at(length);
        frames.push((head[0], payload.to_vec()));
        body = rest;
    }
    assert!(body.is_empty());
    frames
}

fn get_build(id: &str) -> v1::GetBuildRequest {
    v1::GetBuildRequest { build_id: id.to_owned(), ..Default::default() }
}

/// A call as gRPC clients make it: HTTP/2 from the first byte, the state in the trailers.
async fn grpc(server: &Server, path: &str, body: Vec<u8>) -> (Vec<(u8, Vec<u8>)>, String, String) {
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let request = client.post(server.url(path));
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    let response = request.header("x-tenant-id", "t").body(body).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let headers = response.headers().clone();
    let collected = http::Response::from(response).into_body().collect().await.unwrap();
    let trailers = collected.trailers().cloned().unwrap_or(headers);
    let text = |name: &str| {
        trailers.get(name).map_or(String::new(), |value| value.to_str().unwrap().to_owned())
    };
    let (status, message) = (text("grpc-status"), text("grpc-message"));
    (frames(&collected.to_bytes()), status, message)
}

#[tokio::test]
async fn a_build_is_the_same_over_every_protocol() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let path = format!("/{}/GetBuild", api::SERVICE);
    let post = |content_type: &str, body: Vec<u8>| -> RequestBuilder {
        let request = server.request(Method::POST, &path).header("content-type", content_type);
        request.header("x-tenant-id", "t").body(body)
    };
    let is_it = |bytes: &[u8]| {
        let response = v1::GetBuildResponse::decode_from_slice(bytes).unwrap();
        assert_eq!(response.build.build_id, id);
        assert_eq!(response.build.state, v1::BuildState::BUILD_STATE_PENDING);
    };

    let connect = send(post("application/proto", get_build(&id).encode_to_vec())).await;
    assert_eq!(connect.status, StatusCode::OK);
    assert!(!connect.header("content-length").is_empty(), "whole answers tell their length");
    is_it(&connect.body);

    let web = send(post("application/grpc-web+proto", framed(&get_build(&id)))).await;
    let web = frames(&web.body);
    is_it(&web[0].1);
    assert_eq!(web[1].0, 0x80);
    assert!(String::from_utf8_lossy(&web[1].1).contains("grpc-status: 0"));

    let (messages, status, _) = grpc(&server, &path, framed(&get_build(&id))).await;
    assert_eq!(status, "0");
    is_it(&messages[0].1);
    let (_, status, message) = grpc(&server, &path, framed(&get_build("build_0"))).await;
    assert_eq!((status.as_str(), message.as_str()), ("5", "build not found: build_0"));
    server.stop().await;
}

#[tokio::test]
async fn safe_methods_can_be_asked_with_get() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let get = |method: &str, query: &str| {
        let request = server.plain(&format!("{method}?{query}"));
        send(request.header("x-tenant-id", "t"))
    };
    let message = format!("connect=v1&encoding=json&message=%7B%22buildId%22:%22{id}%22%7D");
    let build = get("GetBuild", &message).await.well();
    assert_eq!(build["build"]["buildId"], id);
    assert!(build["build"].get("build_id").is_none());
    let list = get("ListBuilds", "connect=v1&encoding=json&message=%7B%7D").await.well();
    assert_eq!(list["totalCount"], 1);
    let by_hand = get("ListBuilds", "encoding=json&message=%7B%7D").await.well();
    assert_eq!(by_hand["total_count"], 1);
    let refused = get("CreateBuild", &message).await;
    assert_eq!(refused.status, StatusCode::METHOD_NOT_ALLOWED);
    server.stop().await;
}

#[tokio::test]
async fn health_and_reflection_answer_without_a_credential() {
    use connectrpc_health::wire::{HealthCheckRequest, HealthCheckResponse};
    use connectrpc_reflection::wire::v1::server_reflection_request::MessageRequest;
    use connectrpc_reflection::wire::v1::server_reflection_response::MessageResponse;
    use connectrpc_reflection::wire::v1::{ServerReflectionRequest, ServerReflectionResponse};

    let server = Server::start(Mode::Tokens).await;
    let check = |service: &str| {
        framed(&HealthCheckRequest { service: service.to_owned(), ..Default::default() })
    };
    let path = "/grpc.health.v1.Health/Check";
    for service in ["", api::SERVICE] {
        let (messages, status, _) = grpc(&server, path, check(service)).await;
        let response = HealthCheckResponse::decode_from_slice(&messages[0].1).unwrap();
        assert_eq!((status.as_str(), response.status.to_i32()), ("0", 1));
    }
    assert_eq!(grpc(&server, path, check("other")).await.1, "5");

    let list = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let (messages, status, _) = grpc(&server, &path, framed(&list)).await;
        assert_eq!(status, "0");
        let answer = ServerReflectionResponse::decode_from_slice(&messages[0].1).unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("no list of services");
        };
        let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        assert!(names.contains(&api::SERVICE) && names.contains(&"grpc.health.v1.Health"));
        let long = ServerReflectionRequest {
            message_request: Some(MessageRequest::FileContainingSymbol("x".repeat(100 << 10))),
            ..Default::default()
        };
        assert_eq!(grpc(&server, &path, framed(&long)).await.1, "8", "strangers are brief");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_error_carries_its_details_in_every_protocol() {
    let server = Server::start(Mode::Development).await;
    let path = format!("/{}/StreamBuildLogs", api::SERVICE);
    let request = v1::StreamBuildLogsRequest { build_id: "build_0".into(), ..Default::default() };
    let (messages, status, message) = grpc(&server, &path, framed(&request)).await;
    assert_eq!((messages.len(), status.as_str()), (0, "5"));
    assert_eq!(message, "build not found: build_0");

    let unary = server.rpc("GetBuild", &json!({"build_id": "build_0"}));
    let reply = send(unary.header("x-tenant-id", "t")).await.json();
    assert_eq!(reply["code"], "not_found");
    assert_eq!(reply["details"][0]["type"], "builder.v1.ErrorDetail");
    assert_eq!(reply["error"]["code"], "NOT_FOUND");
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_there_and_what_is_too_much_is_said_in_the_right_form() {
    let server = Server::start(Mode::Development).await;
    let lost = send(server.request(Method::GET, "/nowhere")).await;
    assert_eq!(lost.status, StatusCode::NOT_FOUND);
    assert_eq!(lost.json()["error"]["code"], "NOT_FOUND");
    let odd = send(server.request(Method::POST, "/health")).await;
    assert_eq!(odd.status, StatusCode::METHOD_NOT_ALLOWED);
    let (_, status, _) = grpc(&server, "/other.v1.Service/Call", framed(&get_build("x"))).await;
    assert_eq!(status, "12");
    let (_, status, _) =
        grpc(&server, &format!("/{}/Novelty", api::SERVICE), framed(&get_build("x"))).await;
    assert_eq!(status, "12");

    let big = json!({"build_id": "x".repeat(5 << 20)});
    let reply = send(server.rpc("GetBuild", &big).header("x-tenant-id", "t")).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE, "nothing is used up");
    assert_eq!(reply.json()["code"], "resource_exhausted");
    assert_eq!(reply.json()["error"]["code"], "RESOURCE_EXHAUSTED");
    // What cannot be a message at all is told people in both forms, too.
    let odd =
        send(server.rpc("GetBuild", &json!({"build_id": 5})).header("x-tenant-id", "t")).await;
    assert_eq!(odd.status, StatusCode::BAD_REQUEST);
    let said = odd.json();
    assert_eq!(
        (&said["code"], &said["error"]["code"]),
        (&json!("invalid_argument"), &json!("INVALID_ARGUMENT"))
    );
    assert_eq!(said["error"]["message"], said["message"]);
    let garbled = server.rpc("GetBuild", &json!("x")).header("x-tenant-id", "t");
    assert_eq!(send(garbled).await.status, StatusCode::BAD_REQUEST);
    server.stop().await;
}

#[tokio::test]
async fn a_deadline_is_kept() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let path = format!("/{}/StreamBuildLogs", api::SERVICE);
    let wish = v1::StreamBuildLogsRequest { build_id: id, follow: true, ..Default::default() };
    let request = server
        .request(Method::POST, &path)
        .header("content-type", "application/connect+proto")
        .header("connect-timeout-ms", "300")
        .header("x-tenant-id", "t")
        .body(framed(&wish));
    let reply = send(request).await;
    let (flags, end) = frames(&reply.body).pop().unwrap();
    assert_eq!(flags, 2);
    assert!(String::from_utf8_lossy(&end).contains("deadline_exceeded"));
    server.stop().await;
}

#[test]
fn requests_are_called_by_the_name_of_their_rpc() {
    use crate::api::method_named;
    assert_eq!(method_named("/builder.v1.BuilderService/CreateBuild"), "CreateBuild");
    // Whoever makes up names must not make up names of spans.
    assert_eq!(method_named("/builder.v1.BuilderService/NoSuchThing"), "unknown");
}
