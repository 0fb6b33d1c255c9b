//! The keys and values that sessions keep between their turns.
//!
//! When blocks are needed, sessions are evicted in least recently used order. Pinned sessions
//! are exempt: each pin expires at a given time, and the blocks of all pins together are
//! capped. A session whose blocks were evicted recomputes its tokens in its next turn.

use crate::cache::BlockTable;
use crate::id::{SessionId, StepId};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// Size of what a session keeps between its turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RetainedCache {
    /// Number of tokens whose keys and values are retained.
    pub tokens: usize,
    /// Number of blocks that hold them.
    pub blocks: usize,
    /// Whether the blocks are pinned, so that they are not evicted.
    pub pinned: bool,
}

/// The keys and values that one session keeps.
#[derive(Debug, Default)]
pub(super) struct RetainedSession {
    /// Tokens whose keys and values the blocks hold.
    pub tokens: Vec<u32>,
    pub table: BlockTable,
    /// Last step that touches the blocks.
    pub last_step: StepId,
    /// Time until which the blocks are not evicted.
    pub pinned_until: Option<Instant>,
    /// Position in the order of use, which [`RetainedSessions::insert`] sets.
    pub used: u64,
}

impl RetainedSession {
    /// Returns the number of tokens and blocks.
    pub fn size(&self) -> RetainedCache {
        RetainedCache {
            tokens: self.tokens.len(),
            blocks: self.table.len(),
            pinned: self.pinned_until.is_some(),
        }
    }
}

/// The keys and values that all sessions keep.
#[derive(Debug, Default)]
pub(super) struct RetainedSessions {
    sessions: HashMap<SessionId, RetainedSession>,
    /// Sessions without a pin, the least recently used first.
    evictable: BTreeMap<u64, SessionId>,
    /// Sessions with a pin, by the time when it expires, then by their last use.
    pinned: BTreeMap<(Instant, u64), SessionId>,
    uses: u64,
    blocks: usize,
    pinned_blocks: usize,
}

impl RetainedSessions {
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    pub fn pinned_blocks(&self) -> usize {
        self.pinned_blocks
    }

    pub fn tables(&self) -> impl Iterator<Item = &BlockTable> {
        self.sessions.values().map(|retained| &retained.table)
    }

    /// Returns every session that keeps something, in arbitrary order.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &RetainedSession)> {
        self.sessions
            .iter()
            .map(|(session, retained)| (*session, retained))
    }

    #[cfg(test)]
    pub fn contents(&self) -> impl Iterator<Item = (&[u32], &BlockTable)> {
        let sessions = self.sessions.values();
        sessions.map(|retained| (retained.tokens.as_slice(), &retained.table))
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn get(&self, session: SessionId) -> Option<&RetainedSession> {
        self.sessions.get(&session)
    }

    /// Stores what a session keeps. The session must not keep anything yet.
    pub fn insert(&mut self, session: SessionId, mut retained: RetainedSession) {
        self.uses += 1;
        retained.used = self.uses;
        self.blocks += retained.table.len();
        if let Some(until) = retained.pinned_until {
            self.pinned_blocks += retained.table.len();
            self.pinned.insert((until, retained.used), session);
        } else {
            self.evictable.insert(retained.used, session);
        }
        let before = self.sessions.insert(session, retained);
        debug_assert!(before.is_none(), "{session} already keeps something");
    }

    /// Removes and returns what a session keeps.
    pub fn take(&mut self, session: SessionId) -> Option<RetainedSession> {
        let retained = self.sessions.remove(&session)?;
        self.blocks -= retained.table.len();
        if let Some(until) = retained.pinned_until {
            self.pinned_blocks -= retained.table.len();
            self.pinned.remove(&(until, retained.used));
        } else {
            self.evictable.remove(&retained.used);
        }
        Some(retained)
    }

    /// Returns each running total by its name, with the value that a recount gives.
    pub fn sums(&self) -> [(&'static str, usize, usize); 4] {
        let (mut blocks, mut pinned, mut pins, mut evictable) = (0, 0, 0, 0);
        for retained in self.sessions.values() {
            blocks += retained.table.len();
            match retained.pinned_until {
                Some(_) => {
                    pinned += retained.table.len();
                    pins += 1;
                }
                None => evictable += 1,
            }
        }
        [
            ("retained blocks", self.blocks, blocks),
            ("pinned blocks", self.pinned_blocks, pinned),
            ("pinned sessions", self.pinned.len(), pins),
            ("evictable sessions", self.evictable.len(), evictable),
        ]
    }

    /// Returns the sessions without a pin, the least recently used first, and then, if asked to,
    /// those with a pin, in the order in which the pins expire.
    pub fn in_order_of_eviction(
        &self,
        pinned: bool,
    ) -> impl Iterator<Item = (SessionId, &RetainedSession)> {
        let pinned = self.pinned.values().filter(move |_| pinned);
        let order = self.evictable.values().chain(pinned);
        order.filter_map(|session| Some((*session, self.sessions.get(session)?)))
    }

    /// Returns the session whose pin expires first.
    pub fn first_pinned(&self) -> Option<SessionId> {
        self.pinned.first_key_value().map(|(_, session)| *session)
    }

    /// Returns when the next pin expires, if there is one.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.pinned.first_key_value().map(|((until, _), _)| *until)
    }

    /// Removes the pins that have expired by `now`, so that their sessions can be evicted.
    pub fn expire(&mut self, now: Instant) {
        while let Some(pin) = self.pinned.first_entry()
            && pin.key().0 <= now
        {
            let ((_, used), session) = pin.remove_entry();
            self.evictable.insert(used, session);
            if let Some(retained) = self.sessions.get_mut(&session) {
                retained.pinned_until = None;
                self.pinned_blocks -= retained.table.len();
            }
        }
    }
}
