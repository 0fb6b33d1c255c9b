//! Adds, pauses and ends sequences.

use super::Scheduler;
use crate::id::RequestId;
use crate::schedule::{Sequence, SequenceKey, SequenceSpec, SequenceState};
use std::time::Instant;

/// What happens to the blocks of a sequence that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockDisposition {
    /// They are released.
    Release,
    /// The sequence's session keeps the blocks of the first tokens.
    Retain {
        /// Number of tokens to keep.
        tokens: usize,
        /// Time until which the blocks are pinned; not pinned if `None`.
        pin_until: Option<Instant>,
    },
}

impl Scheduler {
    /// Adds a sequence to the queue. If its session keeps tokens, those after the common
    /// beginning with the prompt are dropped, and their blocks are released.
    #[cfg(any(test, feature = "internals"))]
    pub fn add(&mut self, id: RequestId, spec: SequenceSpec) -> SequenceKey {
        self.add_follower(id, spec, None)
    }

    /// Like [`Scheduler::add`], for a sequence with the same prompt as `leader`. The sequence
    /// starts when the leader has computed the prompt, and shares its blocks. A leader with
    /// another salt is ignored.
    pub fn add_follower(
        &mut self,
        id: RequestId,
        spec: SequenceSpec,
        leader: Option<SequenceKey>,
    ) -> SequenceKey {
        self.arrivals += 1;
        if let Some(session) = spec.session {
            // A task that needs every token recomputes the whole prompt, so it reuses nothing.
            // Blocks with another salt must not be reused.
            let retained = self.retained.get(session);
            let foreign =
                retained.is_some_and(|retained| retained.table.salt() != spec.salt.as_ref());
            let reusable = match spec.task.needs_every_token() || foreign {
                true => &[],
                false => &*spec.prompt,
            };
            self.cut_retained(session, reusable);
        }
        let tenant = self.tenants.open(&spec.tenant);
        let same_salt = |leader: &SequenceKey| {
            let leader = self.sequences.get(*leader);
            leader.is_some_and(|leader| leader.spec.salt == spec.salt)
        };
        let leader = leader.filter(same_salt);
        let mut sequence = Sequence::new(id, spec, tenant, self.arrivals);
        sequence.leader = leader;
        let key = self.sequences.insert(sequence);
        if let Some(leader) = leader.and_then(|leader| self.sequences.get_mut(leader)) {
            leader.followers.push(key);
        }
        self.unblock(key);
        key
    }

    /// Moves a blocked sequence to the waiting ones, unless something holds it back.
    pub(super) fn unblock(&mut self, key: SequenceKey) {
        let Some(sequence) = self.sequences.get(key) else {
            return;
        };
        if sequence.state != SequenceState::Blocked {
            return;
        }
        let led = sequence
            .leader
            .and_then(|leader| self.sequences.get(leader))
            .is_some_and(|leader| leader.written_tokens < leader.prompt_tokens);
        // A sequence that has started before does not wait for its leader's prompt again.
        let led = led && !sequence.started;
        let held_back = sequence.paused || sequence.in_flight > 0 || led;
        if !held_back {
            self.set_state(key, SequenceState::Waiting);
            self.waiting.insert(key, &self.sequences);
        }
    }

    pub(super) fn set_state(&mut self, key: SequenceKey, state: SequenceState) {
        if let Some(sequence) = self.sequences.get_mut(key) {
            sequence.state = state;
        }
    }

    /// Pauses a sequence, or resumes it.
    pub fn set_paused(&mut self, key: SequenceKey, paused: bool) {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        if sequence.paused == paused {
            return;
        }
        sequence.paused = paused;
        let state = sequence.state;
        if !paused {
            self.paused -= 1;
            self.unblock(key);
            return;
        }
        self.paused += 1;
        // A reader who waits for a follower may not read from this sequence until then.
        let followers = std::mem::take(&mut sequence.followers);
        self.hand_over(followers);
        if state == SequenceState::Waiting {
            self.waiting.remove(key, &self.sequences);
            self.set_state(key, SequenceState::Blocked);
        }
    }

    /// Ends a sequence in any state and releases all its blocks, like [`Scheduler::close`] with
    /// [`BlockDisposition::Release`].
    #[cfg(any(test, feature = "internals"))]
    pub fn remove(&mut self, key: SequenceKey) -> Option<(Sequence, usize)> {
        self.close(key, BlockDisposition::Release)
    }

    /// Ends a sequence in any state. Returns it with the number of blocks that no table holds
    /// any more. These can be allocated at once, or when the last step that touches them has
    /// completed.
    pub fn close(
        &mut self,
        key: SequenceKey,
        disposition: BlockDisposition,
    ) -> Option<(Sequence, usize)> {
        let state = self.sequences.get(key)?.state;
        match state {
            SequenceState::Running => self.running.remove(key, &self.sequences),
            SequenceState::Waiting => self.waiting.remove(key, &self.sequences),
            SequenceState::Blocked => {}
        }
        let mut sequence = self.sequences.remove(key)?;
        self.paused -= usize::from(sequence.paused);
        self.tenants.close(sequence.tenant);
        if let Some(swapped) = sequence.swapped.take() {
            self.host.release(swapped.blocks);
        }
        self.hand_over(std::mem::take(&mut sequence.followers));
        let blocks = match (disposition, sequence.spec.session) {
            (BlockDisposition::Retain { tokens, pin_until }, Some(session)) => {
                self.retain(&mut sequence, session, tokens, pin_until)
            }
            _ => self.cache.release(&mut sequence.table, sequence.last_step),
        };
        Some((sequence, blocks))
    }

    /// Makes the first of these sequences the leader of the others, because their leader ended
    /// before it had computed the prompt.
    fn hand_over(&mut self, followers: Vec<SequenceKey>) {
        let alive = |key: &SequenceKey| self.sequences.contains_key(*key);
        let mut rest = followers.into_iter().filter(alive).collect::<Vec<_>>();
        if rest.is_empty() {
            return;
        }
        let first = rest.remove(0);
        for &follower in &rest {
            if let Some(follower) = self.sequences.get_mut(follower) {
                follower.leader = Some(first);
            }
        }
        if let Some(first) = self.sequences.get_mut(first) {
            first.leader = None;
            first.followers = rest;
        }
        self.unblock(first);
    }
}
