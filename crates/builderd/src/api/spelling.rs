//! JSON for people: whoever sends JSON without Connect's version header gets answers in which
//! every field also stands under its name of the documentation, in snake_case, with numbers as
//! numbers, and errors have the documented status. Programs that speak Connect get canonical JSON,
//! Connect's status for a code, and nothing else.
//!
//! The names come from the descriptors; nothing here knows a message.

use api::{Field, Kind};
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, ORIGIN, WWW_AUTHENTICATE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use http_body_util::BodyExt as _;
use serde_json::{Map, Value, json};

use super::auth::Caller;
use super::error::Answer;

/// Connect's own header, which only programs send.
const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("connect-protocol-version");

/// Which form a caller expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The documented plain routes.
    Plain,
    /// An RPC in JSON, by hand.
    Person,
    /// An RPC by a program: Connect, gRPC or gRPC-Web.
    Program,
}

impl Form {
    /// What the head of a request to the service expects.
    pub(super) fn of(head: &Parts) -> Self {
        let path = head.uri.path();
        let is_rpc_path = path.split('/').count() == 3;
        let query = head.uri.query().unwrap_or_default();
        let names = |name: &str| query.split('&').any(|pair| pair.starts_with(name));
        if !is_rpc_path {
            return Self::Plain;
        }
        if head.method == Method::GET || head.method == Method::HEAD {
            return match (names("message="), names("connect=") || names("encoding=proto")) {
                (false, _) => Self::Plain,
                (true, true) => Self::Program,
                (true, false) => Self::Person,
            };
        }
        match is_json(&head.headers) && !head.headers.contains_key(PROTOCOL_VERSION) {
            true => Self::Person,
            false => Self::Program,
        }
    }
}

/// What of a request decides how a refusal looks, for when the request itself is gone.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    form: Form,
    version: Version,
    content_type: Option<HeaderValue>,
    protocol_version: Option<HeaderValue>,
}

impl Reader {
    pub(super) fn of(head: &Parts) -> Self {
        Self {
            form: Form::of(head),
            version: head.version,
            content_type: head.headers.get(CONTENT_TYPE).cloned(),
            protocol_version: head.headers.get(PROTOCOL_VERSION).cloned(),
        }
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// An answer that never reached a handler, in the form its caller expects.
    pub(super) fn refuse(&self, answer: Answer) -> Response {
        let mut headers = HeaderMap::new();
        let names =
            [(CONTENT_TYPE, &self.content_type), (PROTOCOL_VERSION, &self.protocol_version)];
        for (name, value) in names {
            value.clone().and_then(|value| headers.insert(name, value));
        }
        refuse(answer, self.form, &headers)
    }

    /// The same, and the end of the connection if it brings one request after the other: the rest
    /// of this one is not waited for.
    pub(super) fn refuse_and_close(&self, answer: Answer) -> Response {
        let mut response = self.refuse(answer);
        if self.version <= Version::HTTP_11 {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    text.and_then(|text| text.split(';').next()).is_some_and(|text| text == "application/json")
}

/// Mends a content type as people write it: curl's own for `-d`, none, or in capitals. What a
/// page in a browser can send without asking stays as it is.
pub(super) fn mend_content_type(headers: &mut HeaderMap) {
    const JSON: HeaderValue = HeaderValue::from_static("application/json");
    let Some(text) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        if !headers.contains_key(CONTENT_TYPE) && !headers.contains_key(ORIGIN) {
            headers.insert(CONTENT_TYPE, JSON);
        }
        return;
    };
    let lower = text.to_ascii_lowercase();
    if lower.starts_with("application/x-www-form-urlencoded") && !headers.contains_key(ORIGIN) {
        headers.insert(CONTENT_TYPE, JSON);
    } else if lower != text
        && let Ok(value) = HeaderValue::from_str(&lower)
    {
        headers.insert(CONTENT_TYPE, value);
    }
}

/// Gives people both spellings.
pub(super) async fn answer_in_both(form: Form, request: Request, next: Next) -> Response {
    if form != Form::Person {
        return next.run(request).await;
    }
    let (mut head, body) = request.into_parts();
    head.headers.remove(ACCEPT_ENCODING);
    let method = head.uri.path().rsplit('/').next().unwrap_or_default();
    let method = api::METHODS.iter().find(|known| known.name == method && !known.streams);
    let caller = head.extensions.get::<Caller>().cloned();
    let response = next.run(Request::from_parts(head, body)).await;
    let (mut head, body) = response.into_parts();
    let Some(method) = method.filter(|_| is_json(&head.headers)) else {
        return Response::from_parts(head, body);
    };
    // Answers of unary calls are whole in memory already.
    let bytes = match body.collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(_) => Bytes::new(),
    };
    let error = caller.as_ref().and_then(Caller::error);
    let spelled = match (head.status.is_success(), error) {
        (true, _) => spelled(&bytes, |value| both(method.output, value)),
        (false, None) => {
            // What never got to a handler has used nothing up: the message is too long.
            if head.status == StatusCode::TOO_MANY_REQUESTS {
                head.status = StatusCode::PAYLOAD_TOO_LARGE;
            }
            spelled(&bytes, with_own_error)
        }
        (false, Some(error)) => {
            head.status = error.status();
            spelled(&bytes, |value| with_plain_error(value, error))
        }
    };
    head.headers.remove(CONTENT_LENGTH);
    Response::from_parts(head, Body::from(spelled.unwrap_or(bytes)))
}

fn spelled(bytes: &[u8], spell: impl FnOnce(Value) -> Value) -> Option<Bytes> {
    let value = serde_json::from_slice(bytes).ok()?;
    Some(Bytes::from(spell(value).to_string()))
}

/// Connect's error with the documented one beside it.
fn with_plain_error(mut value: Value, error: &Answer) -> Value {
    if let Some(object) = value.as_object_mut() {
        object.insert("error".into(), error.plain());
    }
    value
}

/// The same for an error of the protocol itself, of which there is no [`Answer`].
fn with_own_error(mut value: Value) -> Value {
    if let Some(object) = value.as_object_mut() {
        let code = object.get("code").and_then(Value::as_str).unwrap_or("unknown");
        let (code, message) = (code.to_ascii_uppercase(), object.get("message").cloned());
        object.insert("error".into(), json!({"code": code, "message": message, "details": {}}));
    }
    value
}

/// An answer that never reached a handler, in the form its caller expects.
pub(super) fn refuse(answer: Answer, form: Form, headers: &HeaderMap) -> Response {
    use axum::response::IntoResponse as _;
    let mut response = match form {
        Form::Plain => answer.into_response(),
        Form::Program => answer.into_connect().into_http_response(headers).map(Body::new),
        Form::Person => {
            let connect = answer.clone().into_connect();
            let body = serde_json::from_slice(&connect.to_json()).unwrap_or_default();
            let body = with_plain_error(body, &answer).to_string();
            let mut response = connect.into_response();
            *response.status_mut() = answer.status();
            *response.body_mut() = Body::from(body);
            response
        }
    };
    if response.status() == StatusCode::UNAUTHORIZED {
        // RFC 9110, 15.5.2: who is asked for a credential is told of which kind.
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Canonical JSON of a message with the documentation's spelling beside each name.
pub(super) fn both(message: &str, value: Value) -> Value {
    spell(message, value, true, true)
}

/// A message in the documentation's spelling alone.
pub(super) fn documented(message: &str, value: Value) -> Value {
    spell(message, value, false, true)
}

/// `keep` keeps the canonical names; `fill` adds numbers, flags and lists that canonical JSON
/// leaves out for being zero or empty.
fn spell(message: &str, value: Value, keep: bool, fill: bool) -> Value {
    let Some(known) = api::message(message) else { return value };
    let Value::Object(mut fields) = value else { return value };
    // What was sent is shown as it was sent.
    let fill = fill && message != "builder.v1.BuildConfig";
    let mut spelled = Map::new();
    for field in known.fields {
        let value = fields.remove(field.json_name);
        let is_same = field.name == field.json_name;
        let Some(value) = value else {
            if let Some(zero) = zero(field).filter(|_| fill) {
                spelled.insert(field.name.to_owned(), zero);
            }
            continue;
        };
        if keep && !is_same {
            spelled.insert(field.json_name.to_owned(), value.clone());
        }
        let keep_inside = keep && is_same;
        let value = spell_field(field, value, keep_inside, fill);
        spelled.insert(field.name.to_owned(), value);
    }
    spelled.append(&mut fields);
    Value::Object(spelled)
}

fn spell_field(field: &Field, value: Value, keep: bool, fill: bool) -> Value {
    match (field.kind, value) {
        (Kind::Message(name), Value::Array(items)) => {
            items.into_iter().map(|item| spell(name, item, keep, fill)).collect()
        }
        (Kind::Message(name), value) => spell(name, value, keep, fill),
        // Under a name of both spellings the canonical text stays.
        (Kind::Number64, Value::String(text)) if !keep => {
            text.parse::<i64>().map_or(Value::String(text), Value::from)
        }
        (Kind::Number64, Value::Array(items)) if !keep => {
            items.into_iter().map(|item| spell_field(field, item, keep, fill)).collect()
        }
        (
            Kind::Number | Kind::Number64 | Kind::Bool | Kind::Text | Kind::Enum(_) | Kind::Map,
            value,
        ) => value,
    }
}

fn zero(field: &Field) -> Option<Value> {
    match field.kind {
        _ if field.is_repeated => Some(Value::Array(Vec::new())),
        Kind::Number | Kind::Number64 => Some(Value::from(0)),
        Kind::Bool => Some(Value::Bool(false)),
        Kind::Text | Kind::Enum(_) | Kind::Message(_) | Kind::Map => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_get_both_spellings_and_numbers() {
        let canonical = json!({
            "buildId": "build_1",
            "state": "BUILD_STATE_PENDING",
            "createdAt": "2024-01-15T10:30:00Z",
            "tenantContext": {
                "tenantId": "tenant-123",
                "resourceLimits": {"maxMemoryBytes": "2147483648", "maxCpuCores": 2},
            },
        });
        let spelled = both("builder.v1.CreateBuildResponse", canonical.clone());
        assert_eq!(spelled["build_id"], "build_1");
        assert_eq!(spelled["created_at"], "2024-01-15T10:30:00Z");
        let limits = &spelled["tenant_context"]["resource_limits"];
        assert_eq!(limits["max_memory_bytes"], 2_147_483_648u64);
        assert_eq!(limits["max_cpu_cores"], 2);
        assert_eq!(limits["allow_external_network"], false);
        assert!(limits.get("maxMemoryBytes").is_none());
        for (name, value) in canonical.as_object().unwrap() {
            assert_eq!(&spelled[name], value, "canonical JSON stays");
        }
    }

    #[test]
    fn one_word_names_hold_both_spellings_inside() {
        let canonical = json!({"build": {
            "buildId": "b",
            "rootfsSizeBytes": "7",
            "progress": {"currentStep": "x"},
            "config": {"buildName": "n", "labels": {"camelKey": "1", "snake_key": "2"}},
        }});
        let build = &both("builder.v1.GetBuildResponse", canonical)["build"];
        assert_eq!((&build["buildId"], &build["build_id"]), (&json!("b"), &json!("b")));
        let sizes = (&build["rootfsSizeBytes"], &build["rootfs_size_bytes"]);
        assert_eq!(sizes, (&json!("7"), &json!(7)));
        assert_eq!(build["progress"]["currentStep"], build["progress"]["current_step"]);
        assert_eq!(build["progress"]["percentage"], 0);
        assert_eq!(build["config"]["build_name"], "n");
        assert_eq!(build["config"]["labels"], json!({"camelKey": "1", "snake_key": "2"}));
        assert_eq!(build["attempts"], json!([]));
    }

    #[test]
    fn the_documented_spelling_alone_has_no_canonical_names() {
        let spelled = documented("builder.v1.ListBuildsResponse", json!({"totalCount": 1}));
        assert_eq!(spelled, json!({"builds": [], "total_count": 1, "has_more": false}));
    }

    #[test]
    fn content_types_of_people_are_mended() {
        let mended = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            mend_content_type(&mut headers);
            headers.get(CONTENT_TYPE).map(|value| value.to_str().unwrap().to_owned())
        };
        let form = "application/x-www-form-urlencoded";
        assert_eq!(mended(&[]).as_deref(), Some("application/json"));
        assert_eq!(mended(&[("content-type", form)]).as_deref(), Some("application/json"));
        assert_eq!(
            mended(&[("content-type", "Application/JSON")]).as_deref(),
            Some("application/json")
        );
        let grpc = "application/grpc+proto";
        assert_eq!(mended(&[("content-type", grpc)]).as_deref(), Some(grpc));
        let from_a_page = mended(&[("content-type", form), ("origin", "https://evil.example")]);
        assert_eq!(from_a_page.as_deref(), Some(form));
    }

    #[test]
    fn a_full_disk_has_the_documented_status_for_people_and_connect_s_for_programs() {
        use crate::build::service::ServiceError;
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let answer = Answer::of(&ServiceError::Artifact(full));
        let status = |form| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            refuse(answer.clone(), form, &headers).status()
        };
        assert_eq!(status(Form::Plain), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(status(Form::Person), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(status(Form::Program), StatusCode::TOO_MANY_REQUESTS);
    }

    #[test]
    fn forms_are_told_apart() {
        let form = |method: Method, uri: &str, headers: &[(&str, &str)]| {
            let mut request = http::Request::builder().method(method).uri(uri);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            Form::of(&request.body(()).unwrap().into_parts().0)
        };
        let json = ("content-type", "application/json; charset=utf-8");
        let version = ("connect-protocol-version", "1");
        assert_eq!(form(Method::POST, "/s/M", &[json]), Form::Person);
        assert_eq!(form(Method::POST, "/s/M", &[json, version]), Form::Program);
        assert_eq!(
            form(Method::POST, "/s/M", &[("content-type", "application/proto")]),
            Form::Program
        );
        assert_eq!(form(Method::GET, "/s/M?limit=5", &[]), Form::Plain);
        assert_eq!(form(Method::GET, "/s/M?encoding=json&message=%7B%7D", &[]), Form::Person);
        assert_eq!(form(Method::GET, "/s/M?connect=v1&encoding=json&message=", &[]), Form::Program);
        assert_eq!(form(Method::GET, "/s/M/id", &[json]), Form::Plain);
    }
}
