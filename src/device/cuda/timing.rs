//! GPU timing of operations by the GPU's own clock, for `benches/kernels`.

use super::CudaDevice;
use super::context::Context;
use super::handle::Handle;
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::rc::Rc;

const OPERATION: &str = "measuring time";

/// Number of copies that are timed together.
const COPIES: usize = 8;

/// An event that records the time at which it is reached.
struct TimedEvent {
    event: sys::CUevent,
    handle: Rc<Handle>,
}

impl TimedEvent {
    fn new(context: &Context) -> Result<Self, DeviceError> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = context.call(OPERATION, || result::event::create(flags))?;
        let handle = Rc::clone(&context.handle);
        Ok(Self { event, handle })
    }

    fn record(&self, context: &Context) -> Result<(), DeviceError> {
        // SAFETY: event and stream are alive and belong to the same context.
        let record = || unsafe { result::event::record(self.event, context.compute.raw()) };
        context.call(OPERATION, record)
    }

    /// Waits until both events are reached and returns the seconds from `self` to `end`.
    fn seconds_to(&self, end: &Self, context: &Context) -> Result<f64, DeviceError> {
        // SAFETY: both events are alive and were recorded.
        let elapsed = || unsafe {
            result::event::synchronize(end.event)?;
            result::event::elapsed(self.event, end.event)
        };
        Ok(f64::from(context.call(OPERATION, elapsed)?) / 1e3)
    }
}

impl Drop for TimedEvent {
    fn drop(&mut self) {
        // SAFETY: created by `new` and destroyed once.
        let destroy = || unsafe { result::event::destroy(self.event) };
        self.handle.cleanup("destroying an event", destroy);
    }
}

/// Operations recorded as a graph, to be launched in one call.
struct Recording {
    exec: sys::CUgraphExec,
    handle: Rc<Handle>,
}

impl Recording {
    /// Records the operations that `work` enqueues on the compute stream.
    fn new(
        device: &mut CudaDevice,
        work: impl FnOnce(&mut CudaDevice) -> Result<(), DeviceError>,
    ) -> Result<Self, DeviceError> {
        let stream = device.context.compute.raw();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        let begin = || unsafe { result::stream::begin_capture(stream, mode) };
        device.context.call(OPERATION, begin)?;
        device.context.handle.capturing.set(true);
        let outcome = work(device);
        device.context.handle.capturing.set(false);
        // SAFETY: recording was begun above, and is ended even if `work` failed.
        let end = || unsafe { result::stream::end_capture(stream) };
        let graph = device.context.call(OPERATION, end);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        let handle = Rc::clone(&device.context.handle);
        let graph = outcome.and(graph)?;
        // SAFETY: the graph was just recorded, and instantiation copies it.
        let instantiate = || unsafe { result::graph::instantiate(graph, flags) };
        let exec = handle.call(OPERATION, instantiate);
        // SAFETY: the graph is destroyed once and not used afterwards.
        handle.cleanup("destroying a graph", || unsafe {
            result::graph::destroy(graph)
        });
        Ok(Self {
            exec: exec?,
            handle,
        })
    }

    fn launch(&self, context: &Context) -> Result<(), DeviceError> {
        // SAFETY: everything that the recorded operations use outlives the recording, which
        // `time` drops before it returns.
        let launch = || unsafe { result::graph::launch(self.exec, context.compute.raw()) };
        context.call(OPERATION, launch)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // SAFETY: the graph was instantiated once and is destroyed once; the caller has waited
        // for its launches.
        let destroy = || unsafe { result::graph::exec_destroy(self.exec) };
        self.handle.cleanup("destroying a graph", destroy);
    }
}

impl CudaDevice {
    /// Measures the operations that `work` enqueues, and returns the GPU seconds of each of
    /// `samples` runs. The operations run once unrecorded, then as one graph, so that the
    /// host's launch overhead does not count.
    ///
    /// # Errors
    /// Fails if `work` fails, if its operations cannot be recorded, or if the driver fails.
    pub fn time(
        &mut self,
        samples: usize,
        mut work: impl FnMut(&mut Self) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>, DeviceError> {
        work(self)?;
        let recording = Recording::new(self, work)?;
        recording.launch(&self.context)?;
        self.sample_times(samples, |device| recording.launch(&device.context))
    }

    /// Does the same as [`CudaDevice::time`] for operations that cannot be recorded, because
    /// they involve the host.
    ///
    /// # Errors
    /// Fails if `work` or the driver fails.
    pub fn time_unrecorded(
        &mut self,
        samples: usize,
        mut work: impl FnMut(&mut Self) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>, DeviceError> {
        work(self)?;
        self.sample_times(samples, work)
    }

    /// Measures copies of `bytes` bytes within device memory and returns the bandwidth in bytes
    /// per second, reads and writes counted separately. The best of `samples` runs counts.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the buffers cannot be allocated, and other errors if the
    /// driver fails.
    pub fn copy_bandwidth(&mut self, bytes: usize, samples: usize) -> Result<f64, DeviceError> {
        let from = self.context.allocate_zeroed(bytes, "a copy")?;
        let to = self.context.allocate(bytes, "a copy")?;
        let times = self.time(samples, |device| {
            (0..COPIES).try_for_each(|_| device.context.copy(to.ptr(), from.ptr(), bytes))
        })?;
        let best = times.into_iter().fold(f64::INFINITY, f64::min);
        Ok((2 * COPIES * bytes) as f64 / best)
    }

    fn sample_times(
        &mut self,
        samples: usize,
        mut work: impl FnMut(&mut Self) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>, DeviceError> {
        self.context.synchronize()?;
        let begin = TimedEvent::new(&self.context)?;
        let end = TimedEvent::new(&self.context)?;
        let times = (0..samples).map(|_| {
            begin.record(&self.context)?;
            work(self)?;
            end.record(&self.context)?;
            begin.seconds_to(&end, &self.context)
        });
        times.collect()
    }
}
