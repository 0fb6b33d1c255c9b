//! What handles stand for.

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
    /// Flags that it was made with.
    pub flags: u32,
    /// The error after which nothing works any more.
    pub sticky: Option<Code>,
    /// Handle of the legacy default stream.
    pub legacy: u64,
    /// Handles of the default streams of threads.
    pub per_thread: HashMap<ThreadId, u64>,
    /// Limits that were set, by `CUlimit`.
    pub limits: HashMap<i32, usize>,
    /// `CUfunc_cache` preference.
    pub cache: i32,
}

/// How a stream came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamRole {
    /// `cuStreamCreate`.
    Created,
    /// The default stream that waits for all blocking streams, and they for it.
    Legacy,
    /// The default stream of a thread.
    PerThread,
}

/// A stream.
#[derive(Debug)]
pub struct Stream {
    /// Context that it belongs to.
    pub context: u64,
    /// How it came to be.
    pub role: StreamRole,
    /// Whether it is in order with the legacy default stream.
    pub blocking: bool,
    /// Priority; a number without effect.
    pub priority: i32,
    /// The newest node queued on it.
    pub tail: Option<NodeId>,
    /// The capture that it takes part in.
    pub capture: Option<u64>,
    /// The tail that the last `cuStreamQuery` found unfinished.
    pub asked: Option<NodeId>,
}

/// What an event last recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Nothing yet: it counts as complete.
    Never,
    /// This node.
    Node(NodeId),
    /// A place in a capture: these nodes of it.
    Captured { capture: u64, heads: Vec<usize> },
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Context that it belongs to.
    pub context: u64,
    /// Whether it takes the time.
    pub timing: bool,
    /// What it last recorded.
    pub recorded: Recorded,
    /// When that ran.
    pub time: Option<Instant>,
    /// Whether a query found the record unfinished.
    pub asked: bool,
}

/// A loaded module.
pub struct Module {
    /// Context that it belongs to.
    pub context: u64,
    /// The kernels.
    pub image: Arc<ptx::Module>,
    /// Handles of the functions that were asked for, by name.
    pub functions: HashMap<String, u64>,
}

/// A kernel of a loaded module.
pub struct Function {
    /// Context that it belongs to.
    pub context: u64,
    /// Handle of the module.
    pub module: u64,
    /// The kernels of the module.
    pub image: Arc<ptx::Module>,
    /// Which of them it is.
    pub name: CString,
    /// Most bytes of dynamic shared memory, if it was raised.
    pub dynamic_shared: usize,
}

impl Function {
    /// Its name.
    pub fn name(&self) -> &str {
        self.name.to_str().unwrap_or_default()
    }

    /// The kernel; `None` cannot be, as it was looked up when the function was made.
    pub fn kernel(&self) -> Option<&ptx::Kernel> {
        self.image.kernel(self.name())
    }
}

/// A captured graph.
#[derive(Clone)]
pub struct Graph {
    /// Context that it belongs to.
    pub context: u64,
    /// Its nodes; each depends on earlier ones only.
    pub nodes: Arc<[GraphNode]>,
}

/// A graph that can be launched.
pub struct Exec {
    /// Context that it belongs to.
    pub context: u64,
    /// Its nodes; each depends on earlier ones only.
    pub nodes: Arc<[GraphNode]>,
    /// The end of its last launch: two launches of one executable graph do not overlap.
    pub last: Option<NodeId>,
}
