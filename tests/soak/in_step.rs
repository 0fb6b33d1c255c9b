//! One caller that advances the engine step by step and cancels between the steps.

use super::tally::Tally;
use super::{ANSWER, OPEN, PROMPT};
use common::random::Random;
use common::requests::{idle, prompt, request};
use futures_util::Stream;
use quell::{CancelReason, Cancellation, Engine, Outcome, TokenStream};
use sim::{SimOptions, expected};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};

/// Requests at a time: more than can run, so that some wait.
const LIVE: usize = 24;

pub fn engine(depth: usize) -> (Engine, Gate) {
    // A rendezvous channel: a permit is handed over only to a thread that waits for one.
    let (permit, gate) = mpsc::sync_channel(0);
    let options = SimOptions {
        depth,
        gate: Some(gate),
        ..SimOptions::default()
    };
    (super::engine(options), Gate(permit))
}

/// Lets the engine's steps complete one at a time. Once it is dropped, all steps complete.
pub struct Gate(mpsc::SyncSender<()>);

impl Gate {
    /// Lets a step complete, if the engine waits for a permit soon.
    fn step(&self) {
        for _ in 0..200 {
            if self.0.try_send(()).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// Lets steps complete until the engine is idle.
    pub fn until_idle(&self, engine: &Engine) {
        let is_idle = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_idle.load(Ordering::Relaxed) {
                    self.step();
                }
            });
            // Set the flag even if `idle` panics, so that the failure is reported instead of
            // hanging.
            let _raise = RaiseOnDrop(&is_idle);
            idle(engine);
        });
    }
}

struct RaiseOnDrop<'a>(&'a AtomicBool);

impl Drop for RaiseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// When a request is cancelled, if at all.
#[derive(Clone, Copy)]
enum Fate {
    /// Never: it is read to its end.
    Whole,
    /// After this many steps, whatever its state is then.
    After(usize),
    /// When all its tokens but one have arrived.
    BeforeLast,
    /// Unread, after this many steps: it may be paused, preempted or finished by then.
    Unread(usize),
}

/// An open request and what it has produced so far.
struct Live {
    stream: TokenStream,
    prompt: Vec<u32>,
    wanted: usize,
    tokens: Vec<u32>,
    fate: Fate,
    steps: usize,
}

/// Runs this many requests to their ends.
pub fn run(engine: &Engine, gate: &Gate, requests: usize, random: &mut Random, tally: &mut Tally) {
    let mut left = requests;
    let mut live: Vec<Live> = Vec::new();
    let mut posted: Vec<(Cancellation, usize)> = Vec::new();
    while left > 0 || !live.is_empty() || !posted.is_empty() {
        while left > 0 && live.len() < LIVE && live.len() + posted.len() < OPEN {
            left -= 1;
            tally.submitted += 1;
            live.push(submit(engine, random));
        }
        gate.step();
        for mut request in std::mem::take(&mut live) {
            request.steps += 1;
            if request.has_ended(tally) {
                continue;
            }
            if !request.should_be_cancelled() {
                live.push(request);
            } else if random.once_in(4) {
                tally.dropped += 1;
                drop(request.stream);
            } else {
                posted.push((request.stream.cancel(), request.wanted));
            }
        }
        if random.once_in(500) {
            // A second cancellation for those just posted, the first one for all others.
            engine.abort_all().unwrap();
        }
        posted.retain_mut(|(cancellation, wanted)| !is_acknowledged(cancellation, *wanted, tally));
    }
    gate.until_idle(engine);
}

fn submit(engine: &Engine, random: &mut Random) -> Live {
    let prompt = prompt(random.below(1000), 1 + random.below(PROMPT));
    let wanted = 2 + random.below(ANSWER - 1);
    let fate = match random.below(16) {
        0..6 => Fate::Whole,
        6..8 => Fate::After(0),
        8..13 => Fate::After(random.below(40)),
        13..15 => Fate::BeforeLast,
        _ => Fate::Unread(40 + random.below(40)),
    };
    Live {
        stream: engine.generate(request(prompt.clone(), wanted)).unwrap(),
        prompt,
        wanted,
        tokens: Vec::new(),
        fate,
        steps: 0,
    }
}

impl Live {
    fn should_be_cancelled(&self) -> bool {
        match self.fate {
            Fate::Whole => false,
            Fate::After(steps) => self.steps > steps,
            Fate::BeforeLast => self.tokens.len() + 1 == self.wanted,
            Fate::Unread(steps) => self.steps > steps,
        }
    }

    /// Reads what has arrived, and returns whether the request has ended.
    fn has_ended(&mut self, tally: &mut Tally) -> bool {
        if matches!(self.fate, Fate::Unread(_)) {
            return false;
        }
        let mut context = Context::from_waker(Waker::noop());
        while let Poll::Ready(chunk) = Pin::new(&mut self.stream).poll_next(&mut context) {
            let chunk = chunk.expect("a finish comes first").unwrap();
            self.tokens.extend(chunk.tokens.ids());
            let Some(finish) = chunk.finish else {
                continue;
            };
            match finish.outcome {
                Outcome::Length => {
                    // I10: whatever happened to the other requests.
                    assert_eq!(self.tokens, expected(&self.prompt, self.wanted));
                    tally.whole += 1;
                }
                Outcome::Cancelled(CancelReason::AbortAll) => tally.aborted += 1,
                other => panic!("{other:?}"),
            }
            return true;
        }
        false
    }
}

fn is_acknowledged(cancellation: &mut Cancellation, wanted: usize, tally: &mut Tally) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    match pin!(cancellation).poll(&mut context) {
        Poll::Pending => false,
        Poll::Ready(receipt) => {
            tally.receipt(&receipt.unwrap(), wanted);
            true
        }
    }
}
