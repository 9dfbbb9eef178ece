//! The one table from errors to answers: [`Answer::of`].
//!
//! An answer has the form that its door speaks: Connect's and gRPC's code with an `ErrorDetail`,
//! or the documented `{"error": {…}}` of the plain routes. Causes inside the service are logged
//! here, once, under a number; the caller gets the number.

use std::error::Error;
use std::time::Duration;

use api::v1;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use connectrpc::{ConnectError, ErrorCode, ErrorDetail};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::auth::Refusal;
use super::limits::Rate;
use crate::build::service::ServiceError;
use crate::build::state::BuildState;
use crate::causes::chain;
use crate::store::{QuotaExceeded, StoreError};

/// Letters of a path that nothing is at which are told again.
const PATH_CHARS_MAX: usize = 200;

/// What a caller is told of an error, whatever the door.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// For Connect and gRPC.
    code: ErrorCode,
    /// For the plain routes, and for people who call an RPC by hand.
    status: StatusCode,
    /// The documented word.
    word: &'static str,
    message: String,
    quota: Option<Box<QuotaExceeded>>,
    tenant: Option<String>,
    retry_after_secs: Option<u64>,
}

impl Answer {
    fn new(
        code: ErrorCode,
        status: StatusCode,
        word: &'static str,
        message: impl ToString,
    ) -> Self {
        let message = message.to_string();
        Self { code, status, word, message, quota: None, tenant: None, retry_after_secs: None }
    }

    /// The table.
    pub(crate) fn of(error: &ServiceError) -> Self {
        use {ErrorCode as Code, ServiceError as E, StatusCode as Http};
        match error {
            E::Denied(_) => {
                Self::new(Code::PermissionDenied, Http::FORBIDDEN, "PERMISSION_DENIED", error)
            }
            E::NotFound(_) => Self::new(Code::NotFound, Http::NOT_FOUND, "NOT_FOUND", error),
            E::Invalid { field, .. } => {
                let word = match field.starts_with("config.source") {
                    true => "INVALID_SOURCE",
                    false => "INVALID_ARGUMENT",
                };
                Self::new(Code::InvalidArgument, Http::BAD_REQUEST, word, error)
            }
            E::Unimplemented { .. } => {
                Self::new(Code::Unimplemented, Http::NOT_IMPLEMENTED, "UNIMPLEMENTED", error)
            }
            E::Quota(quota) => Self {
                quota: Some(Box::new(quota.clone())),
                ..Self::new(
                    Code::ResourceExhausted,
                    Http::FORBIDDEN,
                    "QUOTA_EXCEEDED",
                    quota_message(quota),
                )
            },
            E::RegistryDenied { .. } | E::RegistryUnreachable { .. } => {
                Self::new(Code::PermissionDenied, Http::FORBIDDEN, "NETWORK_DENIED", error)
            }
            E::KeyReused => Self::new(Code::AlreadyExists, Http::CONFLICT, "CONFLICT", error),
            E::NotEnded(_) => {
                Self::new(Code::FailedPrecondition, Http::CONFLICT, "CONFLICT", error)
            }
            E::NotStopped { .. } => {
                Self::new(Code::DeadlineExceeded, Http::GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED", error)
            }
            E::NoArtifact(state) => {
                let word = no_artifact(*state);
                Self::new(Code::FailedPrecondition, Http::CONFLICT, word, error)
            }
            E::ArtifactGone => Self::new(Code::NotFound, Http::NOT_FOUND, "NOT_FOUND", error),
            E::Stopping => Self::unavailable(error),
            E::Store(StoreError::Unavailable(cause)) => Self::no_database(cause),
            E::Store(error @ StoreError::Unreachable { .. }) => Self::no_database(error),
            E::Store(StoreError::Full(cause)) => Self::storage_full(cause),
            E::Artifact(cause) if cause.kind() == std::io::ErrorKind::StorageFull => {
                Self::storage_full(cause)
            }
            E::Store(
                StoreError::Corrupt(_)
                | StoreError::Illegal(_)
                | StoreError::Database(_)
                | StoreError::DataDirectory { .. }
                | StoreError::Migrate(_),
            )
            | E::Artifact(_)
            | E::Seal(_) => Self::internal(error),
        }
    }

    /// Who asks is not who may.
    pub(crate) fn refused(refusal: &Refusal) -> Self {
        let (code, status, word) = match refusal {
            Refusal::NoTenant | Refusal::NoToken | Refusal::BadToken | Refusal::GoneCertificate => {
                (ErrorCode::Unauthenticated, StatusCode::UNAUTHORIZED, "AUTHENTICATION_REQUIRED")
            }
            Refusal::OtherTenant | Refusal::OtherCustomer | Refusal::OtherOrganization => {
                (ErrorCode::PermissionDenied, StatusCode::FORBIDDEN, "PERMISSION_DENIED")
            }
            Refusal::TenantId(_) | Refusal::NameTooLong(_) | Refusal::Twice(_) => {
                (ErrorCode::InvalidArgument, StatusCode::BAD_REQUEST, "INVALID_ARGUMENT")
            }
            Refusal::TooManyFailures { retry_after_secs } => {
                return Self {
                    retry_after_secs: Some(*retry_after_secs),
                    ..Self::new(
                        ErrorCode::ResourceExhausted,
                        StatusCode::TOO_MANY_REQUESTS,
                        "RATE_LIMITED",
                        refusal,
                    )
                };
            }
            Refusal::Store(error) => return Self::of(error),
        };
        Self::new(code, status, word, refusal)
    }

    /// Too many requests.
    pub(crate) fn rate_limited(rate: &Rate) -> Self {
        let wait = rate.retry_after_secs.unwrap_or(1);
        let message = format!(
            "rate limit exceeded: {} requests per minute; try again in {wait} s",
            rate.limit
        );
        let mut answer = Self::new(
            ErrorCode::ResourceExhausted,
            StatusCode::TOO_MANY_REQUESTS,
            "RATE_LIMITED",
            message,
        );
        answer.retry_after_secs = Some(wait);
        answer
    }

    /// Too many answers that are still being read.
    pub(crate) fn too_many_open(what: &str, max: u32) -> Self {
        let message = format!("{max} {what} are open here, the most there may be: close some");
        let code = ErrorCode::ResourceExhausted;
        let status = StatusCode::TOO_MANY_REQUESTS;
        Self { retry_after_secs: Some(5), ..Self::new(code, status, "RATE_LIMITED", message) }
    }

    /// Bodies that come and answers that wait, in all more than there may be of a tenant's.
    pub(crate) fn too_much_carried(bytes_max: usize) -> Self {
        let message = format!(
            "this tenant's calls hold {} MiB here, the most there may be: make fewer at once, and \
             read their answers",
            bytes_max >> 20
        );
        let code = ErrorCode::ResourceExhausted;
        let status = StatusCode::TOO_MANY_REQUESTS;
        Self { retry_after_secs: Some(5), ..Self::new(code, status, "RATE_LIMITED", message) }
    }

    /// A request that cannot be read.
    pub(crate) fn invalid(message: impl ToString) -> Self {
        let code = ErrorCode::InvalidArgument;
        Self::new(code, StatusCode::BAD_REQUEST, "INVALID_ARGUMENT", message)
    }

    /// A request that development mode, which asks nobody for a credential, does not answer.
    pub(crate) fn not_from_here(message: impl ToString) -> Self {
        let code = ErrorCode::PermissionDenied;
        Self::new(code, StatusCode::FORBIDDEN, "PERMISSION_DENIED", message)
    }

    /// A request of which the body did not come in time.
    pub(crate) fn too_slow(waited: Duration) -> Self {
        let message = format!(
            "the body of this request did not arrive within {} s: send it faster",
            waited.as_secs_f32()
        );
        let code = ErrorCode::DeadlineExceeded;
        Self::new(code, StatusCode::REQUEST_TIMEOUT, "DEADLINE_EXCEEDED", message)
    }

    /// No such route.
    pub(crate) fn no_route(path: &str) -> Self {
        let shown: String = path.chars().take(PATH_CHARS_MAX).collect();
        let more = if shown.len() < path.len() { "..." } else { "" };
        let message = format!("there is nothing at {shown}{more}");
        Self::new(ErrorCode::Unimplemented, StatusCode::NOT_FOUND, "NOT_FOUND", message)
    }

    /// The route is there, but not for this method.
    pub(crate) fn no_method(method: &http::Method) -> Self {
        let message = format!("this path does not take {method}");
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::new(ErrorCode::Unimplemented, status, "METHOD_NOT_ALLOWED", message)
    }

    /// Whoever handled the request panicked; the panic itself went to the log.
    pub(crate) fn panicked() -> Self {
        Self::numbered("a request handler panicked")
    }

    /// What is stored is not what was written.
    pub(crate) fn corrupt(problem: &str) -> Self {
        Self::numbered(problem)
    }

    fn unavailable(message: impl ToString) -> Self {
        let mut answer = Self::new(
            ErrorCode::Unavailable,
            StatusCode::SERVICE_UNAVAILABLE,
            "UNAVAILABLE",
            message,
        );
        answer.retry_after_secs = Some(1);
        answer
    }

    fn no_database(cause: &dyn Error) -> Self {
        tracing::warn!(error = %chain(cause), "the database is not available");
        Self::unavailable("the database is not available; try again")
    }

    fn storage_full(cause: &dyn Error) -> Self {
        tracing::error!(error = %chain(cause), "a disk of the service is full");
        Self::new(
            ErrorCode::ResourceExhausted,
            StatusCode::SERVICE_UNAVAILABLE,
            "STORAGE_FULL",
            "the service is out of storage; try again later",
        )
    }

    fn internal(error: &dyn Error) -> Self {
        Self::numbered(&chain(error))
    }

    fn numbered(cause: &str) -> Self {
        let number = Uuid::new_v4().simple().to_string();
        tracing::error!(error_id = %number, error = cause, "a request failed inside the service");
        let message = format!("the service failed; its log says why under error {number}");
        Self::new(ErrorCode::Internal, StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", message)
    }

    /// Names the tenant in the details of a quota.
    pub(crate) fn for_tenant(mut self, tenant: &str) -> Self {
        self.tenant = Some(tenant.to_owned());
        self
    }

    /// The documented status, which is not always what Connect makes of the code.
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// Connect's name of the code, for metrics.
    pub(crate) fn code(&self) -> ErrorCode {
        self.code
    }

    /// Whether it keeps somebody out: of the service, of what its credential does not allow, or
    /// of a build that may be another's.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self.code,
            ErrorCode::Unauthenticated | ErrorCode::PermissionDenied | ErrorCode::NotFound
        )
    }

    /// As Connect and gRPC say it.
    pub(crate) fn into_connect(self) -> ConnectError {
        let detail = self.detail();
        let mut error = ConnectError::new(self.code, self.message);
        error.details.push(ErrorDetail::from_message("builder.v1.ErrorDetail", &detail));
        if let Some(secs) = self.retry_after_secs {
            error.response_headers_mut().insert(RETRY_AFTER, HeaderValue::from(secs));
        }
        error
    }

    fn detail(&self) -> v1::ErrorDetail {
        let mut detail = v1::ErrorDetail {
            code: self.word.to_owned(),
            tenant_id: self.tenant.clone().unwrap_or_default(),
            ..Default::default()
        };
        if let Some(quota) = &self.quota {
            detail.quota_type = quota.quota_type.to_owned();
            detail.current = super::convert::signed(quota.current);
            detail.limit = super::convert::signed(quota.limit);
            detail.reset_time = quota.reset_at.map(super::convert::timestamp).into();
        }
        detail
    }

    /// As the documentation prints it, without the outer braces.
    pub(crate) fn plain(&self) -> Value {
        let mut details = serde_json::Map::new();
        if let Some(tenant) = &self.tenant {
            details.insert("tenant_id".into(), json!(tenant));
        }
        if let Some(quota) = &self.quota {
            details.insert("quota_type".into(), json!(quota.quota_type));
            details.insert("current".into(), json!(quota.current));
            details.insert("limit".into(), json!(quota.limit));
            if let Some(reset_at) = quota.reset_at {
                details.insert("reset_time".into(), json!(super::convert::rfc3339(reset_at)));
            }
        }
        json!({"code": self.word, "message": self.message, "details": details})
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let body = json!({"error": self.plain()}).to_string();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(secs) = self.retry_after_secs {
            headers.insert(RETRY_AFTER, HeaderValue::from(secs));
        }
        response
    }
}

impl From<ServiceError> for Answer {
    fn from(error: ServiceError) -> Self {
        Self::of(&error)
    }
}

/// Why a build has no artifact, in a word.
fn no_artifact(state: BuildState) -> &'static str {
    match state {
        BuildState::Timeout => "BUILD_TIMEOUT",
        BuildState::Failed | BuildState::Cancelled => "NO_ARTIFACT",
        BuildState::Queued
        | BuildState::Preparing
        | BuildState::Downloading
        | BuildState::Building
        | BuildState::Optimizing
        | BuildState::Packaging
        | BuildState::Completed => "NOT_READY",
    }
}

/// A quota, in the documentation's words.
pub(super) fn quota_message(quota: &QuotaExceeded) -> String {
    let (current, limit) = (quota.current, quota.limit);
    match quota.quota_type {
        "daily_builds" => format!("Daily build limit exceeded: {current}/{limit}"),
        "concurrent_builds" => format!("Concurrent build limit exceeded: {current}/{limit}"),
        "storage" => format!("Storage quota exceeded: {current}/{limit} bytes"),
        "queued_builds" => format!("Queued build limit exceeded: {current}/{limit}"),
        other => format!("Limit of {other} exceeded: {current}/{limit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::record::Micros;

    #[test]
    fn a_used_up_quota_answers_as_documented() {
        let error = ServiceError::Quota(QuotaExceeded {
            quota_type: "daily_builds",
            current: 5,
            limit: 5,
            reset_at: Some(Micros(1_705_363_200_000_000)),
        });
        let answer = Answer::of(&error).for_tenant("tenant-123");
        assert_eq!(
            answer.plain(),
            json!({
                "code": "QUOTA_EXCEEDED",
                "message": "Daily build limit exceeded: 5/5",
                "details": {
                    "tenant_id": "tenant-123",
                    "quota_type": "daily_builds",
                    "current": 5,
                    "limit": 5,
                    "reset_time": "2024-01-16T00:00:00Z",
                },
            })
        );
        assert_eq!(answer.clone().into_response().status(), StatusCode::FORBIDDEN);
        let connect = answer.into_connect();
        assert_eq!(connect.code, ErrorCode::ResourceExhausted);
        assert_eq!(connect.details[0].type_url, "builder.v1.ErrorDetail");
    }

    #[test]
    fn the_inside_of_the_service_stays_inside() {
        let error = ServiceError::Store(StoreError::Corrupt("row of tenant-7".into()));
        let answer = Answer::of(&error);
        assert!(!answer.plain().to_string().contains("tenant-7"));
        assert_eq!(answer.code(), ErrorCode::Internal);
    }

    #[test]
    fn a_wrong_source_has_the_documented_code() {
        let error =
            |field: &str| ServiceError::Invalid { field: field.into(), problem: "is wrong".into() };
        let word = |field| Answer::of(&error(field)).plain()["code"].clone();
        assert_eq!(word("config.source.docker_image.image_uri"), "INVALID_SOURCE");
        assert_eq!(word("config.labels"), "INVALID_ARGUMENT");
    }
}
