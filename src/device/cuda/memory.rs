//! Device memory, pinned host memory, and copies between them.

use super::context::{Context, Event, Handle};
use super::error::{self, DEVICE};
use crate::device::DeviceError;
use bytemuck::Pod;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ptr::NonNull;
use std::rc::Rc;

/// An address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Ptr(u64);

impl Ptr {
    /// The null address, for optional parameters.
    pub(super) const NULL: Self = Self(0);

    /// Returns the address `bytes` bytes after this one.
    pub(super) fn offset_bytes(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// Returns the address as a number, for driver calls.
    pub(super) fn raw(self) -> u64 {
        self.0
    }
}

/// Owned device memory, aligned to 256 bytes. Dropping it waits until all enqueued work has
/// completed, then frees the memory.
pub(super) struct Buffer {
    ptr: Ptr,
    bytes: usize,
    handle: Rc<Handle>,
}

impl Buffer {
    /// Returns the start address; [`Ptr::NULL`] if the size is 0.
    pub(super) fn ptr(&self) -> Ptr {
        self.ptr
    }

    /// Returns the size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let handle = &self.handle;
        handle.allocated.set(handle.allocated.get() - self.bytes);
        handle.releases.set(handle.releases.get() + 1);
        handle.drain();
        // SAFETY: the memory was allocated by `Context::allocate`, is freed once, and is no
        // longer in use after the wait above.
        let free = || unsafe { result::free_sync(self.ptr.0) };
        handle.cleanup("freeing device memory", free);
    }
}

/// What pinned memory is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PinnedUse {
    /// Written by the host and read by the device; allocated as write-combined memory.
    Upload,
    /// Written by the device and read by the host.
    Download,
    /// Written and read by the device only.
    Swap,
}

/// Page-locked host memory, to and from which the device copies asynchronously.
pub(super) struct Pinned {
    start: NonNull<u8>,
    bytes: usize,
    handle: Rc<Handle>,
}

impl Pinned {
    /// Allocates zeroed memory of `bytes` bytes, or of one byte if `bytes` is 0.
    pub(super) fn new(
        context: &Context,
        bytes: usize,
        usage: PinnedUse,
    ) -> Result<Self, DeviceError> {
        const OPERATION: &str = "allocating pinned memory";
        context.refuse_in_capture(OPERATION)?;
        let bytes = bytes.max(1);
        let flags = match usage {
            PinnedUse::Upload => sys::CU_MEMHOSTALLOC_WRITECOMBINED,
            PinnedUse::Download | PinnedUse::Swap => 0,
        };
        // SAFETY: an allocation has no precondition.
        let allocate = || none_if_out_of_memory(unsafe { result::malloc_host(bytes, flags) });
        let start = context.call(OPERATION, allocate)?;
        let start = start.and_then(|start| NonNull::new(start.cast::<u8>()));
        let start = start.ok_or_else(|| out_of_memory(bytes, "pinned host memory"))?;
        // SAFETY: the memory was just allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self {
            start,
            bytes,
            handle: Rc::clone(&context.handle),
        })
    }

    /// Returns the size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the address at `offset`. Fails unless `bytes` bytes from there on are inside the
    /// allocation.
    fn at(&self, offset: usize, bytes: usize) -> Result<*mut u8, DeviceError> {
        let inside = offset <= self.bytes && bytes <= self.bytes - offset;
        error::require(inside, "copying pinned memory", || {
            format!("{bytes} bytes at {offset} are not in {} bytes", self.bytes)
        })?;
        // SAFETY: the offset is inside the allocation, as just checked.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }

    /// Returns the bytes. The caller must have waited for all copies into them.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory was allocated with this size and initialised by `new`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// Returns the bytes for writing. The caller must have waited for all copies out of them.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the memory was allocated with this size and initialised by `new`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let handle = &self.handle;
        handle.drain();
        // SAFETY: the memory was allocated by `new`, is freed once, and no copy is under way
        // after the wait above.
        let free = || unsafe { result::free_host(self.start.as_ptr().cast()) };
        handle.cleanup("freeing pinned memory", free);
    }
}

/// Returns [`DeviceError::OutOfMemory`] for `bytes` bytes of `what`.
pub(super) fn out_of_memory(bytes: usize, what: &str) -> DeviceError {
    DeviceError::OutOfMemory {
        device: DEVICE,
        bytes,
        what: what.to_owned(),
    }
}

/// Converts the driver's out-of-memory error to `None`.
pub(super) fn none_if_out_of_memory<T>(
    allocated: Result<T, DriverError>,
) -> Result<Option<T>, DriverError> {
    match allocated {
        Ok(allocated) => Ok(Some(allocated)),
        Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Maximum number of bytes per piece of an upload.
const PIECE: usize = 16 << 20;

/// A staging buffer for one piece of an upload, with the event that follows its copy.
struct Piece {
    memory: Pinned,
    copied: Event,
}

/// Uploads through two pinned staging buffers in turn: the host fills one while the other is
/// copied.
#[derive(Default)]
pub(super) struct Uploader {
    pieces: [Option<Piece>; 2],
    next: usize,
}

impl Uploader {
    /// Copies `bytes` to `to` on the compute stream. Returns once `bytes` have been read.
    fn copy(&mut self, context: &Context, to: Ptr, bytes: &[u8]) -> Result<(), DeviceError> {
        let capacity = bytes.len().next_power_of_two().clamp(4096, PIECE);
        for (index, part) in bytes.chunks(PIECE).enumerate() {
            let place = &mut self.pieces[self.next];
            self.next = 1 - self.next;
            if place
                .as_ref()
                .is_none_or(|piece| piece.memory.bytes() < capacity)
            {
                *place = None;
                *place = Some(Piece {
                    memory: Pinned::new(context, capacity, PinnedUse::Upload)?,
                    copied: Event::new(context)?,
                });
            }
            let Some(piece) = place else {
                return Err(error::failed("upload", "there is no staging memory"));
            };
            piece.copied.synchronize("upload")?;
            piece.memory.as_mut_slice()[..part.len()].copy_from_slice(part);
            let to = to.offset_bytes(index * PIECE);
            let copied = context
                .copy_from_pinned(to, &piece.memory, part.len())
                .and_then(|()| piece.copied.record(&context.compute));
            if copied.is_err() {
                // Without the event, nothing says when the buffer may be written again.
                *place = None;
                return copied;
            }
        }
        Ok(())
    }
}

impl Context {
    /// Allocates uninitialised device memory. `what` names it in an out-of-memory error.
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer, DeviceError> {
        const OPERATION: &str = "allocating device memory";
        self.refuse_in_capture(OPERATION)?;
        let handle = Rc::clone(&self.handle);
        if bytes == 0 {
            let ptr = Ptr::NULL;
            return Ok(Buffer { ptr, bytes, handle });
        }
        // SAFETY: an allocation has no precondition.
        let allocate = || none_if_out_of_memory(unsafe { result::malloc_sync(bytes) });
        let address = handle.call(OPERATION, allocate)?;
        let ptr = Ptr(address.ok_or_else(|| out_of_memory(bytes, what))?);
        handle.allocated.set(handle.allocated.get() + bytes);
        Ok(Buffer { ptr, bytes, handle })
    }

    /// Allocates device memory and enqueues filling it with zeros.
    pub(super) fn allocate_zeroed(&self, bytes: usize, what: &str) -> Result<Buffer, DeviceError> {
        let buffer = self.allocate(bytes, what)?;
        self.fill_zero(buffer.ptr(), bytes)?;
        Ok(buffer)
    }

    /// Allocates device memory and enqueues the upload of `values`. Returns once the values
    /// have been read, which may be before they arrive.
    pub(super) fn upload<T: Pod>(&self, values: &[T], what: &str) -> Result<Buffer, DeviceError> {
        let buffer = self.allocate(size_of_val(values), what)?;
        self.write(&buffer, 0, values)?;
        Ok(buffer)
    }

    /// Overwrites part of `buffer` with `values`, in stream order.
    pub(super) fn write<T: Pod>(
        &self,
        buffer: &Buffer,
        offset_bytes: usize,
        values: &[T],
    ) -> Result<(), DeviceError> {
        const OPERATION: &str = "upload";
        self.refuse_in_capture(OPERATION)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let end = offset_bytes.checked_add(bytes.len());
        error::require(
            end.is_some_and(|end| end <= buffer.bytes),
            OPERATION,
            || {
                let (length, size) = (bytes.len(), buffer.bytes);
                format!("{length} bytes at {offset_bytes} do not fit {size} bytes")
            },
        )?;
        let mut uploader = self.uploader.borrow_mut();
        uploader.copy(self, buffer.ptr.offset_bytes(offset_bytes), bytes)
    }

    /// Reads `count` values, after waiting for all enqueued work. For tests and benchmarks
    /// only, because a step must not wait.
    pub(super) fn read<T: Pod>(&self, ptr: Ptr, count: usize) -> Result<Vec<T>, DeviceError> {
        const OPERATION: &str = "read";
        self.refuse_in_capture(OPERATION)?;
        let mut values = vec![T::zeroed(); count];
        if count == 0 {
            return Ok(values);
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        // SAFETY: `bytes` outlives the copy, because the stream is waited for below.
        let copy = || unsafe { result::memcpy_dtoh_async(bytes, ptr.0, self.compute.raw()) };
        let copied = self.call(OPERATION, copy);
        self.compute.synchronize(OPERATION)?;
        copied.map(|()| values)
    }

    /// Enqueues a copy from device memory to device memory.
    pub(super) fn copy(&self, to: Ptr, from: Ptr, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.compute.raw();
        // SAFETY: the caller owns both ranges, and buffers are freed only after waiting for all
        // enqueued work.
        let copy = || unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, stream) };
        self.call("copy", copy)
    }

    /// Enqueues filling `bytes` bytes with zeros.
    pub(super) fn fill_zero(&self, to: Ptr, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.compute.raw();
        // SAFETY: the caller owns the range, and buffers are freed only after waiting for all
        // enqueued work.
        let fill = || unsafe { result::memset_d8_async(to.0, 0, bytes, stream) };
        self.call("fill", fill)
    }

    /// Enqueues a copy of `bytes` bytes of device memory into pinned memory at `offset`. The
    /// host must not touch them before the copy has completed.
    pub(super) fn copy_to_swap(
        &self,
        (to, offset): (&Pinned, usize),
        from: Ptr,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let (to, stream) = (to.at(offset, bytes)?, self.compute.raw());
        // SAFETY: `at` has checked the target range, which is freed only after waiting for all
        // enqueued work; the caller owns the source.
        let copy = || unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0, bytes, stream) };
        self.call("swap_out", || copy().result())
    }

    /// Enqueues a copy of `bytes` bytes of pinned memory at `offset` into device memory. The
    /// host must not write them before the copy has completed.
    pub(super) fn copy_from_swap(
        &self,
        to: Ptr,
        (from, offset): (&Pinned, usize),
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let (from, stream) = (from.at(offset, bytes)?, self.compute.raw());
        // SAFETY: `at` has checked the source range, which is freed only after waiting for all
        // enqueued work; the caller owns the target.
        let copy = || unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.cast(), bytes, stream) };
        self.call("swap_in", || copy().result())
    }

    /// Enqueues a copy of the first `bytes` bytes of `from` into device memory. `from` must not
    /// be written before the copy has completed.
    pub(super) fn copy_from_pinned(
        &self,
        to: Ptr,
        from: &Pinned,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let (source, stream) = (&from.as_slice()[..bytes], self.compute.raw());
        // SAFETY: pinned memory is freed only after waiting for all enqueued work; the caller
        // owns the target.
        let copy = || unsafe { result::memcpy_htod_async(to.0, source, stream) };
        self.call("upload", copy)
    }
}

/// Memory for the intermediate results of one operation. It grows as needed and loses its
/// contents when it grows.
#[derive(Default)]
pub(super) struct Scratch(Option<Buffer>);

impl Scratch {
    /// Returns the address of at least `bytes` uninitialised bytes. Fails if the memory would
    /// have to grow while a graph is being recorded.
    pub(super) fn get(&mut self, context: &Context, bytes: usize) -> Result<Ptr, DeviceError> {
        match &self.0 {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.ptr()),
            _ => {
                context.refuse_in_capture("allocating scratch memory")?;
                self.0 = None;
                let buffer = context.allocate(bytes.next_multiple_of(256), "intermediates")?;
                let ptr = buffer.ptr();
                self.0 = Some(buffer);
                Ok(ptr)
            }
        }
    }
}
