//! The keys and values that sessions keep between their turns.
//!
//! They go to others when blocks are needed, the session unused for the longest first,
//! unless they are pinned: a pin has a limit in time, and all pins together have one in
//! blocks. A session that has lost its blocks computes its tokens anew.

use super::Kept;
use crate::cache::BlockTable;
use crate::id::{SessionId, StepId};
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// What a session keeps.
#[derive(Debug, Default)]
pub(super) struct Retained {
    /// The tokens that the blocks hold.
    pub tokens: Vec<u32>,
    pub table: BlockTable,
    /// The last step that touches the blocks.
    pub touched: StepId,
    /// Kept from others until then.
    pub pinned_until: Option<Instant>,
    /// Its place in the order of use; given when it is kept.
    pub used: u64,
}

impl Retained {
    /// How much it is.
    pub fn kept(&self) -> Kept {
        Kept {
            tokens: self.tokens.len(),
            blocks: self.table.len(),
            pinned: self.pinned_until.is_some(),
        }
    }
}

/// What all sessions keep.
#[derive(Debug, Default)]
pub(super) struct RetainedSessions {
    sessions: HashMap<SessionId, Retained>,
    /// Those that give way, the one unused for the longest first.
    evictable: BTreeMap<u64, SessionId>,
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

    /// Each session that keeps something; in no order.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &Retained)> {
        self.sessions.iter().map(|(session, kept)| (*session, kept))
    }

    #[cfg(test)]
    pub fn contents(&self) -> impl Iterator<Item = (&[u32], &BlockTable)> {
        let sessions = self.sessions.values();
        sessions.map(|kept| (kept.tokens.as_slice(), &kept.table))
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn get(&self, session: SessionId) -> Option<&Retained> {
        self.sessions.get(&session)
    }

    /// Keeps something for a session that keeps nothing yet.
    pub fn insert(&mut self, session: SessionId, mut retained: Retained) {
        self.uses += 1;
        retained.used = self.uses;
        self.blocks += retained.table.len();
        if retained.pinned_until.is_some() {
            self.pinned_blocks += retained.table.len();
        } else {
            self.evictable.insert(retained.used, session);
        }
        let before = self.sessions.insert(session, retained);
        debug_assert!(before.is_none(), "{session} keeps something already");
    }

    /// Takes what a session keeps.
    pub fn take(&mut self, session: SessionId) -> Option<Retained> {
        let retained = self.sessions.remove(&session)?;
        self.evictable.remove(&retained.used);
        self.blocks -= retained.table.len();
        if retained.pinned_until.is_some() {
            self.pinned_blocks -= retained.table.len();
        }
        Some(retained)
    }

    /// The sums that are kept here, each as it is and as a recount finds it.
    pub fn sums(&self) -> [(&'static str, usize, usize); 3] {
        let (mut blocks, mut pinned, mut evictable) = (0, 0, 0);
        for kept in self.sessions.values() {
            blocks += kept.table.len();
            match kept.pinned_until {
                Some(_) => pinned += kept.table.len(),
                None => evictable += 1,
            }
        }
        [
            ("retained blocks", self.blocks, blocks),
            ("pinned blocks", self.pinned_blocks, pinned),
            ("sessions that give way", self.evictable.len(), evictable),
        ]
    }

    /// The session that gives way next: not pinned, unused for the longest.
    pub fn oldest(&self) -> Option<SessionId> {
        self.evictable
            .first_key_value()
            .map(|(_, session)| *session)
    }

    /// The pinned session that would be unpinned first.
    pub fn first_pinned(&self) -> Option<SessionId> {
        let pinned = self.sessions.iter().filter_map(|(session, retained)| {
            Some((retained.pinned_until?, retained.used, *session))
        });
        pinned.min().map(|(_, _, session)| session)
    }

    /// Pins that have come to their end: these sessions give way from now on.
    pub fn expire(&mut self, now: Instant) {
        if self.pinned_blocks == 0 {
            return;
        }
        for (session, retained) in &mut self.sessions {
            if retained.pinned_until.is_some_and(|until| until <= now) {
                retained.pinned_until = None;
                self.pinned_blocks -= retained.table.len();
                self.evictable.insert(retained.used, *session);
            }
        }
    }
}
