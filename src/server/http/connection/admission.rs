//! Decides which connections are accepted. There is a limit on all connections and one per
//! address.
//!
//! When there is no room, the connection that has been idle the longest is closed, so that
//! clients cannot keep others out by holding connections open.

use super::activity::Activity;
use std::collections::HashMap;
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
    /// Number of connections per address.
    counts: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Connection {
    address: IpAddr,
    activity: Arc<Activity>,
}

impl Open {
    fn of(&self, address: IpAddr) -> usize {
        self.counts.get(&address).copied().unwrap_or(0)
    }

    /// Returns whether a connection was asked to make room and is not closed yet.
    fn is_evicting(&self) -> bool {
        let mut connections = self.connections.values();
        connections.any(|open| open.activity.is_evicted())
    }

    /// Asks the connection that has been idle the longest to close, if there is one. If
    /// `address` is given, only connections from there count. Returns whether one was asked.
    fn evict(&self, address: Option<IpAddr>) -> bool {
        let candidates = self.connections.values();
        let candidates = candidates.filter(|open| address.is_none_or(|own| own == open.address));
        let idle = candidates.filter_map(|open| Some((open.activity.idle_since()?, open)));
        let longest = idle.min_by_key(|(since, _)| *since);
        longest.is_some_and(|(_, open)| open.activity.evict())
    }
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
                let open = self.open();
                if open.connections.len() < self.limit {
                    return;
                }
                // Close one at a time: this loop may be woken before the last one has been
                // closed.
                if !open.is_evicting() {
                    open.evict(None);
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
        if open.of(address) >= self.per_address && !open.evict(Some(address)) {
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
        *open.counts.entry(address).or_insert(0) += 1;
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
        if let Some(connection) = open.connections.remove(&self.id) {
            let count = open.counts.get_mut(&connection.address);
            let left = count.map_or(0, |count| {
                *count = count.saturating_sub(1);
                *count
            });
            if left == 0 {
                open.counts.remove(&connection.address);
            }
        }
        drop(open);
        self.admission.changed.notify_one();
    }
}
