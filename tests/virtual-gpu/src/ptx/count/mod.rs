//! Counts what a launch does, for predictions of its speed on a GPU.
//!
//! Counting is off unless [`Options::count`](super::Options) asks for it, and then costs nothing:
//! the interpreter's loop is compiled once with and once without it.

mod banks;
mod kind;
mod sectors;

pub use kind::{Class, Kind};

use super::instruction::{Factors, LANES};
use sectors::{SECTOR, Touched};

/// Requests of warps to global memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Instructions of warps with at least one active lane.
    pub requests: u64,
    /// Bytes that their lanes access.
    pub bytes: u64,
    /// Sectors of 32 bytes that they touch, each counted once per request.
    pub sectors: u64,
}

/// Accesses of warps to shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// Instructions of warps with at least one active lane.
    pub requests: u64,
    /// Clocks that the banks need; see `banks.rs`.
    pub wavefronts: u64,
    /// Clocks that they would need without bank conflicts.
    pub least: u64,
}

/// Ways to access global memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GlobalCounts {
    pub load: Requests,
    pub store: Requests,
    /// `cp.async`.
    pub copy: Requests,
    pub atomic: Requests,
}

/// Ways to access shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedCounts {
    pub load: Accesses,
    pub store: Accesses,
    /// `cp.async`.
    pub copy: Accesses,
    /// `ldmatrix`.
    pub matrix: Accesses,
    pub atomic: Accesses,
}

/// What the warps of a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// PTX instructions by [`Class`], each counted once per warp. Those whose guard switches all
    /// lanes off are included.
    pub classes: [u64; Class::ALL.len()],
    /// Estimated number of machine instructions; see [`Kind::of`].
    pub machine: u64,
    /// Lanes that executed an instruction, summed over the instructions.
    pub lanes: u64,
    pub branches: u64,
    /// Branches that some lanes of a warp take and others do not.
    pub divergent: u64,
    pub global: GlobalCounts,
    /// Bytes of the sectors that the launch reads, each counted once.
    pub read: u64,
    /// Bytes of the sectors that the launch writes, each counted once.
    pub written: u64,
    pub shared: SharedCounts,
    /// Floating-point operations of `mma` with 16-bit factors, or as many as take the same time.
    pub multiplications: u64,
}

impl Counts {
    /// Returns the number of PTX instructions.
    pub fn instructions(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// Returns the wavefronts of all accesses to shared memory.
    pub fn wavefronts(&self) -> u64 {
        self.shared.all().iter().map(|(_, a)| a.wavefronts).sum()
    }

    /// Adds what other warps did, except for the sectors.
    fn add(&mut self, other: &Counts) {
        for (to, from) in self.classes.iter_mut().zip(other.classes) {
            *to += from;
        }
        self.machine += other.machine;
        self.lanes += other.lanes;
        self.branches += other.branches;
        self.divergent += other.divergent;
        self.multiplications += other.multiplications;
        let theirs = other.global;
        self.global.load.add(theirs.load);
        self.global.store.add(theirs.store);
        self.global.copy.add(theirs.copy);
        self.global.atomic.add(theirs.atomic);
        let theirs = other.shared;
        self.shared.load.add(theirs.load);
        self.shared.store.add(theirs.store);
        self.shared.copy.add(theirs.copy);
        self.shared.matrix.add(theirs.matrix);
        self.shared.atomic.add(theirs.atomic);
    }
}

impl GlobalCounts {
    /// Returns all ways with their names in results.
    pub fn all(&self) -> [(&'static str, Requests); 4] {
        [
            ("load", self.load),
            ("store", self.store),
            ("copy", self.copy),
            ("atomic", self.atomic),
        ]
    }
}

impl SharedCounts {
    /// Returns all ways with their names in results.
    pub fn all(&self) -> [(&'static str, Accesses); 5] {
        [
            ("load", self.load),
            ("store", self.store),
            ("copy", self.copy),
            ("matrix", self.matrix),
            ("atomic", self.atomic),
        ]
    }
}

impl Requests {
    fn add(&mut self, other: Requests) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.sectors += other.sectors;
    }
}

impl Accesses {
    fn add(&mut self, other: Accesses) {
        self.requests += other.requests;
        self.wavefronts += other.wavefronts;
        self.least += other.least;
    }

    fn record(&mut self, (wavefronts, least): (u64, u64)) {
        self.add(Accesses {
            requests: 1,
            wavefronts,
            least,
        });
    }
}

/// How an instruction accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Load,
    Store,
    Copy,
    Matrix,
    Atomic,
}

/// The counts of the warps that one host thread runs.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    counts: Counts,
    read: Touched,
    written: Touched,
}

impl Counter {
    /// Records an instruction. `None` stands for a further part of a PTX instruction.
    pub fn instruction(&mut self, kind: Option<Kind>, lanes: u32) {
        if let Some(kind) = kind {
            self.counts.classes[kind.class as usize] += 1;
            self.counts.machine += u64::from(kind.machine);
            self.counts.lanes += u64::from(lanes.count_ones());
        }
    }

    /// Takes back what [`Counter::instruction`] recorded, for an instruction that will be tried
    /// again.
    pub fn take_back(&mut self, kind: Option<Kind>, lanes: u32) {
        if let Some(kind) = kind {
            self.counts.classes[kind.class as usize] -= 1;
            self.counts.machine -= u64::from(kind.machine);
            self.counts.lanes -= u64::from(lanes.count_ones());
        }
    }

    /// Records a branch that the lanes `taken` of the lanes `reached` take.
    pub fn branch(&mut self, taken: u32, reached: u32) {
        self.counts.branches += 1;
        self.counts.divergent += u64::from(taken != 0 && taken != reached);
    }

    /// Records a product of matrices of 16 × `depth` and `depth` × 8 elements. An operation on
    /// tf32 counts as two, because it takes as long as two on 16-bit factors.
    pub fn multiplication(&mut self, depth: u8, factors: Factors) {
        let each = if factors == Factors::Tf32 { 2 } else { 1 };
        self.counts.multiplications += each * 2 * 16 * 8 * u64::from(depth);
    }

    /// Records a request of the lanes of `mask` to global memory. `bytes` is the number of bytes
    /// of all lanes.
    pub fn global(&mut self, way: Way, addresses: &[u64; LANES], mask: u32, bytes: u64) {
        let mut sectors = 0;
        for sector in sectors::sectors(addresses, mask) {
            sectors += 1;
            if way != Way::Store {
                self.read.insert(sector);
            }
            if matches!(way, Way::Store | Way::Atomic) {
                self.written.insert(sector);
            }
        }
        let global = &mut self.counts.global;
        let to = match way {
            Way::Load | Way::Matrix => &mut global.load,
            Way::Store => &mut global.store,
            Way::Copy => &mut global.copy,
            Way::Atomic => &mut global.atomic,
        };
        to.add(Requests {
            requests: 1,
            bytes,
            sectors,
        });
    }

    /// Records an access of the lanes of `mask` to shared memory, with `bytes` bytes per lane.
    pub fn shared(&mut self, way: Way, addresses: &[u64; LANES], mask: u32, bytes: usize) {
        let shared = &mut self.counts.shared;
        match way {
            Way::Atomic => shared
                .atomic
                .record(banks::atomic_wavefronts(addresses, mask)),
            _ => {
                let to = match way {
                    Way::Load | Way::Atomic => &mut shared.load,
                    Way::Store => &mut shared.store,
                    Way::Copy => &mut shared.copy,
                    Way::Matrix => &mut shared.matrix,
                };
                to.record(banks::wavefronts(addresses, mask, bytes));
            }
        }
    }

    /// Adds the counts of another host thread.
    pub fn merge(&mut self, other: &Counter) {
        self.counts.add(&other.counts);
        self.read.merge(&other.read);
        self.written.merge(&other.written);
    }

    /// Returns the counts of the whole launch.
    pub fn counts(&self) -> Counts {
        Counts {
            read: self.read.len() * SECTOR,
            written: self.written.len() * SECTOR,
            ..self.counts
        }
    }
}
