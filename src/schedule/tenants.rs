//! Fairness between tenants: whose turn it is among those that wait.
//!
//! A tenant's counter grows with the tokens that are computed for it, answer tokens
//! counting double; the waiting tenant with the lowest counter goes first. One that
//! had nothing open starts at the lowest counter of the others, so that nobody saves
//! up (the Virtual Token Counter of Sheng et al., 2024, "Fairness in Serving Large
//! Language Models").

use std::collections::HashMap;
use std::sync::Arc;

/// Weights of the counter.
const PROMPT_TOKEN: u64 = 1;
const ANSWER_TOKEN: u64 = 2;

#[derive(Debug)]
struct Counter {
    served: u64,
    /// Sequences that have not ended.
    open: usize,
}

/// The counters of all tenants that have open sequences.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    counters: HashMap<Option<Arc<str>>, Counter>,
}

impl Tenants {
    pub fn open(&mut self, tenant: &Option<Arc<str>>) {
        let lowest = self.counters.values().map(|counter| counter.served).min();
        self.counters
            .entry(tenant.clone())
            .or_insert(Counter {
                served: lowest.unwrap_or(0),
                open: 0,
            })
            .open += 1;
    }

    pub fn close(&mut self, tenant: &Option<Arc<str>>) {
        if let Some(counter) = self.counters.get_mut(tenant) {
            counter.open -= 1;
            if counter.open == 0 {
                self.counters.remove(tenant);
            }
        }
    }

    pub fn served(&self, tenant: &Option<Arc<str>>) -> u64 {
        self.counters
            .get(tenant)
            .map_or(0, |counter| counter.served)
    }

    /// Books `rows` computed tokens, of which the last is sampled or not.
    pub fn charge(&mut self, tenant: &Option<Arc<str>>, rows: usize, sample: bool) {
        if let Some(counter) = self.counters.get_mut(tenant) {
            counter.served += rows as u64 * PROMPT_TOKEN + u64::from(sample) * ANSWER_TOKEN;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.counters.is_empty()
    }
}
