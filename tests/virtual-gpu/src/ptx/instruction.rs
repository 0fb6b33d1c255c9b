//! Instructions as they are executed: names resolved, registers as slots of the register file.

use super::types::Space;

/// Lanes of a warp.
pub const LANES: usize = 32;
/// A mask with every lane.
pub const ALL: u32 = u32::MAX;
/// The most operands of an instruction.
pub const OPERANDS: usize = 16;
/// Slot of the guard of an instruction that has none.
pub const UNGUARDED: u16 = u16::MAX;

/// Computes each lane by itself: register file, instruction, lanes to write.
///
/// # Safety
/// The register file must hold every slot that the instruction names, as the class that the
/// handler was made for.
pub type Handler = unsafe fn(*mut u32, &Instruction, u32);

/// One instruction, one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Instruction {
    pub action: Action,
    /// Rows of the register file (words, for predicates); destinations first.
    pub slots: [u16; OPERANDS],
    /// Added to the address operand.
    pub offset: i32,
    /// Word of the guard predicate, or [`UNGUARDED`].
    pub guard: u16,
    /// Whether the guard is negated.
    pub negated: bool,
}

/// Where an instruction stands in the texts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// Line of the PTX.
    pub line: u32,
    /// Number of the source file and the line in it, from `.loc`; zeros if unknown.
    pub location: (u32, u32),
}

/// What an instruction does.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// Each lane by itself.
    Lanes(Handler),
    /// To the instruction with this index.
    Branch(u32),
    Exit,
    Trap,
    /// Fences: blocks and warps see one order here anyway.
    Nothing,
    /// `d`: instructions that this warp has executed.
    Clock,
    /// `d..., address`.
    Load(Access),
    /// `address, s...`.
    Store(Access),
    /// `d, address, b, c`.
    Atomic(Access, AtomicOperation),
    /// `shared address, global address, bytes to read`.
    AsyncCopy(u8),
    AsyncCommit,
    /// Until at most so many groups are pending; `None` waits for all, committed or not.
    AsyncWait(Option<u32>),
    /// `d, barrier, threads, predicate`.
    Barrier(Barrier),
    /// `member mask`.
    WarpBarrier,
    /// `d, predicate, a, b, c, member mask`.
    Shuffle(Shuffle),
    /// `d, predicate, member mask`.
    Vote(Vote),
    /// `d, predicate, a, member mask`.
    Match {
        all: bool,
        wide: bool,
    },
    /// `d, a, member mask`.
    Reduce(Reduce),
    /// `d`.
    ActiveMask,
    /// `d..., row address`.
    LoadMatrix {
        count: u8,
        transposed: bool,
    },
    /// `d × 4, a..., b..., c × 4`.
    Multiply {
        depth: u8,
        brain: bool,
    },
}

/// A load, store or atomic operation.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub space: Space,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub size: u8,
    /// Elements of the vector.
    pub count: u8,
    /// Whether a loaded element keeps its sign in a wider register.
    pub signed: bool,
    /// Whether the registers of the elements are 64 bits wide.
    pub wide: bool,
    /// Whether the address is 64 bits wide.
    pub wide_address: bool,
    /// Not plain: volatile or with an order, so it may meet others.
    pub ordered: bool,
}

impl Access {
    /// Bytes that a lane touches.
    pub fn bytes(&self) -> usize {
        usize::from(self.size) * usize::from(self.count)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOperation {
    Add,
    AddSingle,
    AddDouble,
    Min,
    Max,
    MinSigned,
    MaxSigned,
    And,
    Or,
    Xor,
    Increment,
    Decrement,
    Exchange,
    CompareAndSwap,
}

/// A barrier of the block.
#[derive(Clone, Copy, Debug)]
pub struct Barrier {
    /// All threads of a warp must execute it together.
    pub aligned: bool,
    /// Only announces its arrival.
    pub arrive: bool,
    pub with_count: bool,
    /// Combines a predicate of all threads.
    pub combine: Option<Vote>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// How predicates of several threads are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
    Count,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Add,
    Min,
    Max,
    MinSigned,
    MaxSigned,
    And,
    Or,
    Xor,
}
