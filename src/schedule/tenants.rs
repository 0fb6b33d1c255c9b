//! Fairness between tenants: whose turn it is among those that wait.
//!
//! A tenant's counter grows with the tokens that are computed for it, answer tokens
//! counting double; the waiting tenant with the lowest counter goes first. Whoever had
//! nothing open starts no lower than the others are, so that nobody saves up, and no
//! lower than it was, so that nobody sheds what it was given (the Virtual Token Counter
//! of Sheng et al., 2024, "Fairness in Serving Large Language Models").

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Weights of the counter.
const PROMPT_TOKEN: u64 = 1;
const ANSWER_TOKEN: u64 = 2;

/// Tenants with nothing open that are remembered for being ahead of the others.
const REMEMBERED: usize = 1024;

/// Who it is; requests without a tenant are one.
type Tenant = Option<Arc<str>>;

#[derive(Debug)]
struct Counter {
    served: u64,
    /// Sequences that have not ended.
    open: usize,
}

/// The counters of all tenants that have open sequences, or are ahead of those.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    counters: HashMap<Tenant, Counter>,
    /// Those with nothing open, the one that is the least ahead first.
    ahead: BTreeSet<(u64, Tenant)>,
}

impl Tenants {
    /// The lowest counter of those with open sequences.
    fn lowest(&self) -> Option<u64> {
        let open = self.counters.values().filter(|counter| counter.open > 0);
        open.map(|counter| counter.served).min()
    }

    pub fn open(&mut self, tenant: &Tenant) {
        let lowest = self.lowest().unwrap_or(0);
        let counter = self.counters.entry(tenant.clone()).or_insert(Counter {
            served: lowest,
            open: 0,
        });
        if counter.open == 0 {
            self.ahead.remove(&(counter.served, tenant.clone()));
            counter.served = counter.served.max(lowest);
        }
        counter.open += 1;
    }

    pub fn close(&mut self, tenant: &Tenant) {
        let Some(counter) = self.counters.get_mut(tenant) else {
            return;
        };
        counter.open -= 1;
        if counter.open == 0 {
            self.ahead.insert((counter.served, tenant.clone()));
        }
        self.forget();
    }

    /// Forgets who has nothing open and is not ahead of the others, or is one too many.
    fn forget(&mut self) {
        let lowest = self.lowest();
        while let Some((served, _)) = self.ahead.first() {
            let ahead = lowest.is_some_and(|lowest| *served > lowest);
            if ahead && self.ahead.len() <= REMEMBERED {
                break;
            }
            if let Some((_, tenant)) = self.ahead.pop_first() {
                self.counters.remove(&tenant);
            }
        }
    }

    pub fn served(&self, tenant: &Tenant) -> u64 {
        self.counters
            .get(tenant)
            .map_or(0, |counter| counter.served)
    }

    /// Books `rows` computed tokens, of which the last is sampled or not.
    pub fn charge(&mut self, tenant: &Tenant, rows: usize, sample: bool) {
        if let Some(counter) = self.counters.get_mut(tenant) {
            counter.served += rows as u64 * PROMPT_TOKEN + u64::from(sample) * ANSWER_TOKEN;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.counters.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        Some(Arc::from(name))
    }

    #[test]
    fn a_tenant_neither_saves_up_nor_sheds_what_it_was_given() {
        let mut tenants = Tenants::default();
        let (a, b, c) = (tenant("a"), tenant("b"), tenant("c"));
        tenants.open(&a);
        tenants.open(&b);
        tenants.charge(&a, 1000, true);
        tenants.charge(&b, 10, false);
        tenants.close(&a);
        tenants.open(&a);
        assert_eq!(tenants.served(&a), 1002, "it comes back as it went");
        tenants.open(&c);
        assert_eq!(tenants.served(&c), 10, "a new one starts with the lowest");
        for tenant in [&a, &b, &c] {
            tenants.close(tenant);
        }
        assert!(tenants.is_empty(), "with nobody left nobody is ahead");
    }

    #[test]
    fn no_more_tenants_are_remembered_than_the_bound() {
        let mut tenants = Tenants::default();
        tenants.open(&tenant("waiting"));
        for index in 0..3 * REMEMBERED {
            let other = tenant(&index.to_string());
            tenants.open(&other);
            tenants.charge(&other, 5, true);
            tenants.close(&other);
        }
        assert!(tenants.counters.len() <= REMEMBERED + 1);
    }
}
