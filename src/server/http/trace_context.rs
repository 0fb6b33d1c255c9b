//! W3C trace context: the trace that a client's request belongs to.
//! <https://www.w3.org/TR/trace-context/>

use axum::http::HeaderMap;
use tracing::Span;

/// Makes a request's span part of the client's trace, if the request names one.
pub(crate) fn join(span: &Span, headers: &HeaderMap) {
    let parent = headers.get("traceparent");
    if let Some(id) = parent.and_then(|value| trace_id(value.to_str().ok()?)) {
        span.record("trace_id", id);
        #[cfg(feature = "otel")]
        otel::set_parent(span, headers);
    }
}

/// Returns the trace id of a valid `traceparent` header, `version-trace_id-parent_id-flags` in
/// lower-case hexadecimal.
fn trace_id(parent: &str) -> Option<&str> {
    let mut parts = parent.split('-');
    let mut part = |digits: usize| {
        let part = parts.next()?;
        let hexadecimal = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        (part.len() == digits && part.bytes().all(hexadecimal)).then_some(part)
    };
    let (version, trace, parent) = (part(2)?, part(32)?, part(16)?);
    part(2)?;
    // Only later versions may append fields.
    if version == "00" && parts.next().is_some() {
        return None;
    }
    let zero = |id: &str| id.bytes().all(|c| c == b'0');
    (version != "ff" && !zero(trace) && !zero(parent)).then_some(trace)
}

#[cfg(feature = "otel")]
mod otel {
    use axum::http::HeaderMap;
    use opentelemetry::propagation::{Extractor, TextMapPropagator};
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    struct Headers<'a>(&'a HeaderMap);

    impl Extractor for Headers<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key)?.to_str().ok()
        }

        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(|name| name.as_str()).collect()
        }
    }

    pub fn set_parent(span: &Span, headers: &HeaderMap) {
        let context = TraceContextPropagator::new().extract(&Headers(headers));
        // This fails only if there is no exporter, and then there are no traces.
        let _ = span.set_parent(context);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_read_from_a_valid_parent_only() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let of = |text: &str| trace_id(text).map(str::to_owned);
        let parent = format!("00-{trace}-00f067aa0ba902b7-01");
        assert_eq!(of(&parent).as_deref(), Some(trace));
        // Later versions may append fields.
        let later = format!("01-{trace}-00f067aa0ba902b7-01");
        assert_eq!(of(&later).as_deref(), Some(trace));
        assert_eq!(of(&format!("{later}-x")).as_deref(), Some(trace));
        let zero = "0".repeat(32);
        for wrong in [
            String::new(),
            "00".to_owned(),
            parent.to_uppercase(),
            format!("ff-{trace}-00f067aa0ba902b7-01"),
            format!("00-{zero}-00f067aa0ba902b7-01"),
            format!("00-{trace}-0000000000000000-01"),
            format!("00-{trace}-00f067aa0ba902b7"),
            format!("{parent}-x"),
            format!("{parent}-"),
            format!("00-{trace}é-00f067aa0ba902b7-01"),
        ] {
            assert_eq!(of(&wrong), None, "{wrong}");
        }
    }
}
