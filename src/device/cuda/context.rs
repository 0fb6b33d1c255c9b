//! The CUDA context, its two streams, and events between them.
//!
//! Everything is enqueued on the *compute* stream, in order. Samples go to the host
//! on the *results* stream, so that the copy overlaps with the next step.

use super::error::{self, ErrorDoor};
use super::memory::{Ptr, Uploader, out_of_memory, unless_full};
use super::transfer::Uploads;
use crate::device::DeviceError;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A retained primary context; what every resource needs to be given back.
pub(super) struct Handle {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) errors: ErrorDoor,
    /// Bytes of device memory that are allocated now.
    pub(super) allocated: Cell<usize>,
    /// Counts releases of device memory: addresses recorded before it changed may be stale.
    pub(super) releases: Cell<u64>,
}

impl Handle {
    /// Makes the context current on this thread.
    fn bind(&self) -> Result<(), DriverError> {
        if result::ctx::get_current()? != Some(self.context) {
            // SAFETY: the context is retained for as long as `self` lives.
            unsafe { result::ctx::set_current(self.context)? };
        }
        Ok(())
    }

    /// Calls the driver with the context current; refuses when the device is lost.
    pub(super) fn call<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<T, DriverError>,
    ) -> Result<T, DeviceError> {
        self.errors.check()?;
        self.bind()
            .and_then(|()| call())
            .map_err(|error| self.errors.admit(operation, error))
    }

    /// Waits until nothing runs, so that memory can be given back. One failure may be
    /// an older one that surfaces here: it is logged, and the wait tried again.
    pub(super) fn drain(&self) {
        self.errors.cleanup("binding the context", self.bind());
        let first = result::ctx::synchronize();
        let failed = first.is_err();
        self.errors.cleanup("waiting before a release", first);
        if failed && self.errors.check().is_ok() {
            let again = result::ctx::synchronize();
            self.errors.cleanup("waiting before a release", again);
        }
    }

    /// Calls the driver to give something back. Happens even when the device is lost.
    pub(super) fn cleanup(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<(), DriverError>,
    ) {
        // Not being able to bind must not keep anything from being given back.
        self.errors.cleanup("binding the context", self.bind());
        self.errors.cleanup(operation, call());
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: retained once by `Context::new`; whatever belongs to the context holds an `Rc` of `self`.
        let outcome = unsafe { result::primary_ctx::release(self.device) };
        self.errors.cleanup("releasing the context", outcome);
    }
}

/// A stream of the context.
pub(super) struct Stream {
    stream: sys::CUstream,
    handle: Rc<Handle>,
}

impl Stream {
    fn new(handle: &Rc<Handle>) -> Result<Self, DeviceError> {
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = handle.call("creating a stream", || result::stream::create(kind))?;
        Ok(Self {
            stream,
            handle: Rc::clone(handle),
        })
    }

    /// For calls into the driver.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits on the host until the stream is empty.
    pub(super) fn synchronize(&self, operation: &'static str) -> Result<(), DeviceError> {
        // SAFETY: the stream lives.
        let wait = || unsafe { result::stream::synchronize(self.stream) };
        self.handle.call(operation, wait)
    }

    /// Work enqueued from now on waits, on the device, for `event`.
    pub(super) fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event live, and are of the same context.
        let wait = || unsafe { result::stream::wait_event(self.stream, event.event, flags) };
        self.handle.call("waiting for an event", wait)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created by `new` and destroyed once.
        let destroy = || unsafe { result::stream::destroy(self.stream) };
        self.handle.cleanup("destroying a stream", destroy);
    }
}

/// A point in a stream, to be waited for.
pub(super) struct Event {
    event: sys::CUevent,
    handle: Rc<Handle>,
}

impl Event {
    /// An event without timing; not recorded yet.
    pub(super) fn new(context: &Context) -> Result<Self, DeviceError> {
        let handle = Rc::clone(&context.handle);
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = handle.call("creating an event", || result::event::create(flags))?;
        Ok(Self { event, handle })
    }

    /// Is reached when all that is in `stream` now is done.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: event and stream live, and are of the same context.
        let record = || unsafe { result::event::record(self.event, stream.stream) };
        self.handle.call("recording an event", record)
    }

    /// Whether it was reached; `true` for one that was never recorded.
    pub(super) fn is_reached(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event lives.
        let query = || match unsafe { result::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(error),
        };
        self.handle.call("asking for an event", query)
    }

    /// Waits for it on the host.
    pub(super) fn synchronize(&self, operation: &'static str) -> Result<(), DeviceError> {
        // SAFETY: the event lives.
        let wait = || unsafe { result::event::synchronize(self.event) };
        self.handle.call(operation, wait)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `new` and destroyed once.
        let destroy = || unsafe { result::event::destroy(self.event) };
        self.handle.cleanup("destroying an event", destroy);
    }
}

/// The context of one device, with its streams.
pub(super) struct Context {
    pub(super) uploader: RefCell<Uploader>,
    lists: RefCell<Uploads>,
    pub(super) compute: Stream,
    pub(super) results: Stream,
    /// Whether a graph is being recorded on the compute stream: then nothing may be
    /// allocated or waited for.
    pub(super) capturing: Cell<bool>,
    pub(super) handle: Rc<Handle>,
}

impl Context {
    /// Retains the primary context of `device` and makes the streams.
    pub(super) fn new(device: sys::CUdevice) -> Result<Self, DeviceError> {
        let errors = ErrorDoor::default();
        // SAFETY: `device` is one that the driver gave.
        let context = unless_full(unsafe { result::primary_ctx::retain(device) })
            .map_err(|error| errors.admit("making a context", error))?
            .ok_or_else(|| out_of_memory(0, "a context"))?;
        let handle = Rc::new(Handle {
            device,
            context,
            errors,
            allocated: Cell::new(0),
            releases: Cell::new(0),
        });
        Ok(Self {
            uploader: RefCell::default(),
            lists: RefCell::new(Uploads::new("a list")),
            compute: Stream::new(&handle)?,
            results: Stream::new(&handle)?,
            capturing: Cell::new(false),
            handle,
        })
    }

    /// The compute stream, for libraries that enqueue on it.
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

    /// Uploads a few words for the next kernels: they stay where they are until the
    /// next call enqueues its own.
    pub(super) fn list(&self, words: &[u32]) -> Result<Ptr, DeviceError> {
        self.lists.borrow_mut().write(self, words)
    }

    /// Refuses what cannot be done while a graph is being recorded.
    pub(super) fn refuse_in_capture(&self, operation: &'static str) -> Result<(), DeviceError> {
        error::require(!self.capturing.get(), operation, || {
            "not possible while a graph is being recorded".to_owned()
        })
    }

    /// Waits on the host until both streams are empty.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.refuse_in_capture("synchronize")?;
        self.compute.synchronize("synchronize")?;
        self.results.synchronize("synchronize")
    }

    /// Free and total bytes of the device's memory.
    pub(super) fn memory_info(&self) -> Result<(usize, usize), DeviceError> {
        self.call("asking for free memory", result::mem_get_info)
    }
}
