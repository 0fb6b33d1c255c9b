//! Counts what the launches of an operation do on the virtual GPU.

use super::gpu::VirtualGpu;
use super::report::{Operation, Resources};
use crate::report::Work;
use quell::internals::device::DeviceError;
use quell::internals::device::cuda::CudaDevice;
use serde_json::Value;
use std::error::Error;

/// Counts operations and collects the results.
pub struct Recorder {
    gpu: VirtualGpu,
    resources: Resources,
    pub operations: Vec<Operation>,
}

impl Recorder {
    /// Creates a recorder that has counted nothing yet.
    pub fn new(gpu: VirtualGpu, resources: Resources) -> Self {
        Self {
            gpu,
            resources,
            operations: Vec::new(),
        }
    }

    /// Runs an operation once on the virtual GPU, and adds what its launches did.
    pub fn count(
        &mut self,
        device: &mut CudaDevice,
        work: Work,
        run: impl FnMut(&mut CudaDevice) -> Result<(), DeviceError>,
    ) -> Result<(), Box<dyn Error>> {
        let launches = self.launches(device, run)?;
        let operation = Operation::new(work, launches, &self.resources)?;
        self.operations.push(operation);
        Ok(())
    }

    /// Runs an operation once and returns what its launches did.
    fn launches(
        &self,
        device: &mut CudaDevice,
        run: impl FnMut(&mut CudaDevice) -> Result<(), DeviceError>,
    ) -> Result<Vec<Value>, Box<dyn Error>> {
        // What is queued runs now, and not when the operation is waited for.
        device.time_unrecorded(0, |_| Ok(()))?;
        self.gpu.set("count", "1")?;
        let ran = device.time_unrecorded(0, run);
        self.gpu.set("count", "0")?;
        ran?;
        self.gpu.take_launches()
    }
}
