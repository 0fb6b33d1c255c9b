//! The running and the waiting sequences, each in their order.

use super::tenants::{TenantKey, Tenants};
use super::{SequenceKey, Sequences};
use std::collections::BTreeMap;

/// The running sequences by priority, then by arrival.
#[derive(Debug, Default)]
pub(super) struct RunningQueue {
    keys: Vec<SequenceKey>,
}

impl RunningQueue {
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn keys(&self) -> &[SequenceKey] {
        &self.keys
    }

    /// Inserts a sequence at its position in the order.
    pub fn insert(&mut self, key: SequenceKey, sequences: &Sequences) {
        let at = self.place(key, sequences);
        self.keys.insert(at, key);
    }

    /// Removes a sequence, which must still be in `sequences`.
    pub fn remove(&mut self, key: SequenceKey, sequences: &Sequences) {
        let at = self.place(key, sequences);
        if self.keys.get(at) == Some(&key) {
            self.keys.remove(at);
        }
    }

    fn place(&self, key: SequenceKey, sequences: &Sequences) -> usize {
        let rank = |key: SequenceKey| sequences.get(key).map(|sequence| sequence.rank());
        let own = rank(key);
        self.keys.partition_point(|other| rank(*other) < own)
    }
}

/// The waiting sequences of one tenant, by arrival.
type ArrivalQueue = BTreeMap<u64, SequenceKey>;

/// The waiting sequences by priority, then by how little their tenant was served, then by
/// arrival.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue {
    classes: BTreeMap<i32, BTreeMap<TenantKey, ArrivalQueue>>,
    len: usize,
}

impl WaitingQueue {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn insert(&mut self, key: SequenceKey, sequences: &Sequences) {
        let Some(sequence) = sequences.get(key) else {
            return;
        };
        let class = self.classes.entry(sequence.spec.priority).or_default();
        let queue = class.entry(sequence.tenant).or_default();
        if queue.insert(sequence.arrival, key).is_none() {
            self.len += 1;
        }
    }

    /// Removes a sequence, which must still be in `sequences`.
    pub fn remove(&mut self, key: SequenceKey, sequences: &Sequences) {
        let Some(sequence) = sequences.get(key) else {
            return;
        };
        let priority = sequence.spec.priority;
        let Some(class) = self.classes.get_mut(&priority) else {
            return;
        };
        if let Some(queue) = class.get_mut(&sequence.tenant) {
            if queue.remove(&sequence.arrival).is_some() {
                self.len -= 1;
            }
            if queue.is_empty() {
                class.remove(&sequence.tenant);
            }
        }
        if class.is_empty() {
            self.classes.remove(&priority);
        }
    }

    /// Returns the sequence that starts next.
    pub fn next(&self, tenants: &Tenants) -> Option<SequenceKey> {
        let (_, class) = self.classes.first_key_value()?;
        let first = |queue: &ArrivalQueue| {
            queue
                .first_key_value()
                .map(|(arrival, key)| (*arrival, *key))
        };
        class
            .iter()
            .filter_map(|(tenant, queue)| {
                let (arrival, key) = first(queue)?;
                Some((tenants.served(*tenant), arrival, key))
            })
            .min()
            .map(|(_, _, key)| key)
    }
}
