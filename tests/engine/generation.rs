//! The engine's contract, tested on a simulated device.

use common::requests::{idle, ids, prompt, request};
use quell::{
    Engine, EngineConfig, EngineFault, GenerateError, Outcome, Preemption, Request, SamplingParams,
    Shutdown, SubmitError, Tokenizer,
};
use sim::{Fault, SimOptions, engine, engine_with_text, expected};
use std::sync::mpsc;
use std::time::Duration;

fn token_ids(engine: &Engine, prompt: Vec<u32>, tokens: usize) -> Vec<u32> {
    let generation = engine
        .generate(request(prompt, tokens))
        .unwrap()
        .complete_blocking()
        .unwrap();
    ids(&generation)
}

/// Checks I1.
#[test]
fn tokens_arrive_in_order_with_one_finish_at_the_end() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let stream = engine.generate(request(prompt(1, 9), 20)).unwrap();
    let chunks: Vec<_> = stream.blocking().map(Result::unwrap).collect();
    let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens.ids()).collect();
    assert_eq!(tokens, expected(&prompt(1, 9), 20));
    assert_eq!(
        chunks.iter().filter(|chunk| chunk.finish.is_some()).count(),
        1
    );
    let finish = chunks.last().unwrap().finish.unwrap();
    assert_eq!(finish.outcome, Outcome::Length);
    assert_eq!((finish.prompt_tokens, finish.generated_tokens), (9, 20));
    assert!(finish.timing.first_token.unwrap() <= finish.timing.total);
}

/// Checks I2, and I3 after every step.
#[test]
fn preempted_requests_keep_their_tokens() {
    for depth in [1, 2] {
        let lengths: Vec<(usize, usize)> = (0..64)
            .map(|index| (1 + index * 7 % 50, 5 + index * 11 % 60))
            .collect();
        let needed: usize = lengths.iter().map(|(p, n)| (p + n).div_ceil(4)).sum();
        // The gate holds the first step until all requests are queued, so that they compete for
        // the cache.
        let (open, gate) = mpsc::channel::<()>();
        let options = SimOptions {
            depth,
            blocks: needed / 4,
            gate: Some(gate),
            ..SimOptions::default()
        };
        let config = EngineConfig {
            max_batch_tokens: Some(128),
            ..EngineConfig::default()
        };
        let engine = engine(options, config);
        let streams: Vec<_> = lengths
            .iter()
            .enumerate()
            .map(|(index, &(p, n))| engine.generate(request(prompt(index, p), n)).unwrap())
            .collect();
        drop(open);
        for (index, (stream, &(p, n))) in streams.into_iter().zip(&lengths).enumerate() {
            let generation = stream.complete_blocking().unwrap();
            let tokens = ids(&generation);
            assert_eq!(
                tokens,
                expected(&prompt(index, p), n),
                "request {index}, depth {depth}"
            );
        }
        let stats = idle(&engine);
        assert!(
            stats.preemptions > 0,
            "the cache was large enough: the test proves nothing"
        );
        assert_eq!((stats.outcomes.accepted, stats.outcomes.length), (64, 64));
    }
}

#[test]
fn a_sequence_that_fills_the_whole_cache_finishes() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            blocks: 8,
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        assert_eq!(engine.max_sequence_tokens(), 32);
        let streams: Vec<_> = (0..3)
            .map(|i| engine.generate(request(prompt(i, 10), 100)).unwrap())
            .collect();
        for (index, stream) in streams.into_iter().enumerate() {
            let generation = stream.complete_blocking().unwrap();
            assert_eq!(generation.finish.outcome, Outcome::Length);
            let tokens = ids(&generation);
            assert_eq!(tokens, expected(&prompt(index, 10), 22));
        }
        idle(&engine);
    }
}

#[test]
fn a_waiting_request_starts_when_the_last_step_frees_a_place() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let config = EngineConfig {
            max_sequences: 1,
            ..EngineConfig::default()
        };
        let engine = engine(options, config);
        let streams: Vec<_> = (0..20)
            .map(|i| engine.generate(request(prompt(i, 3), 3)).unwrap())
            .collect();
        // Only the streams are read: no command wakes the scheduler thread.
        for stream in streams {
            assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 3);
        }
    }
}

#[test]
fn paused_requests_give_their_places_to_others() {
    let config = EngineConfig {
        stream_buffer: 2,
        max_sequences: 2,
        ..EngineConfig::default()
    };
    let engine = engine(SimOptions::default(), config);
    let slow: Vec<_> = (0..3)
        .map(|i| engine.generate(request(prompt(i, 6), 40)).unwrap())
        .collect();
    assert_eq!(
        token_ids(&engine, prompt(9, 5), 30),
        expected(&prompt(9, 5), 30)
    );
    for (index, stream) in slow.into_iter().enumerate() {
        let generation = stream.complete_blocking().unwrap();
        let tokens = ids(&generation);
        assert_eq!(tokens, expected(&prompt(index, 6), 40));
    }
    idle(&engine);
}

#[test]
fn a_cancel_is_acknowledged_after_the_last_handle_is_dropped() {
    for depth in [1, 2] {
        for tokens in 0..6 {
            let options = SimOptions {
                depth,
                ..SimOptions::default()
            };
            let engine = engine(options, EngineConfig::default());
            let mut stream = engine.generate(request(prompt(1, 5), 400)).unwrap();
            drop(engine);
            for _ in 0..tokens {
                stream.next_blocking().unwrap().unwrap();
            }
            let receipt = stream.cancel().wait().unwrap();
            assert!(receipt.tokens_generated >= tokens);
        }
    }
}

/// Checks I12.
#[test]
fn a_complete_answer_frees_its_place() {
    let config = EngineConfig {
        max_open_requests: 1,
        ..EngineConfig::default()
    };
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let engine = engine(options, config.clone());
        for round in 0..300 {
            assert_eq!(token_ids(&engine, prompt(round, 3), 2).len(), 2);
            let stream = engine.generate(request(prompt(round, 3), 50)).unwrap();
            stream.cancel().wait().unwrap();
        }
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let base = EngineConfig::default;
    for (config, name) in [
        (
            EngineConfig {
                stream_buffer: usize::MAX,
                ..base()
            },
            "stream_buffer",
        ),
        (
            EngineConfig {
                max_batch_tokens: Some(0),
                ..base()
            },
            "max_batch_tokens",
        ),
        (
            EngineConfig {
                block_tokens: 1 << 40,
                ..base()
            },
            "block_tokens",
        ),
        (
            EngineConfig {
                max_context: Some(0),
                ..base()
            },
            "max_context",
        ),
        (
            EngineConfig {
                pinned_percent: 101,
                ..base()
            },
            "pinned_percent",
        ),
        (
            EngineConfig {
                step_deadline: Some(Duration::ZERO),
                ..base()
            },
            "step_deadline",
        ),
        (
            EngineConfig {
                preemption: Preemption::Swap,
                swap_bytes: 0,
                ..base()
            },
            "swap_bytes is 0, but must be at least 1",
        ),
    ] {
        let refused = quell::Engine::with_runner(config, None, || unreachable!());
        let message = refused.unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }
}

/// Checks I10 and I12.
#[test]
fn dropped_streams_free_their_blocks_and_change_no_other_answer() {
    for depth in [1, 2] {
        let (open, gate) = mpsc::channel();
        let options = SimOptions {
            depth,
            blocks: 120,
            gate: Some(gate),
            ..SimOptions::default()
        };
        let engine = engine(
            options,
            EngineConfig {
                max_batch_tokens: Some(32),
                ..EngineConfig::default()
            },
        );
        let threads: Vec<_> = (0..64usize)
            .map(|index| {
                let engine = engine.clone();
                // Hold the gate until the streams that are dropped unread have been dropped.
                let held = (index % 14 == 0).then(|| open.clone());
                std::thread::spawn(move || {
                    let _held = held;
                    let (p, n) = (1 + index * 5 % 40, 10 + index % 30);
                    let mut stream = engine.generate(request(prompt(index, p), n)).unwrap();
                    if index % 2 == 0 {
                        // Drop before the first token, after it, in the middle or near the end.
                        for _ in 0..index % 7 * 5 {
                            match stream.next_blocking() {
                                Some(chunk) => drop(chunk.unwrap()),
                                None => break,
                            }
                        }
                        drop(stream);
                    } else {
                        let generation = stream.complete_blocking().unwrap();
                        let tokens = ids(&generation);
                        assert_eq!(tokens, expected(&prompt(index, p), n));
                    }
                })
            })
            .collect();
        drop(open);
        for thread in threads {
            thread.join().unwrap();
        }
        let stats = idle(&engine);
        let outcomes = stats.outcomes;
        assert_eq!(outcomes.accepted, 64);
        assert_eq!(outcomes.length + outcomes.cancelled, 64);
        assert!(outcomes.cancelled >= 5, "{outcomes:?}");
    }
}

/// Checks I6.
#[test]
fn a_cancel_is_acknowledged_with_the_number_of_freed_blocks() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let mut stream = engine.generate(request(prompt(1, 9), 400)).unwrap();
    let first = stream.next_blocking().unwrap().unwrap();
    assert!(first.finish.is_none());
    let receipt = stream.cancel().wait().unwrap();
    assert!(
        receipt.blocks_freed >= 3,
        "9 tokens and more hold three blocks: {receipt:?}"
    );
    assert!(receipt.tokens_generated >= 1);
    assert!(receipt.freed_at >= receipt.posted_at);
    idle(&engine);
}

/// Checks I5.
#[test]
fn a_cancel_of_a_waiting_request_frees_nothing_and_is_acknowledged() {
    let (permit, gate) = mpsc::channel();
    let engine = engine(
        SimOptions {
            gate: Some(gate),
            blocks: 8,
            ..SimOptions::default()
        },
        EngineConfig {
            max_sequences: 1,
            ..EngineConfig::default()
        },
    );
    let in_step = |step| {
        let health = engine.health();
        health.device_call.is_some() && health.step.as_u64() == step
    };
    let first = engine.generate(request(prompt(1, 8), 4)).unwrap();
    while !in_step(1) {}
    let second = engine.generate(request(prompt(2, 8), 4)).unwrap();
    permit.send(()).unwrap();
    // By now the second request waits in the queue.
    while !in_step(2) {}
    let cancellation = second.cancel();
    drop(permit);
    let receipt = cancellation.wait().unwrap();
    assert_eq!((receipt.blocks_freed, receipt.tokens_generated), (0, 0));
    assert_eq!(first.complete_blocking().unwrap().tokens.len(), 4);
    idle(&engine);
}

/// Checks I6.
#[test]
fn tokens_of_steps_in_flight_at_a_cancel_are_discarded_and_counted() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        depth: 2,
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let mut stream = engine.generate(request(prompt(1, 4), 400)).unwrap();
    permit.send(()).unwrap();
    assert!(!stream.next_blocking().unwrap().unwrap().tokens.is_empty());
    // The scheduler thread waits at the gate with two steps in flight, or is about to.
    let cancellation = stream.cancel();
    drop(permit);
    let receipt = cancellation.wait().unwrap();
    assert!((1..=2).contains(&receipt.tokens_discarded), "{receipt:?}");
    assert_eq!(receipt.tokens_generated, 1);
    assert_eq!(idle(&engine).tokens_generated, 1);
}

/// Checks I8.
#[test]
fn a_finished_request_still_has_a_receipt() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let mut stream = engine.generate(request(prompt(1, 4), 3)).unwrap();
    while stream.next_blocking().is_some() {}
    let receipt = stream.cancel().wait().unwrap();
    assert_eq!(receipt.tokens_generated, 3);
    assert_eq!(idle(&engine).outcomes.cancelled, 0);
}

#[test]
fn requests_submitted_as_the_engine_becomes_idle_are_served() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        for round in 0..3000 {
            let first = engine.generate(request(prompt(round, 3), 2)).unwrap();
            let second = engine.generate(request(prompt(round, 4), 1)).unwrap();
            assert_eq!(first.complete_blocking().unwrap().tokens.len(), 2);
            assert_eq!(second.complete_blocking().unwrap().tokens.len(), 1);
        }
    }
}

/// Checks I9.
#[test]
fn a_slow_reader_is_paused_and_blocks_no_other_request() {
    let config = EngineConfig {
        stream_buffer: 4,
        ..EngineConfig::default()
    };
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let engine = engine(options, config.clone());
        let slow = engine.generate(request(prompt(1, 9), 100)).unwrap();
        assert_eq!(
            token_ids(&engine, prompt(2, 30), 200),
            expected(&prompt(2, 30), 200)
        );
        let stats = engine.stats().unwrap();
        assert_eq!(stats.paused, 1);
        let generation = slow.complete_blocking().unwrap();
        let tokens = ids(&generation);
        assert_eq!(tokens, expected(&prompt(1, 9), 100), "depth {depth}");
        idle(&engine);
    }
}

#[test]
fn paused_requests_give_their_blocks_to_others() {
    let config = EngineConfig {
        stream_buffer: 2,
        ..EngineConfig::default()
    };
    let engine = engine(
        SimOptions {
            blocks: 20,
            ..SimOptions::default()
        },
        config,
    );
    let slow: Vec<_> = (0..4)
        .map(|i| engine.generate(request(prompt(i, 14), 40)).unwrap())
        .collect();
    assert_eq!(
        token_ids(&engine, prompt(9, 40), 30),
        expected(&prompt(9, 40), 30)
    );
    for (index, stream) in slow.into_iter().enumerate() {
        let generation = stream.complete_blocking().unwrap();
        let tokens = ids(&generation);
        assert_eq!(tokens, expected(&prompt(index, 14), 40));
    }
    idle(&engine);
}

#[test]
fn a_failed_step_fails_its_requests_and_the_engine_continues() {
    for (depth, fault) in [
        (1, Fault::Step),
        (2, Fault::Step),
        (1, Fault::Launch),
        (2, Fault::Launch),
    ] {
        let options = SimOptions {
            depth,
            fault: Some((4, fault)),
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        let failed = engine
            .generate(request(prompt(1, 5), 50))
            .unwrap()
            .complete_blocking();
        match failed {
            Err(GenerateError::Failed(EngineFault::Device(error))) => {
                assert!(error.to_string().contains("made to fail"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        idle(&engine);
        assert_eq!(
            token_ids(&engine, prompt(2, 5), 20),
            expected(&prompt(2, 5), 20)
        );
        assert_eq!(idle(&engine).outcomes.failed, 1);
    }
}

/// I11: no request may find the blocks that a failed step was meant to write.
#[test]
fn a_failed_step_leaves_nothing_in_the_prefix_cache() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            fault: Some((1, Fault::Step)),
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        let failed = engine.generate(request(prompt(1, 20), 5)).unwrap();
        failed.complete_blocking().unwrap_err();
        assert_eq!(
            token_ids(&engine, prompt(1, 20), 5),
            expected(&prompt(1, 20), 5)
        );
        assert_eq!(idle(&engine).prefix_hits, 0);
    }
}

/// Checks I1.
#[test]
fn a_lost_device_or_a_panic_closes_the_engine_and_wakes_every_waiter() {
    for fault in [Fault::Lost, Fault::Panic] {
        for depth in [1, 2] {
            let options = SimOptions {
                depth,
                fault: Some((6, fault)),
                ..SimOptions::default()
            };
            let config = EngineConfig {
                max_sequences: 4,
                ..EngineConfig::default()
            };
            let engine = engine(options, config);
            let streams: Vec<_> = (0..8)
                .map(|i| engine.generate(request(prompt(i, 5), 50)))
                .collect();
            for stream in streams {
                // A request that is submitted too late is refused for the same reason.
                let error = match stream {
                    Ok(stream) => stream.complete_blocking().unwrap_err().to_string(),
                    Err(error) => error.to_string(),
                };
                assert!(error.contains("made to"), "{error}");
            }
            let refused = loop {
                // Submission is refused only once the thread has finished everything else.
                match engine.generate(request(prompt(1, 5), 5)) {
                    Ok(stream) => drop(stream.complete_blocking()),
                    Err(refused) => break refused,
                }
            };
            assert!(matches!(refused, SubmitError::Closed(_)), "{refused}");
            assert!(matches!(engine.stats(), Err(SubmitError::Closed(_))));
        }
    }
}

#[test]
fn shutdown_ends_every_stream_as_cancelled() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let streams: Vec<_> = (0..5)
        .map(|i| engine.generate(request(prompt(i, 5), 400)).unwrap())
        .collect();
    while engine.health().device_call.is_none() {}
    let shutdown = engine.shutdown(Shutdown::Abort);
    // Submission is refused at once, even though the thread waits at the gate and has not seen
    // the command.
    let refused = engine.generate(request(prompt(1, 5), 5)).unwrap_err();
    assert!(matches!(refused, SubmitError::Draining), "{refused}");
    drop(permit);
    for stream in streams {
        let last = stream.blocking().last().unwrap().unwrap();
        assert_eq!(last.finish.unwrap().outcome.as_str(), "cancelled");
    }
    shutdown.wait().unwrap();
    let refused = engine.generate(request(prompt(1, 5), 5)).unwrap_err();
    assert!(matches!(
        refused,
        SubmitError::Closed(EngineFault::Shutdown)
    ));
}

#[test]
fn streams_outlive_every_handle() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let stream = engine.generate(request(prompt(1, 5), 30)).unwrap();
    drop(engine);
    let generation = stream.complete_blocking().unwrap();
    assert_eq!(generation.tokens.len(), 30);
}

#[test]
fn invalid_requests_are_refused_with_the_reason() {
    let engine = engine(
        SimOptions {
            context: 64,
            ..SimOptions::default()
        },
        EngineConfig::default(),
    );
    let refused = |request: Request| engine.generate(request).unwrap_err();
    assert!(matches!(
        refused(request(vec![], 5)),
        SubmitError::EmptyPrompt
    ));
    let long = refused(request(prompt(1, 64), 5));
    assert!(long.to_string().contains("64 tokens"), "{long}");
    assert!(long.to_string().contains("fewer than 64"), "{long}");
    let unknown = refused(request(vec![5, 1000], 5));
    assert!(unknown.to_string().contains("token 1000"), "{unknown}");
    assert!(matches!(
        refused(request(vec![5], 0)),
        SubmitError::NoTokens
    ));
    let nan = SamplingParams {
        temperature: f32::NAN,
        ..SamplingParams::default()
    };
    let nan = refused(request(vec![5], 5).sampling(nan));
    assert!(nan.to_string().contains("temperature is NaN"), "{nan}");
    assert!(matches!(
        refused(Request::new("text")),
        SubmitError::NoTokenizer { .. }
    ));
    let mut stop = request(vec![5], 5);
    stop.stop = vec![String::new()];
    assert!(matches!(refused(stop), SubmitError::EmptyStop { index: 0 }));
    idle(&engine);
}

#[test]
fn requests_beyond_the_limit_are_refused_as_overload_until_others_end() {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(
        options,
        EngineConfig {
            max_open_requests: 2,
            ..EngineConfig::default()
        },
    );
    let first = engine.generate(request(prompt(1, 5), 5)).unwrap();
    let second = engine.generate(request(prompt(2, 5), 5)).unwrap();
    let refused = engine.generate(request(prompt(3, 5), 5)).unwrap_err();
    assert!(
        matches!(refused, SubmitError::Overloaded { open: 2, .. }),
        "{refused}"
    );
    drop(permit);
    first.complete_blocking().unwrap();
    second.complete_blocking().unwrap();
    idle(&engine);
    assert_eq!(token_ids(&engine, prompt(3, 5), 5).len(), 5);
}

#[test]
fn a_batch_is_accepted_as_a_whole_or_not_at_all() {
    let config = EngineConfig {
        max_open_requests: 5,
        ..EngineConfig::default()
    };
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, config);
    let batch = || vec![request(prompt(1, 5), 5), request(prompt(2, 5), 5)];
    let never = engine.generate_batch(batch(), 3).unwrap_err();
    assert!(
        matches!(never, SubmitError::TooManyAnswers { count: 6, limit: 5 }),
        "{never}"
    );
    let endless = engine.generate_batch(batch(), usize::MAX).unwrap_err();
    assert!(matches!(endless, SubmitError::TooManyAnswers { .. }));
    let others = engine.generate_batch(batch(), 1).unwrap();
    let not_now = engine.generate_batch(batch(), 2).unwrap_err();
    assert!(
        matches!(not_now, SubmitError::Overloaded { open: 2, limit: 5 }),
        "{not_now}"
    );
    // An invalid request is reported even if there is no room for the batch.
    let mut wrong = batch();
    wrong[1].max_tokens = Some(0);
    let wrong = engine.generate_batch(wrong, 2).unwrap_err();
    assert!(matches!(wrong, SubmitError::NoTokens), "{wrong}");
    // The refused batches have taken no places.
    let third = engine.generate_batch(batch()[..1].to_vec(), 3).unwrap();
    drop(permit);
    for stream in others.into_iter().chain(third) {
        assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 5);
    }
    assert_eq!(idle(&engine).outcomes.accepted, 5);
    assert_eq!(engine.generate_batch(batch(), 2).unwrap().len(), 4);
    idle(&engine);
}

#[test]
fn stop_tokens_end_the_answer_and_are_its_last_token() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let all = expected(&prompt(1, 5), 20);
    let stop = all[7];
    let end = all.iter().position(|token| *token == stop).unwrap();
    let mut stopping = request(prompt(1, 5), 20);
    stopping.stop_token_ids = vec![stop];
    let generation = engine
        .generate(stopping)
        .unwrap()
        .complete_blocking()
        .unwrap();
    assert_eq!(generation.finish.outcome, Outcome::Stop);
    let tokens = ids(&generation);
    assert_eq!(tokens, all[..=end]);
}

/// I1 and I2: a stop that the reader finds is also counted as a stop by the engine.
#[test]
fn a_stop_string_counts_as_a_stop_and_frees_the_request() {
    let folder = common::root().join("tests/fixtures/text/folder");
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let all = expected(&prompt(1, 5), 40);
    // Find a token after the first few whose text occurs nowhere before it.
    let (at, text) = (3..all.len())
        .map(|at| (at, tokenizer.decode(&all[at..=at], true)))
        .find(|(at, text)| {
            let before = tokenizer.decode(&all[..*at], true);
            let whole = tokenizer.decode(&all[..=*at], true);
            text.is_ascii() && !text.is_empty() && whole.find(text) == Some(before.len())
        })
        .expect("a token with text");
    let engine = engine_with_text(SimOptions::default(), EngineConfig::default(), tokenizer);
    let mut request = request(prompt(1, 5), 500);
    request.stop = vec![text];
    request.ignore_eos = true;
    let mut stream = engine.generate(request).unwrap();
    let chunks: Vec<_> = std::iter::from_fn(|| stream.next_blocking()).collect();
    assert_eq!(chunks.len(), at + 1, "nothing follows the end");
    let last = chunks.last().unwrap().as_ref().unwrap();
    assert_eq!(last.finish.unwrap().outcome, Outcome::Stop);
    drop(stream);
    let outcomes = idle(&engine).outcomes;
    assert_eq!((outcomes.stopped, outcomes.cancelled), (1, 0));
}

#[test]
fn a_session_continues_from_its_finished_turns_and_forgets_cancelled_ones() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let session = engine.session();
    let first = session
        .generate(request(prompt(1, 5), 6))
        .unwrap()
        .complete_blocking()
        .unwrap();
    let mut context = prompt(1, 5);
    context.extend(first.tokens.iter().map(|token| token.id));
    assert_eq!(session.context_tokens(), 11);
    drop(session.generate(request(prompt(2, 3), 300)).unwrap());
    let busy = session.generate(request(prompt(2, 3), 300)).unwrap();
    assert!(matches!(
        session.generate(request(prompt(2, 3), 3)),
        Err(SubmitError::Conflict)
    ));
    assert!(matches!(session.rewind(1), Err(SubmitError::Conflict)));
    busy.cancel().wait().unwrap();
    let second = session
        .generate(request(prompt(3, 2), 4))
        .unwrap()
        .complete_blocking()
        .unwrap();
    context.extend(prompt(3, 2));
    let tokens: Vec<u32> = second.tokens.iter().map(|token| token.id).collect();
    assert_eq!(tokens, expected(&context, 4));
    session.rewind(5).unwrap();
    assert_eq!(session.context_tokens(), 5);
}

#[test]
fn salts_of_the_wrong_length_are_refused() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    for (salt, is_valid) in [(0, false), (1, true), (1024, true), (1025, false)] {
        let request = request(prompt(0, 3), 1).cache_salt("s".repeat(salt));
        match engine.generate(request) {
            Ok(stream) => {
                assert!(is_valid, "{salt}");
                stream.complete_blocking().unwrap();
            }
            Err(SubmitError::Params(error)) => {
                assert!(!is_valid, "{salt}: {error}");
                assert_eq!(error.name, "cache_salt");
            }
            Err(error) => panic!("{salt}: {error}"),
        }
    }
}
