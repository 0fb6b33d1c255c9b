//! Storms: all requests, or every second one, are cancelled within one step.

use common::model;
use common::requests::{idle, ids, prompt, request};
use quell::internals::runner::StateInfo;
use quell::{
    CancelReason, Engine, EngineConfig, LoadOptions, Outcome, Request, SamplingParams, TokenStream,
};
use sim::{SimOptions, expected};
use std::sync::mpsc;

const REQUESTS: usize = 64;
/// Steps that complete before the storm. By then every request has tokens.
const STEPS: u64 = 6;

/// Starts a simulated engine and runs [`STEPS`] steps, after which every stream has begun to
/// answer. No further step completes until the gate is dropped.
fn after_some_steps(depth: usize) -> (Engine, Vec<TokenStream>, mpsc::Sender<()>) {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        depth,
        blocks: 4096,
        layout: sim::layout_with_window(6),
        states: Some(StateInfo {
            slots: 2 * REQUESTS,
            interval: 8,
        }),
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = sim::engine(options, EngineConfig::default());
    let mut streams: Vec<_> = (0..REQUESTS)
        .map(|index| {
            engine
                .generate(request(prompt(index, 1 + index % 7), 40))
                .unwrap()
        })
        .collect();
    for _ in 0..STEPS {
        permit.send(()).unwrap();
    }
    for stream in &mut streams {
        let chunk = stream.next_blocking().unwrap().unwrap();
        assert!(!chunk.tokens.is_empty());
    }
    (engine, streams, permit)
}

/// I5, I6: no step runs except those launched before the storm.
#[test]
fn cancelling_all_requests_frees_all_blocks_after_the_steps_in_flight() {
    for depth in [1, 2] {
        let (engine, streams, gate) = after_some_steps(depth);
        let posted: Vec<_> = streams.into_iter().map(TokenStream::cancel).collect();
        drop(gate);
        for cancellation in posted {
            let receipt = cancellation.wait().unwrap();
            assert!(
                receipt.blocks_freed > 0,
                "the request held no block: {receipt:?}"
            );
            assert!(
                receipt.states_freed > 0,
                "the request held no state: {receipt:?}"
            );
            assert!(
                receipt.step.as_u64() <= STEPS + depth as u64,
                "depth {depth}: {receipt:?}"
            );
        }
        let stats = idle(&engine);
        assert!(stats.steps.as_u64() <= STEPS + depth as u64, "{stats:?}");
        assert_eq!(stats.outcomes.cancelled, REQUESTS as u64);
    }
}

/// I1, I6: each stream gets no token of a later step, and one terminal.
#[test]
fn abort_all_ends_every_stream_without_later_tokens() {
    for depth in [1, 2] {
        let (engine, streams, gate) = after_some_steps(depth);
        engine.abort_all().unwrap();
        drop(gate);
        for stream in streams {
            let chunks: Vec<_> = stream.blocking().map(Result::unwrap).collect();
            let (last, before) = chunks.split_last().unwrap();
            assert!(before.len() < STEPS as usize && before.iter().all(|c| c.finish.is_none()));
            assert!(last.tokens.is_empty());
            assert_eq!(
                last.finish.unwrap().outcome,
                Outcome::Cancelled(CancelReason::AbortAll)
            );
        }
        assert!(idle(&engine).steps.as_u64() <= STEPS + depth as u64);
    }
}

/// I10 on the simulated device, which detects any slot that is handed out too early.
#[test]
fn cancelling_half_of_the_requests_changes_no_other_answer() {
    for depth in [1, 2] {
        let (engine, streams, gate) = after_some_steps(depth);
        let (mut cancelled, mut going_on) = (Vec::new(), Vec::new());
        for (index, stream) in streams.into_iter().enumerate() {
            if index % 2 == 0 {
                cancelled.push(stream.cancel());
            } else {
                going_on.push((index, stream));
            }
        }
        drop(gate);
        for (index, stream) in going_on {
            // The first token has been read already.
            let answer = stream.complete_blocking().unwrap();
            let all = expected(&prompt(index, 1 + index % 7), 40);
            assert_eq!(ids(&answer), all[1..], "depth {depth}, request {index}");
        }
        for cancellation in cancelled {
            assert!(cancellation.wait().unwrap().blocks_freed > 0);
        }
        let outcomes = idle(&engine).outcomes;
        let half = REQUESTS as u64 / 2;
        assert_eq!((outcomes.cancelled, outcomes.length), (half, half));
    }
}

/// Tokens in each answer of the real model.
const ANSWER: usize = 24;
const REAL_REQUESTS: usize = 12;

fn real_engine() -> Engine {
    let config = EngineConfig {
        kv_cache_bytes: Some(64 << 20),
        // Small enough that no request finishes unread.
        stream_buffer: 8,
        audit: true,
        ..EngineConfig::default()
    };
    Engine::load_with(model::smollm2(), config, LoadOptions::cpu()).unwrap()
}

/// Starts greedy and sampled requests, and reads the first four tokens of each.
fn real_streams(engine: &Engine) -> Vec<(TokenStream, Vec<u32>)> {
    let submit = |index: usize| {
        let tokens = (0..5 + index * 3)
            .map(|position| ((index * 977 + position * 389) % 49_000 + 100) as u32)
            .collect::<Vec<_>>();
        let sampling = SamplingParams {
            seed: index as u64,
            temperature: (index % 3) as f32 * 0.5,
            ..SamplingParams::default()
        };
        let mut request = Request::new(tokens).max_tokens(ANSWER).sampling(sampling);
        request.ignore_eos = true;
        engine.generate(request).unwrap()
    };
    let streams: Vec<_> = (0..REAL_REQUESTS).map(submit).collect();
    let begun = streams.into_iter().map(|mut stream| {
        let first = (0..4).map(|_| stream.next_blocking().unwrap().unwrap().tokens[0].id);
        let first = first.collect();
        (stream, first)
    });
    begun.collect()
}

fn remaining_tokens((stream, mut tokens): (TokenStream, Vec<u32>)) -> Vec<u32> {
    tokens.extend(ids(&stream.complete_blocking().unwrap()));
    tokens
}

/// Checks I6 with a real model.
#[test]
fn with_a_real_model_cancelling_all_frees_all_blocks_within_a_step() {
    let engine = real_engine();
    let streams = real_streams(&engine);
    let held = engine.stats().unwrap().blocks.referenced;
    assert!(held >= REAL_REQUESTS, "{held} blocks are held");
    let posted: Vec<_> = streams
        .into_iter()
        .map(|(stream, _)| stream.cancel())
        .collect();
    // Posted after the cancellations, so it is answered after them.
    let after = engine.stats().unwrap();
    assert_eq!((after.open, after.outcomes.length), (0, 0), "{after:?}");
    for cancellation in posted {
        let receipt = cancellation.wait().unwrap();
        assert!(receipt.blocks_freed > 0, "{receipt:?}");
        assert!(receipt.step.as_u64() <= after.steps.as_u64() + 1);
    }
    idle(&engine);
}

/// Checks I10 with a real model.
#[test]
fn with_a_real_model_cancelling_half_changes_no_other_answer() {
    let engine = real_engine();
    let undisturbed: Vec<_> = real_streams(&engine)
        .into_iter()
        .map(remaining_tokens)
        .collect();
    let mut going_on = Vec::new();
    for (index, stream) in real_streams(&engine).into_iter().enumerate() {
        if index % 2 == 0 {
            drop(stream);
        } else {
            going_on.push((index, stream));
        }
    }
    for (index, stream) in going_on {
        assert_eq!(
            remaining_tokens(stream),
            undisturbed[index],
            "request {index}"
        );
    }
    let outcomes = idle(&engine).outcomes;
    assert_eq!(outcomes.cancelled, REAL_REQUESTS as u64 / 2);
}
