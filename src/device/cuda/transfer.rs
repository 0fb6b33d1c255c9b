//! Transfers in every step: inputs to the device, results to the host.

use super::context::Context;
use super::handle::Event;
use super::memory::{Buffer, Pinned, PinnedUse, Ptr};
use crate::device::DeviceError;
use cudarc::driver::result;
use std::cell::RefCell;
use std::rc::Rc;

/// Number of staging buffers: one per step in flight (two), and one for the step that is being
/// prepared.
const STAGING_BUFFERS: usize = 3;

/// Number of downloads: one per step in flight (two), and one for the step that is being
/// enqueued.
const DOWNLOADS: usize = 3;

/// Returns how many bytes to allocate for `bytes`. Rounding up to a power of two keeps data
/// that grows in every step from reallocating in every step, which would wait for the device.
fn room_for(bytes: usize) -> usize {
    let power = bytes.checked_next_power_of_two();
    power.unwrap_or(usize::MAX).max(4096)
}

/// Returns the bytes that [`Uploads::reserve`] allocates on the device for `words` words, and
/// those of the staging buffers in pinned memory.
pub(super) fn upload_bytes(words: usize) -> (usize, usize) {
    let bytes = room_for(words.saturating_mul(4));
    (bytes, bytes.saturating_mul(STAGING_BUFFERS))
}

/// Returns the bytes on the device, and in pinned memory, of the downloads of `bytes` bytes that
/// [`Downloads::reserve`] allocates.
pub(super) fn download_bytes(bytes: usize) -> (usize, usize) {
    let bytes = room_for(bytes).saturating_mul(DOWNLOADS);
    (bytes, bytes)
}

/// A staging buffer: pinned memory, with the event that follows its copy.
struct StagingBuffer {
    memory: Pinned,
    copied: Event,
}

/// Uploads small inputs of steps, in one copy each, into device memory at a fixed address.
///
/// The host fills three staging buffers in turn, so that it does not wait for the copies of the
/// two steps in flight.
pub(super) struct Uploads {
    what: &'static str,
    /// Whether operations of recorded steps may read the device memory.
    recorded: bool,
    device: Option<Buffer>,
    buffers: [Option<StagingBuffer>; STAGING_BUFFERS],
    next: usize,
}

impl Uploads {
    /// Creates uploads without memory. `what` names them in an out-of-memory error.
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            recorded: true,
            device: None,
            buffers: [const { None }; STAGING_BUFFERS],
            next: 0,
        }
    }

    /// Like [`Uploads::new`], for words that no operation of a recorded step reads.
    pub(super) fn outside_graphs(what: &'static str) -> Self {
        Self {
            recorded: false,
            ..Self::new(what)
        }
    }

    /// Makes room for `words` words, so that [`Uploads::write`] need not allocate device
    /// memory. Returns the address.
    pub(super) fn reserve(&mut self, context: &Context, words: usize) -> Result<Ptr, DeviceError> {
        let bytes = words * 4;
        match &self.device {
            Some(device) if device.bytes() >= bytes => Ok(device.ptr()),
            _ => {
                self.device = None;
                let bytes = room_for(bytes);
                let device = context.allocate(bytes, self.what)?;
                let device = match self.recorded {
                    true => device,
                    false => device.outside_graphs(),
                };
                let ptr = device.ptr();
                self.device = Some(device);
                Ok(ptr)
            }
        }
    }

    /// Enqueues the copy of `words` to the start of the device memory and returns its address.
    /// The address changes only if there was not enough room.
    pub(super) fn write(&mut self, context: &Context, words: &[u32]) -> Result<Ptr, DeviceError> {
        const OPERATION: &str = "upload";
        context.refuse_in_capture(OPERATION)?;
        let ptr = self.reserve(context, words.len())?;
        // As large as the device memory, so that it grows no more often than that.
        let room = self.device.as_ref().map_or(0, Buffer::bytes);
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let index = self.next;
        self.next = (self.next + 1) % STAGING_BUFFERS;
        let buffer = match self.buffers[index].take() {
            Some(buffer) if buffer.memory.bytes() >= bytes.len() => buffer,
            _ => StagingBuffer {
                memory: Pinned::new(&context.handle, room, PinnedUse::Upload)?,
                copied: Event::new(&context.handle)?,
            },
        };
        let buffer = self.buffers[index].insert(buffer);
        if !buffer.copied.is_reached()? {
            buffer.copied.synchronize(OPERATION)?;
        }
        buffer.memory.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        let copied = context
            .copy_from_pinned(ptr, &buffer.memory, bytes.len())
            .and_then(|()| buffer.copied.record(&context.compute));
        if copied.is_err() {
            // Without the event, nothing says when the buffer may be written again.
            self.buffers[index] = None;
        }
        copied.map(|()| ptr)
    }
}

/// Device memory for the results of a step, and the host memory that they are copied to.
pub(super) struct Download {
    device: Buffer,
    host: RefCell<Pinned>,
    written: Event,
    copied: Event,
}

impl Download {
    fn new(context: &Context, bytes: usize) -> Result<Self, DeviceError> {
        let (bytes, what) = (room_for(bytes), "the results of a step");
        Ok(Self {
            device: context.allocate(bytes, what)?.outside_graphs(),
            host: RefCell::new(Pinned::new(&context.handle, bytes, PinnedUse::Download)?),
            written: Event::new(&context.handle)?,
            copied: Event::new(&context.handle)?,
        })
    }

    /// Returns the address to which kernels write the results.
    pub(super) fn ptr(&self) -> Ptr {
        self.device.ptr()
    }

    /// Enqueues the copy of the first `bytes` bytes to the host. It runs on the results stream,
    /// after all work enqueued so far on the compute stream.
    pub(super) fn send(&self, context: &Context, bytes: usize) -> Result<(), DeviceError> {
        self.written.record(&context.compute)?;
        context.results.wait(&self.written)?;
        let mut host = self.host.borrow_mut();
        let bytes = bytes.min(host.bytes());
        let target = &mut host.as_mut_slice()[..bytes];
        let stream = context.results.raw();
        // SAFETY: pinned memory is freed only after waiting for all enqueued work, and read
        // only after `copied` is reached.
        let copy = || unsafe { result::memcpy_dtoh_async(target, self.device.ptr().raw(), stream) };
        context.call("copying results", copy)?;
        self.copied.record(&context.results)
    }

    /// Waits for the copy, but not for work enqueued later, and passes the bytes to `read`.
    pub(super) fn receive<R>(&self, read: impl FnOnce(&[u8]) -> R) -> Result<R, DeviceError> {
        self.copied.synchronize("waiting for a step")?;
        Ok(read(self.host.borrow().as_slice()))
    }
}

/// A pool of downloads, one per step in flight.
#[derive(Default)]
pub(super) struct Downloads(Vec<Rc<Download>>);

impl Downloads {
    /// Allocates the downloads of `bytes` bytes that steady decoding needs.
    pub(super) fn reserve(&mut self, context: &Context, bytes: usize) -> Result<(), DeviceError> {
        while self.0.len() < DOWNLOADS {
            self.0.push(Rc::new(Download::new(context, bytes)?));
        }
        Ok(())
    }

    /// Returns a download that no step in flight holds, with room for `bytes` bytes. Kernels
    /// enqueued from now on wait, on the device, for its last copy to the host.
    pub(super) fn next(
        &mut self,
        context: &Context,
        bytes: usize,
    ) -> Result<Rc<Download>, DeviceError> {
        // The list is ordered by last use, oldest first.
        let free = self.0.iter().position(|one| Rc::strong_count(one) == 1);
        let reused = free.map(|index| self.0.remove(index));
        let download = match reused {
            Some(download) if download.device.bytes() >= bytes => download,
            _ => Rc::new(Download::new(context, bytes)?),
        };
        context.compute.wait(&download.copied)?;
        self.0.push(Rc::clone(&download));
        Ok(download)
    }
}
