//! Memory that kernels stream, aligned to cache lines and initially zero.

use crate::device::DeviceError;
use memmap2::MmapMut;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes per cache line.
const ALIGNMENT: usize = 64;

/// Number types for which all bits zero is a valid value and which own no resources.
pub(crate) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for u8 {}
impl Plain for f32 {}

/// A fixed number of elements, initially zero and aligned to a cache line.
///
/// Pages that were never written take no memory, because the allocation comes from `calloc`. An
/// alignment above the allocator's own would rule `calloc` out, so the buffer is aligned by
/// hand.
pub(crate) struct Buffer<T: Plain> {
    start: NonNull<T>,
    len: usize,
    memory: Memory,
}

/// The memory that holds a buffer's elements.
enum Memory {
    /// An allocation of its own.
    Own { base: NonNull<u8>, layout: Layout },
    /// A part of a mapping that it shares with other buffers.
    Part { _of: Arc<Mapping> },
}

// SAFETY: a buffer is the only owner of its elements, and `Plain` types may cross threads.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above, and shared access only reads.
unsafe impl<T: Plain> Sync for Buffer<T> {}

fn out_of_memory<T>(len: usize, what: &str) -> DeviceError {
    DeviceError::OutOfMemory {
        device: "cpu",
        bytes: len.saturating_mul(size_of::<T>()),
        what: what.to_owned(),
    }
}

impl<T: Plain> Buffer<T> {
    /// Allocates `len` zeros. The error names `what` if memory cannot be allocated.
    pub(crate) fn zeroed(len: usize, what: &str) -> Result<Self, DeviceError> {
        let out_of_memory = || out_of_memory::<T>(len, what);
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_add(ALIGNMENT));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 16).ok());
        let layout = layout.ok_or_else(out_of_memory)?;
        // SAFETY: the size of the layout is at least `ALIGNMENT`, so it is not 0.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        let offset = base.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Ok(Self {
            // SAFETY: `offset` is at most `ALIGNMENT`, and the allocation is `ALIGNMENT` bytes
            // longer than the elements.
            start: unsafe { base.add(offset) }.cast(),
            len,
            memory: Memory::Own { base, layout },
        })
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` points to `len` elements that belong to this buffer, and the zeros in
        // them are a valid `Plain` value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Memory::Own { base, layout } = self.memory {
            // SAFETY: `base` was allocated in `zeroed` with this layout and is freed only here.
            unsafe { dealloc(base.as_ptr(), layout) }
        }
    }
}

/// Minimum number of bytes that an [`Arena`] maps at a time.
const MAPPING: usize = 64 << 20;

/// Allocates buffers as parts of large mappings, which use huge pages if the system supports
/// them.
///
/// Meant for weights: they are read from end to end for every token, so with small pages each
/// page would cost a TLB miss per token. A mapping is freed with the last of its buffers, but
/// the current mapping no sooner than the arena. The memory of a dropped buffer is not reused.
#[derive(Default)]
pub(crate) struct Arena {
    mapping: Option<Arc<Mapping>>,
    /// Bytes of the current mapping that are in use.
    used: usize,
}

/// Anonymous memory mapped from the operating system.
struct Mapping {
    base: NonNull<u8>,
    memory: MmapMut,
}

// SAFETY: the memory is accessed only through buffers, each of which has its own part.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize) -> std::io::Result<Self> {
        let mut memory = MmapMut::map_anon(bytes)?;
        #[cfg(target_os = "linux")]
        if let Err(error) = memory.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "huge pages are not available for the weights");
        }
        let base = NonNull::new(memory.as_mut_ptr()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, memory })
    }
}

impl Arena {
    /// Allocates `len` zeros. The error names `what` if memory cannot be allocated.
    pub(crate) fn zeroed<T: Plain>(
        &mut self,
        len: usize,
        what: &str,
    ) -> Result<Buffer<T>, DeviceError> {
        let out_of_memory = || out_of_memory::<T>(len, what);
        let bytes = len.checked_mul(size_of::<T>());
        let bytes = bytes.and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT));
        let bytes = bytes.ok_or_else(out_of_memory)?;
        let has_room = |mapping: &&Arc<Mapping>| mapping.memory.len() - self.used >= bytes;
        let mapping = match self.mapping.as_ref().filter(has_room) {
            Some(mapping) => Arc::clone(mapping),
            None => {
                let mapping = Mapping::new(bytes.max(MAPPING)).map_err(|_| out_of_memory())?;
                self.used = 0;
                Arc::clone(self.mapping.insert(Arc::new(mapping)))
            }
        };
        // SAFETY: `used` and `bytes` are within the mapping, and `used` only grows, so no two
        // buffers overlap. A mapping is aligned to a page, and each part to a cache line.
        let start = unsafe { mapping.base.add(self.used) }.cast();
        self.used += bytes;
        Ok(Buffer {
            start,
            len,
            memory: Memory::Part { _of: mapping },
        })
    }
}

/// A slice that several workers write, each to its own elements.
///
/// This is the only way in which workers share results. An operation divides its output so that
/// no element belongs to two items of work.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: `range` hands out elements only if the caller guarantees that no two threads ask for
// the same ones, so this is a `&mut [T]` that has been cut into pieces.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Wraps `slice` so that it can be cut into pieces.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            of: PhantomData,
        }
    }

    /// Returns a pointer to `len` elements from `start`.
    ///
    /// # Panics
    /// Panics if the elements are not inside the slice.
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut T {
        assert!(
            start <= self.len && len <= self.len - start,
            "range outside the slice"
        );
        // SAFETY: `start` is inside the slice, as just checked.
        unsafe { self.start.add(start) }
    }

    /// Returns `len` elements from `start`.
    ///
    /// # Safety
    /// While the result lives, nothing else may access any of these elements.
    #[allow(clippy::mut_from_ref)] // the caller guarantees exclusive access
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: the elements are inside the slice, as `pointer` checks, and the caller keeps
        // the pieces disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(start, len), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_zero() {
        for len in [0, 1, 63, 4096, 1 << 20] {
            let buffer = Buffer::<f32>::zeroed(len, "a test").unwrap();
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn a_failed_allocation_is_an_error() {
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            let own = Buffer::<f32>::zeroed(len, "a test").err();
            let part = Arena::default().zeroed::<f32>(len, "a test").err();
            for error in [own, part] {
                assert!(
                    matches!(error, Some(DeviceError::OutOfMemory { .. })),
                    "{len}"
                );
            }
        }
    }

    #[test]
    fn arena_buffers_are_aligned_zeroed_and_disjoint() {
        let mut arena = Arena::default();
        let sizes = [0, 1, 63, 4096, MAPPING - 8192, 100, MAPPING + 1, 100];
        let mut parts: Vec<Buffer<u8>> = sizes
            .iter()
            .map(|&len| arena.zeroed(len, "a test").unwrap())
            .collect();
        drop(arena);
        for (index, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(part.len(), sizes[index]);
            assert!(part.iter().all(|&byte| byte == 0));
            part.fill(index as u8 + 1);
        }
        for (index, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|&byte| byte == index as u8 + 1), "{index}");
        }
    }
}
