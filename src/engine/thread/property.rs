//! A property test of the scheduler thread as a state machine. It applies random acts of
//! callers and faults of a simulated device, and runs one iteration of the loop at a time on
//! the test's own thread. After each event it checks the invariants of cancellation (I1 to
//! I12). A failure names the invariant that it violates.

mod callers;
// The package `sim` is included, not a dependency: its device must implement the traits of this
// copy of the crate, which is compiled with `cfg(test)`, and a dependency would implement those
// of a second copy.
#[allow(dead_code)] // the tests in `tests/engine` use the rest
#[path = "../../../tests/sim/lib.rs"]
mod sim;

use super::SchedulerThread;
use crate::cache::{BlockCache, BlockId, CacheLayout, StateSlot};
use crate::config::{EngineConfig, Preemption};
use crate::device::DeviceError;
use crate::engine::sync::{Arc, OnceLock, RecvTimeoutError};
use crate::engine::{Engine, EngineFault, EngineStats, Outcome, Request};
use crate::id::RequestId;
use crate::runner::{Runner, StateInfo, StepOutput};
use crate::schedule::{Sequences, StepPlan};
use callers::{Act, Ask, Callers, End, Wanted};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use sim::{SimOptions, SimRunner};
use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

/// More iterations of the loop than any run needs to come to its end.
const MAX_TURNS: usize = 5000;

/// A fault of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The next launch is refused.
    Launch,
    /// The next step that is collected has failed.
    Collect,
    /// The device is lost with the next step.
    Lost,
}

/// The next event of a run.
#[derive(Clone, Debug)]
enum Event {
    /// A caller does something now.
    Act(Act),
    /// A caller does something while the next step is collected.
    During(Act),
    Turn,
    Fault(Fault),
}

/// How a run ends.
#[derive(Clone, Copy, Debug)]
enum Finale {
    /// Everything is dropped.
    Dropped,
    /// Every stream is read to its end.
    Read,
    Shutdown {
        abort: bool,
    },
}

#[derive(Clone, Debug)]
struct Setup {
    depth: usize,
    /// Maximum number of tokens that a step adds to a sequence.
    run: usize,
    blocks: usize,
    block_tokens: usize,
    layout: CacheLayout,
    states: Option<StateInfo>,
    swap_blocks: usize,
    config: EngineConfig,
    finale: Finale,
}

/// State shared by the device and the test.
struct Script {
    callers: RefCell<Callers>,
    fault: Cell<Option<Fault>>,
    /// What callers do while the next step is collected.
    during: RefCell<Vec<Act>>,
    /// Requests in the steps that were launched since the last iteration began.
    planned: RefCell<Vec<RequestId>>,
    sim: RefCell<SimRunner>,
}

/// The simulated device, under the control of the test.
struct Device(Rc<Script>);

impl Runner for Device {
    fn depth(&self) -> usize {
        self.0.sim.borrow().depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        let Script { fault, planned, .. } = &*self.0;
        let keys = plan.items.iter().map(|item| item.key);
        planned
            .borrow_mut()
            .extend(keys.map(|key| sequences[key].id));
        if fault.get() == Some(Fault::Launch) {
            fault.set(None);
            self.0.callers.borrow_mut().faults += 1;
            return Err(sim::failure("launch"));
        }
        self.0.sim.borrow_mut().launch(plan, sequences)
    }

    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.0.sim.borrow_mut().poison(blocks)
    }

    fn poison_states(&mut self, slots: &[StateSlot]) -> Result<(), DeviceError> {
        self.0.sim.borrow_mut().poison_states(slots)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        let Script {
            callers,
            fault,
            during,
            sim,
            ..
        } = &*self.0;
        let in_flight = sim.borrow().in_flight();
        for act in during.take() {
            callers.borrow_mut().act(&act, in_flight);
        }
        match fault.get() {
            Some(Fault::Collect) => {
                fault.set(None);
                callers.borrow_mut().faults += 1;
                Err(sim.borrow_mut().fail_oldest())
            }
            Some(Fault::Lost) => {
                fault.set(None);
                callers.borrow_mut().faults += 1;
                sim.borrow_mut().fail_oldest();
                Err(DeviceError::Lost {
                    device: "sim",
                    operation: "step",
                    reason: "made to be lost".to_owned(),
                })
            }
            _ => sim.borrow_mut().collect(),
        }
    }
}

/// An engine, its callers and its device.
struct Machine {
    script: Rc<Script>,
    /// `None` once the thread has ended.
    thread: Option<SchedulerThread>,
    fault: Arc<OnceLock<EngineFault>>,
    metrics: Snapshotter,
    seen: Seen,
}

/// Counts how often the situations that the test is about have occurred.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    preemptions: u64,
    swaps: u64,
    prefix_hits: u64,
    pins_refused: u64,
    stopped: u64,
    length: u64,
    cancelled: u64,
    failed: u64,
    paused: u64,
    retained: u64,
    pinned: u64,
    cached: u64,
    deferred: u64,
    receipts: u64,
    cached_states: u64,
    full_states: u64,
}

impl Seen {
    /// Takes over the totals, and counts the states that are present now.
    fn look(&mut self, stats: &EngineStats) {
        *self = Self {
            preemptions: stats.preemptions,
            swaps: stats.swaps,
            prefix_hits: stats.prefix_hits,
            pins_refused: stats.pins_refused,
            stopped: stats.outcomes.stopped,
            length: stats.outcomes.length,
            cancelled: stats.outcomes.cancelled,
            failed: stats.outcomes.failed,
            paused: self.paused + u64::from(stats.paused > 0),
            retained: self.retained + u64::from(stats.retained_sessions > 0),
            pinned: self.pinned + u64::from(stats.pinned_blocks > 0),
            cached: self.cached + u64::from(stats.blocks.cached > 0),
            deferred: self.deferred + u64::from(stats.blocks.deferred > 0),
            receipts: self.receipts,
            cached_states: self.cached_states,
            full_states: self.full_states,
        };
    }

    fn add(&mut self, other: &Self) {
        for (total, more) in self.all().into_iter().zip({ *other }.all()) {
            *total.1 += *more.1;
        }
    }

    fn all(&mut self) -> [(&'static str, &mut u64); 16] {
        [
            ("preemptions", &mut self.preemptions),
            ("swaps", &mut self.swaps),
            ("prefix hits", &mut self.prefix_hits),
            ("refused pins", &mut self.pins_refused),
            ("stops", &mut self.stopped),
            ("length limits", &mut self.length),
            ("cancels", &mut self.cancelled),
            ("failures", &mut self.failed),
            ("pauses", &mut self.paused),
            ("retained sessions", &mut self.retained),
            ("pins", &mut self.pinned),
            ("cached blocks", &mut self.cached),
            ("deferred blocks", &mut self.deferred),
            ("receipts", &mut self.receipts),
            ("cached states", &mut self.cached_states),
            ("full states", &mut self.full_states),
        ]
    }
}

impl Machine {
    fn new(setup: &Setup) -> Self {
        let options = SimOptions {
            depth: setup.depth,
            run: setup.run,
            blocks: setup.blocks,
            block_tokens: setup.block_tokens,
            layout: setup.layout.clone(),
            states: setup.states,
            swap_blocks: setup.swap_blocks,
            ..SimOptions::default()
        };
        let info = sim::info(&options);
        let callers = Callers::new(&setup.config, setup.blocks, setup.depth * setup.run);
        let script = Rc::new(Script {
            callers: RefCell::new(callers),
            fault: Cell::default(),
            during: RefCell::default(),
            planned: RefCell::default(),
            sim: RefCell::new(SimRunner::new(options)),
        });
        let device = Box::new(Device(Rc::clone(&script)));
        let recorder = DebuggingRecorder::new();
        let metrics = recorder.snapshotter();
        let (engine, thread, fault) = metrics::with_local_recorder(&recorder, || {
            Engine::by_hand(setup.config.clone(), device, info)
        });
        script.callers.borrow_mut().engine = Some(engine);
        Self {
            script,
            thread: Some(thread),
            fault,
            metrics,
            seen: Seen::default(),
        }
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Act(act) => {
                let in_flight = self.script.sim.borrow().in_flight();
                self.script.callers.borrow_mut().act(act, in_flight);
            }
            Event::During(act) => self.script.during.borrow_mut().push(act.clone()),
            Event::Turn => self.turn(),
            Event::Fault(fault) => self.script.fault.set(Some(*fault)),
        }
        self.check();
    }

    /// Runs one iteration of the loop.
    fn turn(&mut self) {
        let Some(thread) = &mut self.thread else {
            return;
        };
        let turn = {
            let mut callers = self.script.callers.borrow_mut();
            callers.turn += 1;
            callers.turn
        };
        self.script.planned.take();
        // Clearing `idle` keeps the thread from blocking, as if it were woken by a deadline of
        // no request.
        let asleep = std::mem::take(&mut thread.idle) && thread.commands.is_empty();
        let turned = thread.run_iteration();
        let launched = self.script.planned.take();
        assert!(
            !asleep || launched.is_empty(),
            "I12: an idle thread slept although {launched:?} could be computed"
        );
        for asked in &self.script.callers.borrow().asked {
            let posted_before = asked.cancelled_at.is_some_and(|at| at < turn);
            assert!(
                !posted_before || !launched.contains(&asked.id),
                "I5: {} is in a step that was planned after its cancel",
                asked.id
            );
            let open = thread.ledger.key_of(asked.id).is_some();
            assert!(
                asked.cancelled_at.is_none() || !open,
                "I6: {} is open a turn after its cancel",
                asked.id
            );
        }
        match turned {
            Ok(ControlFlow::Continue(())) => self.script.callers.borrow_mut().after_turn(),
            Ok(ControlFlow::Break(())) => self.close(EngineFault::Shutdown),
            Err(cause) => {
                let lost = matches!(cause, EngineFault::Device(DeviceError::Lost { .. }));
                assert!(lost, "I3: the engine has failed: {cause}");
                self.close(cause);
            }
        }
    }

    /// Ends the thread after its last iteration.
    fn close(&mut self, cause: EngineFault) {
        let Some(mut thread) = self.thread.take() else {
            return;
        };
        thread.close(&cause, &self.fault);
        let stats = thread.stats();
        assert_eq!((stats.open, stats.running + stats.waiting), (0, 0), "I1");
        drop(thread);
        let callers = &mut *self.script.callers.borrow_mut();
        let shut = matches!(cause, EngineFault::Shutdown);
        callers.after_close(shut);
        assert_eq!(
            callers.ends(|end| end != End::Closed),
            stats.outcomes.accepted,
            "I1: terminals and accepted requests"
        );
        if shut {
            // What sessions keep is freed together with the device.
            let idle = stats.retained_sessions > 0 || stats.is_idle();
            assert!(idle && stats.closing == 0, "I12: {stats:?}");
        }
    }

    /// Checks the invariants that hold at any moment.
    fn check(&mut self) {
        let Some(thread) = &self.thread else {
            return;
        };
        let stats = thread.stats();
        self.seen.look(&stats);
        let slots = thread.scheduler.cache().state_counts();
        self.seen.cached_states += u64::from(slots.cached > 0);
        self.seen.full_states += u64::from(slots.total > 0 && slots.free == 0);
        let ended = stats.outcomes;
        assert_eq!(
            ended.accepted,
            ended.stopped + ended.length + ended.cancelled + ended.failed + stats.open as u64,
            "I2: {stats:?}"
        );
        assert_eq!(stats.running + stats.waiting, stats.open, "I2: {stats:?}");
        let held = self
            .script
            .callers
            .borrow()
            .engine
            .as_ref()
            .map(Engine::permits);
        assert!(
            held.is_none_or(|held| held >= stats.open),
            "I2: {held:?} permits are held by {} requests",
            stats.open
        );
        if let Err(imbalance) = thread.scheduler.audit() {
            panic!("I3: {imbalance}");
        }
        let (sim, size) = (self.script.sim.borrow(), stats.block_tokens);
        let content = |block: &BlockId| sim.memory()[block.index() * size..][..size].to_vec();
        for (block, tokens) in thread.scheduler.cache().known() {
            assert_eq!(
                content(&block),
                tokens,
                "I11: {block:?} does not hold the tokens that it is cached for"
            );
        }
        for (slot, tokens) in thread.scheduler.cache().known_states() {
            assert_eq!(
                sim.states()[slot.index()],
                sim::state_of(&tokens),
                "I11: {slot:?} does not hold the state that it is cached for"
            );
        }
        for (tokens, table) in thread.scheduler.retained_contents() {
            for (slot, kept) in BlockCache::kept_states(table) {
                let state = sim.states()[slot.index()];
                let expected = sim::state_of(&tokens[..kept]);
                assert_eq!(state, expected, "I11: a session keeps a wrong state");
            }
            for group in 0..thread.scheduler.cache().groups() {
                let held = table.group(group);
                let begin = held.first * size;
                let mut kept: Vec<u32> = held.blocks.iter().flat_map(content).collect();
                kept.truncate(tokens.len() - begin);
                assert_eq!(kept, tokens[begin..], "I11: a session keeps wrong tokens");
            }
        }
    }

    /// Runs iterations until the thread would wait for commands, and one more.
    fn settle(&mut self) {
        for _ in 0..MAX_TURNS {
            let idle = |thread: &SchedulerThread| thread.idle && thread.commands.is_empty();
            let last = self.thread.as_ref().is_none_or(idle);
            self.apply(&Event::Turn);
            if last {
                return;
            }
        }
        panic!("I12: the thread never becomes idle");
    }

    /// Reads every stream to its end.
    fn read_to_end(&mut self) {
        for _ in 0..MAX_TURNS {
            self.settle();
            let mut callers = self.script.callers.borrow_mut();
            callers.read_all();
            if !callers.waits() {
                return;
            }
            drop(callers);
            let stuck = |thread: &SchedulerThread| thread.commands.is_empty();
            let stuck = self.thread.as_ref().is_some_and(stuck);
            assert!(!stuck, "I12: an idle thread has open requests");
        }
        panic!("I12: some requests never end");
    }

    /// Ends everything and checks that nothing is left.
    fn finish(mut self, finale: Finale) -> Seen {
        // Forget the acts and faults that are still to come.
        self.script.during.borrow_mut().clear();
        self.script.fault.set(None);
        match finale {
            Finale::Dropped => {}
            Finale::Read => self.read_to_end(),
            Finale::Shutdown { abort } => {
                self.script.callers.borrow_mut().shut_down(abort);
                self.read_to_end();
                self.settle();
                assert!(self.thread.is_none(), "I12: a shutdown never completes");
            }
        }
        self.script.callers.borrow_mut().drop_streams();
        self.script.callers.borrow_mut().drop_sessions();
        self.settle();
        if let Some(thread) = &self.thread {
            let stats = thread.stats();
            assert!(stats.is_idle(), "I12: {stats:?}");
            let slots = thread.scheduler.cache().state_counts();
            let back = slots.free + slots.cached == slots.total;
            assert!(back, "I12: not all states have come back: {slots:?}");
            let mut callers = self.script.callers.borrow_mut();
            callers.when_idle();
            let permits = callers.engine.as_ref().map(Engine::permits);
            assert_eq!(permits, Some(0), "I12: permits");
            let asked = callers.asked.len() as u64;
            assert_eq!(stats.outcomes.accepted, asked, "I1: accepted requests");
            let outcome = |outcome| callers.ends(|end| end == End::Outcome(outcome));
            let cancelled = callers.ends(|end| matches!(end, End::Outcome(Outcome::Cancelled(_))));
            assert_eq!(
                (
                    outcome(Outcome::Stop),
                    outcome(Outcome::Length),
                    cancelled,
                    callers.ends(|end| end == End::Failed)
                ),
                (
                    stats.outcomes.stopped,
                    stats.outcomes.length,
                    stats.outcomes.cancelled,
                    stats.outcomes.failed
                ),
                "I1: the ends that callers saw, and those in the books"
            );
            // Drop the last handle, so that the thread ends.
            callers.engine = None;
        }
        self.turn();
        assert!(self.thread.is_none(), "I12: the thread has not ended");
        self.check_counters();
        let receipts = self.script.callers.borrow().receipts;
        Seen {
            receipts,
            ..self.seen
        }
    }

    /// I8: cancels that came too late are counted. I9: no event was lost.
    fn check_counters(&self) {
        let (mut noops, mut failures) = (0, 0);
        for (key, _, _, value) in self.metrics.snapshot().into_vec() {
            let DebugValue::Counter(count) = value else {
                continue;
            };
            match key.key().name() {
                "quell_cancel_noop_total" => noops += count,
                "quell_cleanup_failures_total" => failures += count,
                _ => {}
            }
        }
        assert_eq!(failures, 0, "I9: clean-up failed");
        let callers = self.script.callers.borrow();
        let effective = callers.ends(|end| {
            use crate::engine::CancelReason::{Explicit, StreamDropped, SubmitDropped};
            let by_stream = [Explicit, StreamDropped, SubmitDropped].map(Outcome::Cancelled);
            by_stream.map(End::Outcome).contains(&end)
        });
        let (posted, late) = (callers.cancels, callers.late);
        assert!(
            posted <= effective + noops && noops <= posted + late,
            "I8: {posted} cancels and {late} late ones, {effective} ended a request, {noops} did nothing"
        );
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    let length = prop_oneof![4 => 1..10usize, 1 => 10..24usize];
    let tokens = prop_oneof![4 => 1..8usize, 1 => 8..30usize];
    (
        0..3usize,
        length,
        tokens,
        weighted(0.2, 0..6usize),
        prop_oneof![4 => Just(0), 1 => -2..3i32],
        weighted(0.3, 0..2u8),
        weighted(0.04, any::<bool>()),
        prop_oneof![3 => Just(false), 1 => Just(true)],
        prop_oneof![
            12 => Just(Wanted::Tokens),
            2 => Just(Wanted::Scores),
            1 => Just(Wanted::OnlyScores),
            2 => Just(Wanted::Embedding),
        ],
    )
        .prop_map(
            |(
                prompt,
                length,
                max_tokens,
                stop_at,
                priority,
                tenant,
                overdue,
                constrained,
                wanted,
            )| Ask {
                wanted,
                prompt,
                length,
                max_tokens,
                stop_at,
                priority,
                tenant,
                overdue,
                constrained,
            },
        )
}

fn act() -> impl Strategy<Value = Act> {
    let some = any::<u16>().prop_map(usize::from);
    prop_oneof![
        12 => ask().prop_map(Act::Submit),
        3 => (ask(), 2..4usize).prop_map(|(ask, samples)| Act::Samples(ask, samples)),
        24 => some.clone().prop_map(Act::Read),
        6 => some.clone().prop_map(Act::DropStream),
        6 => some.clone().prop_map(Act::Cancel),
        2 => some.clone().prop_map(Act::CancelLate),
        5 => weighted(0.4, any::<bool>()).prop_map(|pin| Act::OpenSession { pin }),
        14 => (some.clone(), ask()).prop_map(|(session, ask)| Act::Turn(session, ask)),
        4 => (some.clone(), any::<bool>()).prop_map(|(session, keep)| Act::Stop(session, keep)),
        3 => (some.clone(), 0..20usize).prop_map(|(session, tokens)| Act::Rewind(session, tokens)),
        4 => some.clone().prop_map(Act::Fork),
        2 => some.clone().prop_map(Act::End),
        2 => some.prop_map(Act::DropSession),
        1 => Just(Act::AbortAll),
        1 => Just(Act::ClearPrefixes),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        60 => act().prop_map(Event::Act),
        12 => act().prop_map(Event::During),
        60 => Just(Event::Turn),
        3 => Just(Event::Fault(Fault::Launch)),
        4 => Just(Event::Fault(Fault::Collect)),
    ]
}

/// An event that may end the engine or its acceptance of requests. It comes late in a run, if
/// at all.
fn last_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Turn),
        1 => any::<bool>().prop_map(|now| Event::Act(Act::Drain { now })),
        1 => Just(Event::Fault(Fault::Lost)),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    (vec(event(), 1..120), last_event(), vec(event(), 0..20)).prop_map(
        |(mut events, last, after)| {
            events.push(last);
            events.extend(after);
            events
        },
    )
}

/// Groups of layers with windows shorter than the sequences. The first group needs all tokens.
fn layout() -> impl Strategy<Value = CacheLayout> {
    let windows: [(&[Option<usize>], usize); 3] = [
        (&[None], 1),
        (&[None, Some(3)], 1),
        (&[None, Some(6), None, Some(2)], 4),
    ];
    (0..windows.len()).prop_map(move |which| {
        let (windows, span) = windows[which];
        CacheLayout::new(windows, 1000, span).expect("no window is empty")
    })
}

fn setup() -> impl Strategy<Value = Setup> {
    let finale = prop_oneof![
        1 => Just(Finale::Dropped),
        2 => Just(Finale::Read),
        1 => any::<bool>().prop_map(|abort| Finale::Shutdown { abort }),
    ];
    // Runs of several tokens need depth 1.
    let depth = prop_oneof![Just((2, 1)), (1..5usize).prop_map(|run| (1, run))];
    // A few slots, and snapshots after every block, or every second or third.
    let states = weighted(0.5, (2..12usize, 1..4usize));
    let memory = (depth, 4..16usize, 1..5usize, 0..8usize, layout(), states);
    let limits = (2..20usize, 1..5usize, 1..5usize, 0..3u8);
    let ways = (any::<bool>(), any::<bool>(), weighted(0.2, Just(())));
    (memory, limits, ways, finale).prop_map(|(memory, limits, ways, finale)| {
        let ((depth, run), blocks, block_tokens, swap_blocks, layout, states) = memory;
        let groups = layout.groups().len();
        let (max_batch_tokens, max_sequences, stream_buffer, pinned) = limits;
        let (prefix_cache, swap, impatient) = ways;
        Setup {
            depth,
            run,
            blocks: blocks * groups,
            block_tokens,
            layout,
            states: states.map(|(slots, blocks)| StateInfo {
                slots,
                interval: blocks * block_tokens,
            }),
            swap_blocks: swap_blocks * groups,
            config: EngineConfig {
                max_batch_tokens: Some(max_batch_tokens),
                max_sequences,
                max_open_requests: 12,
                stream_buffer,
                prefix_cache,
                // `Auto` would depend on time, so that a run could not be repeated.
                preemption: match swap {
                    true => Preemption::Swap,
                    false => Preemption::Recompute,
                },
                pinned_percent: pinned * 40,
                slow_consumer_deadline: impatient.map(|()| Duration::ZERO),
                step_deadline: None,
                audit: true,
                ..EngineConfig::default()
            },
            finale,
        }
    })
}

fn run(setup: &Setup, events: &[Event]) -> Seen {
    let mut machine = Machine::new(setup);
    for event in events {
        machine.apply(event);
    }
    machine.finish(setup.finale)
}

const ASK: Ask = Ask {
    wanted: Wanted::Tokens,
    prompt: 0,
    length: 1,
    max_tokens: 1,
    stop_at: None,
    priority: 0,
    tenant: None,
    overdue: None,
    constrained: false,
};

/// A small engine without a prefix cache and with two steps in flight.
fn small(blocks: usize, block_tokens: usize) -> Setup {
    Setup {
        depth: 2,
        run: 1,
        blocks,
        block_tokens,
        layout: CacheLayout::single(),
        states: None,
        swap_blocks: 4,
        config: EngineConfig {
            max_batch_tokens: Some(7),
            max_sequences: 2,
            stream_buffer: 1,
            prefix_cache: false,
            preemption: Preemption::Swap,
            slow_consumer_deadline: None,
            step_deadline: None,
            audit: true,
            ..EngineConfig::default()
        },
        finale: Finale::Read,
    }
}

#[test]
fn a_step_does_not_swap_out_to_host_blocks_that_it_swaps_in() {
    let ask = |length, max_tokens| Ask {
        length,
        max_tokens,
        ..ASK
    };
    let setup = Setup {
        depth: 1,
        ..small(4, 3)
    };
    // Three requests with slow readers preempt each other.
    let events = [
        Event::Act(Act::OpenSession { pin: None }),
        Event::Act(Act::Submit(ask(1, 1))),
        Event::Turn,
        Event::During(Act::Submit(ask(1, 2))),
        Event::Act(Act::Turn(0, ask(4, 2))),
        Event::Act(Act::Submit(ask(2, 2))),
        Event::Turn,
        Event::Act(Act::Submit(ask(1, 1))),
        Event::Turn,
        Event::Turn,
        Event::Act(Act::Read(1)),
        Event::Turn,
    ];
    run(&setup, &events);
}

#[test]
fn what_a_failed_step_should_have_swapped_out_is_not_swapped_in() {
    let ask = |length, max_tokens| Ask {
        length,
        max_tokens,
        ..ASK
    };
    let mut setup = small(12, 2);
    setup.config.max_batch_tokens = Some(4);
    setup.config.prefix_cache = true;
    // The second request is paused, preempted by the third, and restarted at once.
    let mut events = vec![Event::Act(Act::Submit(ask(1, 1)))];
    events.extend([Event::Turn, Event::Turn, Event::Turn]);
    events.push(Event::Act(Act::Submit(ask(2, 3))));
    events.extend([Event::Turn, Event::Turn, Event::Turn]);
    events.push(Event::Fault(Fault::Collect));
    events.push(Event::Act(Act::Read(1)));
    events.push(Event::Act(Act::Submit(ask(23, 1))));
    events.push(Event::Turn);
    events.push(Event::Act(Act::Read(1)));
    events.extend([Event::Turn, Event::Turn, Event::Turn]);
    run(&setup, &events);
}

#[test]
fn a_session_does_not_keep_what_a_failed_step_should_have_copied() {
    let turn = |length| Act::Turn(0, Ask { length, ..ASK });
    let events = [
        Event::Act(Act::OpenSession { pin: None }),
        Event::Act(turn(5)),
        Event::Turn,
        Event::Turn,
        Event::Turn,
        Event::Act(Act::Read(0)),
        // The two sessions share a block to which the next turn writes, so it is copied.
        Event::Act(Act::Fork(0)),
        Event::Act(turn(1)),
        Event::Turn,
        Event::Act(Act::DropStream(1)),
        Event::Fault(Fault::Collect),
        Event::Turn,
        Event::Act(turn(1)),
    ];
    run(&small(8, 4), &events);
}

#[test]
fn a_turn_may_begin_as_soon_as_the_previous_one_is_stopped_with_a_rewind() {
    let turn = Act::Turn(
        0,
        Ask {
            length: 3,
            max_tokens: 3,
            ..ASK
        },
    );
    let events = [
        Event::Act(Act::OpenSession { pin: None }),
        Event::Act(turn.clone()),
        Event::Turn,
        Event::Act(Act::Stop(0, false)),
        Event::Act(turn),
    ];
    run(&small(8, 4), &events);
}

#[test]
fn a_turn_that_has_been_read_to_its_end_is_not_rewound_by_a_stop() {
    let turn = Act::Turn(0, ASK);
    let events = [
        Event::Act(Act::OpenSession { pin: None }),
        Event::Act(turn.clone()),
        Event::Turn,
        Event::Turn,
        Event::Act(Act::Read(0)),
        Event::Act(Act::Stop(0, false)),
        Event::Turn,
        Event::Act(turn),
    ];
    run(&small(8, 4), &events);
}

/// Applies the posted commands and returns the number of receipts that callers have got. No
/// step is collected in between.
fn receipts_before_the_next_step(machine: &mut Machine) -> u64 {
    let thread = machine.thread.as_mut().expect("the engine is open");
    assert!(!thread.in_flight.is_empty(), "a step is in flight");
    thread.drain_commands();
    let callers = &mut *machine.script.callers.borrow_mut();
    callers.after_turn();
    callers.receipts
}

/// I6: the receipt of a session waits for all steps that touch its blocks: those of its turn,
/// the blocks that it kept, and those that it shares with the session from which it was forked.
#[test]
fn the_receipt_of_a_session_comes_when_no_step_touches_its_blocks() {
    let ask = |stop_at| Ask {
        length: 3,
        max_tokens: 9,
        stop_at,
        ..ASK
    };
    // The session ends during a turn; after a turn for which a token was still being computed
    // when it stopped; and after such a turn and a fork, which ends last.
    let whole = [Act::Read(0), Act::Fork(0), Act::End(0), Act::End(0)];
    for (stop_at, acts) in [
        (None, &whole[3..]),
        (Some(0), &whole[3..]),
        (Some(0), &whole),
    ] {
        let setup = small(8, 4);
        let mut machine = Machine::new(&setup);
        let turn = Act::Turn(0, ask(stop_at));
        machine.apply(&Event::Act(Act::OpenSession { pin: None }));
        machine.apply(&Event::Act(turn));
        machine.apply(&Event::Turn);
        machine.apply(&Event::Turn);
        let stats = machine.thread.as_ref().unwrap().stats();
        assert_eq!(stats.open, usize::from(stop_at.is_none()));
        for act in acts {
            machine.apply(&Event::Act(act.clone()));
        }
        let ends = acts.iter().filter(|act| matches!(act, Act::End(_)));
        let ends = ends.count() as u64;
        assert_eq!(receipts_before_the_next_step(&mut machine), 0, "{acts:?}");
        machine.apply(&Event::Turn);
        assert_eq!(machine.script.callers.borrow().receipts, ends, "{acts:?}");
        machine.finish(setup.finale);
    }
}

/// I9: the deadline of a reader ends with the pause for which it was set.
#[test]
fn a_reader_that_has_caught_up_has_no_deadline() {
    let mut setup = small(8, 4);
    setup.config.slow_consumer_deadline = Some(Duration::from_secs(1 << 20));
    let mut machine = Machine::new(&setup);
    let ask = Ask {
        max_tokens: 9,
        ..ASK
    };
    machine.apply(&Event::Act(Act::Submit(ask)));
    let paused = |machine: &Machine| {
        let thread = machine.thread.as_ref().unwrap();
        let deadline = thread.ledger.next_deadline();
        (thread.stats().paused, deadline.is_some())
    };
    for _ in 0..2 {
        machine.settle();
        assert_eq!(paused(&machine), (1, true));
        while machine.script.callers.borrow_mut().read_any() {}
        let thread = machine.thread.as_mut().unwrap();
        thread.drain_commands();
        assert_eq!(paused(&machine), (0, false));
    }
    machine.finish(setup.finale);
}

#[test]
fn an_idle_thread_wakes_when_the_next_pin_expires() {
    let mut setup = small(8, 4);
    setup.config.pinned_percent = 100;
    for long in [true, false] {
        let mut machine = Machine::new(&setup);
        machine.apply(&Event::Act(Act::OpenSession { pin: Some(long) }));
        machine.apply(&Event::Act(Act::Turn(0, ASK)));
        let pinned = |machine: &Machine| {
            let thread = machine.thread.as_ref().unwrap();
            thread.stats().pinned_blocks
        };
        // Pins expire at the beginning of an iteration, so that this sees even the short one.
        for _ in 0..MAX_TURNS {
            if pinned(&machine) == 0 {
                machine.turn();
            }
        }
        assert_eq!(pinned(&machine), 1);
        let thread = machine.thread.as_mut().unwrap();
        let due = thread.next_due().expect("the pin expires at some time");
        if long {
            thread.scheduler.expire_pins(due);
        } else {
            let woken = thread.wait();
            assert!(matches!(woken, Err(RecvTimeoutError::Timeout)));
            thread.handle_deadlines();
        }
        assert_eq!(thread.next_due(), None);
        assert_eq!(pinned(&machine), 0);
        machine.finish(setup.finale);
    }
}

#[test]
fn a_drain_reports_its_result_even_if_the_engine_is_dropped_meanwhile() {
    let mut machine = Machine::new(&small(8, 4));
    let engine = machine.script.callers.borrow_mut().engine.take().unwrap();
    let drained = engine.drain(Duration::from_secs(3600));
    drop(engine);
    let thread = machine.thread.as_mut().unwrap();
    let mut turns = 0..MAX_TURNS;
    while turns.next().is_some() && thread.run_iteration().unwrap().is_continue() {}
    assert_eq!(drained.wait().unwrap().aborted, 0);
    machine.close(EngineFault::Shutdown);
}

#[test]
fn the_second_request_of_a_group_leads_if_the_first_is_cancelled_before_it_arrives() {
    let mut machine = Machine::new(&small(40, 4));
    let engine = machine.script.callers.borrow_mut().engine.take().unwrap();
    let request = Request::new(vec![1, 2, 3, 4, 5, 6]).max_tokens(2);
    let mut streams = engine.generate_samples(request, 4).unwrap();
    drop(streams.remove(0));
    let thread = machine.thread.as_mut().unwrap();
    thread.drain_commands();
    let plan = thread.plan().unwrap();
    assert_eq!(plan.tokens(), 6, "one of them computes the prompt");
    drop((streams, engine));
}

/// Ensures that the property test does not pass merely because nothing happens.
#[test]
fn random_acts_cover_everything_that_the_property_is_about() {
    let mut runner = TestRunner::deterministic();
    let mut seen = Seen::default();
    for _ in 0..200 {
        let case = (setup(), events()).new_tree(&mut runner).unwrap();
        let (setup, events) = case.current();
        seen.add(&run(&setup, &events));
    }
    for (what, count) in seen.all() {
        assert!(*count > 5, "{count} {what}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_invariant_of_cancellation_holds_after_every_act(
        setup in setup(),
        events in events(),
    ) {
        run(&setup, &events);
    }
}
