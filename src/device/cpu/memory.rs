//! Memory that kernels stream: aligned to cache lines, zero until written.

use crate::device::DeviceError;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A cache line.
const ALIGNMENT: usize = 64;

/// Numbers for which all bits zero is a value and which own nothing.
pub(crate) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for u8 {}
impl Plain for f32 {}

/// A fixed number of elements, zero at first, aligned to a cache line.
///
/// Pages that were never written take no memory: the allocation comes from
/// `calloc`, which a larger alignment than the allocator's own would forgo, so it
/// is aligned by hand.
pub(crate) struct Buffer<T: Plain> {
    base: NonNull<u8>,
    layout: Layout,
    offset: usize,
    len: usize,
    of: PhantomData<T>,
}

// SAFETY: a buffer owns its memory, and `Plain` types may cross threads.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeros. `what` is named in the error where memory cannot be had.
    pub(crate) fn zeroed(len: usize, what: &str) -> Result<Self, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory {
            device: "cpu",
            bytes: len.saturating_mul(size_of::<T>()),
            what: what.to_owned(),
        };
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_add(ALIGNMENT));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 16).ok());
        let layout = layout.ok_or_else(out_of_memory)?;
        // SAFETY: the layout's size is at least `ALIGNMENT`, not 0.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        let offset = base.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Ok(Self {
            base,
            layout,
            offset,
            len,
            of: PhantomData,
        })
    }

    /// Where the elements begin.
    pub(crate) fn as_ptr(&self) -> *const T {
        // SAFETY: `offset` is at most `ALIGNMENT`, by which the allocation is longer.
        unsafe { self.base.as_ptr().add(self.offset) as *const T }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were allocated zeroed, and zeros are a `Plain` value.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast_mut(), self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// A slice that several workers write, each its own elements.
///
/// This is the one way in which workers share results: an operation cuts its
/// output so that no element belongs to two items of work.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: `range` hands out elements only under the promise that no two threads
// ask for the same ones, which makes this a `&mut [T]` cut into pieces.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Cuts `slice`.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            of: PhantomData,
        }
    }

    /// Where `len` elements from `start` lie.
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut T {
        assert!(
            start <= self.len && len <= self.len - start,
            "a piece outside its slice"
        );
        // SAFETY: inside the slice, as just checked.
        unsafe { self.start.add(start) }
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// Nobody else holds any of these elements while the result lives.
    #[allow(clippy::mut_from_ref)] // the promise above is what `&mut` asks for
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: inside the slice, as `pointer` checks; the caller keeps pieces disjoint.
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
    fn memory_that_cannot_be_had_is_an_error() {
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            let error = Buffer::<f32>::zeroed(len, "a test").err();
            assert!(
                matches!(error, Some(DeviceError::OutOfMemory { .. })),
                "{len}"
            );
        }
    }
}
