//! Each request has a span, with one event that tells how the request ended.
//!
//! There is one test in this file because the subscriber is global.

use quell::{EngineConfig, Request};
use sim::{Fault, SimOptions, engine};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

thread_local! {
    static ENTERED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

type Fields = HashMap<String, String>;

struct Span {
    name: String,
    parent: Option<u64>,
    fields: Fields,
}

impl Span {
    fn is_of(&self, id: quell::RequestId) -> bool {
        self.name == "request" && self.fields["id"] == id.as_u64().to_string()
    }
}

/// What was recorded: spans with their parents, and the events of requests.
#[derive(Default)]
struct Log {
    spans: Mutex<HashMap<u64, Span>>,
    /// Events, each with the span that it occurred in.
    events: Mutex<Vec<(Option<u64>, Fields)>>,
}

#[derive(Clone, Default)]
struct Recorder {
    log: Arc<Log>,
    next: Arc<AtomicU64>,
}

struct Reader(Fields);

impl Visit for Reader {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

fn entered() -> Option<u64> {
    ENTERED.with(|entered| entered.borrow().last().copied())
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("quell::request") || metadata.target() == "spans"
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let mut fields = Reader(Fields::new());
        span.record(&mut fields);
        let span = Span {
            name: span.metadata().name().to_owned(),
            parent: entered(),
            fields: fields.0,
        };
        self.log.spans.lock().unwrap().insert(id, span);
        Id::from_u64(id)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Reader(Fields::new());
        event.record(&mut fields);
        self.log.events.lock().unwrap().push((entered(), fields.0));
    }

    fn enter(&self, span: &Id) {
        ENTERED.with(|entered| entered.borrow_mut().push(span.into_u64()));
    }

    fn exit(&self, _: &Id) {
        ENTERED.with(|entered| entered.borrow_mut().pop());
    }
}

impl Log {
    /// Returns the only event in the span of a request.
    fn end_of(&self, id: quell::RequestId) -> Fields {
        let spans = self.spans.lock().unwrap();
        let of_request = |span: &u64| spans[span].is_of(id);
        let events = self.events.lock().unwrap();
        let ours = events
            .iter()
            .filter(|(span, _)| span.as_ref().is_some_and(of_request));
        let ours: Vec<&Fields> = ours.map(|(_, fields)| fields).collect();
        assert_eq!(ours.len(), 1, "{id} has one event");
        ours[0].clone()
    }
}

#[test]
fn every_request_has_a_child_span_and_one_event_at_its_end() {
    let recorder = Recorder::default();
    let log = Arc::clone(&recorder.log);
    tracing::subscriber::set_global_default(recorder).unwrap();
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        depth: 2,
        gate: Some(gate),
        fault: Some((9, Fault::Step)),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let request = |tokens| Request::new(vec![1, 2, 3, 4, 5]).max_tokens(tokens);

    let outer = tracing::info_span!("handler");
    let finished = outer.in_scope(|| engine.generate(request(3)).unwrap());
    let mut cancelled = engine.generate(request(400)).unwrap();
    let failed = engine.generate(request(400)).unwrap();
    let ids = [finished.id(), cancelled.id(), failed.id()];
    for _ in 0..4 {
        permit.send(()).unwrap();
    }
    cancelled.next_blocking().unwrap().unwrap();
    let cancellation = cancelled.cancel();
    drop(permit);
    let receipt = cancellation.wait().unwrap();
    finished.complete_blocking().unwrap();
    failed.complete_blocking().unwrap_err();
    while engine.stats().unwrap().closing > 0 {}

    let end = log.end_of(ids[0]);
    let of = |name: &str| end.get(name).map(String::as_str);
    assert_eq!(of("outcome"), Some("length"));
    assert_eq!(of("reason"), Some("length"));
    assert_eq!(of("prompt_tokens"), Some("5"));
    assert_eq!(of("generated_tokens"), Some("3"));
    let times = ["queued_ms", "first_token_ms", "total_ms"].map(|name| {
        let value = of(name).unwrap_or_else(|| panic!("no {name} in {end:?}"));
        value.parse::<f64>().unwrap()
    });
    assert!(times.is_sorted(), "{times:?}");
    assert_eq!(of("cancel_to_freed_ms"), None);

    let end = log.end_of(ids[1]);
    assert_eq!(end["outcome"], "cancelled");
    assert_eq!(end["reason"], "explicit");
    assert_eq!(end["blocks_freed"], receipt.blocks_freed.to_string());
    assert_eq!(
        end["discarded_tokens"],
        receipt.tokens_discarded.to_string()
    );
    assert_eq!(
        end["generated_tokens"],
        receipt.tokens_generated.to_string()
    );
    assert!(end["cancel_to_freed_ms"].parse::<f64>().unwrap() >= 0.0);

    let end = log.end_of(ids[2]);
    assert_eq!(end["outcome"], "failed");
    assert_eq!(end["reason"], "engine_fault");

    let spans = log.spans.lock().unwrap();
    let first = spans.values().find(|span| span.is_of(ids[0]));
    let parent = first.and_then(|span| span.parent);
    let parent = parent.expect("the first request's span has a parent");
    assert_eq!(spans[&parent].name, "handler");
}
