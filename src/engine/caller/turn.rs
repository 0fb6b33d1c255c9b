//! The shared state of a session's turn, through which the session, the reader of the stream
//! and the scheduler thread tell each other how the turn ended.

use crate::engine::sync::atomic::{AtomicU8, Ordering};
use crate::engine::sync::{Arc, OnceLock};
use crate::id::SessionId;
use std::time::Duration;

/// What a session keeps of a turn that it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The prompt and the answer so far.
    Keep,
    /// Nothing: the session returns to its state before the turn.
    Rewind,
}

impl Stop {
    fn flag(self) -> u8 {
        match self {
            Self::Keep => 1,
            Self::Rewind => 2,
        }
    }
}

/// How a turn ended on the scheduler thread.
#[derive(Clone, Debug)]
pub(crate) enum TurnEnd {
    /// The answer is complete, and these are the session's tokens. The reader may still find a
    /// stop string earlier in the answer.
    Finished(Vec<u32>),
    /// The session stopped the turn and keeps these tokens.
    Kept(Vec<u32>),
    /// The session has returned to its state before the turn.
    Rewound,
}

/// State shared by the session, the reader and the scheduler thread. Each field is written at
/// most once, without locks.
#[derive(Debug, Default)]
pub(crate) struct TurnCell {
    /// How the session wants to stop the turn; 0 if it has not stopped it.
    stop: AtomicU8,
    /// Result of the reader: the session's tokens from now on, or `None` if the reader gave up.
    reader: OnceLock<Option<Vec<u32>>>,
    thread: OnceLock<TurnEnd>,
}

impl TurnCell {
    /// Records how the session stops the turn. The first call wins.
    pub fn stop(&self, stop: Stop) {
        let _ = self
            .stop
            .compare_exchange(0, stop.flag(), Ordering::AcqRel, Ordering::Acquire);
    }

    pub fn is_stopped(&self, stop: Stop) -> bool {
        self.stop.load(Ordering::Acquire) == stop.flag()
    }

    /// Records that the reader has reached the end, with the session's tokens, or has given up.
    pub fn set_reader_end(&self, tokens: Option<Vec<u32>>) {
        let _ = self.reader.set(tokens);
    }

    /// Records how the scheduler thread ended the turn. Must be called before the ending is
    /// sent.
    pub fn set_thread_end(&self, end: TurnEnd) {
        let _ = self.thread.set(end);
    }

    /// Returns the session's tokens after the turn. `Some(None)` means that the session is as
    /// it was before the turn, and `None` that the turn is still generating.
    pub fn outcome(&self) -> Option<Option<Vec<u32>>> {
        if self.is_stopped(Stop::Rewind) {
            return Some(None);
        }
        if let Some(tokens) = self.reader.get() {
            return Some(tokens.clone());
        }
        match self.thread.get()? {
            TurnEnd::Kept(tokens) => Some(Some(tokens.clone())),
            TurnEnd::Rewound => Some(None),
            TurnEnd::Finished(tokens) if self.is_stopped(Stop::Keep) => Some(Some(tokens.clone())),
            TurnEnd::Finished(_) => None,
        }
    }
}

/// The scheduler thread's view of a turn.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    pub session: SessionId,
    /// Tokens of the session before the turn.
    pub base: usize,
    /// How long the blocks that the turn leaves to the session are pinned.
    pub pin: Option<Duration>,
    pub cell: Arc<TurnCell>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_over_when_its_reader_or_its_session_says_so() {
        let finished = || TurnEnd::Finished(vec![1, 2, 3]);
        let turn = TurnCell::default();
        assert_eq!(turn.outcome(), None);
        turn.set_thread_end(finished());
        assert_eq!(
            turn.outcome(),
            None,
            "its reader may still find a stop string"
        );
        turn.set_reader_end(Some(vec![1, 2]));
        assert_eq!(turn.outcome(), Some(Some(vec![1, 2])));

        let turn = TurnCell::default();
        turn.set_thread_end(finished());
        turn.stop(Stop::Keep);
        assert_eq!(turn.outcome(), Some(Some(vec![1, 2, 3])));

        let turn = TurnCell::default();
        turn.stop(Stop::Rewind);
        turn.stop(Stop::Keep);
        turn.set_thread_end(finished());
        assert_eq!(turn.outcome(), Some(None), "the first way to stop counts");
    }
}
