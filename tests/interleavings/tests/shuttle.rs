//! The whole engine under shuttle: random interleavings of callers and the scheduler
//! thread, over a simulated device.
//!
//! `make models` runs this. `QUELL_SCHEDULES` sets how many schedules a scenario gets:
//! half of them uniformly random, half by PCT, which finds rare orders of a few events.
//! A scenario that fails prints its schedule; put that into a file and replay it with
//! `QUELL_REPLAY=FILE cargo test -p interleavings --features shuttle --test
//! shuttle NAME`. A deadlock, which is a lost wake-up or a thread that never ends, fails
//! too: an execution is over only when all its threads are.

#[path = "../../common/sim.rs"]
mod sim;

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

/// Schedules of one scenario, unless `QUELL_SCHEDULES` says otherwise.
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

/// One of `0..count`, chosen by the checker and so the same in a replay.
fn choose(count: usize) -> usize {
    thread_rng().gen_range(0..count)
}

fn prompt(caller: usize) -> Vec<u32> {
    (0..1 + caller as u32)
        .map(|at| 10 * at + caller as u32)
        .collect()
}

/// An engine whose cache is too small for all callers at once, one or two steps deep,
/// and whose readers are soon too slow.
fn engine(config: EngineConfig) -> Engine {
    faulty_engine(config, None)
}

fn faulty_engine(config: EngineConfig, fault: Option<(u64, Fault)>) -> Engine {
    let options = SimOptions {
        depth: 1 + choose(2),
        blocks: 6,
        block_tokens: 2,
        context: 12,
        swap_blocks: 4 * choose(2),
        fault,
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_batch_tokens: 4,
        max_sequences: 3,
        stream_buffer: 1 + choose(3),
        // Not `Auto`, which goes by the time that steps take.
        preemption: [Preemption::Recompute, Preemption::Swap][choose(2)],
        step_deadline: None,
        slow_consumer_deadline: None,
        ..config
    };
    sim::engine(options, config)
}

/// How a caller's request ended for it.
#[derive(Debug)]
enum End {
    Finished(Outcome),
    Refused(GenerateError),
}

/// A caller that reads, and checks each chunk as it comes.
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

    /// The next message, waited for on the thread or as a future.
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
        if let Some(token) = chunk.token {
            // I10, and I4: nobody else has changed what this answer is made of.
            assert_eq!(Some(token.id), self.expected.next());
        }
        let finish = chunk.finish?;
        if finish.outcome == Outcome::Length {
            assert_eq!(self.expected.next(), None, "tokens are missing");
        }
        Some(self.ended(End::Finished(finish.outcome)))
    }

    /// I1: nothing follows the terminal.
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

    /// Reads up to `count` messages; `None` if the end was among them.
    fn read(mut self, count: usize) -> Option<Self> {
        for _ in 0..count {
            if self.next().is_some() {
                return None;
            }
        }
        Some(self)
    }
}

/// Waits for the acknowledgement of a cancel, or for nothing.
fn acknowledge(cancellation: Cancellation) {
    let receipt = match choose(3) {
        0 => return,
        1 => cancellation.wait(),
        _ => block_on(cancellation),
    };
    match receipt {
        Ok(receipt) => assert!(receipt.freed_at >= receipt.posted_at),
        Err(error) => assert!(matches!(error, GenerateError::Closed(_)), "{error}"),
    }
}

/// A caller that does what the checker chooses.
fn behave(engine: &Engine, caller: usize, tokens: usize) {
    let Ok(reader) = Reader::new(engine, caller, tokens) else {
        return;
    };
    match choose(4) {
        0 => {
            reader.read_all();
        }
        // On its way in, in the middle, or at the last token.
        1 => drop(reader.read(choose(tokens + 1))),
        2 => {
            if let Some(reader) = reader.read(choose(tokens + 1)) {
                acknowledge(reader.stream.cancel());
            }
        }
        // From another thread than the one that submitted.
        _ => {
            thread::spawn(move || drop(reader)).join().unwrap();
        }
    }
}

/// I2 and I3, as any moment must have them.
fn check_books(stats: &EngineStats) {
    let outcomes = &stats.outcomes;
    let ended = outcomes.stopped + outcomes.length + outcomes.cancelled + outcomes.failed;
    assert_eq!(outcomes.accepted, ended + stats.open as u64, "{stats:?}");
    assert_eq!(stats.open, stats.running + stats.waiting, "{stats:?}");
}

/// Waits, by asking the scheduler thread, until nothing is open: I12 must hold then.
fn check_idle(engine: &Engine) -> EngineStats {
    loop {
        let stats = engine.stats().expect("the engine is open");
        check_books(&stats);
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

/// Four callers that read, cancel and drop at any moment, and one that looks on.
#[test]
fn i1_i2_i3_i12_hold_whatever_callers_do() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let mut callers = spawn_callers(4, &engine, |engine, index| behave(engine, index, 4));
        let observer = engine.clone();
        callers.push(thread::spawn(move || {
            check_books(&observer.stats().expect("the engine is open"));
        }));
        join(callers);
        let stats = check_idle(&engine);
        assert_eq!(stats.outcomes.accepted, 4);
        assert_eq!(stats.outcomes.failed, 0);
    });
}

/// I9: slow readers pause and resume, and get every token. A resume that is lost is a
/// reader that waits for ever.
#[test]
fn i9_no_pause_outlasts_its_reader() {
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

/// The scheduler thread ends after the last handle and the last stream, and not before
/// the last reader has its answer.
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

/// A shutdown between submissions, reads and cancels: everybody learns of it, and the
/// thread ends.
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

/// `abort_all` between submissions and the last tokens: each request has one outcome,
/// and the engine goes on.
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

/// A permit is back before its caller learns of the end: whoever has seen an end can
/// submit at once.
#[test]
fn the_end_of_a_request_makes_room_for_the_next() {
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

/// One turn of a session: read, cancelled, dropped, or refused as the other party's
/// turn is still on.
fn take_turn(session: &Session) {
    let turn = session.generate(Request::new(vec![choose(3) as u32]).max_tokens(2));
    let stream = match turn {
        Ok(stream) => stream,
        Err(SubmitError::Conflict | SubmitError::PromptTooLong { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    // Whatever the session has been through, the answer is that to all its tokens.
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

/// What the other party does to the session meanwhile.
fn meddle(session: &Session) {
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

/// Sessions whose turns are read, cancelled, stopped, rewound and forked by two parties
/// at once: each turn answers the session's own tokens, and the end of the sessions
/// leaves nothing behind.
#[test]
fn i10_i12_hold_for_sessions_that_two_parties_use() {
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
            parties.push(thread::spawn(move || meddle(&other)));
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

/// A drain between submissions: who came in is answered, who comes later is refused,
/// and the drain counts them all.
#[test]
fn i2_holds_through_a_drain() {
    explore(|| {
        let engine = engine(EngineConfig::default());
        let callers = spawn_callers(3, &engine, |engine, index| {
            match Reader::new(engine, index, 2).map(Reader::read_all) {
                Ok(End::Finished(Outcome::Length)) | Err(SubmitError::Draining) => {}
                // Between the door and the queue.
                Ok(End::Finished(Outcome::Cancelled(CancelReason::Shutdown))) => {}
                Ok(end) => panic!("{end:?}"),
                Err(error) => panic!("{error}"),
            }
        });
        // No test takes that long, and the checker's time stands still.
        let within = Duration::from_secs(1 << 20);
        let draining = engine.drain(within);
        let drained = match choose(2) {
            0 => draining.wait(),
            _ => block_on(draining),
        };
        let aborted = drained.unwrap().aborted;
        join(callers);
        let outcomes = check_idle(&engine).outcomes;
        // Behind the drain, too, somebody may come in and be cancelled.
        assert!(aborted <= outcomes.cancelled, "{aborted} {outcomes:?}");
        engine.shutdown(Shutdown::Drain(within)).wait().unwrap();
    });
}

/// A step that fails fails its sessions; the engine goes on.
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

/// A lost device or a panic closes the engine: every waiter wakes with the cause, and
/// the thread ends.
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

/// Without this, a printed schedule would replay as another one.
#[test]
fn a_schedule_decides_everything_that_happens() {
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
