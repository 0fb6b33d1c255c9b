//! The events, which are the only way out of the scheduler thread.

use super::EngineFault;
use super::caller::waiting::Waiter;
use super::metrics::cleanup_failed;
use super::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use super::sync::{Arc, AtomicWaker, OnceLock, Receiver, Sender, TrySendError, bounded};
use crate::device::PooledRows;
use crate::id::StepId;
use crate::sampling::{Token, TokenRun};
use crate::schedule::FinishReason;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Waker;
use std::time::Instant;

/// Why a request was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum CancelReason {
    /// The request's stream was dropped.
    StreamDropped = 1,
    /// A caller cancelled the request.
    Explicit = 2,
    /// A caller cancelled all requests with [`Engine::abort_all`](crate::Engine::abort_all).
    AbortAll = 3,
    /// The engine was shut down or drained before the request had ended.
    Shutdown = 4,
    /// The answer's text contained a stop string. The stream has already ended as a normal
    /// stop; the scheduler thread only frees what the request held.
    StopString = 5,
    /// The reader lagged behind for too long.
    SlowConsumer = 6,
    /// A deadline of the request passed.
    Deadline = 7,
    /// The client closed its connection.
    Disconnect = 8,
    /// The request's session was ended.
    SessionEnded = 9,
    /// The request's session stopped this turn.
    SessionStopped = 11,
    /// The request's stream was dropped before the scheduler thread had accepted the request.
    SubmitDropped = 10,
}

impl CancelReason {
    /// All reasons.
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

    /// Returns the reason to use for a cancel by a caller. Only the stream itself may report a
    /// stop string, because that counts as a normal end.
    pub(crate) fn for_caller(self) -> Self {
        match self {
            Self::StopString => Self::Explicit,
            reason => reason,
        }
    }

    /// Returns the reason's name in logs and metrics.
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

/// How a request ended, for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// At a stop token, a stop string, the model's end of turn, or the end of its constraint.
    Stop,
    /// At the limit on new tokens or the context limit.
    Length,
    /// By a cancel.
    Cancelled(CancelReason),
}

impl Outcome {
    /// Returns the outcome of a request whose sequence ended by itself.
    pub(super) fn of(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
        }
    }

    /// Returns `stop`, `length` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled(_) => "cancelled",
        }
    }
}

/// How an accepted request ended: with an outcome, or by a fault. Each request has exactly one
/// ending (I1).
///
/// The fault is boxed to keep events small, because each request has a buffer of them.
pub(crate) type Ending = Result<Outcome, Box<EngineFault>>;

/// What a request learns about its prompt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PromptReport {
    /// The prompt's tokens after the first, in order, with their log probabilities.
    Scores(Vec<Token>),
    /// Sum of the last hidden states.
    Sum(PooledRows),
}

impl PromptReport {
    /// Adds the report of a later step.
    pub fn add(&mut self, later: Self) {
        match (self, later) {
            (Self::Scores(tokens), Self::Scores(later)) => tokens.extend(later),
            (Self::Sum(sum), Self::Sum(later)) => sum.merge(&later),
            (report, later) => *report = later, // A request has one kind of report.
        }
    }
}

/// What a request's reader receives, at most once per step.
#[derive(Debug)]
pub(crate) struct Event {
    pub tokens: TokenRun,
    /// Sent with the first token, or with the end if there is no token.
    pub report: Option<Box<PromptReport>>,
    pub ending: Option<Ending>,
    pub at: Instant,
}

/// Proof that the resources of a request or a session are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// Blocks of the KV cache that were held and that nobody holds any more.
    pub blocks_freed: usize,
    /// States of recurrent layers that were held and that nobody holds any more; 0 for models
    /// without such layers.
    pub states_freed: usize,
    /// Tokens that had been generated.
    pub tokens_generated: usize,
    /// Tokens that were computed after the end of the answer and discarded: by steps in flight,
    /// or in the same step, behind the token that ended the answer.
    pub tokens_discarded: usize,
    /// The step after whose completion the blocks were free.
    pub step: StepId,
    /// When the cancel was posted, or when the request ended if it was not cancelled.
    pub posted_at: Instant,
    /// When the blocks were free.
    pub freed_at: Instant,
}

impl Receipt {
    /// Creates a receipt for an end at which there was nothing to free.
    pub(crate) fn empty(step: StepId, at: Instant) -> Self {
        Self {
            blocks_freed: 0,
            states_freed: 0,
            tokens_generated: 0,
            tokens_discarded: 0,
            step,
            posted_at: at,
            freed_at: at,
        }
    }
}

/// State shared by the two sides of a request: flags and wakers, without a lock.
#[derive(Debug, Default)]
pub(crate) struct RequestCell {
    cancel: AtomicU8,
    posted: OnceLock<Instant>,
    /// Set by the scheduler thread when it pauses the request because its reader lags behind.
    pub paused: AtomicBool,
    /// Number of prompt tokens that the cache held. Set before the first token is sent.
    pub cached_tokens: AtomicUsize,
    /// Number of answer tokens that the reader keeps after it has found a stop string. Set
    /// before it cancels the request for that reason.
    pub kept_tokens: AtomicUsize,
    reader: AtomicWaker,
    receipt: AtomicWaker,
}

impl RequestCell {
    /// Raises the cancel flag. Returns `true` if it was not raised before.
    pub fn cancel(&self, reason: CancelReason) -> bool {
        self.cancel_at(reason, Instant::now())
    }

    /// Raises the cancel flag, like [`Self::cancel`], for a cancel that was posted earlier.
    pub fn cancel_at(&self, reason: CancelReason, posted: Instant) -> bool {
        // Set the time first, so that a thread that sees the flag finds it.
        let _ = self.posted.set(posted);
        self.cancel
            .compare_exchange(0, reason as u8, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Returns the reason, if the flag is raised.
    pub fn cancelled(&self) -> Option<CancelReason> {
        CancelReason::from_flag(self.cancel.load(Ordering::Acquire))
    }

    pub fn posted_at(&self) -> Option<Instant> {
        self.posted.get().copied()
    }

    pub fn register_reader(&self, waker: &Waker) {
        self.reader.register(waker);
    }

    /// Takes the waker of a reader for which there is something to read. The caller must wake
    /// it.
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

/// Wakes a caller. A waker is the caller's code, so a panic in it must not affect other
/// requests.
pub(super) fn wake(waker: Option<Waker>) {
    let Some(waker) = waker else { return };
    if catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err() {
        tracing::error!("a caller's waker panicked");
        cleanup_failed("waker");
    }
}

/// The scheduler thread's end of a request.
pub(crate) struct EventSender {
    cell: Arc<RequestCell>,
    events: Option<Sender<Event>>,
    receipt: Option<Sender<Receipt>>,
    capacity: usize,
}

/// The caller's end of a request.
pub(crate) struct EventReceiver {
    pub events: Receiver<Event>,
    pub receipt: Receiver<Receipt>,
}

/// Room in the buffer beyond the pause threshold, for the ending and for the tokens of the
/// steps in flight when the threshold is reached.
const HEADROOM: usize = 8;

/// Creates the two ends. The request is paused when `buffer` events are unread.
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
    /// Sends an event without ever blocking (I9), and returns the waker to wake for it. The
    /// event is lost if the reader is gone, or if the buffer is full, which the pause threshold
    /// rules out.
    #[must_use = "the reader that waits for the event must be woken"]
    pub fn send(&self, event: Event) -> Option<Waker> {
        let events = self.events.as_ref()?;
        if let Err(TrySendError::Full(event)) = events.try_send(event) {
            tracing::error!(?event, "a request's buffer overflowed; the event is lost");
            cleanup_failed("events");
        }
        self.cell.take_reader()
    }

    /// Returns whether enough events are unread for the request to be paused.
    pub fn is_full(&self) -> bool {
        self.events
            .as_ref()
            .is_some_and(|events| events.len() >= self.capacity)
    }

    /// Returns whether the reader has caught up enough to continue.
    pub fn has_room(&self) -> bool {
        self.events
            .as_ref()
            .is_some_and(|events| has_room(events.len(), self.capacity))
    }

    pub fn send_receipt(&mut self, receipt: Receipt) {
        if let Some(sender) = self.receipt.take() {
            // There is room, because the receipt is sent only once. A missing reader is not an
            // error.
            let _ = sender.try_send(receipt);
        }
        self.cell.wake_receipt();
    }
}

/// Returns whether a reader with `waiting` unread events, of at most `buffer`, has caught up
/// enough.
pub(crate) fn has_room(waiting: usize, buffer: usize) -> bool {
    waiting <= buffer / 2
}

impl Drop for EventSender {
    fn drop(&mut self) {
        // Disconnect first, so that the woken threads see it.
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

    /// I1: nobody waits for a message that will never come.
    #[test]
    fn dropping_a_sender_wakes_those_who_wait() {
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

    /// I8: further cancels change nothing.
    #[test]
    fn the_first_reason_to_cancel_wins() {
        let cell = RequestCell::default();
        assert_eq!(cell.cancelled(), None);
        assert!(cell.cancel(CancelReason::Explicit));
        assert!(!cell.cancel(CancelReason::StreamDropped));
        assert_eq!(cell.cancelled(), Some(CancelReason::Explicit));
    }

    /// Each open request has a buffer of events.
    #[test]
    fn an_event_takes_less_than_two_cache_lines() {
        assert!(size_of::<Event>() <= 88, "{}", size_of::<Event>());
    }

    #[test]
    fn every_cancel_reason_can_be_restored_from_its_flag() {
        for flag in 1..=11 {
            assert_eq!(
                CancelReason::from_flag(flag).map(|reason| reason as u8),
                Some(flag)
            );
        }
        assert_eq!(CancelReason::from_flag(0), None);
    }
}
