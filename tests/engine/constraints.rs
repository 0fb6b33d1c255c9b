//! Constrained requests on the simulated device. Each constraint sees exactly the tokens of its
//! own request, whatever happens to the request's blocks, and its failure ends only that
//! request.

use common::requests::idle;
use quell::{EngineConfig, EngineFault, GenerateError, HealthStatus, Outcome, Preemption, Request};
use sim::constraint::{Remainders, Trouble};
use sim::{SimOptions, engine, expected, expected_where};
use std::sync::mpsc;

/// Returns the simulated model's answer to a prompt under [`Remainders`].
fn constrained(prompt: &[u32], count: usize) -> Vec<u32> {
    expected_where(prompt, count, Remainders::allow_after)
}

fn prompt(index: usize) -> Vec<u32> {
    (0..3 + index * 5 % 11)
        .map(|i| ((index * 131 + i * 17) % 1000) as u32)
        .collect()
}

fn ids(stream: quell::TokenStream) -> Vec<u32> {
    let generation = stream.complete_blocking().unwrap();
    generation.tokens.iter().map(|token| token.id).collect()
}

#[test]
fn constrained_and_free_requests_keep_their_tokens_in_a_batch() {
    for depth in [1, 2] {
        for (preemption, swap_blocks) in [(Preemption::Recompute, 0), (Preemption::Swap, 64)] {
            let (open, gate) = mpsc::channel();
            let options = SimOptions {
                depth,
                blocks: 40,
                swap_blocks,
                gate: Some(gate),
                ..SimOptions::default()
            };
            let config = EngineConfig {
                max_batch_tokens: Some(24),
                preemption,
                ..EngineConfig::default()
            };
            let engine = engine(options, config);
            let streams: Vec<_> = (0..24)
                .map(|index| {
                    let request = Request::new(prompt(index)).max_tokens(30 + index % 7);
                    let request = match index % 2 {
                        0 => request.constraint(Remainders::default()),
                        _ => request,
                    };
                    engine.generate(request).unwrap()
                })
                .collect();
            // All requests are queued: let the steps run.
            drop(open);
            for (index, stream) in streams.into_iter().enumerate() {
                let (prompt, count) = (prompt(index), 30 + index % 7);
                let answer = match index % 2 {
                    0 => constrained(&prompt, count),
                    _ => expected(&prompt, count),
                };
                assert_eq!(ids(stream), answer, "request {index}, depth {depth}");
            }
            let stats = idle(&engine);
            assert!(stats.preemptions > 0, "nothing was preempted");
            assert_eq!(stats.swaps > 0, swap_blocks > 0);
        }
    }
}

#[test]
fn a_slow_reader_pauses_a_constrained_request_and_loses_nothing() {
    let options = SimOptions {
        depth: 2,
        ..SimOptions::default()
    };
    let config = EngineConfig {
        stream_buffer: 2,
        ..EngineConfig::default()
    };
    let engine = engine(options, config);
    let request = || {
        Request::new(prompt(1))
            .max_tokens(40)
            .constraint(Remainders::default())
    };
    let slow = engine.generate(request()).unwrap();
    while engine.stats().unwrap().paused == 0 {}
    assert_eq!(ids(slow), constrained(&prompt(1), 40));
}

#[test]
fn a_complete_constraint_ends_the_answer_with_stop() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        let constraint = Remainders::complete_with(9);
        let request = Request::new(prompt(2))
            .max_tokens(40)
            .constraint(constraint);
        let streams = engine.generate_samples(request, 3).unwrap();
        for stream in streams {
            let generation = stream.complete_blocking().unwrap();
            assert_eq!(generation.finish.outcome, Outcome::Stop);
            let ids: Vec<u32> = generation.tokens.iter().map(|token| token.id).collect();
            assert_eq!(ids, constrained(&prompt(2), 9));
        }
        assert_eq!(idle(&engine).outcomes.stopped, 3);
    }
}

#[test]
fn every_turn_of_a_session_has_its_own_constraint() {
    let options = SimOptions {
        depth: 2,
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let session = engine.session();
    let mut tokens = Vec::new();
    for turn in 0..4 {
        let part = prompt(turn);
        tokens.extend_from_slice(&part);
        let mut request = Request::new(part).max_tokens(11);
        if turn != 2 {
            request = request.constraint(Remainders::default());
        }
        let answer = match turn {
            2 => expected(&tokens, 11),
            _ => constrained(&tokens, 11),
        };
        let turn = session.generate(request).unwrap();
        assert_eq!(ids(turn), answer);
        tokens.extend(answer);
    }
}

#[test]
fn a_constraint_that_fails_ends_its_own_request_and_no_other() {
    for depth in [1, 2] {
        for trouble in [
            Trouble::MaskFails,
            Trouble::MaskPanics,
            Trouble::MaskIsEmpty,
            Trouble::AcceptFails,
            Trouble::AcceptPanics,
        ] {
            for after in [0, 5] {
                let options = SimOptions {
                    depth,
                    ..SimOptions::default()
                };
                let engine = engine(options, EngineConfig::default());
                let good = |index| {
                    let request = Request::new(prompt(index)).max_tokens(20);
                    engine.generate(request.constraint(Remainders::default()))
                };
                let (first, second) = (good(1).unwrap(), good(2).unwrap());
                let request = Request::new(prompt(3))
                    .max_tokens(20)
                    .constraint(Remainders::failing(after, trouble));
                let mut bad = engine.generate(request).unwrap();
                let free = engine.generate(Request::new(prompt(4)).max_tokens(20));
                let mut tokens = Vec::new();
                let error = loop {
                    match bad.next_blocking().expect("the request ends with an error") {
                        Ok(chunk) => tokens.extend(chunk.tokens.ids()),
                        Err(error) => break error,
                    }
                };
                let fault = matches!(
                    &error,
                    GenerateError::Failed(EngineFault::Constraint(error)) if !error.0.is_empty()
                );
                assert!(fault, "{trouble:?}: {error}");
                assert_eq!(tokens, constrained(&prompt(3), after), "{trouble:?}");
                assert!(bad.next_blocking().is_none());
                assert_eq!(ids(first), constrained(&prompt(1), 20));
                assert_eq!(ids(second), constrained(&prompt(2), 20));
                assert_eq!(ids(free.unwrap()), expected(&prompt(4), 20));
                let stats = idle(&engine);
                assert_eq!((stats.outcomes.failed, stats.outcomes.length), (1, 3));
                assert!(matches!(engine.health().status, HealthStatus::Healthy));
            }
        }
    }
}

#[test]
fn a_cancelled_constrained_request_frees_its_blocks() {
    let options = SimOptions {
        depth: 2,
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let request = Request::new(prompt(1)).constraint(Remainders::default());
    let mut stream = engine.generate(request).unwrap();
    for _ in 0..3 {
        stream.next_blocking().unwrap().unwrap();
    }
    let receipt = stream.cancel().wait().unwrap();
    assert!(receipt.blocks_freed > 0);
    assert_eq!(idle(&engine).blocks.referenced, 0);
}
