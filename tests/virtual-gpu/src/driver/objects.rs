//! The objects that handles stand for.

use super::capture::GraphNode;
use super::codes::Code;
use super::queue::NodeId;
use crate::ptx;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Instant;

/// A context.
#[derive(Debug)]
pub struct Context {
    /// Ordinal of its device.
    pub device: i32,
    /// Whether it is the device's primary context.
    pub primary: bool,
    /// Flags passed at its creation.
    pub flags: u32,
    /// The error that broke it; every later call fails with it.
    pub sticky: Option<Code>,
    /// Handle of the legacy default stream.
    pub legacy: u64,
    /// Handles of the per-thread default streams.
    pub per_thread: HashMap<ThreadId, u64>,
    /// Limits that were set, by `CUlimit`.
    pub limits: HashMap<i32, usize>,
    /// `CUfunc_cache` preference.
    pub cache: i32,
}

/// Origin of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamRole {
    /// Created by `cuStreamCreate`.
    Created,
    /// The legacy default stream, which waits for all blocking streams, as they wait for it.
    Legacy,
    /// The default stream of a thread.
    PerThread,
}

/// A stream.
#[derive(Debug)]
pub struct Stream {
    /// Context that owns it.
    pub context: u64,
    /// Its origin.
    pub role: StreamRole,
    /// Whether it is ordered with the legacy default stream.
    pub blocking: bool,
    /// Priority, which has no effect.
    pub priority: i32,
    /// The newest node queued on it.
    pub tail: Option<NodeId>,
    /// The kernel after which nothing was queued on it but records of events. It counts as running
    /// until something else waits for it, even if it has run.
    pub last_kernel: Option<NodeId>,
    /// The capture that it takes part in.
    pub capture: Option<u64>,
    /// The tail that the last `cuStreamQuery` found unfinished.
    pub asked: Option<NodeId>,
}

/// The last record of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Never recorded: the event counts as complete.
    Never,
    /// Recorded as this node.
    Node(NodeId),
    /// Recorded in a capture, after these nodes of it.
    Captured { capture: u64, heads: Vec<usize> },
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Context that owns it.
    pub context: u64,
    /// Whether it measures time.
    pub timing: bool,
    /// Its last record.
    pub recorded: Recorded,
    /// When the record ran.
    pub time: Option<Instant>,
    /// Whether a query has found the record unfinished.
    pub asked: bool,
}

/// A loaded module.
pub struct Module {
    /// Context that owns it.
    pub context: u64,
    /// Its kernels.
    pub image: Arc<ptx::Module>,
    /// Handles of the functions that were requested, by name.
    pub functions: HashMap<String, u64>,
}

/// A kernel of a loaded module.
pub struct Function {
    /// Context that owns it.
    pub context: u64,
    /// Handle of its module.
    pub module: u64,
    /// The kernels of the module.
    pub image: Arc<ptx::Module>,
    /// Name of this kernel among them.
    pub name: CString,
    /// Maximum bytes of dynamic shared memory, if raised; otherwise 0.
    pub dynamic_shared: usize,
}

impl Function {
    /// Returns the kernel's name.
    pub fn name(&self) -> &str {
        self.name.to_str().unwrap_or_default()
    }

    /// Returns the kernel. Never `None` in practice, since the kernel was looked up when the
    /// function was created.
    pub fn kernel(&self) -> Option<&ptx::Kernel> {
        self.image.kernel(self.name())
    }
}

/// A captured graph.
#[derive(Clone)]
pub struct Graph {
    /// Context that owns it.
    pub context: u64,
    /// Its nodes; each depends only on earlier ones.
    pub nodes: Arc<[GraphNode]>,
}

/// An executable graph.
pub struct Exec {
    /// Context that owns it.
    pub context: u64,
    /// Its nodes; each depends only on earlier ones.
    pub nodes: Arc<[GraphNode]>,
    /// End of its last launch; launches of the same executable graph must not overlap.
    pub last: Option<NodeId>,
}
