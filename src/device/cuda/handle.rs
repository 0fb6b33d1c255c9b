//! The driver's context, its streams, and events between them.

use super::error::{self, ErrorState, none_if_out_of_memory, out_of_memory};
use crate::device::DeviceError;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A retained primary context. Every resource holds one, because it is needed for the release.
pub(super) struct Handle {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// The streams that have been created and not destroyed.
    streams: RefCell<Vec<sys::CUstream>>,
    pub(super) errors: ErrorState,
    /// Whether a graph is being recorded on the compute stream. Meanwhile nothing may be
    /// allocated or waited for.
    pub(super) capturing: Cell<bool>,
    /// Bytes of device memory that are currently allocated.
    pub(super) allocated: Cell<usize>,
    /// Number of releases so far of device memory that recorded steps may refer to. Addresses
    /// recorded before the last one may be stale.
    pub(super) releases: Cell<u64>,
}

impl Handle {
    /// Retains the primary context of `device`.
    pub(super) fn new(device: sys::CUdevice) -> Result<Rc<Self>, DeviceError> {
        let errors = ErrorState::default();
        // SAFETY: the driver returned `device`.
        let context = none_if_out_of_memory(unsafe { result::primary_ctx::retain(device) })
            .map_err(|error| errors.convert("creating a context", error))?
            .ok_or_else(|| out_of_memory(0, "a context"))?;
        Ok(Rc::new(Self {
            device,
            context,
            streams: RefCell::default(),
            errors,
            capturing: Cell::new(false),
            allocated: Cell::new(0),
            releases: Cell::new(0),
        }))
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<(), DriverError> {
        if result::ctx::get_current()? != Some(self.context) {
            // SAFETY: the context is retained for as long as `self` lives.
            unsafe { result::ctx::set_current(self.context)? };
        }
        Ok(())
    }

    /// Calls the driver with the context current. Fails without the call if the device is lost.
    pub(super) fn call<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<T, DriverError>,
    ) -> Result<T, DeviceError> {
        self.errors.check()?;
        self.bind()
            .and_then(|()| call())
            .map_err(|error| self.errors.convert(operation, error))
    }

    /// Fails if a graph is being recorded. `operation` names the refused call in the error.
    pub(super) fn refuse_in_capture(&self, operation: &'static str) -> Result<(), DeviceError> {
        error::require(!self.capturing.get(), operation, || {
            "not possible while a graph is being recorded".to_owned()
        })
    }

    /// Waits until the streams are idle, so that memory can be released. Other users of the
    /// context, such as a second engine in this process, are not waited for: a call that waits
    /// for the whole context would invalidate what they record.
    pub(super) fn drain(&self) {
        for &stream in self.streams.borrow().iter() {
            self.settle(stream);
        }
    }

    /// Waits until a stream is idle. The first failure may stem from earlier work, so it is
    /// logged and the wait is retried once.
    fn settle(&self, stream: sys::CUstream) {
        self.errors.cleanup("binding the context", self.bind());
        // SAFETY: the callers pass streams that have not been destroyed.
        let wait = || unsafe { result::stream::synchronize(stream) };
        let first = wait();
        let failed = first.is_err();
        self.errors.cleanup("waiting before a release", first);
        if failed && self.errors.check().is_ok() {
            self.errors.cleanup("waiting before a release", wait());
        }
    }

    /// Calls the driver to release a resource, even if the device is lost.
    pub(super) fn cleanup(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<(), DriverError>,
    ) {
        // Release even if the context cannot be bound.
        self.errors.cleanup("binding the context", self.bind());
        self.errors.cleanup(operation, call());
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the context was retained once by `new`, and everything that belongs
        // to it holds an `Rc` of `self`, so nothing uses it any more.
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
    pub(super) fn new(handle: &Rc<Handle>) -> Result<Self, DeviceError> {
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = handle.call("creating a stream", || result::stream::create(kind))?;
        handle.streams.borrow_mut().push(stream);
        Ok(Self {
            stream,
            handle: Rc::clone(handle),
        })
    }

    /// Returns the driver's handle.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// Returns the context that the stream belongs to.
    pub(super) fn handle(&self) -> &Rc<Handle> {
        &self.handle
    }

    /// Blocks the host until all work in the stream has completed.
    pub(super) fn synchronize(&self, operation: &'static str) -> Result<(), DeviceError> {
        // SAFETY: the stream is alive.
        let wait = || unsafe { result::stream::synchronize(self.stream) };
        self.handle.call(operation, wait)
    }

    /// Makes all work enqueued from now on wait for `event`, on the device.
    pub(super) fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are alive and belong to the same context.
        let wait = || unsafe { result::stream::wait_event(self.stream, event.event, flags) };
        self.handle.call("waiting for an event", wait)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The driver destroys a stream without waiting for its work, and `drain` does not wait
        // for a stream that is gone.
        self.handle.settle(self.stream);
        let mut streams = self.handle.streams.borrow_mut();
        streams.retain(|stream| *stream != self.stream);
        drop(streams);
        // SAFETY: created by `new` and destroyed once.
        let destroy = || unsafe { result::stream::destroy(self.stream) };
        self.handle.cleanup("destroying a stream", destroy);
    }
}

/// A point in a stream that the host or another stream can wait for.
pub(super) struct Event {
    event: sys::CUevent,
    handle: Rc<Handle>,
}

impl Event {
    /// Creates an event without timing that is not recorded yet.
    pub(super) fn new(handle: &Rc<Handle>) -> Result<Self, DeviceError> {
        Self::create(handle, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// Creates an event that records the time at which it is reached.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn with_time(handle: &Rc<Handle>) -> Result<Self, DeviceError> {
        Self::create(handle, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn create(handle: &Rc<Handle>, flags: sys::CUevent_flags) -> Result<Self, DeviceError> {
        let handle = Rc::clone(handle);
        let event = handle.call("creating an event", || result::event::create(flags))?;
        Ok(Self { event, handle })
    }

    /// Records the event in `stream`: it is reached when all work enqueued so far has
    /// completed.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: event and stream are alive and belong to the same context.
        let record = || unsafe { result::event::record(self.event, stream.stream) };
        self.handle.call("recording an event", record)
    }

    /// Returns whether the event was reached; `true` if it was never recorded.
    pub(super) fn is_reached(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event is alive.
        let query = || match unsafe { result::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(error),
        };
        self.handle.call("querying an event", query)
    }

    /// Blocks the host until the event is reached.
    pub(super) fn synchronize(&self, operation: &'static str) -> Result<(), DeviceError> {
        // SAFETY: the event is alive.
        let wait = || unsafe { result::event::synchronize(self.event) };
        self.handle.call(operation, wait)
    }
}

#[cfg(any(test, feature = "internals"))]
impl Event {
    /// Waits until both events are reached and returns the seconds from `self` to `end`. Both
    /// must have been created with a time, and recorded.
    pub(super) fn seconds_to(&self, end: &Self) -> Result<f64, DeviceError> {
        const OPERATION: &str = "measuring time";
        end.synchronize(OPERATION)?;
        // SAFETY: both events are alive; the driver refuses events without a time.
        let elapsed = || unsafe { result::event::elapsed(self.event, end.event) };
        let milliseconds = self.handle.call(OPERATION, elapsed)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `new` and destroyed once.
        let destroy = || unsafe { result::event::destroy(self.event) };
        self.handle.cleanup("destroying an event", destroy);
    }
}
