//! Deadlines of requests and of slow readers.

use common::requests::{idle, request};
use quell::{CancelReason, EngineConfig, GenerateError, Outcome, Request, SubmitError};
use sim::{SimOptions, engine, expected};
use std::sync::mpsc;
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

fn reason(result: Result<quell::Generation, GenerateError>) -> CancelReason {
    match result {
        Err(GenerateError::Cancelled(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_deadline_that_has_passed_ends_a_request_before_it_runs() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    for request in [
        request(vec![1, 2, 3], 5).first_token_within(Duration::ZERO),
        request(vec![1, 2, 3], 5).finish_within(Duration::ZERO),
    ] {
        let stream = engine.generate(request).unwrap();
        assert_eq!(reason(stream.complete_blocking()), CancelReason::Deadline);
    }
    let stats = idle(&engine);
    assert_eq!(stats.outcomes.cancelled, 2);
    assert_eq!(stats.steps.as_u64(), 0, "no request was computed");
}

#[test]
fn deadlines_that_do_not_pass_change_nothing() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    for time in [HOUR, Duration::MAX] {
        let request = request(vec![1, 2, 3], 20)
            .first_token_within(time)
            .finish_within(time);
        let generation = engine.generate(request).unwrap().complete_blocking();
        let tokens = generation.unwrap().tokens.into_iter();
        let tokens: Vec<u32> = tokens.map(|token| token.id).collect();
        assert_eq!(tokens, expected(&[1, 2, 3], 20));
    }
    idle(&engine);
}

#[test]
fn a_running_request_ends_at_its_deadline_with_the_tokens_so_far() {
    for depth in [1, 2] {
        // Room for an answer so long that the deadline comes first.
        let options = SimOptions {
            depth,
            blocks: 16_384,
            context: 60_000,
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        let request = Request::new(vec![1, 2, 3]).finish_within(Duration::from_millis(30));
        let stream = engine.generate(request).unwrap();
        let chunks: Vec<_> = stream.blocking().map(Result::unwrap).collect();
        let finish = chunks.last().unwrap().finish.unwrap();
        assert_eq!(finish.outcome, Outcome::Cancelled(CancelReason::Deadline));
        assert!(finish.generated_tokens < 59_000);
        assert!(finish.timing.total >= Duration::from_millis(30));
        idle(&engine);
    }
}

#[test]
fn a_waiting_request_ends_at_its_deadline_with_no_blocks_to_free() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_sequences: 1,
        ..EngineConfig::default()
    };
    let engine = engine(options, config);
    let first = engine.generate(request(vec![1, 2, 3], 30)).unwrap();
    let second = request(vec![4, 5, 6], 30).first_token_within(Duration::from_micros(1));
    let mut second = engine.generate(second).unwrap();
    permit.send(()).unwrap();
    // The first request goes on: its steps are still held by the gate.
    let finish = second.next_blocking().unwrap().unwrap().finish.unwrap();
    assert_eq!(finish.outcome, Outcome::Cancelled(CancelReason::Deadline));
    let receipt = second.cancel().wait().unwrap();
    assert_eq!((receipt.blocks_freed, receipt.tokens_generated), (0, 0));
    drop(permit);
    assert_eq!(first.complete_blocking().unwrap().tokens.len(), 30);
    idle(&engine);
}

#[test]
fn a_slow_reader_is_cancelled_and_keeps_the_tokens_so_far() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let config = EngineConfig {
            stream_buffer: 3,
            slow_consumer_deadline: Some(Duration::ZERO),
            ..EngineConfig::default()
        };
        let engine = engine(options, config);
        let slow = engine.generate(request(vec![1, 2, 3], 100)).unwrap();
        assert_eq!(idle(&engine).outcomes.cancelled, 1);
        let chunks: Vec<_> = slow.blocking().map(Result::unwrap).collect();
        let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens.ids()).collect();
        assert!(tokens.len() >= 3);
        assert_eq!(tokens, expected(&[1, 2, 3], tokens.len()));
        let outcome = chunks.last().unwrap().finish.unwrap().outcome;
        assert_eq!(outcome, Outcome::Cancelled(CancelReason::SlowConsumer));
    }
}

#[test]
fn a_reader_that_catches_up_in_time_is_not_cancelled() {
    let config = EngineConfig {
        stream_buffer: 2,
        slow_consumer_deadline: Some(HOUR),
        ..EngineConfig::default()
    };
    let engine = engine(SimOptions::default(), config);
    let slow = engine.generate(request(vec![1, 2, 3], 100)).unwrap();
    while engine.stats().unwrap().paused == 0 {}
    assert_eq!(slow.complete_blocking().unwrap().tokens.len(), 100);
    idle(&engine);
}

/// I9: an idle scheduler thread wakes by itself for a deadline, without any command.
#[test]
fn an_idle_scheduler_thread_wakes_for_a_deadline() {
    let config = EngineConfig {
        stream_buffer: 2,
        slow_consumer_deadline: Some(Duration::from_millis(20)),
        max_open_requests: 1,
        ..EngineConfig::default()
    };
    let engine = engine(SimOptions::default(), config);
    let slow = engine.generate(request(vec![1, 2, 3], 100)).unwrap();
    let next = loop {
        // The request is refused at submission, without waking the scheduler thread.
        match engine.generate(request(vec![4, 5, 6], 5)) {
            Ok(stream) => break stream,
            Err(SubmitError::Overloaded { .. }) => std::thread::yield_now(),
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(reason(slow.complete_blocking()), CancelReason::SlowConsumer);
    drop(next);
    idle(&engine);
}

/// I8: the first reason wins.
#[test]
fn a_cancel_before_the_deadline_keeps_its_reason() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let running = engine.generate(request(vec![1, 2, 3], 20)).unwrap();
    let both = request(vec![4, 5, 6], 20).finish_within(HOUR);
    let receipt = engine.generate(both).unwrap().cancel();
    drop(permit);
    assert_eq!(receipt.wait().unwrap().tokens_generated, 0);
    running.complete_blocking().unwrap();
    idle(&engine);
}
