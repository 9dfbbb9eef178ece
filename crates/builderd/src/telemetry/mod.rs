//! How the service is seen from outside: log, traces, metrics.
//!
//! One line of the log is one JSON object with tenant, build and trace (`lines.rs`). Metrics are
//! recorded once, through OpenTelemetry, and read as Prometheus text and pushed as OTLP
//! (`metrics.rs`, `levels.rs`). A build's trace has a span for each of its steps, those of the
//! engine's process as well (`steps.rs`). Traces exist always, so that every line has a trace id and
//! an incoming `traceparent` goes on; they are sent only when a collector is configured.
//!
//! It does not know what is worth telling: the service calls it.

mod labels;
mod levels;
mod lines;
mod metrics;
mod steps;

use std::collections::HashMap;
use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::net::TcpListener;
use tracing::field::Empty;
use tracing::{Dispatch, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::Registry;

use crate::config::{Config, LogConfig, LogFormat, TelemetryConfig};

pub(crate) use levels::{Cache, RunningBuild, StorageLevels, TenantLevels};
pub(crate) use metrics::{Metrics, Pull};
pub(crate) use steps::Steps;

/// How often metrics are pushed.
const PUSH_INTERVAL: Duration = Duration::from_secs(30);
/// How long one push may take.
const PUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// What the parts that send telemetry say would become telemetry again.
const NOT_TRACED: &str = "h2=off,hyper=off,hyper_util=off,reqwest=off,rustls=off,tower=off,\
                          opentelemetry=off,opentelemetry_sdk=off,opentelemetry_otlp=off";
/// What says nothing worth a line of the log below a warning.
const QUIET: &str = "h2=warn,hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,sqlx=warn,\
                     tower=warn,opentelemetry=warn,opentelemetry_sdk=warn,opentelemetry_otlp=warn";
/// The content type of Prometheus' text (prometheus.io, "Exposition formats").
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TelemetryError {
    /// The collector's address cannot be used.
    #[error("telemetry cannot be sent to {endpoint}: check UNKEY_BUILDERD_OTEL_ENDPOINT")]
    Exporter { endpoint: String, source: ExporterBuildError },
    /// Metrics cannot be read as Prometheus text.
    #[error("the metrics cannot be registered")]
    Prometheus(#[source] opentelemetry_sdk::error::OTelSdkError),
    /// Something else in this process writes the log already.
    #[error("the log was set up before")]
    Log(#[from] tracing::dispatcher::SetGlobalDefaultError),
}

/// Running telemetry.
#[derive(Debug)]
pub(crate) struct Telemetry {
    metrics: Arc<Metrics>,
    tracer: SdkTracerProvider,
    meter: SdkMeterProvider,
}

/// Starts telemetry for this process; the log goes to standard error.
pub(crate) fn start(config: &Config) -> Result<Telemetry, TelemetryError> {
    let docker = &config.docker;
    let registries = [&docker.allowed_registries[..], &docker.insecure_registries].concat();
    let (telemetry, dispatch) = prepare(&config.telemetry, registries, &config.log, io::stderr)?;
    tracing::dispatcher::set_global_default(dispatch)?;
    Ok(telemetry)
}

/// Telemetry, and what is to become the process' dispatcher, with the log going to `out`.
/// Metrics name `registries` beside those that many use.
fn prepare<W>(
    config: &TelemetryConfig,
    registries: Vec<String>,
    log: &LogConfig,
    out: W,
) -> Result<(Telemetry, Dispatch), TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let resource = Resource::builder_empty()
        .with_service_name(config.service_name.clone())
        .with_attribute(opentelemetry::KeyValue::new(
            "service.version",
            config.service_version.clone(),
        ))
        .build();
    let tracer = tracer_provider(config, resource.clone())?;
    let registry = prometheus::Registry::new();
    let meter = meter_provider(config, resource, &registry)?;
    let metrics = Arc::new(Metrics::new(&meter, registry, config.high_cardinality, registries));

    let traces = tracing_opentelemetry::layer()
        .with_tracer(tracer.tracer("builderd"))
        // Who is asked often would pay for it with each turn of each request.
        .with_tracked_inactivity(false)
        .with_threads(false)
        .with_filter(EnvFilter::new(format!("info,{NOT_TRACED}")));
    let filter = EnvFilter::new(format!("{},{QUIET}", log.level));
    let subscriber = Registry::default().with(traces);
    let dispatch = match log.format {
        LogFormat::Json => {
            Dispatch::new(subscriber.with(lines::JsonLines::new(out).with_filter(filter)))
        }
        LogFormat::Text => {
            let lines = tracing_subscriber::fmt::layer()
                .with_writer(out)
                .with_ansi(io::stderr().is_terminal())
                .with_filter(filter);
            Dispatch::new(subscriber.with(lines))
        }
    };
    Ok((Telemetry { metrics, tracer, meter }, dispatch))
}

fn tracer_provider(
    config: &TelemetryConfig,
    resource: Resource,
) -> Result<SdkTracerProvider, TelemetryError> {
    let builder = SdkTracerProvider::builder().with_resource(resource);
    let Some(endpoint) = &config.otlp else {
        // Trace ids for the log, and nothing else.
        return Ok(builder.with_sampler(Sampler::AlwaysOff).build());
    };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(format!("{endpoint}/v1/traces"))
        .with_timeout(PUSH_TIMEOUT)
        .build()
        .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.clone(), source })?;
    let share = Sampler::TraceIdRatioBased(config.sampling_rate);
    let sampler = Sampler::ParentBased(Box::new(share));
    Ok(builder.with_sampler(sampler).with_batch_exporter(exporter).build())
}

fn meter_provider(
    config: &TelemetryConfig,
    resource: Resource,
    registry: &prometheus::Registry,
) -> Result<SdkMeterProvider, TelemetryError> {
    let text = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .without_units()
        .without_counter_suffixes()
        .scope_info_enabled(false)
        .build()
        .map_err(TelemetryError::Prometheus)?;
    let builder = SdkMeterProvider::builder().with_resource(resource).with_reader(text);
    let Some(endpoint) = &config.otlp else { return Ok(builder.build()) };
    let exporter = MetricExporter::builder()
        .with_http()
        .with_endpoint(format!("{endpoint}/v1/metrics"))
        .with_timeout(PUSH_TIMEOUT)
        .build()
        .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.clone(), source })?;
    let push = PeriodicReader::builder(exporter).with_interval(PUSH_INTERVAL).build();
    Ok(builder.with_reader(push).build())
}

impl Telemetry {
    /// What is counted.
    pub(crate) fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Sends what has not been sent; nothing is recorded afterwards.
    pub(crate) async fn finish(self) {
        // Sending blocks, and would block the thread that has to do the sending.
        let flushed = tokio::task::spawn_blocking(move || {
            let traces = self.tracer.shutdown_with_timeout(PUSH_TIMEOUT);
            let metrics = self.meter.shutdown_with_timeout(PUSH_TIMEOUT);
            traces.and(metrics)
        });
        match flushed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last telemetry was not sent"),
            Err(error) => tracing::warn!(%error, "the last telemetry was not sent"),
        }
    }
}

/// Binds the port of its own for `/metrics`, if there is to be one.
pub(crate) async fn bind_metrics(config: &TelemetryConfig) -> io::Result<Option<TcpListener>> {
    let Some(address) = config.prometheus else { return Ok(None) };
    let named = |error: io::Error| {
        let what = "UNKEY_BUILDERD_OTEL_PROMETHEUS_PORT";
        io::Error::new(error.kind(), format!("cannot listen on {address} ({what}): {error}"))
    };
    TcpListener::bind(address).await.map(Some).map_err(named)
}

/// The one page of that port.
pub(crate) fn metrics_router(metrics: Arc<Metrics>) -> axum::Router {
    let answer = move || {
        let text = metrics.render();
        std::future::ready(([(CONTENT_TYPE, PROMETHEUS_TEXT)], text))
    };
    axum::Router::new().route("/metrics", get(answer))
}

/// The span of one request; `traceparent` is the caller's header (W3C Trace Context).
pub(crate) fn request_span(method: &str, traceparent: Option<&str>) -> Span {
    let span = tracing::info_span!(
        "request",
        otel.name = method,
        otel.kind = "server",
        method,
        tenant = Empty,
        build = Empty,
    );
    adopt(&span, traceparent);
    span
}

/// The span of one try of a build, in the trace of the request that asked for it.
pub(crate) fn build_span(
    tenant: &str,
    build: &str,
    attempt: u32,
    traceparent: Option<&str>,
) -> Span {
    let span = tracing::info_span!(parent: None, "build", tenant, build, attempt);
    adopt(&span, traceparent);
    span
}

/// The span of one step of the build whose span is current.
pub(crate) fn step_span(step: &str) -> Span {
    tracing::info_span!("step", otel.name = step, step)
}

/// The current trace, to be kept or sent on as `traceparent`.
pub(crate) fn traceparent() -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut carrier);
    carrier.remove("traceparent")
}

/// Puts a span into the caller's trace, if the caller has one.
fn adopt(span: &Span, traceparent: Option<&str>) {
    let Some(traceparent) = traceparent else { return };
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract(&carrier);
    if context.span().span_context().is_valid() {
        // Fails only without the layer, and then there is no trace to go on.
        let _ = span.set_parent(context);
    }
}

#[cfg(test)]
pub(crate) mod tests;
