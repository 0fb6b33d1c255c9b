//! Sessions: what carries over from turn to turn, and what is released.

use common::requests::{idle, ids, prompt};
use quell::{
    CancelReason, EngineConfig, GenerateError, Outcome, Preemption, Request, Session,
    SessionOptions, Stop, SubmitError,
};
use sim::{Fault, SimOptions, engine, expected};
use std::sync::mpsc;
use std::time::Duration;

fn request(prompt: &[u32], tokens: usize) -> Request {
    Request::new(prompt.to_vec()).max_tokens(tokens)
}

/// Completes a turn, checks its tokens and appends the turn to `context`.
fn turn(session: &Session, context: &mut Vec<u32>, prompt: &[u32], tokens: usize) {
    let stream = session.generate(request(prompt, tokens)).unwrap();
    let generation = stream.complete_blocking().unwrap();
    context.extend(prompt);
    let answer = expected(context, tokens);
    assert_eq!(ids(&generation), answer);
    let kept = context.len() - prompt.len();
    assert!(generation.finish.cached_tokens <= kept);
    context.extend(answer);
    assert_eq!(session.context_tokens(), context.len());
}

/// Turns the prefix cache off, so that only a session's own blocks can be reused.
fn without_prefixes() -> EngineConfig {
    EngineConfig {
        prefix_cache: false,
        ..EngineConfig::default()
    }
}

fn sim(depth: usize) -> SimOptions {
    SimOptions {
        depth,
        ..SimOptions::default()
    }
}

#[test]
fn a_turn_computes_only_its_new_tokens() {
    for depth in [1, 2] {
        let engine = engine(sim(depth), without_prefixes());
        let session = engine.session();
        let mut context = Vec::new();
        for (index, length) in [9, 3, 1, 17].into_iter().enumerate() {
            let before = engine.stats().unwrap().prefix_hits;
            let kept = session.retained().unwrap().tokens;
            turn(&session, &mut context, &prompt(index, length), 5);
            let reused = engine.stats().unwrap().prefix_hits - before;
            assert_eq!(reused, kept as u64);
            // The last token is sampled, but not computed before the next turn.
            let kept = session.retained().unwrap();
            assert_eq!(
                kept.tokens,
                context.len() - 1,
                "turn {index}, depth {depth}"
            );
        }
        let receipt = session.end().wait().unwrap();
        assert_eq!(receipt.blocks_freed, (context.len() - 1).div_ceil(4));
        idle(&engine);
    }
}

#[test]
fn a_dropped_turn_leaves_the_session_unchanged() {
    for depth in [1, 2] {
        let engine = engine(sim(depth), without_prefixes());
        let session = engine.session();
        let mut context = Vec::new();
        turn(&session, &mut context, &prompt(1, 6), 5);
        for read in 0..6 {
            let mut dropped = session.generate(request(&prompt(7, 9), 200)).unwrap();
            for _ in 0..read {
                dropped.next_blocking().unwrap().unwrap();
            }
            drop(dropped);
            assert_eq!(session.context_tokens(), context.len());
            // The next turn may start at once, without waiting for the scheduler thread.
            turn(&session, &mut context, &prompt(read, 2), 3);
        }
        drop(session);
        idle(&engine);
    }
}

#[test]
fn a_session_has_one_turn_at_a_time() {
    let (open, gate) = mpsc::channel::<()>();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let session = engine.session();
    let stream = session.generate(request(&[1, 2, 3], 4)).unwrap();
    for refused in [
        session.generate(request(&[4], 2)).map(drop),
        session.rewind(0),
        session.fork().map(drop),
    ] {
        assert!(matches!(refused, Err(SubmitError::Conflict)), "{refused:?}");
    }
    drop(open);
    stream.complete_blocking().unwrap();
    session.generate(request(&[4], 2)).unwrap();
}

/// I12: a rewound turn leaves nothing behind.
#[test]
fn a_stopped_turn_is_kept_or_rewound_as_asked() {
    for depth in [1, 2] {
        for stop in [Stop::Keep, Stop::Rewind] {
            let engine = engine(sim(depth), without_prefixes());
            let session = engine.session();
            let mut context = Vec::new();
            turn(&session, &mut context, &prompt(1, 6), 5);
            let mut stream = session.generate(request(&prompt(2, 3), 400)).unwrap();
            stream.next_blocking().unwrap().unwrap();
            let receipt = session.stop(stop).wait().unwrap();
            // The reader gets all tokens that count, then the end with its reason.
            let chunks: Vec<_> = stream.blocking().map(Result::unwrap).collect();
            let finish = chunks.last().unwrap().finish.unwrap();
            assert_eq!(
                finish.outcome,
                Outcome::Cancelled(CancelReason::SessionStopped)
            );
            if stop == Stop::Keep {
                context.extend(prompt(2, 3));
                let answer = expected(&context, receipt.tokens_generated);
                context.extend(answer);
            }
            assert_eq!(session.context_tokens(), context.len(), "{stop:?}");
            let kept = session.retained().unwrap().tokens;
            assert!(kept <= context.len(), "{kept} tokens kept after {stop:?}");
            turn(&session, &mut context, &prompt(3, 2), 4);
            session.end().wait().unwrap();
            idle(&engine);
        }
    }
}

/// Checks I8.
#[test]
fn stopping_an_idle_session_frees_nothing() {
    let engine = engine(sim(1), EngineConfig::default());
    let session = engine.session();
    for _ in 0..3 {
        let receipt = session.stop(Stop::Rewind).wait().unwrap();
        assert_eq!((receipt.blocks_freed, receipt.tokens_generated), (0, 0));
    }
    let mut context = Vec::new();
    turn(&session, &mut context, &prompt(1, 6), 5);
    session.stop(Stop::Keep).wait().unwrap();
    assert_eq!(session.context_tokens(), 11);
}

#[test]
fn stopping_a_session_ends_a_finished_turn_that_was_not_read() {
    for (stop, tokens) in [(Stop::Keep, 9), (Stop::Rewind, 0)] {
        let engine = engine(sim(1), EngineConfig::default());
        let session = engine.session();
        let unread = session.generate(request(&prompt(1, 5), 4)).unwrap();
        while engine.stats().unwrap().outcomes.length == 0 {}
        assert!(matches!(
            session.generate(request(&[1], 1)),
            Err(SubmitError::Conflict)
        ));
        session.stop(stop).wait().unwrap();
        assert_eq!(session.context_tokens(), tokens, "{stop:?}");
        session.generate(request(&[1], 1)).unwrap();
        drop(unread);
    }
}

#[test]
fn a_rewound_session_continues_from_that_point() {
    let engine = engine(sim(2), without_prefixes());
    let session = engine.session();
    let mut context = Vec::new();
    turn(&session, &mut context, &prompt(1, 9), 6);
    // Rewind into the middle of a block.
    session.rewind(6).unwrap();
    context.truncate(6);
    assert_eq!(session.retained().unwrap().tokens, 6);
    turn(&session, &mut context, &prompt(2, 4), 6);
    session.rewind(0).unwrap();
    context.clear();
    assert_eq!(session.retained().unwrap().blocks, 0);
    turn(&session, &mut context, &prompt(3, 4), 2);
}

/// Checks I12.
#[test]
fn ending_a_session_ends_its_turn_and_frees_all_its_blocks() {
    for depth in [1, 2] {
        let engine = engine(sim(depth), without_prefixes());
        let session = engine.session();
        let mut context = Vec::new();
        turn(&session, &mut context, &prompt(1, 9), 6);
        let mut stream = session.generate(request(&prompt(2, 9), 400)).unwrap();
        stream.next_blocking().unwrap().unwrap();
        let receipt = session.end().wait().unwrap();
        let held = 15 + 9 + receipt.tokens_generated;
        assert!(
            receipt.blocks_freed >= (held - 1) / 4,
            "{receipt:?} of {held} tokens"
        );
        let error = stream.complete_blocking().unwrap_err();
        assert!(
            matches!(error, GenerateError::Cancelled(CancelReason::SessionEnded)),
            "{error}"
        );
        idle(&engine);
    }
}

/// I7: a turn and the end of its session are posted before the scheduler thread sees either.
#[test]
fn commands_of_a_session_take_effect_in_the_order_of_posting() {
    let (open, gate) = mpsc::channel::<()>();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let busy = engine.generate(request(&prompt(9, 3), 2)).unwrap();
    while engine.health().device_call.is_none() {}
    let session = engine.session();
    let stream = session.generate(request(&prompt(1, 5), 400)).unwrap();
    let ended = session.end();
    drop(open);
    ended.wait().unwrap();
    let error = stream.complete_blocking().unwrap_err();
    assert!(
        matches!(error, GenerateError::Cancelled(CancelReason::SessionEnded)),
        "{error}"
    );
    busy.complete_blocking().unwrap();
    idle(&engine);
}

#[test]
fn dropping_a_session_ends_it_even_during_a_turn() {
    let engine = engine(sim(2), EngineConfig::default());
    let session = engine.session();
    let mut stream = session.generate(request(&prompt(2, 9), 400)).unwrap();
    stream.next_blocking().unwrap().unwrap();
    drop(session);
    let error = stream.complete_blocking().unwrap_err();
    assert!(matches!(
        error,
        GenerateError::Cancelled(CancelReason::SessionEnded)
    ));
    idle(&engine);
}

/// Checks I10.
#[test]
fn forks_share_their_common_blocks() {
    for depth in [1, 2] {
        let engine = engine(sim(depth), without_prefixes());
        let session = engine.session();
        let mut context = Vec::new();
        turn(&session, &mut context, &prompt(1, 9), 6);
        let alone = engine.stats().unwrap().blocks.referenced;
        let forks: Vec<Session> = (0..3).map(|_| session.fork().unwrap()).collect();
        assert_eq!(engine.stats().unwrap().blocks.referenced, alone);
        // All sessions generate at the same time.
        let streams: Vec<_> = forks
            .iter()
            .chain([&session])
            .enumerate()
            .map(|(index, fork)| fork.generate(request(&prompt(index, 3), 8)).unwrap())
            .collect();
        for (index, stream) in streams.into_iter().enumerate() {
            let generation = stream.complete_blocking().unwrap();
            let context = [context.clone(), prompt(index, 3)].concat();
            assert_eq!(
                ids(&generation),
                expected(&context, 8),
                "fork {index}, depth {depth}"
            );
        }
        drop(session);
        drop(forks);
        idle(&engine);
    }
}

#[test]
fn blocks_kept_by_sessions_never_block_requests() {
    let options = SimOptions {
        blocks: 16,
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let sessions: Vec<Session> = (0..6).map(|_| engine.session()).collect();
    let mut contexts = vec![Vec::new(); 6];
    for round in 0..4 {
        for (index, session) in sessions.iter().enumerate() {
            turn(session, &mut contexts[index], &prompt(index + round, 5), 3);
        }
        // A request that fills the whole cache.
        let all = prompt(round, 40);
        let stream = engine.generate(request(&all, 24)).unwrap();
        let generation = stream.complete_blocking().unwrap();
        assert_eq!(ids(&generation), expected(&all, 24));
    }
    assert_eq!(engine.stats().unwrap().preemptions, 0);
}

#[test]
fn a_pinned_session_keeps_its_blocks_under_pressure_up_to_the_cap() {
    let options = SimOptions {
        blocks: 40,
        ..SimOptions::default()
    };
    let engine = engine(options, without_prefixes());
    let options = SessionOptions {
        pin: Some(Duration::from_secs(3600)),
    };
    let pinned = engine.session_with(options);
    let beyond = engine.session_with(options);
    let mut contexts = [Vec::new(), Vec::new()];
    // The cap is a quarter of the cache: 10 blocks.
    turn(&pinned, &mut contexts[0], &prompt(1, 20), 12);
    turn(&beyond, &mut contexts[1], &prompt(2, 20), 12);
    assert!(pinned.retained().unwrap().pinned);
    assert!(!beyond.retained().unwrap().pinned);
    assert_eq!(engine.stats().unwrap().pins_refused, 1);
    let stream = engine.generate(request(&prompt(3, 100), 20)).unwrap();
    stream.complete_blocking().unwrap();
    assert_eq!(pinned.retained().unwrap().tokens, 31);
    assert_eq!(beyond.retained().unwrap().blocks, 0);
    turn(&beyond, &mut contexts[1], &prompt(3, 2), 4);
    turn(&pinned, &mut contexts[0], &prompt(3, 2), 4);
}

#[test]
fn samples_share_the_blocks_of_their_prompt() {
    for depth in [1, 2] {
        let engine = engine(sim(depth), without_prefixes());
        let prompt = prompt(1, 40);
        let streams = engine.generate_samples(request(&prompt, 10), 5).unwrap();
        for stream in streams {
            let generation = stream.complete_blocking().unwrap();
            assert_eq!(ids(&generation), expected(&prompt, 10));
        }
        let stats = idle(&engine);
        assert_eq!(stats.outcomes.length, 5);
        assert_eq!(
            stats.prefix_hits,
            4 * 39,
            "every sample computes the last token"
        );
    }
}

/// Checks I10.
#[test]
fn samples_survive_the_cancellation_of_the_first_sample() {
    for depth in [1, 2] {
        let (open, gate) = mpsc::channel::<()>();
        let options = SimOptions {
            gate: Some(gate),
            ..sim(depth)
        };
        let engine = engine(options, without_prefixes());
        let prompt = prompt(1, 40);
        let mut streams = engine.generate_samples(request(&prompt, 10), 3).unwrap();
        drop(streams.remove(0));
        drop(open);
        for stream in streams {
            let generation = stream.complete_blocking().unwrap();
            assert_eq!(ids(&generation), expected(&prompt, 10));
        }
        idle(&engine);
    }
}

#[test]
fn swapping_to_the_host_changes_no_answer() {
    for preemption in [Preemption::Swap, Preemption::Auto, Preemption::Recompute] {
        for depth in [1, 2] {
            let (open, gate) = mpsc::channel::<()>();
            let options = SimOptions {
                blocks: 60,
                swap_blocks: 100,
                gate: Some(gate),
                ..sim(depth)
            };
            let config = EngineConfig {
                max_batch_tokens: Some(64),
                preemption,
                ..EngineConfig::default()
            };
            let engine = engine(options, config);
            let lengths = |index: usize| (1 + index * 7 % 50, 5 + index * 11 % 60);
            let streams: Vec<_> = (0..24)
                .map(|index| {
                    let (p, n) = lengths(index);
                    engine.generate(request(&prompt(index, p), n)).unwrap()
                })
                .collect();
            drop(open);
            for (index, stream) in streams.into_iter().enumerate() {
                let (p, n) = lengths(index);
                let generation = stream.complete_blocking().unwrap();
                assert_eq!(
                    ids(&generation),
                    expected(&prompt(index, p), n),
                    "request {index}"
                );
            }
            let stats = idle(&engine);
            assert!(stats.preemptions > 0, "nothing was preempted");
            match preemption {
                Preemption::Swap => assert_eq!(stats.swaps, stats.preemptions),
                Preemption::Recompute => assert_eq!(stats.swaps, 0),
                _ => {}
            }
        }
    }
}

/// I10: a failed step must not change the answers of other requests, even if it was swapping
/// out their blocks.
#[test]
fn a_failed_step_changes_no_other_answer() {
    let mut swaps = 0;
    for depth in [1, 2] {
        for step in 1..40 {
            let (open, gate) = mpsc::channel::<()>();
            let options = SimOptions {
                blocks: 20,
                swap_blocks: 60,
                gate: Some(gate),
                fault: Some((step, Fault::Step)),
                ..sim(depth)
            };
            let config = EngineConfig {
                preemption: Preemption::Swap,
                ..without_prefixes()
            };
            let engine = engine(options, config);
            let lengths = |index: usize| (1 + index * 7 % 20, 5 + index * 11 % 30);
            let streams: Vec<_> = (0..8)
                .map(|index| {
                    let (p, n) = lengths(index);
                    engine.generate(request(&prompt(index, p), n)).unwrap()
                })
                .collect();
            drop(open);
            for (index, stream) in streams.into_iter().enumerate() {
                let (p, n) = lengths(index);
                if let Ok(generation) = stream.complete_blocking() {
                    let tokens = generation.tokens.iter();
                    let ids: Vec<u32> = tokens.map(|token| token.id).collect();
                    assert_eq!(
                        ids,
                        expected(&prompt(index, p), n),
                        "request {index}, step {step}, depth {depth}"
                    );
                }
            }
            let stats = idle(&engine);
            swaps += stats.swaps;
        }
    }
    assert!(swaps > 0, "nothing was swapped out");
}

#[test]
fn urgent_requests_run_first_and_tenants_get_equal_shares() {
    let (open, gate) = mpsc::channel::<()>();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_sequences: 1,
        ..EngineConfig::default()
    };
    let engine = engine(options, config);
    let usual: Vec<_> = (0..4)
        .map(|index| {
            let request = request(&prompt(index, 5), 3).tenant("many");
            engine.generate(request).unwrap()
        })
        .collect();
    let fair = engine
        .generate(request(&prompt(8, 5), 3).tenant("few"))
        .unwrap();
    let urgent = engine
        .generate(request(&prompt(9, 5), 3).priority(-1))
        .unwrap();
    drop(open);
    let total =
        |stream: quell::TokenStream| stream.complete_blocking().unwrap().finish.timing.total;
    let (urgent, fair) = (total(urgent), total(fair));
    let usual: Vec<_> = usual.into_iter().map(total).collect();
    // The first request may have been running already.
    assert!(usual[1..].iter().all(|total| urgent < *total));
    assert!(usual[2..].iter().all(|total| fair < *total));
}

#[test]
fn an_answer_reports_its_cached_prompt_tokens() {
    let engine = engine(sim(1), EngineConfig::default());
    for (length, cached) in [(9, 0), (9, 8), (8, 4), (21, 8)] {
        let stream = engine.generate(request(&prompt(1, length), 2)).unwrap();
        let finish = stream.complete_blocking().unwrap().finish;
        assert_eq!(finish.cached_tokens, cached, "{length} tokens");
        assert_eq!(finish.prompt_tokens, length);
    }
}
