//! Device memory, pinned host memory, and copies between them.

use super::context::{Context, Event, Handle};
use super::error::{self, DEVICE};
use crate::device::{DeviceError, Precision};
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
    /// The address of nothing, for optional parameters.
    pub(super) const NULL: Self = Self(0);

    /// The address `bytes` further on.
    pub(super) fn offset_bytes(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// For calls into the driver.
    pub(super) fn raw(self) -> u64 {
        self.0
    }
}

/// Owned device memory, aligned to 256 bytes; given back on drop, when nothing that
/// was enqueued uses it any more.
pub(super) struct Buffer {
    ptr: Ptr,
    bytes: usize,
    handle: Rc<Handle>,
}

impl Buffer {
    /// Where it begins; [`Ptr::NULL`] if it has no bytes.
    pub(super) fn ptr(&self) -> Ptr {
        self.ptr
    }

    /// Its size.
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
        // SAFETY: allocated by `Context::allocate`, freed once, and no longer in use.
        let free = || unsafe { result::free_sync(self.ptr.0) };
        handle.cleanup("freeing device memory", free);
    }
}

/// How the host uses pinned memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PinnedUse {
    /// Written by the host, read by the device: write-combined.
    Upload,
    /// Written by the device, read by the host.
    Download,
    /// Written and read by the device only.
    Swap,
}

/// Page-locked host memory, which the device copies from and to on its own.
pub(super) struct Pinned {
    start: NonNull<u8>,
    bytes: usize,
    handle: Rc<Handle>,
}

impl Pinned {
    /// Zeroed memory of at least one byte.
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
        // SAFETY: a plain allocation.
        let allocate = || unless_full(unsafe { result::malloc_host(bytes, flags) });
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

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where `bytes` bytes from `offset` on lie.
    fn at(&self, offset: usize, bytes: usize) -> Result<*mut u8, DeviceError> {
        let inside = offset <= self.bytes && bytes <= self.bytes - offset;
        error::require(inside, "copying pinned memory", || {
            format!("{bytes} bytes at {offset} are not in {} bytes", self.bytes)
        })?;
        // SAFETY: inside the allocation, as just checked.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }

    /// The bytes. The caller has waited for copies into them.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with this size, initialised by `new`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// The bytes, to be written. The caller has waited for copies out of them.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, initialised by `new`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let handle = &self.handle;
        handle.drain();
        // SAFETY: allocated by `new`, freed once, and no copy is under way.
        let free = || unsafe { result::free_host(self.start.as_ptr().cast()) };
        handle.cleanup("freeing pinned memory", free);
    }
}

/// `OutOfMemory` of this device.
pub(super) fn out_of_memory(bytes: usize, what: &str) -> DeviceError {
    DeviceError::OutOfMemory {
        device: DEVICE,
        bytes,
        what: what.to_owned(),
    }
}

/// What was allocated; `None` when there is no memory left.
pub(super) fn unless_full<T>(allocated: Result<T, DriverError>) -> Result<Option<T>, DriverError> {
    match allocated {
        Ok(allocated) => Ok(Some(allocated)),
        Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Bytes of a piece of an upload.
const PIECE: usize = 16 << 20;

/// One of the two places that a piece is put in before it is copied.
struct Piece {
    memory: Pinned,
    copied: Event,
}

/// Two pinned pieces, filled in turn: one is written while the other is copied.
#[derive(Default)]
pub(super) struct Uploader {
    pieces: [Option<Piece>; 2],
    next: usize,
}

impl Uploader {
    /// Copies `bytes` to `to` on the compute stream.
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
                // Nobody would know when the piece may be written again.
                *place = None;
                return copied;
            }
        }
        Ok(())
    }
}

impl Context {
    /// Uninitialised device memory; `what` names it when there is none left.
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer, DeviceError> {
        const OPERATION: &str = "allocating device memory";
        self.refuse_in_capture(OPERATION)?;
        let handle = Rc::clone(&self.handle);
        if bytes == 0 {
            let ptr = Ptr::NULL;
            return Ok(Buffer { ptr, bytes, handle });
        }
        // SAFETY: a plain allocation.
        let allocate = || unless_full(unsafe { result::malloc_sync(bytes) });
        let address = handle.call(OPERATION, allocate)?;
        let ptr = Ptr(address.ok_or_else(|| out_of_memory(bytes, what))?);
        handle.allocated.set(handle.allocated.get() + bytes);
        Ok(Buffer { ptr, bytes, handle })
    }

    /// Device memory filled with zeros.
    pub(super) fn allocate_zeroed(&self, bytes: usize, what: &str) -> Result<Buffer, DeviceError> {
        let buffer = self.allocate(bytes, what)?;
        self.fill_zero(buffer.ptr(), bytes)?;
        Ok(buffer)
    }

    /// Device memory that holds `values`. Returns when they are read, not when they
    /// have arrived.
    pub(super) fn upload<T: Pod>(&self, values: &[T], what: &str) -> Result<Buffer, DeviceError> {
        let buffer = self.allocate(size_of_val(values), what)?;
        self.write(&buffer, 0, values)?;
        Ok(buffer)
    }

    /// Overwrites a part of `buffer`, after what is enqueued already.
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

    /// Reads `count` values, after waiting for all that is enqueued. For tests and
    /// benches: a step never waits.
    pub(super) fn read<T: Pod>(&self, ptr: Ptr, count: usize) -> Result<Vec<T>, DeviceError> {
        const OPERATION: &str = "read";
        self.refuse_in_capture(OPERATION)?;
        let mut values = vec![T::zeroed(); count];
        if count == 0 {
            return Ok(values);
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        // SAFETY: `bytes` lives until the stream was waited for, below.
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
        // SAFETY: the caller owns both ranges, and buffers are freed only after a wait.
        let copy = || unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, stream) };
        self.call("copy", copy)
    }

    /// Enqueues zeros.
    pub(super) fn fill_zero(&self, to: Ptr, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.compute.raw();
        // SAFETY: the caller owns the range, and buffers are freed only after a wait.
        let fill = || unsafe { result::memset_d8_async(to.0, 0, bytes, stream) };
        self.call("fill", fill)
    }

    /// Enqueues a copy of some bytes of device memory to `to`, from `offset` on. The host
    /// must not touch them before that was done.
    pub(super) fn copy_to_swap(
        &self,
        (to, offset): (&Pinned, usize),
        from: Ptr,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let (to, stream) = (to.at(offset, bytes)?, self.compute.raw());
        // SAFETY: `at` has checked the range, which is freed only after a wait; the caller owns
        // the source.
        let copy = || unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0, bytes, stream) };
        self.call("swap_out", || copy().result())
    }

    /// Enqueues a copy of some bytes of `from`, from `offset` on, to device memory; likewise.
    pub(super) fn copy_from_swap(
        &self,
        to: Ptr,
        (from, offset): (&Pinned, usize),
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let (from, stream) = (from.at(offset, bytes)?, self.compute.raw());
        // SAFETY: as above, with source and target exchanged.
        let copy = || unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.cast(), bytes, stream) };
        self.call("swap_in", || copy().result())
    }

    /// Enqueues a copy of the first `bytes` of `from` to device memory. `from` must
    /// not be written before that was done.
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
        // SAFETY: pinned memory is freed only after a wait; the caller owns the target.
        let copy = || unsafe { result::memcpy_htod_async(to.0, source, stream) };
        self.call("upload", copy)
    }
}

/// A matrix of activations on the device: row-major, dense.
pub struct CudaTensor {
    buffer: Buffer,
    rows: usize,
    columns: usize,
    precision: Precision,
}

impl CudaTensor {
    /// An uninitialised matrix.
    pub(super) fn new(
        context: &Context,
        rows: usize,
        columns: usize,
        precision: Precision,
    ) -> Result<Self, DeviceError> {
        let element = match precision {
            Precision::Activation => 2,
            Precision::Full => 4,
        };
        let bytes = rows
            .checked_mul(columns)
            .and_then(|elements| elements.checked_mul(element))
            .ok_or_else(|| out_of_memory(usize::MAX, "activations"))?;
        Ok(Self {
            buffer: context.allocate(bytes, "activations")?,
            rows,
            columns,
            precision,
        })
    }

    /// Where the first row begins.
    pub(super) fn ptr(&self) -> Ptr {
        self.buffer.ptr()
    }

    /// The memory of all rows.
    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Rows that there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What an element is kept as.
    pub fn precision(&self) -> Precision {
        self.precision
    }
}

/// Memory for intermediate results of one operation, which grows as needed. What it
/// held is lost when it grows.
#[derive(Default)]
pub(super) struct Scratch(Option<Buffer>);

impl Scratch {
    /// At least `bytes` bytes, uninitialised. An error while a graph is being
    /// recorded, if it had to grow.
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
