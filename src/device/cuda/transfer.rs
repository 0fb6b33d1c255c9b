//! What goes back and forth in every step: inputs to the device, samples to the host.

use super::context::{Context, Event};
use super::memory::{Buffer, Pinned, PinnedUse, Ptr};
use crate::device::DeviceError;
use cudarc::driver::result;
use std::cell::RefCell;
use std::rc::Rc;

/// Steps in flight, and one that is being prepared.
const PLACES: usize = 3;

/// How much to allocate for `bytes`: what grows a little every step does not grow its
/// memory, which would wait for the device and make recorded graphs stale, every step.
fn room_for(bytes: usize) -> usize {
    bytes.next_power_of_two().max(4096)
}

/// One of the places that inputs are put in before they are copied.
struct Place {
    memory: Pinned,
    copied: Event,
}

/// Small inputs of a step: one copy a step into device memory at a fixed address.
///
/// The host fills one of three pinned places in turn, so that it does not wait for
/// the copies of the two steps in flight.
pub(super) struct Uploads {
    what: &'static str,
    device: Option<Buffer>,
    places: [Option<Place>; PLACES],
    next: usize,
}

impl Uploads {
    /// None yet; `what` names them when there is no memory left.
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            device: None,
            places: [const { None }; PLACES],
            next: 0,
        }
    }

    /// Makes room for so many words, so that [`Uploads::write`] need not.
    pub(super) fn reserve(&mut self, context: &Context, words: usize) -> Result<Ptr, DeviceError> {
        let bytes = words * 4;
        match &self.device {
            Some(device) if device.bytes() >= bytes => Ok(device.ptr()),
            _ => {
                self.device = None;
                let bytes = room_for(bytes);
                let device = context.allocate(bytes, self.what)?;
                let ptr = device.ptr();
                self.device = Some(device);
                Ok(ptr)
            }
        }
    }

    /// Enqueues the copy of `words` to the beginning of the device memory, whose
    /// address it gives. The address changes only when there was no room.
    pub(super) fn write(&mut self, context: &Context, words: &[u32]) -> Result<Ptr, DeviceError> {
        const OPERATION: &str = "upload";
        context.refuse_in_capture(OPERATION)?;
        let ptr = self.reserve(context, words.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let index = self.next;
        self.next = (self.next + 1) % PLACES;
        let place = match self.places[index].take() {
            Some(place) if place.memory.bytes() >= bytes.len() => place,
            _ => Place {
                memory: Pinned::new(context, room_for(bytes.len()), PinnedUse::Upload)?,
                copied: Event::new(context)?,
            },
        };
        let place = self.places[index].insert(place);
        if !place.copied.is_reached()? {
            place.copied.synchronize(OPERATION)?;
        }
        place.memory.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        let copied = context
            .copy_from_pinned(ptr, &place.memory, bytes.len())
            .and_then(|()| place.copied.record(&context.compute));
        if copied.is_err() {
            // Nobody would know when the place may be written again.
            self.places[index] = None;
        }
        copied.map(|()| ptr)
    }
}

/// Device memory that a step writes its results to, with the host memory that they
/// are copied to.
pub(super) struct Download {
    device: Buffer,
    host: RefCell<Pinned>,
    written: Event,
    copied: Event,
}

impl Download {
    /// Where kernels write the results.
    pub(super) fn ptr(&self) -> Ptr {
        self.device.ptr()
    }

    /// Enqueues the copy of the first `bytes` to the host, on the results stream,
    /// after all that is enqueued on the compute stream.
    pub(super) fn send(&self, context: &Context, bytes: usize) -> Result<(), DeviceError> {
        self.written.record(&context.compute)?;
        context.results.wait(&self.written)?;
        let mut host = self.host.borrow_mut();
        let bytes = bytes.min(host.bytes());
        let target = &mut host.as_mut_slice()[..bytes];
        let stream = context.results.raw();
        // SAFETY: pinned memory is freed only after a wait, and read only after `copied`.
        let copy = || unsafe { result::memcpy_dtoh_async(target, self.device.ptr().raw(), stream) };
        context.call("copying results", copy)?;
        self.copied.record(&context.results)
    }

    /// Waits for the copy, and for nothing that was enqueued later, and gives the
    /// bytes to `read`.
    pub(super) fn receive<R>(&self, read: impl FnOnce(&[u8]) -> R) -> Result<R, DeviceError> {
        self.copied.synchronize("waiting for a step")?;
        Ok(read(self.host.borrow().as_slice()))
    }
}

/// The downloads of the steps in flight, used in turn.
#[derive(Default)]
pub(super) struct Downloads(Vec<Rc<Download>>);

impl Downloads {
    /// One that no step in flight holds, with room for `bytes`. What the kernels
    /// write next waits, on the device, for its last copy.
    pub(super) fn next(
        &mut self,
        context: &Context,
        bytes: usize,
    ) -> Result<Rc<Download>, DeviceError> {
        // The one that was used longest ago comes first.
        let free = self.0.iter().position(|one| Rc::strong_count(one) == 1);
        let reused = free.map(|index| self.0.remove(index));
        let download = match reused {
            Some(download) if download.device.bytes() >= bytes => download,
            _ => {
                let bytes = room_for(bytes);
                Rc::new(Download {
                    device: context.allocate(bytes, "the results of a step")?,
                    host: RefCell::new(Pinned::new(context, bytes, PinnedUse::Download)?),
                    written: Event::new(context)?,
                    copied: Event::new(context)?,
                })
            }
        };
        context.compute.wait(&download.copied)?;
        self.0.push(Rc::clone(&download));
        Ok(download)
    }
}
