//! The log as JSON: one object for each line, with the fields of the event and of every span
//! around it at the top, the innermost first. Nothing is nested, so that `tenant`, `build` and
//! `trace_id` are always found under those names.

use std::fmt;
use std::io::Write as _;
use std::sync::OnceLock;

use opentelemetry::trace::TraceContextExt as _;
use serde_json::{Map, Value};
use tracing::dispatcher::WeakDispatch;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// See the module.
#[derive(Debug)]
pub(super) struct JsonLines<W> {
    out: W,
    /// Where the layer that makes traces is found; weak, because this is a part of it.
    dispatch: OnceLock<WeakDispatch>,
}

impl<W> JsonLines<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, dispatch: OnceLock::new() }
    }
}

/// The fields of one span or event.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        // Names of OpenTelemetry's own, for the layer that makes traces.
        if !field.name().starts_with("otel.") {
            self.0.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, crate::causes::chain(value).into());
    }
}

impl<S, W> Layer<S> for JsonLines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + 'static,
{
    fn on_register_dispatch(&self, dispatch: &Dispatch) {
        // Set once: a layer belongs to one subscriber.
        let _ = self.dispatch.set(dispatch.downgrade());
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut line = Map::new();
        line.insert("timestamp".into(), jiff::Timestamp::now().to_string().into());
        line.insert("level".into(), metadata.level().as_str().to_ascii_lowercase().into());
        line.insert("target".into(), metadata.target().into());
        let mut fields = Fields::default();
        event.record(&mut fields);
        add(&mut line, fields.0);
        if let Some(span) = context.event_span(event)
            && let Some(trace) = self.trace_id(&span.id())
        {
            line.insert("trace_id".into(), trace.into());
        }
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<Fields>() {
                add(&mut line, fields.0.clone());
            }
        }
        if let Ok(mut bytes) = serde_json::to_vec(&line) {
            bytes.push(b'\n');
            // There is nowhere to say that the log cannot be written.
            let _ = self.out.make_writer_for(metadata).write_all(&bytes);
        }
    }
}

impl<W> JsonLines<W> {
    fn trace_id(&self, span: &Id) -> Option<String> {
        let dispatch = self.dispatch.get()?.upgrade()?;
        let context = tracing_opentelemetry::get_otel_context(span, &dispatch)?;
        let span = context.span();
        let trace = span.span_context();
        trace.is_valid().then(|| trace.trace_id().to_string())
    }
}

/// What is nearer to the event stays.
fn add(line: &mut Map<String, Value>, fields: Map<String, Value>) {
    for (name, value) in fields {
        line.entry(name).or_insert(value);
    }
}
