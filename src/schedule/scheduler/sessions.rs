//! Keeps what sessions retain between their turns: stores it at the end of a turn, and cuts,
//! shares or releases it when the session is rewound, forked or ended.

use super::Scheduler;
use crate::cache::BlockTable;
use crate::id::{SessionId, StepId};
use crate::schedule::retained::RetainedSession;
use crate::schedule::{RetainedCache, Sequence};
use std::time::Instant;

impl Scheduler {
    /// Lets the session keep the blocks of the first `tokens` tokens. Returns the number of
    /// other blocks that no table holds any more.
    pub(super) fn retain(
        &mut self,
        sequence: &mut Sequence,
        session: SessionId,
        tokens: usize,
        pin_until: Option<Instant>,
    ) -> usize {
        if sequence.table.is_empty() {
            // If it was swapped out, it still has its state.
            self.cache.release(&mut sequence.table, sequence.last_step);
            // If the sequence never started, the session still has what it retained before.
            return self.rewind_session(session, tokens);
        }
        let tokens = tokens
            .min(sequence.written_tokens)
            .min(sequence.tokens.len());
        let last_step = sequence.last_step;
        let (tokens, blocks) = self.cache.rewind(&mut sequence.table, tokens, last_step);
        let mut table = std::mem::take(&mut sequence.table);
        if table.is_empty() {
            return blocks;
        }
        table.shrink();
        let cap = self.policy.max_pinned_blocks;
        let fits = self.retained.pinned_blocks() + table.len() <= cap;
        self.totals.pins_refused += u64::from(pin_until.is_some() && !fits);
        let pin_until = pin_until.filter(|_| fits);
        self.retained.insert(
            session,
            RetainedSession {
                tokens: sequence.tokens[..tokens].to_vec(),
                table,
                last_step,
                pinned_until: pin_until,
                ..RetainedSession::default()
            },
        );
        blocks
    }

    /// Cuts what a session keeps to the common beginning with `tokens`.
    pub(super) fn cut_retained(&mut self, session: SessionId, tokens: &[u32]) {
        let Some(retained) = self.retained.get(session) else {
            return;
        };
        let common = retained.tokens.iter().zip(tokens);
        let common = common.take_while(|(retained, new)| retained == new).count();
        // The last token of the prompt is computed, even if its key and value exist.
        let reused = common.min(tokens.len().saturating_sub(1));
        let common = match self.cache.can_continue(&retained.table, reused) {
            true => common,
            false => reused,
        };
        // Called even if nothing is cut, because it marks the session as used.
        self.rewind_session(session, common);
    }

    /// Cuts what a session keeps to its first `tokens` tokens, or to fewer if a window needs
    /// blocks that are gone. Returns the number of blocks that no table holds any more.
    pub fn rewind_session(&mut self, session: SessionId, tokens: usize) -> usize {
        let Some(mut retained) = self.retained.take(session) else {
            return 0;
        };
        let tokens = tokens.min(retained.tokens.len());
        let (tokens, blocks) = self
            .cache
            .rewind(&mut retained.table, tokens, retained.last_step);
        retained.tokens.truncate(tokens);
        if !retained.table.is_empty() {
            self.retained.insert(session, retained);
        }
        blocks
    }

    /// Lets the new session `to` keep what `from` keeps. Both share the blocks.
    pub fn fork_session(&mut self, from: SessionId, to: SessionId) {
        let Some(retained) = self.retained.get(from) else {
            return;
        };
        let table = self.cache.share(&retained.table, retained.tokens.len());
        let fork = RetainedSession {
            tokens: retained.tokens.clone(),
            table,
            last_step: retained.last_step,
            ..RetainedSession::default()
        };
        self.retained.insert(to, fork);
    }

    /// Releases everything that a session keeps. Returns the number of blocks that no table
    /// holds any more, and the last step that touches them.
    pub fn end_session(&mut self, session: SessionId) -> (usize, StepId) {
        match self.retained.take(session) {
            Some(mut retained) => {
                let blocks = self.cache.release(&mut retained.table, retained.last_step);
                (blocks, retained.last_step)
            }
            None => (0, StepId::default()),
        }
    }

    /// Removes the pins that have expired by `now`, so that their sessions can be evicted.
    pub fn expire_pins(&mut self, now: Instant) {
        self.retained.expire(now);
    }

    /// Returns when the next pin expires, if there is one.
    pub fn next_pin_expiry(&self) -> Option<Instant> {
        self.retained.next_expiry()
    }

    /// Returns the size of what a session keeps now.
    pub fn retained(&self, session: SessionId) -> RetainedCache {
        self.retained
            .get(session)
            .map_or_else(RetainedCache::default, RetainedSession::size)
    }

    /// Returns every session that keeps something, ordered by id, with the size and the block
    /// table of what it keeps.
    pub fn retained_sessions(&self) -> Vec<(SessionId, RetainedCache, &BlockTable)> {
        let retained = self.retained.iter();
        let mut all: Vec<_> = retained
            .map(|(session, retained)| (session, retained.size(), &retained.table))
            .collect();
        all.sort_unstable_by_key(|(session, ..)| *session);
        all
    }

    /// Returns what all sessions keep: the tokens, and the blocks that hold them.
    #[cfg(test)]
    pub(crate) fn retained_contents(&self) -> impl Iterator<Item = (&[u32], &BlockTable)> {
        self.retained.contents()
    }
}
