//! The device memory that a kernel may access.

use super::kernel::Kernel;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

/// Number of bytes that share an entry of [`Region::writers`].
pub const GRANULE: usize = 16;

/// One allocation.
#[derive(Clone, Debug)]
pub struct Region {
    /// Device address.
    pub base: u64,
    /// Size in bytes.
    pub len: usize,
    /// Location of the bytes; as aligned as `base`, but at least to 16 bytes.
    pub data: *mut u8,
    /// One byte per byte of data, 0 if it was never written; null if writes are not tracked.
    pub defined: *const AtomicU8,
    /// For each [`GRANULE`] bytes of data, the number of the last launch that wrote to them; null
    /// if that is not tracked.
    pub writers: *const AtomicU32,
    /// Name in reports.
    pub label: String,
}

// SAFETY: a region only refers to memory; `run` requires that the memory stays valid while a
// kernel runs, and kernels access it atomically.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// All allocations, by ascending base and without overlaps. They must stay unchanged while a
/// kernel runs, and nothing else may access their bytes.
pub struct Regions<'a>(pub &'a [Region]);

/// Finds regions by address.
pub struct Map<'a> {
    regions: &'a [Region],
    /// The module's own variables, whose addresses are above all others.
    module: Vec<Region>,
}

impl<'a> Map<'a> {
    pub fn new(regions: &'a [Region], kernel: &Kernel) -> Self {
        Map {
            regions,
            module: kernel.globals.regions(),
        }
    }

    /// Returns the region with the index `hint`, if it exists.
    pub fn get(&self, hint: usize) -> Option<&Region> {
        match hint.checked_sub(self.regions.len()) {
            None => self.regions.get(hint),
            Some(hint) => self.module.get(hint),
        }
    }

    /// Returns the index of the last region that begins at or below the address.
    fn below(&self, address: u64) -> Option<usize> {
        let begins = |r: &Region| r.base <= address;
        let count = self.regions.partition_point(begins) + self.module.partition_point(begins);
        count.checked_sub(1)
    }

    /// Returns the index of the region that contains all these bytes.
    pub fn find(&self, address: u64, bytes: u64) -> Option<usize> {
        let at = self.below(address)?;
        self.get(at)?.holds(address, bytes).then_some(at)
    }

    /// Describes the location of an address, relative to the nearest allocation below if no
    /// allocation contains it.
    pub fn describe(&self, address: u64) -> String {
        if address < 256 {
            return "a null pointer".to_string();
        }
        let Some(nearest) = self.below(address).and_then(|at| self.get(at)) else {
            return "below every allocation".to_string();
        };
        let offset = address - nearest.base;
        let Region { label, len, .. } = nearest;
        if offset < *len as u64 {
            format!("`{label}` + {offset} of {len} bytes")
        } else {
            format!(
                "{} bytes past the end of `{label}`, which has {len}",
                offset - *len as u64
            )
        }
    }
}

impl Region {
    pub(super) fn holds(&self, address: u64, bytes: u64) -> bool {
        let len = self.len as u64;
        address >= self.base && bytes <= len && address - self.base <= len - bytes
    }

    /// Returns the entries of `writers` for bytes of the region.
    fn writers(&self, address: u64, bytes: usize) -> impl Iterator<Item = &AtomicU32> {
        let first = (address - self.base) as usize;
        let tracked = !self.writers.is_null() && bytes > 0;
        let range = match tracked {
            true => first / GRANULE..(first + bytes - 1) / GRANULE + 1,
            false => 0..0,
        };
        // SAFETY: there is an entry for each `GRANULE` bytes, and callers ask about bytes that the
        // region holds.
        range.map(|at| unsafe { &*self.writers.add(at) })
    }

    /// Notes that a launch writes to bytes of the region.
    pub(super) fn written(&self, address: u64, bytes: usize, launch: u32) {
        self.writers(address, bytes)
            .for_each(|writer| writer.store(launch, Relaxed));
    }

    /// Returns whether a launch was the last to write to any of these bytes of the region.
    pub(super) fn is_written_by(&self, address: u64, bytes: usize, launch: u32) -> bool {
        self.writers(address, bytes)
            .any(|writer| writer.load(Relaxed) == launch)
    }
}

/// Numbers whose bytes can be copied to a device and back.
///
/// # Safety
/// Every bit pattern must be a valid value, and the type must have no padding.
pub unsafe trait Plain: Copy + Default + 'static {}

macro_rules! plain {
    ($($of:ty),*) => {$(
        // SAFETY: a primitive number.
        unsafe impl Plain for $of {}
    )*};
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

/// Device memory for tests of kernels, owned by the host.
///
/// ```
/// # use virtual_gpu::ptx::HostMemory;
/// let mut memory = HostMemory::new();
/// let x = memory.alloc("x", &[1.0f32, 2.0]);
/// let out = memory.alloc_uninitialised("out", 8);
/// assert_eq!(memory.read::<f32>(x, 2), [1.0, 2.0]);
/// assert_eq!(memory.regions().0.len(), 2);
/// # let _ = out;
/// ```
#[derive(Default)]
pub struct HostMemory {
    regions: Vec<Region>,
    /// The memory that the regions point to.
    data: Vec<(Box<[u128]>, Box<[AtomicU8]>)>,
    writers: Vec<Box<[AtomicU32]>>,
}

// SAFETY: the pointers refer to the boxes in the same struct.
unsafe impl Send for HostMemory {}

/// Gap between allocations, so that an access past the end of one does not hit another.
const GAP: u64 = 1 << 16;
const FIRST: u64 = 0x7000_0000_0000;

impl HostMemory {
    pub fn new() -> Self {
        HostMemory::default()
    }

    /// Allocates and fills memory. Returns its address, a multiple of 256.
    pub fn alloc<T: Plain>(&mut self, label: &str, values: &[T]) -> u64 {
        let address = self.alloc_uninitialised(label, size_of_val(values));
        self.write(address, values);
        address
    }

    /// Allocates memory that a kernel must write before it reads it.
    pub fn alloc_uninitialised(&mut self, label: &str, bytes: usize) -> u64 {
        // Not zeros, so that a read that escapes the checks does not yield plausible values.
        let data = vec![u128::from_ne_bytes([0xcd; 16]); bytes.div_ceil(16) + 1].into_boxed_slice();
        let defined: Box<[AtomicU8]> = (0..bytes).map(|_| AtomicU8::new(0)).collect();
        let end = self
            .regions
            .last()
            .map_or(FIRST, |r| r.base + r.len as u64 + GAP);
        let base = end.next_multiple_of(256);
        self.data.push((data, defined));
        let writers = (0..bytes.div_ceil(GRANULE) + 1).map(|_| AtomicU32::new(0));
        self.writers.push(writers.collect());
        let (data, defined) = self
            .data
            .last_mut()
            .map(|(data, defined)| (data.as_mut_ptr(), defined.as_ptr()))
            .unzip();
        self.regions.push(Region {
            base,
            len: bytes,
            data: data.unwrap_or(std::ptr::null_mut()).cast(),
            defined: defined.unwrap_or(std::ptr::null()),
            writers: self
                .writers
                .last()
                .map_or(std::ptr::null(), |writers| writers.as_ptr()),
            label: label.to_string(),
        });
        base
    }

    fn find(&self, address: u64, bytes: usize) -> &Region {
        let found = self.regions.iter().find(|r| r.holds(address, bytes as u64));
        found.unwrap_or_else(|| panic!("{bytes} bytes at {address:#x} are in no allocation"))
    }

    /// Writes values at an address inside an allocation.
    ///
    /// # Panics
    /// Panics if the values do not lie in one allocation.
    pub fn write<T: Plain>(&mut self, address: u64, values: &[T]) {
        let bytes = size_of_val(values);
        let region = self.find(address, bytes);
        let offset = (address - region.base) as usize;
        // SAFETY: `find` checked the range; `Plain` values are just bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                values.as_ptr().cast::<u8>(),
                region.data.add(offset),
                bytes,
            );
            for byte in offset..offset + bytes {
                (*region.defined.add(byte)).store(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }

    /// Reads values at an address inside an allocation.
    ///
    /// # Panics
    /// Panics if the values do not lie in one allocation, or if a byte was never written.
    pub fn read<T: Plain>(&self, address: u64, count: usize) -> Vec<T> {
        let bytes = count * size_of::<T>();
        let region = self.find(address, bytes);
        let offset = (address - region.base) as usize;
        let mut values = vec![T::default(); count];
        // SAFETY: `find` checked the range; any bytes are valid `Plain` values.
        unsafe {
            for byte in offset..offset + bytes {
                let defined =
                    (*region.defined.add(byte)).load(std::sync::atomic::Ordering::Relaxed);
                assert!(
                    defined != 0,
                    "byte {byte} of `{}` was never written",
                    region.label
                );
            }
            std::ptr::copy_nonoverlapping(
                region.data.add(offset),
                values.as_mut_ptr().cast::<u8>(),
                bytes,
            );
        }
        values
    }

    /// Returns the number of bytes of an allocation that were never written.
    pub fn unwritten(&self, address: u64) -> usize {
        let region = self.find(address, 1);
        let Some(at) = self.regions.iter().position(|r| r.base == region.base) else {
            return 0;
        };
        self.data[at]
            .1
            .iter()
            .filter(|d| d.load(std::sync::atomic::Ordering::Relaxed) == 0)
            .count()
    }

    /// Returns the memory that a kernel may access.
    pub fn regions(&self) -> Regions<'_> {
        Regions(&self.regions)
    }
}

/// An argument of a kernel, for [`arguments`].
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    Pointer(u64),
    U32(u32),
    F32(f32),
}

/// Returns the bytes of a launch's parameters.
///
/// # Panics
/// Panics if the kernel takes a different number of parameters, or parameters of different
/// sizes.
pub fn arguments(kernel: &Kernel, values: &[Argument]) -> Vec<u8> {
    assert_eq!(
        values.len(),
        kernel.parameters.len(),
        "`{}` takes a different number of parameters",
        kernel.name
    );
    let mut bytes = vec![0; kernel.parameter_bytes()];
    for (index, (parameter, value)) in kernel.parameters.iter().zip(values).enumerate() {
        let value = match value {
            Argument::Pointer(address) => address.to_le_bytes().to_vec(),
            Argument::U32(number) => number.to_le_bytes().to_vec(),
            Argument::F32(number) => number.to_le_bytes().to_vec(),
        };
        assert_eq!(
            value.len(),
            parameter.size,
            "parameter {index} of `{}`",
            kernel.name
        );
        bytes[parameter.offset..][..parameter.size].copy_from_slice(&value);
    }
    bytes
}
