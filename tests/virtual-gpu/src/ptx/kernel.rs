//! A kernel that is ready to run, and the memory of its module.

use super::count::Kind;
use super::instruction::{Instruction, Place};
use super::memory::Region;
use super::types::{Class, Type};
use std::cell::UnsafeCell;
use std::collections::HashMap;

/// Address of the module's own variables.
pub const MODULE_WINDOW: u64 = 0xd000_0000_0000_0000;
/// Address of local memory among the generic addresses.
pub const LOCAL_WINDOW: u64 = 0xe000_0000_0000_0000;
/// Address of shared memory among the generic addresses.
pub const SHARED_WINDOW: u64 = 0xf000_0000_0000_0000;
/// Size of each window in bytes.
pub const WINDOW_SIZE: u64 = 1 << 32;

/// A kernel's parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Offset in bytes from the beginning of the parameters.
    pub offset: usize,
    pub size: usize,
    pub align: usize,
    /// The declared type; `U64` for pointers.
    pub of: Type,
}

/// An initial value of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    Thread(u8),
    BlockSize(u8),
    Block(u8),
    Grid(u8),
    Lane,
    Warp,
    Warps,
    MaskEqual,
    MaskLess,
    MaskLessEqual,
    MaskGreater,
    MaskGreaterEqual,
    DynamicSize,
    DynamicShared,
    DynamicSharedWide,
}

/// A decoded kernel.
#[derive(Debug)]
pub struct Kernel {
    pub name: String,
    pub parameters: Vec<Parameter>,
    /// Bytes of shared memory that the kernel declares itself.
    pub static_shared: usize,
    pub(super) code: Vec<Instruction>,
    /// One position per instruction.
    pub(super) places: Vec<Place>,
    /// One kind per instruction; `None` for a further part of a PTX instruction.
    pub(super) kinds: Vec<Option<Kind>>,
    pub(super) constants: Vec<(u16, Class, u64)>,
    pub(super) presets: Vec<(Preset, u16)>,
    /// Number of rows of 32 words for a warp's registers.
    pub(super) rows: usize,
    /// Offset of the shared memory whose size is set at launch.
    pub(super) dynamic_shared_at: usize,
    /// Bytes of local memory per thread.
    pub(super) local: usize,
    /// Size of the smallest access to shared memory in bytes, which is the granularity of the
    /// checks.
    pub(super) granule: usize,
    pub(super) max_threads: Option<u32>,
    pub(super) required_block: Option<[u32; 3]>,
    pub(super) globals: std::sync::Arc<Globals>,
}

impl Kernel {
    /// Returns the size of all parameters in bytes.
    pub fn parameter_bytes(&self) -> usize {
        self.parameters.last().map_or(0, |p| p.offset + p.size)
    }

    /// Returns the bytes of local memory per thread, used for example by arrays that are
    /// indexed at run time.
    pub fn local_bytes(&self) -> usize {
        self.local
    }

    /// Returns the number of instructions after decoding.
    pub fn instructions(&self) -> usize {
        self.code.len()
    }

    /// Returns the maximum number of threads per block, if the kernel declares it.
    pub fn max_threads(&self) -> Option<u32> {
        self.max_threads
    }

    /// Returns the source position as `file:line`, if the PTX contains it.
    pub(super) fn source(&self, place: Place) -> Option<String> {
        let name = self.globals.files.get(&place.location.0)?;
        (place.location.1 > 0).then(|| format!("{name}:{}", place.location.1))
    }
}

/// The variables of a module and the names of its source files.
#[derive(Debug)]
pub struct Globals {
    data: Box<[UnsafeCell<u128>]>,
    variables: Vec<GlobalVariable>,
    pub(super) files: HashMap<u32, String>,
}

/// A variable of a module, and its location in the module's window in bytes.
#[derive(Debug)]
pub struct GlobalVariable {
    pub name: String,
    pub offset: usize,
    pub size: usize,
}

// SAFETY: only kernels access the bytes, through raw pointers as for other device memory.
unsafe impl Sync for Globals {}
// SAFETY: nothing in it is tied to a thread.
unsafe impl Send for Globals {}

impl Globals {
    /// Creates the variables. `bytes` contains all of them at their offsets, which ascend.
    pub fn new(bytes: &[u8], variables: Vec<GlobalVariable>, files: HashMap<u32, String>) -> Self {
        let words = bytes.chunks(16).map(|chunk| {
            let mut word = [0; 16];
            word[..chunk.len()].copy_from_slice(chunk);
            UnsafeCell::new(u128::from_ne_bytes(word))
        });
        Globals {
            data: words.collect(),
            variables,
            files,
        }
    }

    /// Returns the variables as regions of device memory.
    pub fn regions(&self) -> Vec<Region> {
        let data: *mut u8 = self.data.as_ptr().cast_mut().cast();
        let region = |variable: &GlobalVariable| Region {
            base: MODULE_WINDOW + variable.offset as u64,
            len: variable.size,
            data: data.wrapping_add(variable.offset),
            defined: std::ptr::null(),
            writers: std::ptr::null(),
            label: variable.name.clone(),
        };
        self.variables.iter().map(region).collect()
    }
}
