//! The events: the only way out of the scheduler thread.

use super::EngineFault;
use super::metrics::cleanup_failed;
use super::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use super::sync::{Arc, AtomicWaker, OnceLock, Receiver, Sender, TrySendError, bounded};
use super::waiting::Waiter;
use crate::device::PooledRows;
use crate::id::StepId;
use crate::sampling::Sampled;
use crate::schedule::FinishReason;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Waker;
use std::time::Instant;

/// Why a request was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum CancelReason {
    /// Its stream was dropped.
    StreamDropped = 1,
    /// `cancel` was called.
    Explicit = 2,
    /// `abort_all` was called.
    AbortAll = 3,
    /// The engine was shut down, or drained and the request came too late.
    Shutdown = 4,
    /// Its text came to a stop string: the caller's side has ended it as a normal
    /// stop, and the scheduler thread only frees what it held.
    StopString = 5,
    /// The reader lagged behind for too long.
    SlowConsumer = 6,
    /// A deadline of the request has passed.
    Deadline = 7,
    /// The client has gone: its connection was closed.
    Disconnect = 8,
    /// Its session was ended.
    SessionEnded = 9,
    /// Its session stopped this turn.
    SessionStopped = 11,
    /// Its stream was dropped before the scheduler thread had taken the request.
    SubmitDropped = 10,
}

impl CancelReason {
    /// Every reason.
    pub const ALL: [Self; 11] = [
        Self::StreamDropped,
        Self::Explicit,
        Self::AbortAll,
        Self::Shutdown,
        Self::StopString,
        Self::SlowConsumer,
        Self::Deadline,
        Self::Disconnect,
        Self::SessionEnded,
        Self::SessionStopped,
        Self::SubmitDropped,
    ];

    /// What a caller can mean by it: that a stop string was found is for the stream
    /// itself to say, and would count as a normal end.
    pub(crate) fn of_a_caller(self) -> Self {
        match self {
            Self::StopString => Self::Explicit,
            reason => reason,
        }
    }

    /// The reason as logs and metrics name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StreamDropped => "stream_dropped",
            Self::Explicit => "explicit",
            Self::AbortAll => "abort_all",
            Self::Shutdown => "shutdown",
            Self::StopString => "stop_string",
            Self::SlowConsumer => "slow_consumer",
            Self::Deadline => "deadline",
            Self::Disconnect => "disconnect",
            Self::SessionEnded => "session_ended",
            Self::SessionStopped => "session_stopped",
            Self::SubmitDropped => "submit_dropped",
        }
    }

    fn from_flag(flag: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == flag)
    }
}

/// How an accepted request ended, exactly once (I1).
#[derive(Clone, Debug)]
pub(crate) enum Terminal {
    Finished(FinishReason),
    Cancelled(CancelReason),
    /// In a box, which keeps events small: a buffer of them is set aside for each request.
    Failed(Box<EngineFault>),
}

/// How a request ended, for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// A stop token, a stop string, or the model's end of turn.
    Stop,
    /// The limit on new tokens, or the context limit.
    Length,
    /// It was cancelled.
    Cancelled(CancelReason),
}

impl Outcome {
    /// `stop`, `length` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled(_) => "cancelled",
        }
    }
}

/// A generated token; or one of a prompt, where its log-probability was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability under the model's unmodified logits; 0 unless asked for.
    pub logprob: f32,
    /// The likeliest tokens of its step, as many as asked for.
    pub top: Vec<(u32, f32)>,
}

impl From<Sampled> for Token {
    fn from(sampled: Sampled) -> Self {
        let Sampled {
            token,
            logprob,
            top,
            is_finite: _,
        } = sampled;
        Self {
            id: token,
            logprob,
            top,
        }
    }
}

/// What a request learns of its prompt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PromptReport {
    /// Its tokens, in order, with their log-probabilities.
    Scores(Vec<Token>),
    /// The sum of the last hidden states.
    Sum(PooledRows),
}

impl PromptReport {
    /// Adds what a later step has found.
    pub fn add(&mut self, later: Self) {
        match (self, later) {
            (Self::Scores(tokens), Self::Scores(later)) => tokens.extend(later),
            (Self::Sum(sum), Self::Sum(later)) => sum.merge(&later),
            (report, later) => *report = later, // A request has one kind.
        }
    }
}

/// What a session's reader gets for one step: at most one message a step.
#[derive(Debug)]
pub(crate) struct Event {
    pub token: Option<Token>,
    /// With the first token, or with the end if there is none.
    pub report: Option<Box<PromptReport>>,
    pub terminal: Option<Terminal>,
    pub at: Instant,
}

/// Proof that a request's resources are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Blocks of the key-value cache that it held and that are free now.
    pub blocks_freed: usize,
    /// Tokens it had generated.
    pub tokens_generated: usize,
    /// Tokens that steps in flight produced after its end.
    pub tokens_discarded: usize,
    /// The step after whose completion the blocks were free.
    pub step: StepId,
    /// When the cancel was posted; when it ended, if it was not cancelled.
    pub posted_at: Instant,
    /// When its blocks were free.
    pub freed_at: Instant,
}

impl Receipt {
    /// There was nothing to free.
    pub(crate) fn of_nothing(step: StepId, at: Instant) -> Self {
        Self {
            blocks_freed: 0,
            tokens_generated: 0,
            tokens_discarded: 0,
            step,
            posted_at: at,
            freed_at: at,
        }
    }
}

/// What a session's two sides share: flags and wakers, no lock.
#[derive(Debug, Default)]
pub(crate) struct RequestCell {
    cancel: AtomicU8,
    posted: OnceLock<Instant>,
    /// Set by the thread when it pauses the session for its reader's sake.
    pub paused: AtomicBool,
    /// Prompt tokens that the cache held; set before the first token is sent.
    pub cached_tokens: AtomicUsize,
    reader: AtomicWaker,
    receipt: AtomicWaker,
}

impl RequestCell {
    /// Raises the cancel flag; `true` for the first to do so.
    pub fn cancel(&self, reason: CancelReason) -> bool {
        self.cancel_at(reason, Instant::now())
    }

    /// As [`Self::cancel`], for a cancel that was posted earlier.
    pub fn cancel_at(&self, reason: CancelReason, posted: Instant) -> bool {
        // The time first: whoever sees the flag finds it.
        let _ = self.posted.set(posted);
        self.cancel
            .compare_exchange(0, reason as u8, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The reason, if the flag is up.
    pub fn cancelled(&self) -> Option<CancelReason> {
        CancelReason::from_flag(self.cancel.load(Ordering::Acquire))
    }

    pub fn posted_at(&self) -> Option<Instant> {
        self.posted.get().copied()
    }

    pub fn register_reader(&self, waker: &Waker) {
        self.reader.register(waker);
    }

    /// Whom to wake when there is something to read; the caller must.
    fn take_reader(&self) -> Option<Waker> {
        self.reader.take()
    }

    fn wake_reader(&self) {
        wake(self.take_reader());
    }

    fn wake_receipt(&self) {
        wake(self.receipt.take());
    }

    pub fn register_receipt(&self, waker: &Waker) {
        self.receipt.register(waker);
    }
}

impl Waiter for RequestCell {
    fn wake(&self) {
        self.wake_reader();
        self.wake_receipt();
    }
}

/// Wakes a caller. A waker is the caller's code: if it panics, that is the caller's
/// loss, and no other session's.
pub(super) fn wake(waker: Option<Waker>) {
    let Some(waker) = waker else { return };
    if catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err() {
        tracing::error!("the waker of a caller panicked");
        cleanup_failed("waker");
    }
}

/// The scheduler thread's end of a session.
pub(crate) struct EventSender {
    cell: Arc<RequestCell>,
    events: Option<Sender<Event>>,
    receipt: Option<Sender<Receipt>>,
    capacity: usize,
}

/// The caller's end of a session.
pub(crate) struct EventReceiver {
    pub events: Receiver<Event>,
    pub receipt: Receiver<Receipt>,
}

/// Room beyond the pause threshold: the tokens of the steps in flight when the
/// threshold is reached, and the terminal.
const HEADROOM: usize = 8;

/// Makes the two ends; the session is paused when `buffer` events wait.
pub(crate) fn channel(cell: &Arc<RequestCell>, buffer: usize) -> (EventSender, EventReceiver) {
    let (events, event_receiver) = bounded(buffer + HEADROOM);
    let (receipt, receipt_receiver) = bounded(1);
    let sender = EventSender {
        cell: Arc::clone(cell),
        events: Some(events),
        receipt: Some(receipt),
        capacity: buffer,
    };
    (
        sender,
        EventReceiver {
            events: event_receiver,
            receipt: receipt_receiver,
        },
    )
}

impl EventSender {
    /// Sends without ever blocking (I9), and gives whom to wake for it. The event is
    /// lost when the reader is gone or, which the pause threshold rules out, the buffer
    /// is full.
    #[must_use = "whoever waits for the event must be woken"]
    pub fn send(&self, event: Event) -> Option<Waker> {
        let events = self.events.as_ref()?;
        if let Err(TrySendError::Full(event)) = events.try_send(event) {
            tracing::error!(?event, "a session's buffer overflowed; the event is lost");
            cleanup_failed("events");
        }
        self.cell.take_reader()
    }

    /// Whether so many events wait that the session is to be paused.
    pub fn is_full(&self) -> bool {
        self.events
            .as_ref()
            .is_some_and(|events| events.len() >= self.capacity)
    }

    /// Whether the reader has caught up enough to go on.
    pub fn has_room(&self) -> bool {
        self.events
            .as_ref()
            .is_some_and(|events| has_room(events.len(), self.capacity))
    }

    pub fn send_receipt(&mut self, receipt: Receipt) {
        if let Some(sender) = self.receipt.take() {
            // The slot is empty: a receipt is sent once. No reader is no failure.
            let _ = sender.try_send(receipt);
        }
        self.cell.wake_receipt();
    }
}

/// Whether a reader with `waiting` of `buffer` events has caught up enough.
pub(crate) fn has_room(waiting: usize, buffer: usize) -> bool {
    waiting <= buffer / 2
}

impl Drop for EventSender {
    fn drop(&mut self) {
        // Disconnect first, so that whoever wakes sees it.
        self.events = None;
        self.receipt = None;
        self.cell.wake_reader();
        self.cell.wake_receipt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// I1: nobody waits for what will never come.
    #[test]
    fn a_sender_that_is_dropped_wakes_whoever_waits() {
        let cell = Arc::new(RequestCell::default());
        let (sender, receiver) = channel(&cell, 4);
        let woken = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&woken));
        cell.register_reader(&waker);
        cell.register_receipt(&waker);
        drop(sender);
        assert_eq!(woken.0.load(Ordering::SeqCst), 2);
        assert!(receiver.events.try_recv().is_err());
    }

    /// I8.
    #[test]
    fn the_first_reason_to_cancel_wins() {
        let cell = RequestCell::default();
        assert_eq!(cell.cancelled(), None);
        assert!(cell.cancel(CancelReason::Explicit));
        assert!(!cell.cancel(CancelReason::StreamDropped));
        assert_eq!(cell.cancelled(), Some(CancelReason::Explicit));
    }

    /// Each open request has a buffer of them.
    #[test]
    fn an_event_takes_little_more_than_a_cache_line() {
        assert!(size_of::<Event>() <= 72, "{}", size_of::<Event>());
    }

    #[test]
    fn every_reason_survives_its_flag() {
        for flag in 1..=11 {
            assert_eq!(
                CancelReason::from_flag(flag).map(|reason| reason as u8),
                Some(flag)
            );
        }
        assert_eq!(CancelReason::from_flag(0), None);
    }
}
