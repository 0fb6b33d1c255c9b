//! GPU timing of operations by the GPU's own clock, for `benches/kernels`.

use super::CudaDevice;
use super::capture::{self, Executable};
use super::handle::Event;
use crate::device::DeviceError;

/// Number of copies that are timed together.
const COPIES: usize = 8;

/// Records the operations that `work` enqueues on the compute stream. If that fails, operations
/// are executed again as usual.
fn record(
    device: &mut CudaDevice,
    work: impl FnOnce(&mut CudaDevice) -> Result<(), DeviceError>,
) -> Result<Executable, DeviceError> {
    capture::begin(&device.context)?;
    let outcome = work(device);
    let captured = capture::end(&device.context);
    outcome.and(captured)?.instantiate()
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
        // What it uses outlives it, because it is dropped before this returns.
        let recording = record(self, work)?;
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
        let begin = Event::with_time(&self.context.handle)?;
        let end = Event::with_time(&self.context.handle)?;
        let times = (0..samples).map(|_| {
            begin.record(&self.context.compute)?;
            work(self)?;
            end.record(&self.context.compute)?;
            begin.seconds_to(&end)
        });
        times.collect()
    }
}
