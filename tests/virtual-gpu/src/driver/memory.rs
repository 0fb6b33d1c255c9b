//! Memory: device allocations in an address space of their own, with a shadow byte per byte
//! that tells whether it was ever written, and pinned host memory.
//!
//! Device addresses mean nothing to the host: dereferencing one crashes. Allocations are
//! separated by unused gaps, and no address is reused, so that a stray or stale address is
//! always detected.

use crate::ptx::{GRANULE, Region};
use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// First device address.
pub const FIRST_ADDRESS: u64 = 0x7000_0000_0000;
/// End of the device addresses, exclusive.
pub const LAST_ADDRESS: u64 = 0x7800_0000_0000;
/// Size of the unused gap after each allocation.
const GAP: u64 = 1 << 16;
const ALIGN: u64 = 512;
const HOST_ALIGN: usize = 4096;
/// Fresh memory up to this size is filled with the undefined pattern. The pages of larger
/// allocations stay untouched to save memory; the shadow still detects every read of them.
const FILL_LIMIT: usize = 256 << 20;

/// Returns the byte of the undefined pattern at an address. Every aligned 2 or 4 bytes of it
/// are a NaN in float16, bfloat16 and float32, and no plausible index as an integer (nor
/// 0xffffffff, which kernels understand as "none").
pub fn undefined(address: usize) -> u8 {
    if address.is_multiple_of(2) {
        0xfb
    } else {
        0x7f
    }
}

/// Lifecycle stage of an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `cuMemAllocAsync` is queued but has not run yet.
    Reserved,
    /// Ready for use.
    Live,
}

/// One allocation of device memory.
#[derive(Debug)]
pub struct Allocation {
    /// Context that owns the allocation.
    pub context: u64,
    /// First address.
    pub base: u64,
    /// Size in bytes.
    pub len: usize,
    /// Lifecycle stage.
    pub stage: Stage,
    /// Whether `cuMemFreeAsync` is queued: only work queued before it may use the memory.
    pub leaving: bool,
    /// Whether the memory was allocated by `cuMemAllocAsync`.
    pub ordered: bool,
    /// Whether the memory belongs to a module (a `.global` variable) and is freed with it.
    pub of_module: bool,
    /// Name in reports.
    pub label: String,
    data: *mut u8,
    shadow: *mut u8,
    /// See [`Region::writers`].
    writers: *mut u8,
}

// SAFETY: the allocation owns the pointers, and everything that accesses them holds the
// driver's lock.
unsafe impl Send for Allocation {}

impl Allocation {
    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len, HOST_ALIGN).ok()
    }

    fn writers_layout(len: usize) -> Option<Layout> {
        Layout::array::<u32>(len.div_ceil(GRANULE)).ok()
    }

    fn new(context: u64, base: u64, len: usize, label: String) -> Option<Self> {
        let layout = Self::layout(len)?;
        let writers_layout = Self::writers_layout(len)?;
        // SAFETY: `len` is not 0 (checked by the caller); a null result is checked below.
        let (data, shadow, writers) = unsafe {
            (
                if len > FILL_LIMIT {
                    alloc_zeroed(layout)
                } else {
                    alloc(layout)
                },
                alloc_zeroed(layout),
                alloc_zeroed(writers_layout),
            )
        };
        let made = Self {
            context,
            base,
            len,
            stage: Stage::Live,
            leaving: false,
            ordered: false,
            of_module: false,
            label,
            data,
            shadow,
            writers,
        };
        if data.is_null() || shadow.is_null() || writers.is_null() {
            return None;
        }
        if len <= FILL_LIMIT {
            // SAFETY: `data` points to `len` bytes that were just allocated.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(data.cast::<std::mem::MaybeUninit<u8>>(), len)
            };
            for (at, byte) in bytes.iter_mut().enumerate() {
                byte.write(undefined(at));
            }
        }
        Some(made)
    }

    /// Returns the address past the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.len as u64
    }

    fn region(&self) -> Region {
        Region {
            base: self.base,
            len: self.len,
            data: self.data,
            defined: self.shadow.cast::<AtomicU8>(),
            writers: self.writers.cast::<AtomicU32>(),
            label: self.label.clone(),
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let Some(layout) = Self::layout(self.len) else {
            return;
        };
        let Some(writers_layout) = Self::writers_layout(self.len) else {
            return;
        };
        // SAFETY: the pointers were allocated with these layouts and are freed once.
        unsafe {
            if !self.data.is_null() {
                dealloc(self.data, layout);
            }
            if !self.shadow.is_null() {
                dealloc(self.shadow, layout);
            }
            if !self.writers.is_null() {
                dealloc(self.writers, writers_layout);
            }
        }
    }
}

/// A frozen list of the regions that a kernel may access.
#[derive(Default)]
struct Regions {
    context: u64,
    list: Vec<Region>,
}

// SAFETY: the pointers in it belong to the allocations, which are `Send` (see there).
unsafe impl Send for Regions {}

/// The device memory of all contexts.
pub struct DeviceMemory {
    next: u64,
    serial: u64,
    live: BTreeMap<u64, Allocation>,
    freed: BTreeMap<u64, (usize, String)>,
    regions: Option<Regions>,
}

impl Default for DeviceMemory {
    fn default() -> Self {
        Self {
            next: FIRST_ADDRESS,
            serial: 1,
            live: BTreeMap::new(),
            freed: BTreeMap::new(),
            regions: None,
        }
    }
}

impl DeviceMemory {
    /// Allocates `len` bytes (not 0) and returns the address. Returns `None` if the host is out
    /// of memory or the device addresses are used up.
    pub fn allocate(&mut self, context: u64, len: usize, stage: Stage) -> Option<u64> {
        let base = self.next;
        let padded = (len as u64).checked_next_multiple_of(ALIGN)?;
        let next = base.checked_add(padded)?.checked_add(GAP)?;
        if next > LAST_ADDRESS {
            return None;
        }
        let label = format!("allocation {} ({len} bytes)", self.serial);
        let mut made = Allocation::new(context, base, len, label)?;
        made.stage = stage;
        made.ordered = stage == Stage::Reserved;
        self.live.insert(base, made);
        self.next = next;
        self.serial += 1;
        self.regions = None;
        Some(base)
    }

    /// Frees an allocation by its first address. Returns `None` if there is none.
    pub fn free(&mut self, base: u64) -> Option<()> {
        let gone = self.live.remove(&base)?;
        self.freed.insert(base, (gone.len, gone.label.clone()));
        self.regions = None;
        Some(())
    }

    /// Returns the allocation that begins at this address.
    pub fn get(&self, base: u64) -> Option<&Allocation> {
        self.live.get(&base)
    }

    /// Returns the allocation that begins at this address, to change its stage or name.
    pub fn get_mut(&mut self, base: u64) -> Option<&mut Allocation> {
        self.regions = None;
        self.live.get_mut(&base)
    }

    /// Returns the live allocation that contains this address.
    pub fn containing(&self, address: u64) -> Option<&Allocation> {
        let (_, found) = self.live.range(..=address).next_back()?;
        (address < found.end()).then_some(found)
    }

    /// Iterates over the live allocations by address.
    pub fn iter(&self) -> impl Iterator<Item = &Allocation> {
        self.live.values()
    }

    /// Returns the bytes held by the contexts that match the filter.
    pub fn used(&self, mut wanted: impl FnMut(u64) -> bool) -> usize {
        let held = self.live.values().filter(|a| wanted(a.context));
        held.map(|a| a.len.next_multiple_of(ALIGN as usize)).sum()
    }

    /// Returns the name of the freed allocation that contained this address.
    pub fn freed(&self, address: u64) -> Option<&str> {
        let (base, (len, label)) = self.freed.range(..=address).next_back()?;
        (address < base + *len as u64).then_some(label)
    }

    /// Checks that the `len` bytes at `address` lie in one allocation of the context.
    ///
    /// # Errors
    /// Returns a description of where they lie instead.
    pub fn check(&self, context: u64, address: u64, len: usize) -> Result<(), String> {
        let what = format!("device address {address:#x} ({len} bytes)");
        if address == 0 {
            return Err("device address is null".to_owned());
        }
        if let Some(label) = self.freed(address) {
            return Err(format!("{what} lies in {label}, which has been freed"));
        }
        let Some((_, near)) = self.live.range(..=address).next_back() else {
            return Err(format!("{what} is not a device address"));
        };
        if address >= near.end() {
            if !(FIRST_ADDRESS..LAST_ADDRESS).contains(&address) {
                return Err(format!("{what} is not a device address"));
            }
            let past = address - near.end();
            return Err(format!(
                "{what} begins {past} bytes past the end of {}",
                near.label
            ));
        }
        if len as u64 > near.end() - address {
            let past = len as u64 - (near.end() - address);
            return Err(format!(
                "{what} runs {past} bytes past the end of {}",
                near.label
            ));
        }
        if near.context != context {
            return Err(format!("{what} lies in {} of another context", near.label));
        }
        Ok(())
    }

    fn reach(&self, context: u64, address: u64, len: usize) -> Result<(*mut u8, *mut u8), String> {
        self.check(context, address, len)?;
        let found = self.containing(address).ok_or("no allocation")?;
        if found.stage == Stage::Reserved {
            return Err(format!(
                "{} is used before its cuMemAllocAsync has run",
                found.label
            ));
        }
        let offset = (address - found.base) as usize;
        // SAFETY: `check` verified that `offset + len` is within the allocation.
        Ok(unsafe { (found.data.add(offset), found.shadow.add(offset)) })
    }

    /// Writes host bytes to the device.
    ///
    /// # Errors
    /// Fails unless the bytes lie in one live allocation of the context.
    ///
    /// # Safety
    /// `from` must be readable for `len` bytes.
    pub unsafe fn write(
        &mut self,
        context: u64,
        to: u64,
        from: *const u8,
        len: usize,
    ) -> Result<(), String> {
        let (data, shadow) = self.reach(context, to, len)?;
        // SAFETY: `reach` returns `len` bytes in both; `from` is readable as the caller
        // guarantees, and never points into device memory.
        unsafe {
            std::ptr::copy_nonoverlapping(from, data, len);
            std::ptr::write_bytes(shadow, 1, len);
        }
        Ok(())
    }

    /// Copies device bytes to the host. Undefined bytes are replaced by the pattern of
    /// [`undefined`]. Returns their number.
    ///
    /// # Errors
    /// Fails unless the bytes lie in one live allocation of the context.
    ///
    /// # Safety
    /// `to` must be writable for `len` bytes.
    pub unsafe fn read(
        &self,
        context: u64,
        to: *mut u8,
        from: u64,
        len: usize,
    ) -> Result<usize, String> {
        let (data, shadow) = self.reach(context, from, len)?;
        let mut missing = 0;
        // SAFETY: as in `write`, in the other direction; the shadow is read atomically, as
        // kernels write it.
        unsafe {
            std::ptr::copy_nonoverlapping(data, to, len);
            for at in 0..len {
                if (*shadow.add(at).cast::<AtomicU8>()).load(Ordering::Relaxed) == 0 {
                    *to.add(at) = undefined(from as usize + at);
                    missing += 1;
                }
            }
        }
        Ok(missing)
    }

    /// Copies within the device; undefined bytes stay undefined.
    ///
    /// # Errors
    /// Fails unless both ranges lie in live allocations of the context.
    pub fn copy(&mut self, context: u64, to: u64, from: u64, len: usize) -> Result<(), String> {
        let (source, source_shadow) = self.reach(context, from, len)?;
        let (target, target_shadow) = self.reach(context, to, len)?;
        // SAFETY: `reach` returns `len` bytes in all four; `copy` allows overlap.
        unsafe {
            std::ptr::copy(source, target, len);
            std::ptr::copy(source_shadow, target_shadow, len);
        }
        Ok(())
    }

    /// Fills `count` units of `unit` bytes with the low bytes of `value`.
    ///
    /// # Errors
    /// Fails unless the bytes lie in one live allocation of the context.
    pub fn fill(
        &mut self,
        context: u64,
        to: u64,
        value: u32,
        unit: usize,
        count: usize,
    ) -> Result<(), String> {
        let len = unit.checked_mul(count).ok_or("size overflows")?;
        let (data, shadow) = self.reach(context, to, len)?;
        let bytes = value.to_le_bytes();
        // SAFETY: `reach` returns `len` bytes in both.
        unsafe {
            if bytes[..unit].iter().all(|byte| *byte == bytes[0]) {
                std::ptr::write_bytes(data, bytes[0], len);
            } else {
                for at in 0..len {
                    *data.add(at) = bytes[at % unit];
                }
            }
            std::ptr::write_bytes(shadow, 1, len);
        }
        Ok(())
    }

    /// Returns the regions that kernels of the context may access now, by address.
    pub fn regions(&mut self, context: u64) -> &[Region] {
        if self
            .regions
            .as_ref()
            .is_none_or(|made| made.context != context)
        {
            let reachable = self
                .live
                .values()
                .filter(|a| a.context == context && a.stage != Stage::Reserved);
            self.regions = Some(Regions {
                context,
                list: reachable.map(Allocation::region).collect(),
            });
        }
        self.regions.as_ref().map_or(&[], |made| &made.list)
    }
}

/// One range of pinned host memory.
#[derive(Debug)]
pub struct Pinned {
    /// Context that owns the range.
    pub context: u64,
    /// Size in bytes.
    pub len: usize,
    /// Flags passed when it was pinned.
    pub flags: u32,
    /// Whether the caller owns the memory (`cuMemHostRegister`).
    pub registered: bool,
}

/// Pinned host memory, by address.
#[derive(Default)]
pub struct HostMemory {
    live: BTreeMap<usize, Pinned>,
}

impl HostMemory {
    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len, HOST_ALIGN).ok()
    }

    /// Allocates `len` bytes (not 0), filled with the pattern of [`undefined`].
    pub fn allocate(&mut self, context: u64, len: usize, flags: u32) -> Option<usize> {
        let layout = Self::layout(len)?;
        // SAFETY: `len` is not 0 (checked by the caller); a null result is checked below.
        let data = unsafe { alloc_zeroed(layout) };
        if data.is_null() {
            return None;
        }
        Self::scribble(data, len);
        self.live.insert(
            data as usize,
            Pinned {
                context,
                len,
                flags,
                registered: false,
            },
        );
        Some(data as usize)
    }

    /// Pins the caller's memory. Returns `false` if it overlaps memory that is already pinned.
    pub fn register(&mut self, context: u64, address: usize, len: usize, flags: u32) -> bool {
        if self.overlapping(address, len).is_some() {
            return false;
        }
        self.live.insert(
            address,
            Pinned {
                context,
                len,
                flags,
                registered: true,
            },
        );
        true
    }

    fn scribble(data: *mut u8, len: usize) {
        for at in 0..len {
            // SAFETY: `data` points to `len` bytes.
            unsafe { *data.add(at) = undefined(at) };
        }
    }

    /// Releases pinned memory by its first address. Returns `None` if there is none.
    pub fn free(&mut self, address: usize) -> Option<()> {
        let gone = self.live.remove(&address)?;
        if !gone.registered {
            let layout = Self::layout(gone.len)?;
            Self::scribble(address as *mut u8, gone.len);
            // SAFETY: allocated by `allocate` with this layout, and freed once.
            unsafe { dealloc(address as *mut u8, layout) };
        }
        Some(())
    }

    /// Returns the range that begins at this address.
    pub fn get(&self, address: usize) -> Option<&Pinned> {
        self.live.get(&address)
    }

    /// Returns a range that overlaps these bytes, with its address.
    pub fn overlapping(&self, address: usize, len: usize) -> Option<(usize, &Pinned)> {
        let end = address.saturating_add(len.max(1));
        let (base, found) = self.live.range(..end).next_back()?;
        (base + found.len > address).then_some((*base, found))
    }

    /// Iterates over all ranges by address.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Pinned)> {
        self.live.iter().map(|(address, pinned)| (*address, pinned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_explain_where_an_address_lies() {
        let mut memory = DeviceMemory::default();
        let a = memory.allocate(1, 100, Stage::Live).unwrap();
        let b = memory.allocate(1, 8, Stage::Live).unwrap();
        assert!(b >= a + 100 + GAP);
        assert_eq!(memory.check(1, a, 100), Ok(()));
        assert!(
            memory
                .check(1, a + 90, 11)
                .unwrap_err()
                .contains("runs 1 bytes past the end")
        );
        assert!(
            memory
                .check(1, a + 104, 4)
                .unwrap_err()
                .contains("begins 4 bytes past the end")
        );
        assert!(
            memory
                .check(2, a, 4)
                .unwrap_err()
                .contains("another context")
        );
        assert!(memory.check(1, 0, 4).unwrap_err().contains("null"));
        assert!(
            memory
                .check(1, 0x1234, 4)
                .unwrap_err()
                .contains("not a device address")
        );
        memory.free(a).unwrap();
        assert!(memory.check(1, a + 4, 4).unwrap_err().contains("freed"));
        assert_ne!(memory.allocate(1, 100, Stage::Live), Some(a));
    }

    #[test]
    fn new_memory_is_undefined_and_so_are_copies_of_it() {
        let mut memory = DeviceMemory::default();
        let a = memory.allocate(1, 8, Stage::Live).unwrap();
        let b = memory.allocate(1, 8, Stage::Live).unwrap();
        // SAFETY: the array has the length that is passed.
        unsafe { memory.write(1, a, [1u8, 2, 3, 4].as_ptr(), 4).unwrap() };
        memory.copy(1, b, a, 8).unwrap();
        let mut back = [0u8; 8];
        // SAFETY: the array has the length that is passed.
        let missing = unsafe { memory.read(1, back.as_mut_ptr(), b, 8).unwrap() };
        assert_eq!((missing, back), (4, [1, 2, 3, 4, 0xfb, 0x7f, 0xfb, 0x7f]));
        assert!(f32::from_le_bytes([back[4], back[5], back[6], back[7]]).is_nan());
    }
}
