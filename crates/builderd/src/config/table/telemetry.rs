//! Traces and metrics.

use super::{Kind, Setting, setting};

pub(super) const TELEMETRY: &[Setting] = &[
    setting(
        "OTEL_ENABLED",
        Kind::Flag,
        "false",
        "README",
        "Whether traces and metrics are sent to OTEL_ENDPOINT.",
    ),
    setting(
        "OTEL_SERVICE_NAME",
        Kind::Text,
        "builderd",
        "README",
        "What this service calls itself there.",
    ),
    setting(
        "OTEL_SERVICE_VERSION",
        Kind::Text,
        "",
        "code",
        "Its version; the program's when empty.",
    ),
    setting(
        "OTEL_SAMPLING_RATE",
        Kind::Ratio,
        "1.0",
        "README",
        "Share of the traces that are sent, unless the caller's trace decides.",
    )
    .also(&["OTEL_SAMPLE_RATE"]),
    setting(
        "OTEL_ENDPOINT",
        Kind::Text,
        "localhost:4318",
        "README",
        "OTLP over HTTP: `host:port` or a URL, to which `/v1/traces` and `/v1/metrics` \
         are added.",
    ),
    setting(
        "OTEL_INSECURE",
        Kind::Flag,
        "true",
        "guide",
        "Whether OTEL_ENDPOINT is reached over plain HTTP if it names no scheme.",
    ),
    setting(
        "OTEL_PROMETHEUS_ENABLED",
        Kind::Flag,
        "true",
        "README",
        "Whether `/metrics` has a port of its own; it is on PORT in any case.",
    )
    .also(&["METRICS_ENABLED"]),
    setting(
        "OTEL_PROMETHEUS_PORT",
        Kind::Number { min: 0, max: 65_535 },
        "9466",
        "README",
        "That port; 0 takes a free one.",
    )
    .also(&["METRICS_PORT"]),
    setting(
        "OTEL_PROMETHEUS_INTERFACE",
        Kind::Ip,
        "127.0.0.1",
        "code",
        "The address it listens on.",
    ),
    setting(
        "OTEL_PROMETHEUS_TLS",
        Kind::Flag,
        "true",
        "ours",
        "Whether that port has TLS when the API has, with the same certificates and demands.",
    ),
    setting(
        "OTEL_HIGH_CARDINALITY_ENABLED",
        Kind::Flag,
        "false",
        "code",
        "Whether metrics carry `tenant_id`: one series for each tenant.",
    ),
];
