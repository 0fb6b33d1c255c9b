//! Queued work: a graph of nodes whose edges come from stream order and recorded events. A node
//! can run once all nodes that it depends on have run.

use super::launch::KernelLaunch;
use super::settings::Schedule;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::sync::Arc;

/// Number of a node; nodes are numbered in the order in which they were queued.
pub type NodeId = u64;

/// A function that `cuLaunchHostFunc` queues.
pub type HostFunction = unsafe extern "C" fn(*mut c_void);

/// Source of a copy to the device.
#[derive(Clone)]
pub enum HostSource {
    /// Pinned memory, read when the copy runs.
    Pinned(usize),
    /// Bytes taken when the copy was queued, as a driver does for pageable memory.
    Snapshot(Arc<[u8]>),
}

/// One unit of queued work.
#[derive(Clone)]
pub enum Op {
    /// Runs a kernel.
    Kernel(Arc<KernelLaunch>),
    /// Copies to the device.
    HostToDevice {
        to: u64,
        from: HostSource,
        len: usize,
    },
    /// Copies to a host address, which must be valid when the copy runs.
    DeviceToHost { to: usize, from: u64, len: usize },
    /// Copies within the device.
    DeviceToDevice { to: u64, from: u64, len: usize },
    /// Fills memory with a value of 1, 2 or 4 bytes.
    Fill {
        to: u64,
        value: u32,
        unit: usize,
        count: usize,
    },
    /// `cuMemAllocAsync`.
    Allocate { address: u64 },
    /// `cuMemFreeAsync`.
    Free { address: u64 },
    /// Records an event.
    Record { event: u64 },
    /// Calls a host function.
    Host { function: HostFunction, data: usize },
    /// Does nothing; joins several edges (event waits, the start and end of graphs).
    Join,
}

impl Op {
    /// Returns whether the operation is a kernel that may begin while the one before it still runs.
    pub fn overlaps(&self) -> bool {
        matches!(self, Op::Kernel(launch) if launch.overlaps)
    }

    /// Describes the operation for reports.
    pub fn describe(&self) -> String {
        match self {
            Op::Kernel(launch) => format!("kernel {}", launch.name()),
            Op::HostToDevice { to, len, .. } => format!("copy of {len} bytes to {to:#x}"),
            Op::DeviceToHost { from, len, .. } => {
                format!("copy of {len} bytes from {from:#x} to the host")
            }
            Op::DeviceToDevice { to, from, len } => {
                format!("copy of {len} bytes from {from:#x} to {to:#x}")
            }
            Op::Fill {
                to, unit, count, ..
            } => format!("fill of {} bytes at {to:#x}", unit * count),
            Op::Allocate { address } => format!("allocation of {address:#x}"),
            Op::Free { address } => format!("free of {address:#x}"),
            Op::Record { event } => format!("record of event {event:#x}"),
            Op::Host { .. } => "host function".to_owned(),
            Op::Join => "wait".to_owned(),
        }
    }

    /// Returns the device addresses that the operation uses, with lengths. For a kernel, these
    /// are the parameter values that can be pointers, with length 1.
    pub fn addresses(&self) -> Vec<(u64, usize)> {
        match self {
            Op::Kernel(launch) => launch.pointers().map(|(_, pointer)| (pointer, 1)).collect(),
            Op::HostToDevice { to, len, .. } => vec![(*to, *len)],
            Op::DeviceToHost { from, len, .. } => vec![(*from, *len)],
            Op::DeviceToDevice { to, from, len } => vec![(*to, *len), (*from, *len)],
            Op::Fill {
                to, unit, count, ..
            } => vec![(*to, unit * count)],
            Op::Allocate { .. }
            | Op::Free { .. }
            | Op::Record { .. }
            | Op::Host { .. }
            | Op::Join => vec![],
        }
    }

    /// Returns whether the operation uses any of the `len` bytes of device memory at `base`.
    pub fn uses_device(&self, base: u64, len: usize) -> bool {
        let end = base + len as u64;
        self.addresses()
            .into_iter()
            .any(|(at, bytes)| at < end && at + bytes as u64 > base)
    }

    /// Returns whether the operation uses any of the `len` bytes of host memory at `base`.
    pub fn uses_host(&self, base: usize, len: usize) -> bool {
        let (at, bytes) = match self {
            Op::HostToDevice {
                from: HostSource::Pinned(at),
                len,
                ..
            } => (*at, *len),
            Op::DeviceToHost { to, len, .. } => (*to, *len),
            _ => return false,
        };
        at < base + len && at + bytes > base
    }
}

/// A node that has not run yet.
pub struct Node {
    /// Context that it belongs to.
    pub context: u64,
    /// Stream that it was queued on.
    pub stream: u64,
    /// Its operation.
    pub op: Op,
    /// A kernel that may still run when this kernel begins, although it is one of those that must
    /// have run before.
    pub overlaps: Option<NodeId>,
    depends: Vec<NodeId>,
    waiting: usize,
    dependents: Vec<NodeId>,
}

/// The nodes that a waiting call needs to run.
#[derive(Debug)]
pub struct Plan {
    needed: BTreeSet<NodeId>,
    ready: BTreeSet<NodeId>,
}

/// All nodes that have not run yet.
#[derive(Default)]
pub struct Queue {
    next: NodeId,
    nodes: BTreeMap<NodeId, Node>,
    ready: BTreeSet<NodeId>,
    random: u64,
    pace: u64,
}

impl Queue {
    /// Seeds the random numbers of [`Schedule::Shuffle`].
    pub fn seed(&mut self, seed: u64) {
        self.random = seed;
        self.pace = self.random() % 4;
    }

    /// Returns a random number of nodes to run while more work is being queued. Some seeds run
    /// nothing ahead, others most of the work.
    pub fn run_ahead(&mut self) -> u64 {
        if self.random() % 4 < self.pace {
            1 + self.random() % 2
        } else {
            0
        }
    }

    /// Returns a random number (SplitMix64).
    pub fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Queues work that may run after all of `depends`, which may include nodes that have
    /// already run.
    pub fn add(&mut self, context: u64, stream: u64, op: Op, mut depends: Vec<NodeId>) -> NodeId {
        let id = self.next;
        self.next += 1;
        depends.sort_unstable();
        depends.dedup();
        depends.retain(|on| self.nodes.contains_key(on));
        for on in &depends {
            if let Some(node) = self.nodes.get_mut(on) {
                node.dependents.push(id);
            }
        }
        let waiting = depends.len();
        if waiting == 0 {
            self.ready.insert(id);
        }
        self.nodes.insert(
            id,
            Node {
                context,
                stream,
                op,
                overlaps: None,
                depends,
                waiting,
                dependents: Vec::new(),
            },
        );
        id
    }

    /// Notes that the kernel `before` may still run when the kernel `id` begins.
    pub fn overlap(&mut self, id: NodeId, before: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.overlaps = Some(before);
        }
    }

    /// Returns the number of nodes that have not run yet.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Returns whether all nodes have run.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Returns whether the node has not run yet.
    pub fn pending(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id)
    }

    /// Iterates over the nodes of the context that have not run yet, oldest first.
    pub fn of_context(&self, context: u64) -> impl Iterator<Item = (NodeId, &Node)> {
        let mine = self
            .nodes
            .iter()
            .filter(move |(_, node)| node.context == context);
        mine.map(|(id, node)| (*id, node))
    }

    /// Returns the targets that have not run yet and all nodes that must run before them.
    pub fn closure(&self, targets: impl IntoIterator<Item = NodeId>) -> BTreeSet<NodeId> {
        let mut found = BTreeSet::new();
        let mut open: Vec<NodeId> = targets.into_iter().collect();
        while let Some(id) = open.pop() {
            if let Some(node) = self.nodes.get(&id)
                && found.insert(id)
            {
                open.extend(&node.depends);
            }
        }
        found
    }

    /// Plans which nodes to run so that all targets have run.
    pub fn plan(&self, targets: impl IntoIterator<Item = NodeId>) -> Plan {
        let needed = self.closure(targets);
        let ready = needed.intersection(&self.ready).copied().collect();
        Plan { needed, ready }
    }

    /// Removes and returns the next node to run for the plan, or `None` if the plan is
    /// complete. [`Schedule::Shuffle`] also picks nodes of the context that the plan does not
    /// need.
    pub fn next(
        &mut self,
        plan: &mut Plan,
        context: u64,
        schedule: Schedule,
    ) -> Option<(NodeId, Node)> {
        if plan.needed.is_empty() {
            return None;
        }
        let id = match schedule {
            Schedule::Eager => *plan.ready.first()?,
            Schedule::Late => *plan.ready.last()?,
            Schedule::Shuffle(_) => self.random_ready(context)?,
        };
        let node = self.take(id)?;
        plan.needed.remove(&id);
        plan.ready.remove(&id);
        let freed = node
            .dependents
            .iter()
            .filter(|id| plan.needed.contains(id) && self.ready.contains(id));
        plan.ready.extend(freed);
        Some((id, node))
    }

    /// Returns a random node of the context that is ready to run.
    pub fn random_ready(&mut self, context: u64) -> Option<NodeId> {
        let can: Vec<NodeId> = {
            let of = |id: &&NodeId| {
                self.nodes
                    .get(id)
                    .is_some_and(|node| node.context == context)
            };
            self.ready.iter().filter(of).copied().collect()
        };
        let choices = can.len() as u64;
        if choices == 0 {
            return None;
        }
        let at = self.random() % choices;
        can.get(at as usize).copied()
    }

    /// Removes a node in order to run it. Nodes that waited only for this one become ready.
    pub fn take(&mut self, id: NodeId) -> Option<Node> {
        let node = self.nodes.remove(&id)?;
        self.ready.remove(&id);
        for dependent in &node.dependents {
            if let Some(next) = self.nodes.get_mut(dependent) {
                next.waiting -= 1;
                if next.waiting == 0 {
                    self.ready.insert(*dependent);
                }
            }
        }
        Some(node)
    }

    /// Drops all nodes of a context. Returns their number.
    pub fn drop_context(&mut self, context: u64) -> usize {
        let mine: Vec<NodeId> = self.of_context(context).map(|(id, _)| id).collect();
        for id in &mine {
            self.take(*id);
        }
        mine.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(queue: &mut Queue, target: NodeId, schedule: Schedule) -> Vec<NodeId> {
        let mut plan = queue.plan([target]);
        let mut order = Vec::new();
        while let Some((id, _)) = queue.next(&mut plan, 1, schedule) {
            order.push(id);
        }
        order
    }

    #[test]
    fn the_late_schedule_runs_only_what_is_needed() {
        let mut queue = Queue::default();
        let a = queue.add(1, 1, Op::Join, vec![]);
        let b = queue.add(1, 2, Op::Join, vec![]);
        let c = queue.add(1, 2, Op::Join, vec![b]);
        assert_eq!(run(&mut queue, c, Schedule::Late), [b, c]);
        assert!(queue.pending(a) && !queue.pending(c));
        let d = queue.add(1, 2, Op::Join, vec![c, a]);
        assert_eq!(run(&mut queue, d, Schedule::Late), [a, d]);
    }

    #[test]
    fn the_late_schedule_runs_the_newest_ready_work_first() {
        let mut queue = Queue::default();
        let a = queue.add(1, 1, Op::Join, vec![]);
        let b = queue.add(1, 2, Op::Join, vec![]);
        let c = queue.add(1, 1, Op::Join, vec![a]);
        let end = queue.add(1, 3, Op::Join, vec![b, c]);
        assert_eq!(run(&mut queue, end, Schedule::Late), [b, a, c, end]);
    }

    #[test]
    fn the_shuffle_schedule_respects_every_edge_and_reaches_every_order() {
        let mut orders = BTreeSet::new();
        for seed in 0..64 {
            let mut queue = Queue::default();
            queue.seed(seed);
            let a = queue.add(1, 1, Op::Join, vec![]);
            let b = queue.add(1, 1, Op::Join, vec![a]);
            let c = queue.add(1, 2, Op::Join, vec![]);
            let end = queue.add(1, 1, Op::Join, vec![b, c]);
            let order = run(&mut queue, end, Schedule::Shuffle(seed));
            let at = |id| order.iter().position(|x| *x == id);
            assert!(
                at(a) < at(b) && at(b) < at(end) && at(c) < at(end),
                "{order:?}"
            );
            orders.insert(order);
        }
        assert_eq!(orders.len(), 3);
    }
}
