//! Decides which connections are accepted. There is a limit on all connections and one per
//! address.
//!
//! When there is no room, the connection that has been idle the longest is closed, so that
//! clients cannot keep others out by holding connections open.

use super::activity::Activity;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The open connections.
#[derive(Debug)]
pub(super) struct Admission {
    limit: usize,
    per_address: usize,
    open: Mutex<Open>,
    /// Notified when a connection was closed or became idle.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, Connection>,
    /// The connections of each address.
    by_address: HashMap<IpAddr, HashSet<u64>>,
    /// The connections that were asked to make room, until they are closed or were used again.
    evicted: Vec<u64>,
}

#[derive(Debug)]
struct Connection {
    address: IpAddr,
    activity: Arc<Activity>,
}

impl Open {
    /// Returns the number of connections from an address.
    fn of(&self, address: IpAddr) -> usize {
        self.by_address.get(&address).map_or(0, HashSet::len)
    }

    /// Returns whether a connection was asked to make room and is not closed yet. This is asked
    /// whenever a connection becomes idle, so it does not look at all of them.
    fn is_evicting(&mut self) -> bool {
        let connections = &self.connections;
        self.evicted.retain(|id| {
            let connection = connections.get(id);
            connection.is_some_and(|open| open.activity.is_evicted())
        });
        !self.evicted.is_empty()
    }

    /// Asks the connection that has been idle the longest to close, if there is one. Returns
    /// whether one was asked.
    fn evict_any(&mut self) -> bool {
        let longest = longest_idle(self.connections.iter().map(|(id, open)| (*id, open)));
        self.evict(longest)
    }

    /// Like [`Open::evict_any`], for the connections of one address.
    fn evict_from(&mut self, address: IpAddr) -> bool {
        let own = self.by_address.get(&address).into_iter().flatten();
        let own = own.filter_map(|id| Some((*id, self.connections.get(id)?)));
        let longest = longest_idle(own);
        self.evict(longest)
    }

    fn evict(&mut self, chosen: Option<u64>) -> bool {
        let connection = chosen.and_then(|id| Some((id, self.connections.get(&id)?)));
        let asked = connection.filter(|(_, open)| open.activity.evict());
        self.evicted.extend(asked.map(|(id, _)| id));
        asked.is_some()
    }
}

/// Returns the connection that has been idle the longest.
fn longest_idle<'a>(connections: impl Iterator<Item = (u64, &'a Connection)>) -> Option<u64> {
    let idle = connections.filter_map(|(id, open)| Some((open.activity.idle_since()?, id)));
    idle.min().map(|(_, id)| id)
}

impl Admission {
    /// Creates an empty list of connections with these limits.
    pub fn new(limit: usize, per_address: usize) -> Self {
        Self {
            limit,
            per_address,
            open: Mutex::new(Open::default()),
            changed: Arc::new(Notify::new()),
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for one more connection. Closes an idle one if that makes
    /// room.
    pub async fn room(&self) {
        loop {
            {
                let mut open = self.open();
                if open.connections.len() < self.limit {
                    return;
                }
                // Close one at a time: this loop may be woken before the last one has been
                // closed.
                if !open.is_evicting() {
                    open.evict_any();
                }
            }
            // No wake-up is lost, because only the accept loop waits here.
            self.changed.notified().await;
        }
    }

    /// Adds a connection from `address`. If there are too many from that address, asks an idle
    /// one of them to close; if none is idle, refuses the new one and returns `None`.
    pub fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = network(address);
        let mut open = self.open();
        if open.of(address) >= self.per_address && !open.evict_from(address) {
            return None;
        }
        let id = open.next;
        open.next += 1;
        let activity = Arc::new(Activity::new(Arc::clone(&self.changed)));
        let connection = Connection {
            address,
            activity: Arc::clone(&activity),
        };
        open.connections.insert(id, connection);
        open.by_address.entry(address).or_default().insert(id);
        Some(Place {
            admission: Arc::clone(self),
            id,
            activity,
        })
    }
}

/// Returns the network within which a client can choose its address: a /64 network with IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let prefix = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(prefix))
        }
    }
}

/// The place of a connection among the open ones, freed on drop.
#[derive(Debug)]
pub(super) struct Place {
    admission: Arc<Admission>,
    id: u64,
    /// What the connection is doing.
    pub activity: Arc<Activity>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.admission.open();
        if let Some(connection) = open.connections.remove(&self.id)
            && let Entry::Occupied(mut own) = open.by_address.entry(connection.address)
        {
            own.get_mut().remove(&self.id);
            if own.get().is_empty() {
                own.remove();
            }
        }
        drop(open);
        self.admission.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// Polls a future once.
    fn poll<T>(future: impl Future<Output = T>) -> Poll<T> {
        pin!(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    fn evicted(places: &[Option<Place>]) -> Vec<bool> {
        let each = places.iter().flatten();
        each.map(|place| place.activity.is_evicted()).collect()
    }

    #[test]
    fn one_connection_at_a_time_makes_room() {
        let admission = Arc::new(Admission::new(3, 2));
        let from = |last: u8| IpAddr::from([10, 0, 0, last]);
        let mut places: Vec<_> = [1, 2, 2].map(|last| admission.admit(from(last))).into();
        assert!(poll(admission.room()).is_pending());
        assert!(poll(admission.room()).is_pending());
        assert_eq!(evicted(&places), [true, false, false]);
        // It is used again, so another one must close.
        let first = places[0].as_ref().map(|place| Arc::clone(&place.activity));
        let used = first.map(|activity| {
            activity.cancel_eviction();
            activity.request()
        });
        assert!(poll(admission.room()).is_pending());
        assert_eq!(evicted(&places), [false, true, false]);
        places.remove(1);
        assert!(poll(admission.room()).is_ready());
        drop(used);
    }

    #[test]
    fn an_address_makes_room_among_its_own_connections() {
        let admission = Arc::new(Admission::new(8, 2));
        let from = |last: u8| IpAddr::from([10, 0, 0, last]);
        let mut places: Vec<_> = [1, 2, 2].map(|last| admission.admit(from(last))).into();
        let busy = places[1].as_ref().map(|place| place.activity.request());
        places.push(admission.admit(from(2)));
        assert_eq!(evicted(&places), [false, false, true, false]);
        let newest = places[3].as_ref().map(|place| place.activity.request());
        assert!(admission.admit(from(2)).is_none(), "none of them is idle");
        assert!(admission.admit(from(1)).is_some());
        drop((busy, newest));
        places.clear();
        let open = admission.open();
        assert!(open.by_address.is_empty() && open.connections.is_empty());
    }
}
