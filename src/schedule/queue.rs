//! Who runs and who waits, each in its order.

use super::tenants::{TenantKey, Tenants};
use super::{SequenceKey, Sequences};
use std::collections::BTreeMap;

/// The running sequences, urgent ones first, then by arrival.
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

    /// Puts a sequence in its place.
    pub fn insert(&mut self, key: SequenceKey, sequences: &Sequences) {
        let at = self.place(key, sequences);
        self.keys.insert(at, key);
    }

    /// Takes a sequence out, which must still be among `sequences`.
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

/// The sequences of a tenant by their arrival.
type Line = BTreeMap<u64, SequenceKey>;

/// The waiting sequences: urgent ones first, among them the tenant that was served
/// the least, then by arrival.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue {
    classes: BTreeMap<i32, BTreeMap<TenantKey, Line>>,
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
        let line = class.entry(sequence.tenant).or_default();
        if line.insert(sequence.arrival, key).is_none() {
            self.len += 1;
        }
    }

    /// Takes a sequence out, which must still be among `sequences`.
    pub fn remove(&mut self, key: SequenceKey, sequences: &Sequences) {
        let Some(sequence) = sequences.get(key) else {
            return;
        };
        let priority = sequence.spec.priority;
        let Some(class) = self.classes.get_mut(&priority) else {
            return;
        };
        if let Some(line) = class.get_mut(&sequence.tenant) {
            if line.remove(&sequence.arrival).is_some() {
                self.len -= 1;
            }
            if line.is_empty() {
                class.remove(&sequence.tenant);
            }
        }
        if class.is_empty() {
            self.classes.remove(&priority);
        }
    }

    /// The next to be started.
    pub fn next(&self, tenants: &Tenants) -> Option<SequenceKey> {
        let (_, class) = self.classes.first_key_value()?;
        let first = |line: &Line| {
            line.first_key_value()
                .map(|(arrival, key)| (*arrival, *key))
        };
        class
            .iter()
            .filter_map(|(tenant, line)| {
                let (arrival, key) = first(line)?;
                Some((tenants.served(*tenant), arrival, key))
            })
            .min()
            .map(|(_, _, key)| key)
    }
}
