//! Runs the whole engine under shuttle: random interleavings of callers and the scheduler
//! thread, on a simulated device.
//!
//! `make models` runs this. `QUELL_SCHEDULES` sets the number of schedules per scenario: half
//! of them are uniformly random, half are chosen by PCT, which finds rare orders of a few
//! events. A scenario that fails prints its schedule; write that to a file and replay it with
//! `QUELL_REPLAY=FILE cargo test -p interleavings --features shuttle --test shuttle NAME`. A
//! deadlock, which is a lost wake-up or a thread that never ends, also counts as a failure,
//! because an execution ends only when all its threads have ended.

use quell::internals::cache::CacheLayout;
use quell::internals::runner::StateInfo;
use quell::{
    CancelReason, Cancellation, Engine, EngineConfig, EngineFault, EngineStats, GenerateError,
    Outcome, Preemption, Request, Session, Shutdown, Stop, SubmitError, TokenStream,
};
use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler};
use shuttle::{Config, Runner, thread};
use sim::{Fault, SimOptions, expected};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// Number of schedules per scenario, unless `QUELL_SCHEDULES` overrides it.
const SCHEDULES: usize = 3000;

fn explore(scenario: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    if let Some(path) = std::env::var_os("QUELL_REPLAY") {
        let replay = ReplayScheduler::new_from_file(path).expect("a schedule");
        Runner::new(replay, config).run(scenario);
        return;
    }
    let schedules = std::env::var("QUELL_SCHEDULES").map_or(SCHEDULES, |count| {
        count.parse().expect("QUELL_SCHEDULES is a number")
    });
    let random = RandomScheduler::new(schedules.div_ceil(2));
    let mut explored = Runner::new(random, config.clone()).run(scenario);
    explored += Runner::new(PctScheduler::new(3, schedules / 2), config).run(scenario);
    assert_eq!(explored, schedules);
}

/// Returns one of `0..count`. The checker chooses, so that a replay makes the same choices.
fn choose(count: usize) -> usize {
    thread_rng().gen_range(0..count)
}

fn prompt(caller: usize) -> Vec<u32> {
    (0..1 + caller as u32)
        .map(|at| 10 * at + caller as u32)
        .collect()
}

/// Starts an engine with one or two steps in flight, whose cache is too small for all callers
/// at once and whose stream buffers are so small that readers soon fall behind.
fn engine(config: EngineConfig) -> Engine {
    faulty_engine(config, None)
}

fn faulty_engine(config: EngineConfig, fault: Option<(u64, Fault)>) -> Engine {
    let states = (choose(2) == 0).then_some(StateInfo {
        slots: 4,
        interval: 2,
    });
    let (layout, groups) = match choose(2) {
        0 => (CacheLayout::single(), 1),
        _ => (sim::layout_with_window(3), 2),
    };
    let options = SimOptions {
        depth: 1 + choose(2),
        blocks: 6 * groups,
        block_tokens: 2,
        layout,
        context: 12,
        states,
        swap_blocks: 4 * groups * choose(2),
        fault,
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_batch_tokens: Some(4),
        max_sequences: 3,
        stream_buffer: 1 + choose(3),
        // Not `Auto`, which depends on the time that steps take.
        preemption: [Preemption::Recompute, Preemption::Swap][choose(2)],
        step_deadline: None,
        slow_consumer_deadline: None,
        ..config
    };
    sim::engine(options, config)
}

/// How a request ended, from its caller's point of view.
#[derive(Debug)]
enum End {
    Finished(Outcome),
    Refused(GenerateError),
}

/// A caller that reads its stream and checks each chunk as it arrives.
struct Reader {
    stream: TokenStream,
    expected: std::vec::IntoIter<u32>,
}

impl Reader {
    fn new(engine: &Engine, caller: usize, tokens: usize) -> Result<Self, SubmitError> {
        let request = Request::new(prompt(caller)).max_tokens(tokens);
        Ok(Self {
            stream: engine.generate(request)?,
            expected: expected(&prompt(caller), tokens).into_iter(),
        })
    }

    /// Reads the next message, either blocking the thread or as a future. Returns the end, if
    /// the message was the last.
    fn next(&mut self) -> Option<End> {
        let stream = &mut self.stream;
        let next = if choose(2) == 0 {
            stream.next_blocking()
        } else {
            block_on(poll_fn(|context| {
                futures_core::Stream::poll_next(Pin::new(&mut *stream), context)
            }))
        };
        let chunk = match next.expect("a stream has a last chunk") {
            Ok(chunk) => chunk,
            Err(error) => return Some(self.ended(End::Refused(error))),
        };
        for id in chunk.tokens.ids() {
            // I10 and I4: no other request has changed this answer or the blocks that it is
            // computed from.
            assert_eq!(Some(id), self.expected.next());
        }
        let finish = chunk.finish?;
        if finish.outcome == Outcome::Length {
            assert_eq!(self.expected.next(), None, "tokens are missing");
        }
        Some(self.ended(End::Finished(finish.outcome)))
    }

    /// Asserts I1: nothing follows the terminal.
    fn ended(&mut self, end: End) -> End {
        assert!(self.stream.next_blocking().is_none());
        end
    }

    fn read_all(mut self) -> End {
        loop {
            if let Some(end) = self.next() {
                return end;
            }
        }
    }

    /// Reads up to `count` messages. Returns `None` if the end was among them.
    fn read(mut self, count: usize) -> Option<Self> {
        for _ in 0..count {
            if self.next().is_some() {
                return None;
            }
        }
        Some(self)
    }
}

/// Waits for the acknowledgement of a cancel, or drops it without waiting.
fn acknowledge(cancellation: Cancellation) {
    let receipt = match choose(3) {
        0 => return,
        1 => cancellation.wait(),
        _ => block_on(cancellation),
    };
    // The error would be the fault that ended the engine before it could answer.
    if let Ok(receipt) = receipt {
        assert!(receipt.freed_at >= receipt.posted_at);
    }
}

/// Runs a caller that does what the checker chooses.
fn behave(engine: &Engine, caller: usize, tokens: usize) {
    let Ok(reader) = Reader::new(engine, caller, tokens) else {
        return;
    };
    match choose(4) {
        0 => {
            reader.read_all();
        }
        // Drops the request before its first token, in the middle, or at the last token.
        1 => drop(reader.read(choose(tokens + 1))),
        2 => {
            if let Some(reader) = reader.read(choose(tokens + 1)) {
                acknowledge(reader.stream.cancel());
            }
        }
        // Drops the request on a thread other than the one that submitted it.
        _ => {
            thread::spawn(move || drop(reader)).join().unwrap();
        }
    }
}

/// Asserts I2 and I3, which must hold at any moment.
fn check_accounting(stats: &EngineStats) {
    let outcomes = &stats.outcomes;
    let ended = outcomes.stopped + outcomes.length + outcomes.cancelled + outcomes.failed;
    assert_eq!(outcomes.accepted, ended + stats.open as u64, "{stats:?}");
    assert_eq!(stats.open, stats.running + stats.waiting, "{stats:?}");
}

/// Polls the scheduler thread until nothing is open, then asserts I12.
fn check_idle(engine: &Engine) -> EngineStats {
    loop {
        let stats = engine.stats().expect("the engine is open");
        check_accounting(&stats);
        if stats.open == 0 && stats.closing == 0 {
            assert!(stats.is_idle(), "{stats:?}");
            return stats;
        }
    }
}

fn spawn_callers(
    count: usize,
    engine: &Engine,
    caller: impl Fn(&Engine, usize) + Clone + Send + 'static,
) -> Vec<thread::JoinHandle<()>> {
    let spawn = |index| {
        let (engine, caller) = (engine.clone(), caller.clone());
        thread::spawn(move || caller(&engine, index))
    };
    (0..count).map(spawn).collect()
}

fn join(callers: Vec<thread::JoinHandle<()>>) {
    for caller in callers {
        caller.join().unwrap();
    }
}

/// Four callers read, cancel and drop at any moment while another one observes.
#[test]
fn i1_i2_i3_i12_hold_for_random_callers() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let mut callers = spawn_callers(4, &engine, |engine, index| behave(engine, index, 4));
        let observer = engine.clone();
        callers.push(thread::spawn(move || {
            check_accounting(&observer.stats().expect("the engine is open"));
        }));
        join(callers);
        let stats = check_idle(&engine);
        assert_eq!(stats.outcomes.accepted, 4);
        assert_eq!(stats.outcomes.failed, 0);
    });
}

/// I9: slow readers pause and resume, and get every token. A lost resume would leave a reader
/// waiting forever.
#[test]
fn i9_every_paused_reader_resumes() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let callers = spawn_callers(3, &engine, |engine, index| {
            let end = Reader::new(engine, index, 5).unwrap().read_all();
            assert!(matches!(end, End::Finished(Outcome::Length)), "{end:?}");
        });
        join(callers);
        assert_eq!(check_idle(&engine).outcomes.length, 3);
    });
}

/// The scheduler thread ends after the last handle and the last stream have been dropped, but
/// not before the last reader has its answer.
#[test]
fn i1_holds_when_all_handles_are_dropped() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let mut callers = Vec::new();
        for index in 0..3 {
            let reader = Reader::new(&engine, index, 2).unwrap();
            let reads = choose(2) == 0;
            callers.push(thread::spawn(move || {
                if reads {
                    let end = reader.read_all();
                    assert!(matches!(end, End::Finished(Outcome::Length)), "{end:?}");
                } else if let Some(reader) = reader.read(choose(3)) {
                    acknowledge(reader.stream.cancel());
                }
            }));
        }
        drop(engine);
        join(callers);
    });
}

/// Shuts down between submissions, reads and cancels: every caller learns of it, and the thread
/// ends.
#[test]
fn i1_holds_through_a_shutdown() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let mut callers = spawn_callers(3, &engine, |engine, index| {
            match Reader::new(engine, index, 3) {
                Ok(reader) if choose(3) > 0 => match reader.read_all() {
                    End::Finished(Outcome::Length) => {}
                    End::Finished(Outcome::Cancelled(CancelReason::Shutdown)) => {}
                    End::Refused(GenerateError::Closed(EngineFault::Shutdown)) => {}
                    end => panic!("{end:?}"),
                },
                Ok(reader) => acknowledge(reader.stream.cancel()),
                Err(SubmitError::Draining | SubmitError::Closed(EngineFault::Shutdown)) => {}
                Err(error) => panic!("{error}"),
            }
        });
        let other = engine.clone();
        callers.push(thread::spawn(move || {
            other.shutdown(Shutdown::Abort).wait().unwrap();
        }));
        join(callers);
        let late = Reader::new(&engine, 0, 3).map(Reader::read_all);
        let closed = matches!(
            &late,
            Err(SubmitError::Draining | SubmitError::Closed(_))
                | Ok(End::Refused(GenerateError::Closed(_)))
                | Ok(End::Finished(Outcome::Cancelled(CancelReason::Shutdown)))
        );
        assert!(closed, "an engine that was shut down has answered");
    });
}

/// Calls `abort_all` between submissions and the last tokens: each request has one outcome, and
/// the engine continues to work.
#[test]
fn i2_i12_hold_through_abort_all() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let mut callers = spawn_callers(3, &engine, |engine, index| {
            if choose(3) == 0 {
                return behave(engine, index, 3);
            }
            let end = Reader::new(engine, index, 3).unwrap().read_all();
            let ok = matches!(
                end,
                End::Finished(Outcome::Length | Outcome::Cancelled(CancelReason::AbortAll))
            );
            assert!(ok, "{end:?}");
        });
        let other = engine.clone();
        callers.push(thread::spawn(move || other.abort_all().unwrap()));
        join(callers);
        assert_eq!(check_idle(&engine).outcomes.accepted, 3);
        let end = Reader::new(&engine, 1, 2).unwrap().read_all();
        assert!(matches!(end, End::Finished(Outcome::Length)), "{end:?}");
    });
}

/// A permit is returned before the caller learns of the end, so a caller that has seen an end
/// can submit again at once.
#[test]
fn a_caller_that_has_seen_an_end_can_submit_again() {
    explore(|| {
        let config = EngineConfig {
            max_open_requests: 2,
            ..EngineConfig::default()
        };
        let engine = engine(config);
        let callers = spawn_callers(2, &engine, |engine, index| {
            for _ in 0..2 {
                let reader = Reader::new(engine, index, 2).unwrap();
                if choose(2) == 0 {
                    reader.read_all();
                } else {
                    reader.stream.cancel().wait().unwrap();
                }
            }
        });
        join(callers);
        assert_eq!(check_idle(&engine).outcomes.accepted, 4);
    });
}

/// Takes one turn of a session, which is read, cancelled, dropped, or refused because another
/// turn is still running.
fn take_turn(session: &Session) {
    let turn = session.generate(Request::new(vec![choose(3) as u32]).max_tokens(2));
    let stream = match turn {
        Ok(stream) => stream,
        Err(SubmitError::Conflict | SubmitError::PromptTooLong { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    // Whatever has happened to the session, the answer is the one for all of its tokens.
    let answer = expected(stream.prompt_ids(), 2);
    let reader = Reader {
        stream,
        expected: answer.into_iter(),
    };
    match choose(3) {
        0 => {
            reader.read_all();
        }
        1 => drop(reader.read(choose(3))),
        _ => acknowledge(reader.stream.cancel()),
    }
}

/// Interferes with the session from another thread.
fn interfere(session: &Session) {
    match choose(4) {
        0 => acknowledge(session.stop(Stop::Keep)),
        1 => acknowledge(session.stop(Stop::Rewind)),
        2 => match session.rewind(choose(4)) {
            Ok(()) | Err(SubmitError::Conflict) => {}
            Err(error) => panic!("{error}"),
        },
        _ => match session.fork() {
            Ok(fork) => take_turn(&fork),
            Err(SubmitError::Conflict) => {}
            Err(error) => panic!("{error}"),
        },
    }
}

/// Two threads read, cancel, stop, rewind and fork the turns of the same sessions at once. Each
/// turn answers the session's own tokens, and ending the sessions leaves nothing behind.
#[test]
fn i10_i12_hold_for_sessions_that_two_threads_use() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let mut parties = Vec::new();
        let sessions = [engine.session(), engine.session()].map(Arc::new);
        for session in &sessions {
            let (turns, other) = (Arc::clone(session), Arc::clone(session));
            parties.push(thread::spawn(move || {
                take_turn(&turns);
                take_turn(&turns);
            }));
            parties.push(thread::spawn(move || interfere(&other)));
        }
        join(parties);
        for session in sessions {
            match Arc::into_inner(session) {
                Some(session) if choose(2) == 0 => acknowledge(session.end()),
                session => drop(session),
            }
        }
        check_idle(&engine);
    });
}

/// Drains between submissions: earlier requests are answered, later ones are refused, and the
/// drain counts the requests that it aborts.
#[test]
fn i2_holds_through_a_drain() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let callers = spawn_callers(3, &engine, |engine, index| {
            match Reader::new(engine, index, 2).map(Reader::read_all) {
                Ok(End::Finished(Outcome::Length)) | Err(SubmitError::Draining) => {}
                // Submitted while the engine still accepted requests, but queued too late.
                Ok(End::Finished(Outcome::Cancelled(CancelReason::Shutdown))) => {}
                Ok(end) => panic!("{end:?}"),
                Err(error) => panic!("{error}"),
            }
        });
        // No test takes this long, and time does not advance in the checker.
        let within = Duration::from_secs(1 << 20);
        let draining = engine.drain(within);
        let drained = match choose(2) {
            0 => draining.wait(),
            _ => block_on(draining),
        };
        let aborted = drained.unwrap().aborted;
        join(callers);
        let outcomes = check_idle(&engine).outcomes;
        // After the drain, too, a request may still be queued and then be cancelled.
        assert!(aborted <= outcomes.cancelled, "{aborted} {outcomes:?}");
        engine.shutdown(Shutdown::Drain(within)).wait().unwrap();
    });
}

/// A failing step fails its requests; the engine continues to work.
#[test]
fn i1_i2_i12_hold_when_a_step_fails() {
    explore(|| {
        let fault = [Fault::Launch, Fault::Step][choose(2)];
        let at = 1 + choose(4) as u64;
        let engine = faulty_engine(EngineConfig::default(), Some((at, fault)));
        join(spawn_callers(3, &engine, |engine, index| {
            behave(engine, index, 3);
        }));
        assert_eq!(check_idle(&engine).outcomes.accepted, 3);
    });
}

/// A lost device or a panic closes the engine: every waiter wakes with the cause, and the
/// thread ends.
#[test]
fn i1_holds_when_the_device_is_lost() {
    explore(|| {
        let fault = [Fault::Lost, Fault::Panic][choose(2)];
        let at = 1 + choose(4) as u64;
        let engine = faulty_engine(EngineConfig::default(), Some((at, fault)));
        join(spawn_callers(
            3,
            &engine,
            |engine, index| match Reader::new(engine, index, 3) {
                Ok(reader) if choose(3) > 0 => {
                    let end = reader.read_all();
                    let shutdown = matches!(
                        end,
                        End::Refused(GenerateError::Closed(EngineFault::Shutdown))
                    );
                    assert!(!shutdown, "the cause is missing");
                }
                Ok(reader) => acknowledge(reader.stream.cancel()),
                Err(SubmitError::Closed(cause)) => {
                    assert!(!matches!(cause, EngineFault::Shutdown));
                }
                Err(error) => panic!("{error}"),
            },
        ));
    });
}

/// Otherwise, a printed schedule would replay as a different one.
#[test]
fn schedules_are_deterministic() {
    shuttle::check_uncontrolled_nondeterminism(
        || {
            let engine = engine(EngineConfig::default());
            let callers = spawn_callers(3, &engine, |engine, index| behave(engine, index, 2));
            engine.abort_all().unwrap();
            join(callers);
            check_idle(&engine);
        },
        100,
    );
}
