//! The order in which sequences are served: by arrival.

use super::{SequenceKey, Sequences};

/// Sequences in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct ArrivalQueue {
    keys: Vec<SequenceKey>,
}

impl ArrivalQueue {
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn keys(&self) -> &[SequenceKey] {
        &self.keys
    }

    /// Puts a sequence in its place; O(1) for the latest arrival.
    pub fn insert(&mut self, key: SequenceKey, sequences: &Sequences) {
        let arrival = |key: &SequenceKey| sequences.get(*key).map_or(0, |s| s.arrival);
        let own = arrival(&key);
        let later = self
            .keys
            .iter()
            .rev()
            .take_while(|other| arrival(other) > own)
            .count();
        self.keys.insert(self.keys.len() - later, key);
    }

    pub fn remove(&mut self, key: SequenceKey) {
        self.keys.retain(|other| *other != key);
    }
}
