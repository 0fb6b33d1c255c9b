//! Fairness between tenants: decides whose sequence starts next among the waiting ones.
//!
//! Each tenant has a counter of the tokens that were computed for it, in which answer tokens
//! count double. The waiting tenant with the lowest counter goes first. When a tenant without
//! open sequences submits one, its counter is raised to the lowest counter of the other
//! tenants, so that idle time earns no advantage. It is never lowered, so going idle does not
//! reset it. This is the Virtual Token Counter of Sheng et al., 2024, "Fairness in Serving
//! Large Language Models".

use slotmap::{SlotMap, new_key_type};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Weights of tokens in the counter.
const PROMPT_TOKEN: u64 = 1;
const ANSWER_TOKEN: u64 = 2;

/// Maximum number of tenants without open sequences whose counters are remembered.
const MAX_IDLE_TENANTS: usize = 1024;

/// Name of a tenant. Requests without a tenant share the tenant `None`.
type Tenant = Option<Arc<str>>;

new_key_type! {
    /// Key of a tenant's counter. It is valid at least while the tenant has open sequences.
    pub(super) struct TenantKey;
}

#[derive(Debug)]
struct Counter {
    tenant: Tenant,
    served: u64,
    /// Number of sequences that have not ended.
    open: usize,
}

/// The counters of all tenants that have open sequences or are ahead of those that do.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    counters: SlotMap<TenantKey, Counter>,
    by_name: HashMap<Tenant, TenantKey>,
    /// Tenants without open sequences, the lowest counter first.
    idle: BTreeSet<(u64, Tenant)>,
}

impl Tenants {
    /// Returns the lowest counter of the tenants with open sequences.
    fn lowest(&self) -> Option<u64> {
        let open = self.counters.values().filter(|counter| counter.open > 0);
        open.map(|counter| counter.served).min()
    }

    /// Counts a new sequence of this tenant, until [`Tenants::close`] is called for it.
    pub fn open(&mut self, tenant: &Tenant) -> TenantKey {
        let known = self.by_name.get(tenant).copied();
        // The counter of a tenant with open sequences does not change.
        if let Some((key, counter)) = known.and_then(|key| Some((key, self.counters.get_mut(key)?)))
            && counter.open > 0
        {
            counter.open += 1;
            return key;
        }
        let lowest = self.lowest().unwrap_or(0);
        let key = known.unwrap_or_else(|| {
            let key = self.counters.insert(Counter {
                tenant: tenant.clone(),
                served: lowest,
                open: 0,
            });
            self.by_name.insert(tenant.clone(), key);
            key
        });
        if let Some(counter) = self.counters.get_mut(key) {
            self.idle.remove(&(counter.served, tenant.clone()));
            counter.served = counter.served.max(lowest);
            counter.open = 1;
        }
        key
    }

    /// Counts the end of a sequence of this tenant.
    pub fn close(&mut self, key: TenantKey) {
        let Some(counter) = self.counters.get_mut(key) else {
            return;
        };
        counter.open -= 1;
        if counter.open == 0 {
            self.idle.insert((counter.served, counter.tenant.clone()));
            self.forget();
        }
    }

    /// Forgets tenants without open sequences that are not ahead of the others or exceed the
    /// limit.
    fn forget(&mut self) {
        let lowest = self.lowest();
        while let Some((served, _)) = self.idle.first() {
            let ahead = lowest.is_some_and(|lowest| *served > lowest);
            if ahead && self.idle.len() <= MAX_IDLE_TENANTS {
                break;
            }
            let forgotten = self.idle.pop_first();
            if let Some(key) = forgotten.and_then(|(_, tenant)| self.by_name.remove(&tenant)) {
                self.counters.remove(key);
            }
        }
    }

    pub fn served(&self, key: TenantKey) -> u64 {
        self.counters.get(key).map_or(0, |counter| counter.served)
    }

    /// Adds `tokens` computed tokens to the counter, of which `samples` are sampled.
    pub fn charge(&mut self, key: TenantKey, tokens: usize, samples: usize) {
        if let Some(counter) = self.counters.get_mut(key) {
            counter.served += tokens as u64 * PROMPT_TOKEN + samples as u64 * ANSWER_TOKEN;
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
    fn idling_neither_earns_an_advantage_nor_resets_a_counter() {
        let mut tenants = Tenants::default();
        let (a, b, c) = (tenant("a"), tenant("b"), tenant("c"));
        let (first, other) = (tenants.open(&a), tenants.open(&b));
        tenants.charge(first, 1000, 1);
        tenants.charge(other, 10, 0);
        tenants.close(first);
        let again = tenants.open(&a);
        assert_eq!(tenants.served(again), 1002, "its counter was remembered");
        let new = tenants.open(&c);
        assert_eq!(tenants.served(new), 10, "a new one starts with the lowest");
        for tenant in [again, other, new] {
            tenants.close(tenant);
        }
        assert!(tenants.is_empty(), "nothing is left to remember");
    }

    #[test]
    fn the_number_of_remembered_tenants_is_bounded() {
        let mut tenants = Tenants::default();
        tenants.open(&tenant("waiting"));
        for index in 0..3 * MAX_IDLE_TENANTS {
            let other = tenants.open(&tenant(&index.to_string()));
            tenants.charge(other, 5, 1);
            tenants.close(other);
        }
        assert!(tenants.counters.len() <= MAX_IDLE_TENANTS + 1);
        assert_eq!(tenants.counters.len(), tenants.by_name.len());
    }
}
