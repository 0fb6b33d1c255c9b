//! Fairness between tenants: whose turn it is among those that wait.
//!
//! A tenant's counter grows with the tokens that are computed for it, answer tokens
//! counting double; the waiting tenant with the lowest counter goes first. Whoever had
//! nothing open starts no lower than the others are, so that nobody saves up, and no
//! lower than it was, so that nobody sheds what it was given (the Virtual Token Counter
//! of Sheng et al., 2024, "Fairness in Serving Large Language Models").

use slotmap::{SlotMap, new_key_type};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Weights of the counter.
const PROMPT_TOKEN: u64 = 1;
const ANSWER_TOKEN: u64 = 2;

/// Tenants with nothing open that are remembered for being ahead of the others.
const REMEMBERED: usize = 1024;

/// Who it is; requests without a tenant are one.
type Tenant = Option<Arc<str>>;

new_key_type! {
    /// Names a tenant's counter, as long as it has something open.
    pub(super) struct TenantKey;
}

#[derive(Debug)]
struct Counter {
    tenant: Tenant,
    served: u64,
    /// Sequences that have not ended.
    open: usize,
}

/// The counters of all tenants that have open sequences, or are ahead of those.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    counters: SlotMap<TenantKey, Counter>,
    by_name: HashMap<Tenant, TenantKey>,
    /// Those with nothing open, the one that is the least ahead first.
    ahead: BTreeSet<(u64, Tenant)>,
}

impl Tenants {
    /// The lowest counter of those with open sequences.
    fn lowest(&self) -> Option<u64> {
        let open = self.counters.values().filter(|counter| counter.open > 0);
        open.map(|counter| counter.served).min()
    }

    /// A sequence of this tenant begins; it ends with [`Tenants::close`].
    pub fn open(&mut self, tenant: &Tenant) -> TenantKey {
        let known = self.by_name.get(tenant).copied();
        // With something open it is where it is.
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
            self.ahead.remove(&(counter.served, tenant.clone()));
            counter.served = counter.served.max(lowest);
            counter.open = 1;
        }
        key
    }

    /// A sequence of this tenant has ended.
    pub fn close(&mut self, key: TenantKey) {
        let Some(counter) = self.counters.get_mut(key) else {
            return;
        };
        counter.open -= 1;
        if counter.open == 0 {
            self.ahead.insert((counter.served, counter.tenant.clone()));
            self.forget();
        }
    }

    /// Forgets who has nothing open and is not ahead of the others, or is one too many.
    fn forget(&mut self) {
        let lowest = self.lowest();
        while let Some((served, _)) = self.ahead.first() {
            let ahead = lowest.is_some_and(|lowest| *served > lowest);
            if ahead && self.ahead.len() <= REMEMBERED {
                break;
            }
            let forgotten = self.ahead.pop_first();
            if let Some(key) = forgotten.and_then(|(_, tenant)| self.by_name.remove(&tenant)) {
                self.counters.remove(key);
            }
        }
    }

    pub fn served(&self, key: TenantKey) -> u64 {
        self.counters.get(key).map_or(0, |counter| counter.served)
    }

    /// Books `rows` computed tokens, of which the last is sampled or not.
    pub fn charge(&mut self, key: TenantKey, rows: usize, sample: bool) {
        if let Some(counter) = self.counters.get_mut(key) {
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
        let (first, other) = (tenants.open(&a), tenants.open(&b));
        tenants.charge(first, 1000, true);
        tenants.charge(other, 10, false);
        tenants.close(first);
        let again = tenants.open(&a);
        assert_eq!(tenants.served(again), 1002, "it comes back as it went");
        let new = tenants.open(&c);
        assert_eq!(tenants.served(new), 10, "a new one starts with the lowest");
        for tenant in [again, other, new] {
            tenants.close(tenant);
        }
        assert!(tenants.is_empty(), "with nobody left nobody is ahead");
    }

    #[test]
    fn no_more_tenants_are_remembered_than_the_bound() {
        let mut tenants = Tenants::default();
        tenants.open(&tenant("waiting"));
        for index in 0..3 * REMEMBERED {
            let other = tenants.open(&tenant(&index.to_string()));
            tenants.charge(other, 5, true);
            tenants.close(other);
        }
        assert!(tenants.counters.len() <= REMEMBERED + 1);
        assert_eq!(tenants.counters.len(), tenants.by_name.len());
    }
}
