//! Checks how the engine hands work over between threads, using loom. Loom runs every
//! interleaving of a few threads up to a bounded number of preemptions, and every value that an
//! atomic load may return.
//!
//! Each model runs the real engine, including its scheduler thread, on a simulated device. A
//! model lists the kinds of executions that must occur, so a model without a race fails. Loom
//! reports a lost wake-up, or a thread that never ends, as a deadlock. `make models` runs this;
//! `LOOM_MAX_PREEMPTIONS` sets another bound, and loom's own variables for analysing a failure
//! (`LOOM_LOG`, `LOOM_CHECKPOINT_FILE`) work too.
//!
//! The bugs that a test is said to catch were put into the engine by hand; the test then failed
//! as described in parentheses.

use loom::future::block_on;
use loom::thread;
use quell::internals::runner::StateInfo;
use quell::{
    CancelReason, Engine, EngineConfig, EngineFault, GenerateError, Outcome, Request, Shutdown,
    Stop, SubmitError, TokenStream,
};
use sim::{Fault, SimOptions, expected};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PROMPT: [u32; 1] = [7];

/// Runs a scenario in all interleavings with up to `preemptions` preemptions. The scenario
/// returns the kind of execution that it was. Each of `kinds` must occur, and no other kind
/// may.
fn model<const N: usize>(
    preemptions: usize,
    kinds: [&'static str; N],
    scenario: impl Fn() -> &'static str + Send + Sync + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = 100_000;
    let seen = Arc::new(Mutex::new((BTreeSet::new(), 0)));
    let record = Arc::clone(&seen);
    builder.check(move || {
        let kind = scenario();
        let mut record = record.lock().unwrap();
        record.0.insert(kind);
        record.1 += 1;
    });
    let seen = seen.lock().unwrap();
    println!("{} executions: {:?}", seen.1, seen.0);
    assert_eq!(seen.0, BTreeSet::from(kinds));
}

fn engine(depth: usize, config: EngineConfig) -> Engine {
    faulty_engine(depth, config, None)
}

fn faulty_engine(depth: usize, config: EngineConfig, fault: Option<(u64, Fault)>) -> Engine {
    let options = SimOptions {
        depth,
        blocks: 6,
        block_tokens: 2,
        layout: sim::layout_with_window(3),
        states: Some(StateInfo {
            slots: 4,
            interval: 2,
        }),
        context: 8,
        fault,
        ..SimOptions::default()
    };
    let config = EngineConfig {
        step_deadline: None,
        slow_consumer_deadline: None,
        ..config
    };
    sim::engine(options, config)
}

fn submit(engine: &Engine, tokens: usize) -> TokenStream {
    engine
        .generate(request(tokens))
        .expect("the engine is open")
}

fn request(tokens: usize) -> Request {
    Request::new(PROMPT.to_vec()).max_tokens(tokens)
}

/// Reads a stream to its end, as a task would, and returns the tokens and the end. Asserts that
/// nothing follows the end (I1).
fn read(mut stream: TokenStream) -> (Vec<u32>, Result<Outcome, GenerateError>) {
    let mut tokens = Vec::new();
    loop {
        let next =
            poll_fn(|context| futures_core::Stream::poll_next(Pin::new(&mut stream), context));
        let end = match block_on(next).expect("a stream has a last chunk") {
            Ok(chunk) => {
                tokens.extend(chunk.tokens.ids());
                chunk.finish.map(|finish| Ok(finish.outcome))
            }
            Err(error) => Some(Err(error)),
        };
        if let Some(end) = end {
            assert!(
                stream.next_blocking().is_none(),
                "the stream continues after its end"
            );
            return (tokens, end);
        }
    }
}

/// Asserts I2 and I12 after the last request has ended and its blocks have been freed.
fn assert_idle(engine: &Engine, accepted: u64) -> quell::EngineStats {
    let stats = engine.stats().expect("the engine is open");
    let outcomes = stats.outcomes;
    assert_eq!(outcomes.accepted, accepted);
    assert_eq!(
        outcomes.accepted,
        outcomes.stopped + outcomes.length + outcomes.cancelled + outcomes.failed
    );
    assert!(stats.is_idle(), "{stats:?}");
    stats
}

/// Races the cancel flag with admission and completion. Whenever the flag is raised, the
/// request has exactly one outcome (I1, I2) and the receipt arrives; everything is free when it
/// does (I12).
///
/// Catches receipts that do not wait for their fence (a deferred block is left in the
/// pipeline's accounting), and a thread that checks the flag only at commits (no request is
/// cancelled before its first step).
fn a_cancel_races_its_request(depth: usize) {
    let kinds = [
        "cancelled before its first step",
        "cancelled in its steps",
        "finished first",
    ];
    model(3, kinds, move || {
        let engine = engine(depth, EngineConfig::default());
        let receipt = submit(&engine, 2).cancel().wait().unwrap();
        let outcomes = assert_idle(&engine, 1).outcomes;
        match (outcomes.length, receipt.blocks_freed) {
            (1, _) => "finished first",
            (_, 0) => "cancelled before its first step",
            (_, _) => "cancelled in its steps",
        }
    });
}

#[test]
fn i1_i2_i12_hold_when_a_cancel_races_admission_and_completion() {
    a_cancel_races_its_request(1);
}

#[test]
fn i1_i2_i12_hold_when_a_cancel_races_a_pipeline_of_two_steps() {
    a_cancel_races_its_request(2);
}

/// Races the cancel flag with the wake-up. A request whose reader is too slow is not planned,
/// so only the posted command can end it.
///
/// Catches a command that is posted before the flag is raised (deadlock).
#[test]
fn i6_a_cancel_ends_a_paused_request() {
    let kinds = ["before its first token", "after its first token"];
    model(3, kinds, || {
        let config = EngineConfig {
            stream_buffer: 1,
            ..EngineConfig::default()
        };
        let engine = engine(1, config);
        let receipt = submit(&engine, 4).cancel().wait().unwrap();
        assert_eq!(assert_idle(&engine, 1).outcomes.cancelled, 1);
        match receipt.tokens_generated {
            0 => "before its first token",
            _ => "after its first token",
        }
    });
}

/// Races the fence with the freeing of blocks. A request is dropped while steps are in flight,
/// and its blocks go to a request that needs all of them. If they were handed out too early,
/// the device would notice (I4) and the tokens of the other request would change (I10).
///
/// Catches blocks that are freed immediately ("handed out again while step 3 is in flight").
#[test]
fn i4_i10_blocks_are_reused_only_after_their_fence() {
    model(2, ["cancelled", "finished first"], || {
        let engine = engine(2, EngineConfig::default());
        let dropped = submit(&engine, 3);
        let prompt = vec![1, 2, 3, 4, 5];
        let next = Request::new(prompt.clone()).max_tokens(1);
        let next = engine.generate(next).expect("the engine is open");
        let dropper = thread::spawn(move || drop(dropped));
        let (tokens, end) = read(next);
        assert_eq!(tokens, expected(&prompt, 1));
        assert!(matches!(end, Ok(Outcome::Length)), "{end:?}");
        dropper.join().unwrap();
        // Answered after everything that was posted before; the first request may finish before
        // its cancel takes effect.
        let outcomes = engine.stats().expect("the engine is open").outcomes;
        match outcomes.cancelled {
            1 => "cancelled",
            _ => "finished first",
        }
    });
}

/// Races a reader with the sender. A reader that goes to sleep is woken for each token and for
/// the end.
///
/// Catches a reader that does not check again after it has registered its waker (deadlock).
#[test]
fn i1_no_wake_up_of_a_reader_is_lost() {
    model(3, ["finished"], || {
        let engine = engine(1, EngineConfig::default());
        let (tokens, end) = read(submit(&engine, 2));
        assert_eq!(tokens, expected(&PROMPT, 2));
        assert!(matches!(end, Ok(Outcome::Length)), "{end:?}");
        "finished"
    });
}

/// Like the test above, but for the receipt of a cancel. Catches the same bug there (deadlock).
#[test]
fn i6_no_wake_up_for_a_receipt_is_lost() {
    model(3, ["freed"], || {
        let engine = engine(2, EngineConfig::default());
        block_on(submit(&engine, 3).cancel()).unwrap();
        assert_idle(&engine, 1);
        "freed"
    });
}

/// Like the tests above, but the thread exits instead of sending.
///
/// Catches a waker that is called before the channel is closed (deadlock), and a fault that is
/// set after the requests have failed (a late reader is told of a shutdown).
#[test]
fn i1_a_reader_learns_that_the_device_is_lost() {
    let kinds = ["closed", "refused"];
    model(2, kinds, || {
        let engine = faulty_engine(2, EngineConfig::default(), Some((1, Fault::Lost)));
        let first = submit(&engine, 2);
        let (tokens, end) = read(first);
        assert!(tokens.is_empty());
        assert!(
            matches!(end, Err(GenerateError::Failed(EngineFault::Device(_)))),
            "{end:?}"
        );
        let device = |fault: &EngineFault| matches!(fault, EngineFault::Device(_));
        match engine.generate(request(1)) {
            Err(SubmitError::Closed(fault)) if device(&fault) => "refused",
            Err(error) => panic!("{error}"),
            Ok(late) => match read(late).1 {
                Err(GenerateError::Closed(fault)) if device(&fault) => "closed",
                end => panic!("{end:?}"),
            },
        }
    });
}

/// Races pause with resume, with one and with two steps in flight. Whichever side clears the
/// pause flag, the request continues and its reader gets every token.
///
/// Catches a pause without a second check after the flag has been set (deadlock) and, with two
/// steps in flight, a thread that clears the flag without ending the pause (deadlock).
#[test]
fn i9_no_resume_is_lost() {
    for (depth, preemptions) in [(1, 2), (2, 3)] {
        model(preemptions, ["finished"], move || {
            let config = EngineConfig {
                stream_buffer: 1,
                ..EngineConfig::default()
            };
            let engine = engine(depth, config);
            let (tokens, end) = read(submit(&engine, 3));
            assert_eq!(tokens, expected(&PROMPT, 3));
            assert!(matches!(end, Ok(Outcome::Length)), "{end:?}");
            "finished"
        });
    }
}

/// Races the drop of the last handle with a shutdown and the last token. There is one end, and
/// the thread exits.
///
/// Catches a thread that exits without closing its queue (deadlock).
#[test]
fn i1_holds_when_a_shutdown_races_the_last_handle() {
    model(2, ["finished", "shut down"], || {
        let engine = engine(2, EngineConfig::default());
        let stream = submit(&engine, 1);
        let other = engine.clone();
        let closer = thread::spawn(move || other.shutdown(Shutdown::Abort).wait());
        drop(engine);
        let kind = match read(stream).1 {
            Ok(Outcome::Length) => "finished",
            Ok(Outcome::Cancelled(CancelReason::Shutdown)) => "shut down",
            end => panic!("{end:?}"),
        };
        closer.join().unwrap().expect("a shutdown is not a fault");
        kind
    });
}

/// Drops the last handle while an answer is being generated: the thread finishes it first.
///
/// Catches a stream that does not keep the engine alive (its tokens are lost).
#[test]
fn i1_holds_when_the_last_handle_is_dropped_before_the_answer() {
    model(3, ["finished"], || {
        let engine = engine(2, EngineConfig::default());
        let stream = submit(&engine, 2);
        drop(engine);
        let (tokens, end) = read(stream);
        assert_eq!(tokens, expected(&PROMPT, 2));
        assert!(matches!(end, Ok(Outcome::Length)), "{end:?}");
        "finished"
    });
}

/// Races the post of a cancel with the close of the engine. A cancel that is posted during a
/// shutdown is acknowledged or told that the engine has closed; it never waits forever.
///
/// Catches a thread that exits without closing its queue (deadlock).
#[test]
fn i8_a_cancel_races_a_shutdown() {
    let kinds = ["acknowledged", "submitted too late", "refused"];
    model(2, kinds, || {
        let engine = engine(1, EngineConfig::default());
        let other = engine.clone();
        let closer = thread::spawn(move || other.shutdown(Shutdown::Abort).wait());
        let kind = match engine.generate(request(2)) {
            Err(SubmitError::Draining | SubmitError::Closed(EngineFault::Shutdown)) => "refused",
            Err(error) => panic!("{error}"),
            Ok(stream) => match stream.cancel().wait() {
                Ok(_) => "acknowledged",
                Err(EngineFault::Shutdown) => "submitted too late",
                Err(error) => panic!("{error}"),
            },
        };
        closer.join().unwrap().expect("a shutdown is not a fault");
        kind
    });
}

/// Races an abort with a submission and a pause. A request that arrived before the abort is
/// aborted, whether paused or not; a later one is answered.
///
/// Catches an abort that only raises the flags (a paused request stays open).
#[test]
fn i2_i12_hold_when_an_abort_races_a_submission() {
    model(2, ["aborted", "finished"], || {
        let config = EngineConfig {
            stream_buffer: 1,
            ..EngineConfig::default()
        };
        let engine = engine(1, config);
        let other = engine.clone();
        let aborter = thread::spawn(move || other.abort_all().expect("the engine is open"));
        let stream = submit(&engine, 3);
        aborter.join().unwrap();
        // Answered after the abort. The request cannot have finished, since nobody reads it.
        let open = engine.stats().expect("the engine is open").open;
        let kind = match read(stream).1 {
            Ok(Outcome::Length) => "finished",
            Ok(Outcome::Cancelled(CancelReason::AbortAll)) => "aborted",
            end => panic!("{end:?}"),
        };
        assert_eq!(open == 0, kind == "aborted");
        kind
    });
}

/// Races a drain with a submission. A drain waits for a request that arrived before it, and
/// refuses or cancels a later one.
///
/// Catches a thread that accepts requests while it drains (none is cancelled).
#[test]
fn i2_i12_hold_when_a_drain_races_a_submission() {
    model(2, ["answered", "refused", "submitted too late"], || {
        let engine = engine(1, EngineConfig::default());
        let other = engine.clone();
        // No model takes this long, and time does not advance in the checker.
        let drain = move || other.drain(Duration::from_secs(1 << 20)).wait();
        let drainer = thread::spawn(drain);
        let kind = match engine.generate(request(1)).map(read) {
            Ok((_, Ok(Outcome::Length))) => "answered",
            Ok((_, Ok(Outcome::Cancelled(CancelReason::Shutdown)))) => "submitted too late",
            Err(SubmitError::Draining) => "refused",
            unexpected => panic!("{unexpected:?}"),
        };
        let drained = drainer.join().unwrap().expect("a drain is not a fault");
        assert!(drained.aborted == 0 || kind == "submitted too late");
        kind
    });
}

/// Races a stop with the completion of a turn. The turn has one end, and once both sides have
/// learnt of it, the next turn continues from the tokens that were kept.
///
/// Catches a terminal that is sent without notifying the turn (the next turn is refused as a
/// conflict).
#[test]
fn i8_i10_hold_when_a_stop_races_the_end_of_a_turn() {
    model(2, ["finished", "stopped"], || {
        let engine = engine(2, EngineConfig::default());
        let session = Arc::new(engine.session());
        let turn = session.generate(request(1)).expect("the session is idle");
        let other = Arc::clone(&session);
        let stopper = thread::spawn(move || other.stop(Stop::Keep).wait().map(|_| ()));
        let kind = match read(turn).1 {
            Ok(Outcome::Length) => "finished",
            Ok(Outcome::Cancelled(CancelReason::SessionStopped)) => "stopped",
            end => panic!("{end:?}"),
        };
        stopper.join().unwrap().expect("the engine is open");
        let next = session.generate(request(1)).expect("the turn is over");
        let answer = expected(next.prompt_ids(), 1);
        assert_eq!(read(next).0, answer);
        kind
    });
}

/// Races two requests for the single permit of an engine. The permit is neither lost nor given
/// to both. Once a caller has read the end of its request, there is room for the next one.
///
/// Catches a permit that is returned after the terminal has been sent ("no permit is left").
#[test]
fn only_one_request_is_open_at_a_time() {
    model(1, ["one after the other", "overloaded"], || {
        let config = EngineConfig {
            max_open_requests: 1,
            ..EngineConfig::default()
        };
        let engine = engine(1, config);
        let other = engine.clone();
        let answered = |engine: &Engine| match engine.generate(request(1)) {
            Ok(stream) => matches!(read(stream).1, Ok(Outcome::Length)),
            Err(SubmitError::Overloaded { open: 1, .. }) => false,
            Err(error) => panic!("{error}"),
        };
        let rival = thread::spawn(move || answered(&other));
        let both = (answered(&engine), rival.join().unwrap());
        assert!(answered(&engine), "no permit is left");
        match both {
            (true, true) => "one after the other",
            (false, false) => panic!("both requests were refused"),
            _ => "overloaded",
        }
    });
}

/// Races a query with the close of the engine. The caller gets the statistics, or learns that
/// the engine has closed.
///
/// Catches a thread that exits without closing its queue (deadlock).
#[test]
fn a_stats_query_races_a_shutdown() {
    model(2, ["answered", "refused"], || {
        let engine = engine(1, EngineConfig::default());
        let other = engine.clone();
        let closer = thread::spawn(move || other.shutdown(Shutdown::Abort).wait());
        let kind = match engine.stats() {
            Ok(stats) if stats.is_idle() => "answered",
            Err(SubmitError::Closed(EngineFault::Shutdown)) => "refused",
            unexpected => panic!("{unexpected:?}"),
        };
        closer.join().unwrap().expect("a shutdown is not a fault");
        kind
    });
}
