//! Device memory, pinned host memory, and uploads through it.

use super::error::{self, none_if_out_of_memory, out_of_memory};
use super::handle::{Event, Handle, Stream};
use crate::device::DeviceError;
use cudarc::driver::result;
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
    /// Whether recorded steps may refer to the memory.
    recorded: bool,
    handle: Rc<Handle>,
}

impl Buffer {
    /// Allocates uninitialised memory. `what` names it in an out-of-memory error.
    pub(super) fn new(handle: &Rc<Handle>, bytes: usize, what: &str) -> Result<Self, DeviceError> {
        const OPERATION: &str = "allocating device memory";
        handle.refuse_in_capture(OPERATION)?;
        let (handle, recorded) = (Rc::clone(handle), true);
        if bytes == 0 {
            return Ok(Self {
                ptr: Ptr::NULL,
                bytes,
                recorded,
                handle,
            });
        }
        // SAFETY: an allocation has no precondition.
        let allocate = || none_if_out_of_memory(unsafe { result::malloc_sync(bytes) });
        let address = handle.call(OPERATION, allocate)?;
        let ptr = Ptr(address.ok_or_else(|| out_of_memory(bytes, what))?);
        handle.allocated.set(handle.allocated.get() + bytes);
        Ok(Self {
            ptr,
            bytes,
            recorded,
            handle,
        })
    }

    /// Promises that no recorded step refers to the memory, so that freeing it invalidates none.
    pub(super) fn outside_graphs(mut self) -> Self {
        self.recorded = false;
        self
    }

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
        if self.recorded {
            handle.releases.set(handle.releases.get() + 1);
        }
        handle.drain();
        // SAFETY: the memory was allocated by `new`, is freed once, and is no
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
        handle: &Rc<Handle>,
        bytes: usize,
        usage: PinnedUse,
    ) -> Result<Self, DeviceError> {
        const OPERATION: &str = "allocating pinned memory";
        handle.refuse_in_capture(OPERATION)?;
        let bytes = bytes.max(1);
        let flags = match usage {
            PinnedUse::Upload => sys::CU_MEMHOSTALLOC_WRITECOMBINED,
            PinnedUse::Download | PinnedUse::Swap => 0,
        };
        // SAFETY: an allocation has no precondition.
        let allocate = || none_if_out_of_memory(unsafe { result::malloc_host(bytes, flags) });
        let start = handle.call(OPERATION, allocate)?;
        let start = start.and_then(|start| NonNull::new(start.cast::<u8>()));
        let start = start.ok_or_else(|| out_of_memory(bytes, "pinned host memory"))?;
        // SAFETY: the memory was just allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self {
            start,
            bytes,
            handle: Rc::clone(handle),
        })
    }

    /// Returns the size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the address at `offset`. Fails unless `bytes` bytes from there on are inside the
    /// allocation.
    pub(super) fn at(&self, offset: usize, bytes: usize) -> Result<*mut u8, DeviceError> {
        let inside = offset <= self.bytes && bytes <= self.bytes - offset;
        error::require(inside, "copying pinned memory", || {
            format!("{bytes} bytes at {offset} are not in {} bytes", self.bytes)
        })?;
        // SAFETY: the offset is inside the allocation, as just checked.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }

    /// Enqueues a copy of the first `bytes` bytes into device memory. The host must not write
    /// them before the copy has completed.
    pub(super) fn copy_to(
        &self,
        to: Ptr,
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let (source, stream) = (&self.as_slice()[..bytes], stream.raw());
        // SAFETY: pinned memory is freed only after waiting for all enqueued work; the caller
        // owns the target.
        let copy = || unsafe { result::memcpy_htod_async(to.0, source, stream) };
        self.handle.call("upload", copy)
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

/// Maximum number of bytes per piece of an upload.
const PIECE: usize = 16 << 20;

/// Bytes of pinned memory that an [`Uploader`] takes at most.
pub(super) const UPLOADER_BYTES: usize = 2 * PIECE;

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
    /// Copies `bytes` to `to` on `stream`. Returns once `bytes` have been read.
    pub(super) fn copy(
        &mut self,
        stream: &Stream,
        to: Ptr,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
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
                    memory: Pinned::new(stream.handle(), capacity, PinnedUse::Upload)?,
                    copied: Event::new(stream.handle())?,
                });
            }
            let Some(piece) = place else {
                return Err(error::failed("upload", "there is no staging memory"));
            };
            piece.copied.synchronize("upload")?;
            piece.memory.as_mut_slice()[..part.len()].copy_from_slice(part);
            let to = to.offset_bytes(index * PIECE);
            let copied = piece
                .memory
                .copy_to(to, part.len(), stream)
                .and_then(|()| piece.copied.record(stream));
            if copied.is_err() {
                // Without the event, nothing says when the buffer may be written again.
                *place = None;
                return copied;
            }
        }
        Ok(())
    }
}
