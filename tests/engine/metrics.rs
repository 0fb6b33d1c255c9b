//! The metrics agree with the engine's statistics, and cancelled requests are counted.

use common::requests::idle;
use metrics_util::MetricKind;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use quell::{CancelReason, Engine, EngineConfig, EngineStats, Request, Shutdown};
use sim::{Fault, SimOptions, VOCABULARY, engine};
use std::collections::HashMap;
use std::sync::mpsc;
use std::time::Duration;

fn request(index: usize, prompt: usize, tokens: usize) -> Request {
    let prompt = (0..prompt).map(|position| ((index * 131 + position * 7) as u32) % VOCABULARY);
    Request::new(prompt.collect::<Vec<u32>>()).max_tokens(tokens)
}

/// Creates an engine whose metrics go to its own recorder. The engine takes its metric handles
/// on the caller's thread when it starts.
fn recorded(options: SimOptions, config: EngineConfig) -> (Engine, Snapshotter) {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let engine = metrics::with_local_recorder(&recorder, || engine(options, config));
    (engine, snapshotter)
}

/// All metric values, by name and labels. The value of a histogram is its number of samples.
struct Numbers(HashMap<String, f64>);

impl Numbers {
    /// Reads all metrics. Counters and histograms restart from zero with each reading.
    fn read(snapshotter: &Snapshotter) -> Self {
        let numbers = snapshotter.snapshot().into_vec().into_iter();
        Self(
            numbers
                .map(|(key, _, _, value)| {
                    let (kind, key) = key.into_parts();
                    let mut name = key.name().to_owned();
                    for label in key.labels() {
                        name += &format!(" {}={}", label.key(), label.value());
                    }
                    let value = match value {
                        DebugValue::Counter(count) => count as f64,
                        DebugValue::Gauge(value) => value.into_inner(),
                        DebugValue::Histogram(values) => values.len() as f64,
                    };
                    assert!(kind != MetricKind::Gauge || value >= 0.0, "{name}: {value}");
                    (name, value)
                })
                .collect(),
        )
    }

    fn of(&self, name: &str) -> u64 {
        let value = self.0.get(name);
        *value.unwrap_or_else(|| panic!("no {name} in {:?}", self.0.keys())) as u64
    }

    /// Returns the sum over all labels.
    fn sum(&self, name: &str) -> u64 {
        let values = self.0.iter();
        let ours = values.filter(|(key, _)| key.split(' ').next() == Some(name));
        ours.map(|(_, value)| *value as u64).sum()
    }
}

#[test]
fn counters_equal_the_statistics_after_a_mixed_run() {
    for depth in [1, 2] {
        let (permit, gate) = mpsc::channel();
        let options = SimOptions {
            depth,
            blocks: 60,
            gate: Some(gate),
            fault: Some((12, Fault::Step)),
            ..SimOptions::default()
        };
        let config = EngineConfig {
            max_sequences: 12,
            ..EngineConfig::default()
        };
        let (engine, snapshotter) = recorded(options, config);
        // The first step waits at the gate until all requests are queued.
        let mut streams: Vec<_> = (0..24)
            .map(|index| engine.generate(request(index, 5 + index, 8)).unwrap())
            .collect();
        let long = engine.generate(request(99, 5, 400)).unwrap();
        let disconnected = streams.remove(20).when_dropped(CancelReason::Disconnect);
        drop(disconnected);
        let explicit = streams.remove(3).cancel();
        drop(streams.remove(10));
        drop(permit);
        explicit.wait().unwrap();
        for stream in streams {
            // Some of them are in the step that fails.
            let _ = stream.complete_blocking();
        }
        engine.abort_all().unwrap();
        drop(long);
        let stats = idle(&engine);
        let numbers = Numbers::read(&snapshotter);
        let outcomes = stats.outcomes;
        assert_eq!(outcomes.accepted, 25);
        assert!(outcomes.length > 0 && outcomes.failed > 0, "{outcomes:?}");
        let outcome = |labels: &str| numbers.of(&format!("quell_request_outcomes_total {labels}"));
        assert_eq!(outcome("outcome=length reason=length"), outcomes.length);
        assert_eq!(outcome("outcome=stop reason=stop"), outcomes.stopped);
        assert_eq!(
            outcome("outcome=failed reason=engine_fault"),
            outcomes.failed
        );
        assert_eq!(numbers.sum("quell_request_outcomes_total"), 25);
        let reasons = CancelReason::ALL.map(|reason| {
            let name = format!(
                "quell_request_outcomes_total outcome=cancelled reason={}",
                reason.as_str()
            );
            numbers.0.get(&name).copied().unwrap_or(0.0) as u64
        });
        assert_eq!(reasons.iter().sum::<u64>(), outcomes.cancelled);
        assert_eq!(outcome("outcome=cancelled reason=explicit"), 1);
        assert_eq!(outcome("outcome=cancelled reason=disconnect"), 1);
        let success = |reason| {
            numbers.of(&format!(
                "quell_request_success_total finished_reason={reason}"
            ))
        };
        assert_eq!(success("length"), outcomes.length);
        assert_eq!(success("cancelled"), outcomes.cancelled);
        assert_eq!(numbers.of("quell_prompt_tokens_total"), stats.prompt_tokens);
        assert_eq!(
            numbers.of("quell_generation_tokens_total"),
            stats.tokens_generated
        );
        assert_eq!(numbers.of("quell_num_preemptions_total"), stats.preemptions);
        let queries = numbers.of("quell_prefix_cache_queries_total");
        assert_eq!(queries, stats.prefix_queries);
        let hits = numbers.of("quell_prefix_cache_hits_total");
        assert_eq!(hits, stats.prefix_hits);
        assert_eq!(numbers.of("quell_e2e_request_latency_seconds"), 25);
        let cancelled = outcomes.cancelled;
        assert_eq!(numbers.of("quell_cancel_to_terminal_seconds"), cancelled);
        assert_eq!(numbers.of("quell_cancel_to_free_seconds"), cancelled);
        for phase in ["plan", "launch", "collect", "commit"] {
            let times = numbers.of(&format!("quell_step_seconds phase={phase}"));
            assert_eq!(times, stats.steps.as_u64(), "{phase}");
        }
        let first = numbers.of("quell_time_to_first_token_seconds");
        let later = numbers.of("quell_inter_token_latency_seconds");
        assert!(first >= outcomes.length && first <= 25, "{first}");
        // A request that is cancelled between a commit and its flush loses one token.
        assert!(first + later <= stats.tokens_generated);
        assert!(first + later + outcomes.cancelled >= stats.tokens_generated);
    }
}

#[test]
fn gauges_equal_the_statistics_during_a_run_and_after_it() {
    let config = EngineConfig {
        stream_buffer: 2,
        max_sequences: 3,
        metrics_label: Some("tiny".to_owned()),
        ..EngineConfig::default()
    };
    let (engine, snapshotter) = recorded(SimOptions::default(), config);
    // The streams are not read, so all requests are paused and the engine comes to rest.
    let streams: Vec<_> = (0..3)
        .map(|index| engine.generate(request(index, 9, 100)).unwrap())
        .collect();
    let compare = |stats: &EngineStats| {
        let numbers = Numbers::read(&snapshotter);
        let gauge = |name: &str| {
            let (name, state) = name.split_once(' ').unwrap_or((name, ""));
            let name = format!("quell_{name} model_name=tiny {state}");
            numbers.of(name.trim_end()) as usize
        };
        assert_eq!(gauge("num_requests_running"), stats.running);
        assert_eq!(gauge("num_requests_waiting"), stats.waiting);
        assert_eq!(gauge("num_requests_paused"), stats.paused);
        assert_eq!(gauge("kv_blocks state=free"), stats.blocks.free);
        assert_eq!(gauge("kv_blocks state=active"), stats.blocks.referenced);
        assert_eq!(gauge("kv_blocks state=cached"), stats.blocks.cached);
        assert_eq!(gauge("kv_blocks state=deferred"), stats.blocks.deferred);
        let usage = numbers.0["quell_kv_cache_usage_perc model_name=tiny"];
        let used = stats.blocks.referenced + stats.blocks.deferred;
        assert_eq!(usage, used as f64 / stats.blocks.total as f64);
    };
    let stats = loop {
        let stats = engine.stats().unwrap();
        if stats.paused == 3 {
            break stats;
        }
    };
    assert!(stats.blocks.referenced > 0);
    compare(&stats);
    drop(streams);
    let stats = idle(&engine);
    assert_eq!(stats.blocks.referenced, 0);
    compare(&stats);
}

#[test]
fn tokens_of_steps_in_flight_at_a_cancel_count_as_generated_after_it() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        depth: 2,
        gate: Some(gate),
        ..SimOptions::default()
    };
    let (engine, snapshotter) = recorded(options, EngineConfig::default());
    let mut stream = engine.generate(request(1, 4, 400)).unwrap();
    permit.send(()).unwrap();
    stream.next_blocking().unwrap().unwrap();
    let cancellation = stream.cancel();
    drop(permit);
    let receipt = cancellation.wait().unwrap();
    assert!(receipt.tokens_discarded > 0);
    let numbers = Numbers::read(&snapshotter);
    assert_eq!(
        numbers.of("quell_tokens_generated_after_cancel_total"),
        receipt.tokens_discarded as u64
    );
}

/// I8: a cancel after the terminal changes nothing, and is counted as such.
#[test]
fn cancels_without_effect_are_counted_by_cause() {
    let (engine, snapshotter) = recorded(SimOptions::default(), EngineConfig::default());
    let finished = engine.generate(request(1, 4, 3)).unwrap();
    idle(&engine);
    // The answer is complete, but has not been read.
    finished.cancel().wait().unwrap();
    idle(&engine);
    let aborted = engine.generate(request(1, 4, 400)).unwrap();
    engine.abort_all().unwrap();
    idle(&engine);
    drop(aborted);
    let last = engine.generate(request(1, 4, 3)).unwrap();
    idle(&engine);
    engine.shutdown(Shutdown::Abort).wait().unwrap();
    drop(last);
    let numbers = Numbers::read(&snapshotter);
    let noop = |why| numbers.of(&format!("quell_cancel_noop_total why={why}"));
    assert_eq!(noop("already_ended"), 1);
    assert_eq!(noop("already_cancelled"), 1);
    assert_eq!(noop("engine_closed"), 1);
}

/// Starts an engine with one request that `end` submits and ends. Returns the outcome and
/// reason that the metrics report.
fn reason_of(
    config: EngineConfig,
    fault: Option<(u64, Fault)>,
    end: impl FnOnce(&Engine),
) -> String {
    let options = SimOptions {
        fault,
        ..SimOptions::default()
    };
    let (engine, snapshotter) = recorded(options, config);
    end(&engine);
    while engine
        .stats()
        .is_ok_and(|stats| stats.open + stats.closing > 0)
    {}
    let numbers = Numbers::read(&snapshotter);
    let name = "quell_request_outcomes_total outcome=";
    let mut counted = numbers
        .0
        .iter()
        .filter(|(key, value)| key.starts_with(name) && **value > 0.0);
    let (key, count) = counted.next().expect("an outcome was counted");
    assert_eq!((*count, counted.next()), (1.0, None));
    key[name.len()..].to_owned()
}

#[test]
fn every_early_end_is_counted_with_its_reason() {
    let base = EngineConfig::default;
    let endless = || request(1, 5, 400);
    let first_token = |engine: &Engine| {
        let mut stream = engine.generate(endless()).unwrap();
        stream.next_blocking().unwrap().unwrap();
        stream
    };
    let of = |end: &dyn Fn(&Engine)| reason_of(base(), None, end);
    let dropped = of(&|engine| drop(first_token(engine)));
    assert_eq!(dropped, "cancelled reason=stream_dropped");
    let explicit = of(&|engine| drop(first_token(engine).cancel()));
    assert_eq!(explicit, "cancelled reason=explicit");
    let disconnect = of(&|engine| {
        drop(first_token(engine).cancel_because(CancelReason::Disconnect));
    });
    assert_eq!(disconnect, "cancelled reason=disconnect");
    let disconnect = of(&|engine| {
        drop(first_token(engine).when_dropped(CancelReason::Disconnect));
    });
    assert_eq!(disconnect, "cancelled reason=disconnect");
    let aborted = of(&|engine| {
        let stream = first_token(engine);
        engine.abort_all().unwrap();
        stream.complete_blocking().unwrap_err();
    });
    assert_eq!(aborted, "cancelled reason=abort_all");
    let shutdown = of(&|engine| {
        let stream = first_token(engine);
        drop(engine.shutdown(Shutdown::Abort));
        stream.complete_blocking().unwrap_err();
    });
    assert_eq!(shutdown, "cancelled reason=shutdown");
    let deadline = of(&|engine| {
        let request = endless().first_token_within(Duration::ZERO);
        engine
            .generate(request)
            .unwrap()
            .complete_blocking()
            .unwrap_err();
    });
    assert_eq!(deadline, "cancelled reason=deadline");
    let slow = EngineConfig {
        stream_buffer: 2,
        slow_consumer_deadline: Some(Duration::ZERO),
        ..base()
    };
    let slow = reason_of(slow, None, |engine| {
        let stream = engine.generate(endless()).unwrap();
        idle(engine);
        drop(stream);
    });
    assert_eq!(slow, "cancelled reason=slow_consumer");
    let failed = reason_of(base(), Some((2, Fault::Step)), |engine| {
        engine
            .generate(endless())
            .unwrap()
            .complete_blocking()
            .unwrap_err();
    });
    assert_eq!(failed, "failed reason=engine_fault");
}

#[test]
fn a_stream_dropped_before_submission_is_counted_as_submit_dropped() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let (engine, snapshotter) = recorded(options, EngineConfig::default());
    let first = engine.generate(request(1, 5, 3)).unwrap();
    // From here on, the scheduler thread is held by the gate in its first step.
    while engine.health().device_call.is_none() {
        std::thread::yield_now();
    }
    drop(engine.generate(request(2, 5, 400)).unwrap());
    drop(permit);
    first.complete_blocking().unwrap();
    assert_eq!(idle(&engine).outcomes.cancelled, 1);
    let numbers = Numbers::read(&snapshotter);
    let name = "quell_request_outcomes_total outcome=cancelled reason=submit_dropped";
    assert_eq!(numbers.of(name), 1);
    assert_eq!(numbers.of("quell_generation_tokens_total"), 3);
}

/// A waker is the caller's code. It panics on the scheduler thread, which reports to the global
/// recorder.
#[test]
fn a_panicking_waker_is_counted_as_a_cleanup_failure() {
    use futures_util::Stream;
    use std::task::{Context, Wake, Waker};
    struct Panics;
    impl Wake for Panics {
        fn wake(self: std::sync::Arc<Self>) {
            panic!("the caller's own affair");
        }
    }
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let mut stream = engine.generate(request(1, 4, 3)).unwrap();
    let waker = Waker::from(std::sync::Arc::new(Panics));
    let mut context = Context::from_waker(&waker);
    assert!(
        std::pin::Pin::new(&mut stream)
            .poll_next(&mut context)
            .is_pending()
    );
    drop(permit);
    assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 3);
    let numbers = Numbers::read(&snapshotter);
    assert_eq!(numbers.of("quell_cleanup_failures_total stage=waker"), 1);
}
