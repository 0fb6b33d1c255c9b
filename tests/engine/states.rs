//! Models with recurrent layers: what is computed again, and that all states come back.

use common::requests::{idle, ids, prompt};
use quell::internals::runner::StateInfo;
use quell::{EngineConfig, Preemption, Request};
use sim::{SimOptions, engine, expected};

/// Tokens between snapshots.
const INTERVAL: usize = 8;

fn sim(depth: usize, slots: usize) -> SimOptions {
    SimOptions {
        depth,
        blocks: 512,
        context: 2048,
        states: Some(StateInfo {
            slots,
            interval: INTERVAL,
        }),
        ..SimOptions::default()
    }
}

/// A conversation computes its new tokens and at most one interval again in each turn.
#[test]
fn thirty_turns_of_a_session_compute_little_more_than_their_new_tokens() {
    for depth in [1, 2] {
        let engine = engine(sim(depth, 8), EngineConfig::default());
        let session = engine.session();
        let mut context = Vec::new();
        for turn in 0..30 {
            let new = prompt(turn, 3 + turn % 5);
            let request = Request::new(new.clone()).max_tokens(11 + turn % 7);
            let done = session.generate(request).unwrap().complete_blocking();
            let done = done.unwrap();
            let before = context.len();
            context.extend(new);
            assert_eq!(ids(&done), expected(&context, 11 + turn % 7));
            context.extend(ids(&done));
            let again = before.saturating_sub(done.finish.cached_tokens);
            // The last token of a turn is never computed before the next.
            assert!(again <= INTERVAL + 1, "turn {turn}: {again} tokens again");
        }
        session.end().wait().unwrap();
        idle(&engine);
    }
}

/// The same without a session: every turn sends the whole conversation.
#[test]
fn thirty_turns_without_a_session_compute_little_more_than_their_new_tokens() {
    for depth in [1, 2] {
        let engine = engine(sim(depth, 8), EngineConfig::default());
        let mut context: Vec<u32> = Vec::new();
        for turn in 0..30 {
            let before = context.len();
            context.extend(prompt(turn, 3 + turn % 5));
            let request = Request::new(context.clone()).max_tokens(11 + turn % 7);
            let done = engine.generate(request).unwrap().complete_blocking();
            let done = done.unwrap();
            assert_eq!(ids(&done), expected(&context, 11 + turn % 7));
            let again = before.saturating_sub(done.finish.cached_tokens);
            assert!(again <= INTERVAL + 1, "turn {turn}: {again} tokens again");
            context.extend(ids(&done));
        }
        idle(&engine);
    }
}

/// Requests with a common beginning: the first computes it, the second too and leaves a
/// snapshot where they part, and all others continue from there.
#[test]
fn all_but_the_first_two_of_sixteen_requests_continue_from_their_common_beginning() {
    let engine = engine(sim(2, 64), EngineConfig::default());
    let common = prompt(99, 100);
    let mut cached = Vec::new();
    for request in 0..16 {
        let mut tokens = common.clone();
        tokens.extend(prompt(request, 20));
        let stream = engine.generate(Request::new(tokens.clone()).max_tokens(4));
        let done = stream.unwrap().complete_blocking().unwrap();
        assert_eq!(ids(&done), expected(&tokens, 4));
        cached.push(done.finish.cached_tokens);
    }
    let parted = common.len() / INTERVAL * INTERVAL;
    assert_eq!(cached[..2], [0, 0]);
    assert!(
        cached[2..].iter().all(|tokens| *tokens == parted),
        "{cached:?}"
    );
    // The second request finds all blocks but no snapshot, the others the tokens after it.
    let missed = common.len() + 14 * (common.len() - parted);
    let stats = engine.stats().unwrap();
    assert_eq!(stats.prefix_misses.no_snapshot, missed as u64);
    idle(&engine);
}

/// Half of the requests are cancelled, on a cache that is too small for all of them, so that
/// sequences are preempted in both ways.
#[test]
fn all_states_come_back_when_half_of_the_requests_are_cancelled() {
    for (preemption, slots) in [(Preemption::Recompute, 5), (Preemption::Swap, 9)] {
        let options = SimOptions {
            blocks: 60,
            swap_blocks: 60,
            ..sim(2, slots)
        };
        let config = EngineConfig {
            preemption,
            ..EngineConfig::default()
        };
        let engine = engine(options, config);
        let common = prompt(5, 40);
        let streams: Vec<_> = (0..16)
            .map(|request| {
                let mut tokens = common.clone();
                tokens.extend(prompt(request, 10));
                let stream = engine.generate(Request::new(tokens.clone()).max_tokens(40));
                (tokens, stream.unwrap())
            })
            .collect();
        let mut receipts = 0;
        for (index, (tokens, mut stream)) in streams.into_iter().enumerate() {
            if index % 2 == 0 {
                for _ in 0..index {
                    stream.next_blocking().unwrap().unwrap();
                }
                receipts += stream.cancel().wait().unwrap().states_freed;
                continue;
            }
            let done = stream.complete_blocking().unwrap();
            assert_eq!(ids(&done), expected(&tokens, 40));
        }
        assert!(receipts > 0, "no receipt counts a state");
        idle(&engine);
        let states = engine.stats().unwrap().states;
        assert_eq!(states.total, slots);
        assert_eq!(states.free + states.cached, slots, "{states:?}");
    }
}
