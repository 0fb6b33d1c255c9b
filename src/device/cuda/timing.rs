//! How long the GPU takes for operations, by its own clock: for `benches/kernels.rs`.

use super::CudaDevice;
use super::context::{Context, Handle};
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::rc::Rc;

const OPERATION: &str = "measuring time";

/// Copies that are timed together.
const COPIES: usize = 8;

/// An event that notes when it is reached.
struct Mark {
    event: sys::CUevent,
    handle: Rc<Handle>,
}

impl Mark {
    fn new(context: &Context) -> Result<Self, DeviceError> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = context.call(OPERATION, || result::event::create(flags))?;
        let handle = Rc::clone(&context.handle);
        Ok(Self { event, handle })
    }

    fn record(&self, context: &Context) -> Result<(), DeviceError> {
        // SAFETY: event and stream live, and are of the same context.
        let record = || unsafe { result::event::record(self.event, context.compute.raw()) };
        context.call(OPERATION, record)
    }

    /// Seconds from `self` to `end`; waits until both are reached.
    fn seconds_to(&self, end: &Self, context: &Context) -> Result<f64, DeviceError> {
        // SAFETY: both events live and were recorded.
        let elapsed = || unsafe {
            result::event::synchronize(end.event)?;
            result::event::elapsed(self.event, end.event)
        };
        Ok(f64::from(context.call(OPERATION, elapsed)?) / 1e3)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: created by `new` and destroyed once.
        let destroy = || unsafe { result::event::destroy(self.event) };
        self.handle.cleanup("destroying an event", destroy);
    }
}

/// Operations recorded to be launched at once.
struct Recording {
    exec: sys::CUgraphExec,
    handle: Rc<Handle>,
}

impl Recording {
    /// Records what `work` enqueues on the compute stream.
    fn new(
        device: &mut CudaDevice,
        work: impl FnOnce(&mut CudaDevice) -> Result<(), DeviceError>,
    ) -> Result<Self, DeviceError> {
        let stream = device.context.compute.raw();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let begin = || unsafe { result::stream::begin_capture(stream, mode) };
        device.context.call(OPERATION, begin)?;
        device.context.capturing.set(true);
        let outcome = work(device);
        device.context.capturing.set(false);
        // SAFETY: recording was begun above; it is ended whatever came of the work.
        let end = || unsafe { result::stream::end_capture(stream) };
        let graph = device.context.call(OPERATION, end);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        let handle = Rc::clone(&device.context.handle);
        let graph = outcome.and(graph)?;
        // SAFETY: the graph was just recorded; instantiating copies it.
        let instantiate = || unsafe { result::graph::instantiate(graph, flags) };
        let exec = handle.call(OPERATION, instantiate);
        // SAFETY: destroyed once.
        handle.cleanup("destroying a graph", || unsafe {
            result::graph::destroy(graph)
        });
        Ok(Self {
            exec: exec?,
            handle,
        })
    }

    fn launch(&self, context: &Context) -> Result<(), DeviceError> {
        // SAFETY: what the recorded operations use outlives the recording, which `time` drops
        // when it is done.
        let launch = || unsafe { result::graph::launch(self.exec, context.compute.raw()) };
        context.call(OPERATION, launch)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // SAFETY: instantiated once and destroyed once; the caller waited for its launches.
        let destroy = || unsafe { result::graph::exec_destroy(self.exec) };
        self.handle.cleanup("destroying a graph", destroy);
    }
}

impl CudaDevice {
    /// GPU seconds of each of `samples` launches of the operations that `work` enqueues.
    /// They are enqueued once as they are, then recorded and launched as one graph, so
    /// that what the host takes does not count.
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

    /// The same for operations that cannot be recorded, since they reach the host.
    pub fn time_unrecorded(
        &mut self,
        samples: usize,
        mut work: impl FnMut(&mut Self) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>, DeviceError> {
        work(self)?;
        self.sample_times(samples, work)
    }

    /// Bytes that the GPU moves in a second when it copies `bytes` from one place of its
    /// memory to another: read and written ones both count. The best of `samples`.
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
        let begin = Mark::new(&self.context)?;
        let end = Mark::new(&self.context)?;
        let times = (0..samples).map(|_| {
            begin.record(&self.context)?;
            work(self)?;
            end.record(&self.context)?;
            begin.seconds_to(&end, &self.context)
        });
        times.collect()
    }
}
