//! The engine's hand-overs between threads under loom: every interleaving of a few
//! threads with up to so many preemptions, and every value that an atomic may give.
//!
//! Each model runs the engine itself, its scheduler thread included, over a simulated
//! device, and says which kinds of executions it must have seen: one that races
//! nothing fails. Loom reports a lost wake-up, or a thread that never ends, as a
//! deadlock. `make models` runs this; `LOOM_MAX_PREEMPTIONS` sets another bound, and
//! what loom says for finding a failure (`LOOM_LOG`, `LOOM_CHECKPOINT_FILE`) works.

#[path = "../../common/sim.rs"]
mod sim;

use loom::future::block_on;
use loom::thread;
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

/// Runs a scenario in all interleavings with up to `preemptions` preemptions. It gives
/// the kind of execution that it was; each of `kinds` must have come up, and no other.
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
        blocks: 3,
        block_tokens: 2,
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

/// Reads to the end as a task does, and gives the tokens and the end. I1: exactly one.
fn read(mut stream: TokenStream) -> (Vec<u32>, Result<Outcome, GenerateError>) {
    let mut tokens = Vec::new();
    loop {
        let next =
            poll_fn(|context| futures_core::Stream::poll_next(Pin::new(&mut stream), context));
        let end = match block_on(next).expect("a stream has a last chunk") {
            Ok(chunk) => {
                tokens.extend(chunk.token.map(|token| token.id));
                chunk.finish.map(|finish| Ok(finish.outcome))
            }
            Err(error) => Some(Err(error)),
        };
        if let Some(end) = end {
            assert!(
                stream.next_blocking().is_none(),
                "something follows the end"
            );
            return (tokens, end);
        }
    }
}

/// I2 and I12 after the last request has ended and its blocks are free.
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

/// Flag × admit × complete. Whenever the flag goes up, there is one outcome (I1, I2),
/// the receipt comes, and all is free when it does (I12).
///
/// Broken by hand: receipts that do not wait for their fence leave a deferred block in
/// the books of the pipeline; a thread that looks at the flag only at commits shows no
/// cancel before a first step.
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

/// Flag × wake-up: a session whose reader is too slow is not planned, so nothing but
/// the posted command ends it.
///
/// Broken by hand: the command posted before the flag is raised, deadlock.
#[test]
fn i6_a_cancel_ends_a_paused_session() {
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

/// Fence publish × free: the blocks of a session that is dropped while steps are in
/// flight go to one that needs all of them. The device would see them handed out too
/// early (I4), and the other's tokens would change (I10).
///
/// Broken by hand: blocks that are free at once, "handed out again while step 3 is in
/// flight".
#[test]
fn i4_i10_blocks_are_handed_on_only_after_their_fence() {
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
        // Behind everything that was posted; a first answer may come before the receipt.
        let outcomes = engine.stats().expect("the engine is open").outcomes;
        match outcomes.cancelled {
            1 => "cancelled",
            _ => "finished first",
        }
    });
}

/// Reader × send: a reader that goes to sleep is woken for each token and for the end.
///
/// Broken by hand: no second look after the waker is registered, deadlock.
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

/// As before, for the receipt of a cancel. Broken by hand in the same way: deadlock.
#[test]
fn i6_no_wake_up_for_a_receipt_is_lost() {
    model(3, ["freed"], || {
        let engine = engine(2, EngineConfig::default());
        block_on(submit(&engine, 3).cancel()).unwrap();
        assert_idle(&engine, 1);
        "freed"
    });
}

/// As before, when the thread goes away instead of sending.
///
/// Broken by hand: the waker called before the channel closes, deadlock; the fault set
/// after the sessions have failed, a late reader is told of a shutdown.
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

/// Pause × resume, one and two steps deep: whoever takes the pause flag down, the
/// session goes on and its reader gets every token.
///
/// Broken by hand: no second look after the flag is up, deadlock; two steps deep, the
/// flag taken down by the thread without an end of the pause, deadlock.
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

/// Last handle drop × shutdown × the last token: one end, and the thread ends.
///
/// Broken by hand: a thread that ends without closing its queue, deadlock.
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
        closer.join().unwrap().expect("a shutdown is no fault");
        kind
    });
}

/// The last handle goes while an answer is on its way: the thread finishes it first.
///
/// Broken by hand: a stream that does not keep the engine alive loses its tokens.
#[test]
fn i1_holds_when_the_last_handle_goes_before_the_answer() {
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

/// Drop-post × close: a cancel that is posted while the engine shuts down is
/// acknowledged, or told that the engine has closed; it never waits for ever.
///
/// Broken by hand: a thread that ends without closing its queue, deadlock.
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
                Err(GenerateError::Closed(EngineFault::Shutdown)) => "submitted too late",
                Err(error) => panic!("{error}"),
            },
        };
        closer.join().unwrap().expect("a shutdown is no fault");
        kind
    });
}

/// Abort × submit × pause: a request that came in before the abort is aborted, paused
/// or not; one that came later is answered.
///
/// Broken by hand: an abort that only raises the flags leaves a paused request open.
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
        // Behind the abort; without a reader the request cannot have finished.
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

/// Drain × submit: a drain waits for a request that came in before it, and refuses or
/// cancels one that came later.
///
/// Broken by hand: a thread that takes requests while it drains, none is cancelled.
#[test]
fn i2_i12_hold_when_a_drain_races_a_submission() {
    model(2, ["answered", "refused", "submitted too late"], || {
        let engine = engine(1, EngineConfig::default());
        let other = engine.clone();
        // No model takes that long, and the checker's time stands still.
        let drain = move || other.drain(Duration::from_secs(1 << 20)).wait();
        let drainer = thread::spawn(drain);
        let kind = match engine.generate(request(1)).map(read) {
            Ok((_, Ok(Outcome::Length))) => "answered",
            Ok((_, Ok(Outcome::Cancelled(CancelReason::Shutdown)))) => "submitted too late",
            Err(SubmitError::Draining) => "refused",
            unexpected => panic!("{unexpected:?}"),
        };
        let drained = drainer.join().unwrap().expect("a drain is no fault");
        assert!(drained.aborted == 0 || kind == "submitted too late");
        kind
    });
}

/// Stop × completion: a turn is stopped while it comes to its end by itself. It has one
/// end, and when both have learnt of it, the next turn continues from what is kept.
///
/// Broken by hand: a terminal without word to the turn, the next turn is a conflict.
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

/// Permit × permit: of two requests at a door for one, none is lost and none too many.
/// Whoever has read an end has made room for the next.
///
/// Broken by hand: the permit given back after the terminal is sent, "the door stayed
/// shut".
#[test]
fn the_door_lets_one_in_at_a_time() {
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
        assert!(answered(&engine), "the door stayed shut");
        match both {
            (true, true) => "one after the other",
            (false, false) => panic!("neither came in"),
            _ => "overloaded",
        }
    });
}

/// Ask × close: whoever asks for the state gets it, or learns that there is none.
///
/// Broken by hand: a thread that ends without closing its queue, deadlock.
#[test]
fn a_question_races_a_shutdown() {
    model(2, ["answered", "refused"], || {
        let engine = engine(1, EngineConfig::default());
        let other = engine.clone();
        let closer = thread::spawn(move || other.shutdown(Shutdown::Abort).wait());
        let kind = match engine.stats() {
            Ok(stats) if stats.is_idle() => "answered",
            Err(SubmitError::Closed(EngineFault::Shutdown)) => "refused",
            unexpected => panic!("{unexpected:?}"),
        };
        closer.join().unwrap().expect("a shutdown is no fault");
        kind
    });
}
