//! What a kernel did wrong.

use std::fmt;

/// The kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// An access outside of every allocation, or beyond shared, local or parameter memory.
    OutOfBounds,
    /// An address that is not a multiple of the size of the access.
    Misaligned,
    /// Reads bytes that were never written.
    UninitialisedRead,
    /// Threads touch the same shared memory with nothing that orders them.
    SharedRace,
    /// A barrier that not all threads of the block reach together.
    DivergentBarrier,
    /// An instruction of a whole warp that some of its lanes do not execute.
    DivergentWarp,
    /// The launch does not fit the kernel.
    BadParameters,
    /// Something that is not emulated.
    Unsupported,
    /// The kernel stopped itself.
    Trap,
    /// A warp executed more instructions than it is allowed.
    Timeout,
}

/// A fault, and everything that helps to find it.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: FaultKind,
    pub kernel: String,
    /// Line of the PTX; 0 if the launch itself is at fault.
    pub line: u32,
    /// `file:line` of the source, where the PTX tells.
    pub source: Option<String>,
    pub block: [u32; 3],
    /// The first thread at fault.
    pub thread: Option<[u32; 3]>,
    pub address: Option<u64>,
    /// Allocation and offset of the address.
    pub location: Option<String>,
    /// What happened and what was expected.
    pub detail: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in `{}`", self.kind, self.kernel)?;
        if self.line > 0 {
            write!(f, ", PTX line {}", self.line)?;
        }
        if let Some(source) = &self.source {
            write!(f, " ({source})")?;
        }
        if self.line > 0 {
            write!(f, ", block {:?}", self.block)?;
        }
        if let Some(thread) = self.thread {
            write!(f, ", thread {thread:?}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        if let Some(location) = &self.location {
            write!(f, ", {location}")?;
        }
        write!(f, ": {}", self.detail)
    }
}

impl std::error::Error for Fault {}

/// A fault while it is on its way up: the place is added by who knows it.
#[derive(Debug)]
pub struct Stop {
    pub kind: FaultKind,
    pub lane: Option<u32>,
    pub address: Option<u64>,
    pub location: Option<String>,
    pub detail: String,
}

impl Stop {
    pub fn new(kind: FaultKind, detail: impl Into<String>) -> Box<Stop> {
        Box::new(Stop {
            kind,
            lane: None,
            address: None,
            location: None,
            detail: detail.into(),
        })
    }

    pub fn at_lane(mut self: Box<Self>, lane: usize) -> Box<Stop> {
        self.lane = Some(lane as u32);
        self
    }

    pub fn at(mut self: Box<Self>, address: u64, location: impl Into<String>) -> Box<Stop> {
        self.address = Some(address);
        self.location = Some(location.into());
        self
    }
}
