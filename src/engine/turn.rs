//! A turn of a session: what its three parties, the session, the reader of its stream
//! and the scheduler thread, tell each other of its end.

use super::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use super::sync::{Arc, OnceLock};
use crate::id::SessionId;
use std::time::Duration;

/// What a session keeps of a turn that it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The prompt and the answer so far.
    Keep,
    /// Nothing: it is as it was before the turn.
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
    /// By itself, after these tokens. Its reader may still find a stop string earlier.
    Finished(Vec<u32>),
    /// Stopped after these tokens, which the session keeps.
    Kept(Vec<u32>),
    /// The session is as it was before.
    Rewound,
}

/// What the three share: written once each, no lock.
#[derive(Debug, Default)]
pub(crate) struct TurnCell {
    /// How the session wants it to stop.
    stop: AtomicU8,
    /// What the reader has made of it: the session's tokens from now on.
    reader: OnceLock<Option<Vec<u32>>>,
    thread: OnceLock<TurnEnd>,
    /// Answer tokens that the reader keeps, once it has found a stop string.
    kept_answer: AtomicUsize,
}

impl TurnCell {
    /// The session stops it; the first way counts.
    pub fn stop(&self, stop: Stop) {
        let _ = self
            .stop
            .compare_exchange(0, stop.flag(), Ordering::AcqRel, Ordering::Acquire);
    }

    pub fn is_stopped(&self, stop: Stop) -> bool {
        self.stop.load(Ordering::Acquire) == stop.flag()
    }

    /// The reader has found a stop string after so many answer tokens; said before the
    /// cancel is posted.
    pub fn keep_answer(&self, tokens: usize) {
        self.kept_answer.store(tokens, Ordering::Release);
    }

    pub fn kept_answer(&self) -> usize {
        self.kept_answer.load(Ordering::Acquire)
    }

    /// The reader has come to the end, or given up.
    pub fn ended_by_reader(&self, tokens: Option<Vec<u32>>) {
        let _ = self.reader.set(tokens);
    }

    /// The scheduler thread has ended it; said before the terminal is sent.
    pub fn ended_by_thread(&self, end: TurnEnd) {
        let _ = self.thread.set(end);
    }

    /// The session's tokens after the turn: `Some(None)` as before it, `None` while it
    /// is still generating.
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

/// A turn, as the scheduler thread knows it.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    pub session: SessionId,
    /// Tokens of the session before it.
    pub base: usize,
    /// How long what it leaves behind is kept from others.
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
        turn.ended_by_thread(finished());
        assert_eq!(
            turn.outcome(),
            None,
            "its reader may find a stop string yet"
        );
        turn.ended_by_reader(Some(vec![1, 2]));
        assert_eq!(turn.outcome(), Some(Some(vec![1, 2])));

        let turn = TurnCell::default();
        turn.ended_by_thread(finished());
        turn.stop(Stop::Keep);
        assert_eq!(turn.outcome(), Some(Some(vec![1, 2, 3])));

        let turn = TurnCell::default();
        turn.stop(Stop::Rewind);
        turn.stop(Stop::Keep);
        turn.ended_by_thread(finished());
        assert_eq!(turn.outcome(), Some(None), "the first way to stop counts");
    }
}
