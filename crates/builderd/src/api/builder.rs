//! The eight RPCs: each admits its caller, translates, and lets the service do it.

use std::sync::Arc;
use std::time::Duration;

use api::v1;
use connectrpc::{
    CodecFormat, ConnectError, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};

use super::answers::{Answers, Name, Written};
use super::auth::{Caller, Claim};
use super::convert;
use super::error::Answer;
use super::follow::{Reader, Wish, follow};
use super::{Answered, ApiState};
use crate::build::record::{Build, Micros};
use crate::build::service::ServiceError;
use crate::store::Cancel;
use crate::tenant::Principal;

/// Lines of the log that `GetBuild` shows.
const TAIL_LINES: u32 = 50;
/// Longest trace context: 55 bytes in its version 00, and a later version may be longer.
const TRACEPARENT_BYTES_MAX: usize = 256;
/// Heartbeats come at least so far apart.
const HEARTBEAT_SECS_MIN: u64 = 1;

/// The service as the generated code calls it.
pub(super) struct Door {
    state: Arc<ApiState>,
    answers: Answers,
}

impl Door {
    pub(super) fn new(state: Arc<ApiState>) -> Self {
        Self { state, answers: Answers::new() }
    }

    fn now(&self) -> Micros {
        self.state.clock.now()
    }

    fn job(&self, build: &Build) -> v1::BuildJob {
        convert::job(&self.state.service, build, Vec::new(), self.now())
    }

    /// A build as it goes out: as it did before, if it has ended and the database says that
    /// nothing of it changed since.
    async fn written(&self, who: &Principal, id: &str, format: CodecFormat) -> Answered<Written> {
        let service = &self.state.service;
        let name = Name { tenant: who.tenant().clone(), build: id.to_owned(), format };
        if let Some((revision, written)) = self.answers.get(&name) {
            if service.revision_of_ended(who, id).await? == Some(revision) {
                return Ok(written);
            }
            self.answers.forget(&name);
        }
        let seen = service.get_with_log(who, id, TAIL_LINES).await?;
        let job = convert::job(service, &seen.build, seen.log, self.now());
        let response = v1::GetBuildResponse { build: job.into(), ..Default::default() };
        let written = Written::of(&response, format)?;
        if seen.build.state.is_terminal() {
            self.answers.put(name, seen.revision, &written);
        }
        Ok(written)
    }

    /// The state of a build that was told to stop, for callers who may not look at it: cancelled
    /// is what it will be.
    async fn state_after(
        &self,
        who: &Principal,
        id: &str,
        cancel: Cancel,
    ) -> Answered<v1::BuildState> {
        match cancel {
            Cancel::Done => Ok(v1::BuildState::BUILD_STATE_CANCELLED),
            Cancel::Ended(state) => Ok(convert::state(state)),
            Cancel::Requested => match self.state.service.get(who, id).await {
                Ok(build) => Ok(convert::state(build.state)),
                Err(ServiceError::Denied(_)) => Ok(v1::BuildState::BUILD_STATE_CANCELLED),
                Err(error) => Err(error.into()),
            },
        }
    }
}

/// The caller that the way in has put beside the request.
fn caller(context: &RequestContext) -> Result<Caller, ConnectError> {
    let found = context.extensions().get::<Caller>().cloned();
    // Nobody gets here past the gate; if somebody does, nobody is let in.
    found.ok_or_else(|| Answer::refused(&super::auth::Refusal::NoToken).into_connect())
}

/// Runs a handler for whoever is admitted; errors become the protocol's.
async fn admitted<T, F: Future<Output = Answered<T>>>(
    state: &ApiState,
    context: &RequestContext,
    claim: Claim,
    handler: impl FnOnce(Principal) -> F,
) -> Result<T, ConnectError> {
    let caller = caller(context)?;
    let result = match state.auth.admit(&caller, &claim).await {
        Ok(principal) => {
            let who = principal.clone();
            handler(principal).await.map_err(|answer| {
                state.refused(&caller, Some(&who), &claim.build, &answer);
                answer.for_tenant(who.tenant().as_str())
            })
        }
        Err(answer) => {
            state.refused(&caller, None, &claim.build, &answer);
            Err(answer)
        }
    };
    result.map_err(|answer| {
        caller.note(&answer);
        answer.into_connect()
    })
}

/// The caller's trace; one that cannot be one is none (W3C Trace Context, section 4.3).
fn traceparent_of_header(context: &RequestContext) -> Option<String> {
    let text = context.header("traceparent")?.to_str().ok()?;
    (text.len() <= TRACEPARENT_BYTES_MAX).then(|| text.to_owned())
}

#[expect(refining_impl_trait, reason = "the messages themselves are answered with")]
impl v1::BuilderService for Door {
    async fn create_build(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::CreateBuildRequest>,
    ) -> ServiceResult<v1::CreateBuildResponse> {
        let request = request.to_owned_message();
        let tenant = &request.config.tenant;
        let claim = Claim {
            tenant: tenant.tenant_id.clone(),
            customer: tenant.customer_id.clone(),
            organization: tenant.organization_id.clone(),
            tier: convert::tier(tenant.tier),
            ..Claim::default()
        };
        let context = &context;
        let build = admitted(&self.state, context, claim, |who| async move {
            let mut order = convert::order(request)?;
            order.traceparent =
                crate::telemetry::traceparent().or_else(|| traceparent_of_header(context));
            let header = context.header("idempotency-key");
            order.idempotency_key = convert::idempotency_key(order.idempotency_key, header)?;
            Ok(self.state.service.create(&who, order).await?)
        });
        let build = build.await?;
        Response::ok(v1::CreateBuildResponse {
            build_id: build.id.to_string(),
            state: convert::state(build.state).into(),
            created_at: convert::timestamp(build.created_at).into(),
            rootfs_path: self.job(&build).rootfs_path,
            status: convert::status(build.state).into(),
            tenant_context: convert::tenant_context(&build).into(),
            ..Default::default()
        })
    }

    async fn get_build(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::GetBuildRequest>,
    ) -> ServiceResult<Written> {
        let request = request.to_owned_message();
        let claim = Claim::tenant(&request.tenant_id).about(&request.build_id);
        let format = context.extensions().get::<CodecFormat>().copied();
        let written = admitted(&self.state, &context, claim, |who| async move {
            let format = format.ok_or_else(|| Answer::corrupt("a call without a format"))?;
            self.written(&who, &request.build_id, format).await
        });
        Response::ok(written.await?)
    }

    async fn list_builds(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::ListBuildsRequest>,
    ) -> ServiceResult<v1::ListBuildsResponse> {
        let request = request.to_owned_message();
        let claim = Claim::tenant(&request.tenant_id);
        let response = admitted(&self.state, &context, claim, |who| async move {
            let Some(filter) = convert::filter(&request)? else {
                return Ok(v1::ListBuildsResponse::default());
            };
            let page = self.state.service.list(&who, &filter).await?;
            let last = page.builds.last().filter(|_| page.has_more);
            Ok(v1::ListBuildsResponse {
                next_page_token: last.map_or_else(String::new, |build| build.id.to_string()),
                builds: page.builds.iter().map(|build| self.job(build)).collect(),
                total_count: i32::try_from(page.total).unwrap_or(i32::MAX),
                has_more: page.has_more,
                ..Default::default()
            })
        });
        Response::ok(response.await?)
    }

    async fn cancel_build(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::CancelBuildRequest>,
    ) -> ServiceResult<v1::CancelBuildResponse> {
        let request = request.to_owned_message();
        let claim = Claim::tenant(&request.tenant_id).about(&request.build_id);
        let response = admitted(&self.state, &context, claim, |who| async move {
            let (service, id) = (&self.state.service, &request.build_id);
            let cancel = service.cancel(&who, id, &convert::reason(&request.reason)?).await?;
            let state = self.state_after(&who, id, cancel).await?;
            let is_cancelled = state == v1::BuildState::BUILD_STATE_CANCELLED;
            let (success, status) = match cancel {
                Cancel::Ended(state) => (is_cancelled, convert::status(state)),
                Cancel::Done => (true, v1::BuildStatus::BUILD_STATUS_CANCELLED),
                Cancel::Requested if is_cancelled => {
                    (true, v1::BuildStatus::BUILD_STATUS_CANCELLED)
                }
                Cancel::Requested => (true, v1::BuildStatus::BUILD_STATUS_RUNNING),
            };
            Ok(v1::CancelBuildResponse {
                success,
                state: state.into(),
                status: status.into(),
                ..Default::default()
            })
        });
        Response::ok(response.await?)
    }

    async fn delete_build(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::DeleteBuildRequest>,
    ) -> ServiceResult<v1::DeleteBuildResponse> {
        let request = request.to_owned_message();
        let claim = Claim::tenant(&request.tenant_id).about(&request.build_id);
        let deleted = admitted(&self.state, &context, claim, |who| async move {
            Ok(self.state.service.delete(&who, &request.build_id, request.force).await?)
        });
        deleted.await?;
        Response::ok(v1::DeleteBuildResponse { success: true, ..Default::default() })
    }

    async fn stream_build_logs(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::StreamBuildLogsRequest>,
    ) -> ServiceResult<ServiceStream<v1::StreamBuildLogsResponse>> {
        let request = request.to_owned_message();
        let claim = Claim::tenant(&request.tenant_id).about(&request.build_id);
        let caller = caller(&context)?;
        let lines = admitted(&self.state, &context, claim.clone(), |who| async move {
            let silence = u64::try_from(request.heartbeat_secs)
                .map_err(|_| Answer::invalid("heartbeat_secs: must not be negative"))?;
            let wish = Wish {
                build: request.build_id.clone(),
                follow: request.follow,
                offset: u64::try_from(request.offset)
                    .map_err(|_| Answer::invalid("offset: must not be negative"))?,
                heartbeat: (silence >= HEARTBEAT_SECS_MIN).then(|| Duration::from_secs(silence)),
            };
            let reader = Reader { who, caller, claim };
            follow(Arc::clone(&self.state), reader, wish).await
        });
        Response::stream_ok(lines.await?)
    }

    async fn get_tenant_quotas(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::GetTenantQuotasRequest>,
    ) -> ServiceResult<v1::GetTenantQuotasResponse> {
        let claim = Claim::tenant(&request.to_owned_message().tenant_id);
        let quotas = admitted(&self.state, &context, claim, |who| async move {
            Ok(self.state.service.quotas(&who).await?)
        });
        Response::ok(convert::quotas(&quotas.await?))
    }

    async fn get_build_stats(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, v1::GetBuildStatsRequest>,
    ) -> ServiceResult<v1::GetBuildStatsResponse> {
        let request = request.to_owned_message();
        let claim = Claim::tenant(&request.tenant_id);
        let stats = admitted(&self.state, &context, claim, |who| async move {
            let from = request.start_time.as_option().map(convert::micros);
            let to = request.end_time.as_option().map(convert::micros);
            if from.zip(to).is_some_and(|(from, to)| from > to) {
                return Err(Answer::invalid("start_time: is later than end_time"));
            }
            Ok(self.state.service.stats(&who, from, to).await?)
        });
        let (stats, recent) = stats.await?;
        let recent = recent.iter().map(|build| self.job(build)).collect();
        Response::ok(convert::stats(&stats, recent))
    }
}
