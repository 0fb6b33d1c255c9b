//! The context of a device: its two streams, and copies on them.
//!
//! All operations are enqueued in order on the *compute* stream. Results are copied to the host
//! on the *results* stream, so that the copy overlaps with the next step.

use super::error;
use super::handle::{Handle, Stream};
use super::memory::{Buffer, Pinned, Ptr, Uploader};
use crate::device::DeviceError;
use bytemuck::Pod;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::cell::RefCell;
use std::rc::Rc;

/// The context of one device, with its streams.
pub(super) struct Context {
    uploader: RefCell<Uploader>,
    pub(super) compute: Stream,
    pub(super) results: Stream,
    pub(super) handle: Rc<Handle>,
    /// Whether kernels begin while the one before them still runs.
    pub(super) overlaps: bool,
}

impl Context {
    /// Retains the primary context of `device` and creates the streams. `overlaps` says whether
    /// kernels begin while the one before them still runs, for which the GPU must have compute
    /// capability 9.0.
    pub(super) fn new(device: sys::CUdevice, overlaps: bool) -> Result<Self, DeviceError> {
        let handle = Handle::new(device)?;
        Ok(Self {
            uploader: RefCell::default(),
            compute: Stream::new(&handle)?,
            results: Stream::new(&handle)?,
            handle,
            overlaps,
        })
    }

    /// Returns the compute stream, for libraries that enqueue on it.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.compute.raw()
    }

    /// Calls the driver with the context current. `operation` names the call in errors.
    pub(super) fn call<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<T, DriverError>,
    ) -> Result<T, DeviceError> {
        self.handle.call(operation, call)
    }

    /// Fails if a graph is being recorded. `operation` names the refused call in the error.
    pub(super) fn refuse_in_capture(&self, operation: &'static str) -> Result<(), DeviceError> {
        self.handle.refuse_in_capture(operation)
    }

    /// Blocks the host until all work in both streams has completed.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.refuse_in_capture("synchronize")?;
        self.compute.synchronize("synchronize")?;
        self.results.synchronize("synchronize")
    }

    /// Returns the free and the total bytes of the device's memory.
    pub(super) fn memory_info(&self) -> Result<(usize, usize), DeviceError> {
        self.call("querying free memory", result::mem_get_info)
    }

    /// Allocates uninitialised device memory. `what` names it in an out-of-memory error.
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer, DeviceError> {
        Buffer::new(&self.handle, bytes, what)
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
            end.is_some_and(|end| end <= buffer.bytes()),
            OPERATION,
            || {
                let (length, size) = (bytes.len(), buffer.bytes());
                format!("{length} bytes at {offset_bytes} do not fit {size} bytes")
            },
        )?;
        let mut uploader = self.uploader.borrow_mut();
        uploader.copy(
            &self.compute,
            buffer.ptr().offset_bytes(offset_bytes),
            bytes,
        )
    }

    /// Reads `count` values, after waiting for all enqueued work. For tests and benchmarks
    /// only, because a step must not wait.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn read<T: Pod>(&self, ptr: Ptr, count: usize) -> Result<Vec<T>, DeviceError> {
        const OPERATION: &str = "read";
        self.refuse_in_capture(OPERATION)?;
        let mut values = vec![T::zeroed(); count];
        if count == 0 {
            return Ok(values);
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        // SAFETY: `bytes` outlives the copy, because the stream is waited for below.
        let copy = || unsafe { result::memcpy_dtoh_async(bytes, ptr.raw(), self.compute.raw()) };
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
        let copy = || unsafe { result::memcpy_dtod_async(to.raw(), from.raw(), bytes, stream) };
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
        let fill = || unsafe { result::memset_d8_async(to.raw(), 0, bytes, stream) };
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
        let copy = || unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.raw(), bytes, stream) };
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
        let copy = || unsafe { sys::cuMemcpyHtoDAsync_v2(to.raw(), from.cast(), bytes, stream) };
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
        from.copy_to(to, bytes, &self.compute)
    }
}
