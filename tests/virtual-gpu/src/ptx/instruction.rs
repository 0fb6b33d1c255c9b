//! Instructions in executable form: names are resolved, and registers are slots of the register
//! file.

use super::types::Space;

/// Lanes per warp.
pub const LANES: usize = 32;
/// Mask of all lanes.
pub const ALL: u32 = u32::MAX;
/// Maximum number of operands of an instruction.
pub const OPERANDS: usize = 16;
/// Value of [`Instruction::guard`] for an instruction without a guard.
pub const UNGUARDED: u16 = u16::MAX;

/// Computes each lane separately. Takes the register file, the instruction, and the mask of
/// lanes to write.
///
/// # Safety
/// The register file must contain every slot that the instruction names, in the class that the
/// handler was built for.
pub type Handler = unsafe fn(*mut u32, &Instruction, u32);

/// One instruction, which fills one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Instruction {
    pub action: Action,
    /// Rows of the register file (words, for predicates); destinations first.
    pub slots: [u16; OPERANDS],
    /// Offset that is added to the address operand.
    pub offset: i32,
    /// Word of the guard predicate, or [`UNGUARDED`].
    pub guard: u16,
    /// Whether the guard is negated.
    pub negated: bool,
}

/// Position of an instruction in the PTX and in the source.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// PTX line.
    pub line: u32,
    /// Source file number and line in it, from `.loc`; zeros if unknown.
    pub location: (u32, u32),
}

/// The operation of an instruction. Operands are listed in the order of the slots.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// Computes each lane separately.
    Lanes(Handler),
    /// Jumps to the instruction with this index.
    Branch(u32),
    Exit,
    Trap,
    /// Does nothing. Used for fences, since blocks and warps see a single order here.
    Nothing,
    /// Waits for the kernels before this one (`griddepcontrol.wait`).
    WaitForKernels,
    /// Lets the next kernel begin (`griddepcontrol.launch_dependents`).
    LaunchDependents,
    /// `d`: the number of instructions that this warp has executed.
    Clock,
    /// `d..., address`.
    Load(Access),
    /// `address, s...`.
    Store(Access),
    /// `d, address, b, c`.
    Atomic(Access, AtomicOperation),
    /// `shared address, global address, bytes to read`.
    AsyncCopy(u8),
    /// `global address, bytes`: reads bytes into a cache.
    Prefetch,
    AsyncCommit,
    /// Waits until at most this many groups are pending; `None` waits for all copies, committed
    /// or not.
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
        factors: Factors,
    },
}

/// Type of the factors of a product of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    F16,
    Bf16,
    /// The upper 19 bits of a float32.
    Tf32,
}

/// A load, store or atomic operation.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub space: Space,
    /// Bytes per element: 1, 2, 4 or 8.
    pub size: u8,
    /// Number of elements in the vector.
    pub count: u8,
    /// Whether loaded elements are sign-extended in a wider register.
    pub signed: bool,
    /// Whether the registers of the elements are 64 bits wide.
    pub wide: bool,
    /// Whether the address is 64 bits wide.
    pub wide_address: bool,
    /// Whether the access is volatile or has a memory order, which makes concurrent accesses
    /// legal.
    pub ordered: bool,
}

impl Access {
    /// Returns the number of bytes that each lane accesses.
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
    /// Whether all threads of a warp must execute it together.
    pub aligned: bool,
    /// Whether threads only arrive, without waiting.
    pub arrive: bool,
    pub with_count: bool,
    /// How to combine a predicate of all threads, if requested.
    pub combine: Option<Vote>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// How to combine predicates of several threads.
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
