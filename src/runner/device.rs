//! Turns a choice of device into a device.

use super::{DeviceChoice, LoadError, LoadOptions};
use crate::device::cpu::CpuDevice;
#[cfg(feature = "cuda")]
use crate::device::cuda::{CudaDevice, CudaOptions};
use crate::device::{Device, DeviceError, DeviceInfo};

/// Work to do on a device, whichever type it turns out to have.
pub(super) trait DeviceWork {
    /// Result of the work.
    type Output;

    /// Does the work.
    fn run<D: Device>(self, device: D) -> Result<Self::Output, LoadError>;
}

/// Opens the device that `options` choose, and does `work` on it. `quantised` says whether the
/// weights of the model are quantised, which decides how the CPU stores keys and values if the
/// options leave that open.
///
/// # Errors
/// Returns an error if the device cannot be used, and the error of `work`.
pub(super) fn on_device<W: DeviceWork>(
    options: &LoadOptions,
    quantised: bool,
    work: W,
) -> Result<W::Output, LoadError> {
    #[cfg(feature = "cuda")]
    if let Some(device) = cuda_device(options)? {
        return work.run(device);
    }
    #[cfg(not(feature = "cuda"))]
    refuse_cuda(options.device)?;
    let cpu = options.cpu.clone().for_weights(quantised);
    work.run(CpuDevice::new(&cpu)?)
}

/// Opens the CUDA device, unless the CPU is chosen or automatic choice finds no usable GPU.
#[cfg(feature = "cuda")]
fn cuda_device(options: &LoadOptions) -> Result<Option<CudaDevice>, DeviceError> {
    let cuda = &options.cuda;
    match options.device {
        DeviceChoice::Cpu => Ok(None),
        DeviceChoice::Cuda(device) => {
            let cuda = CudaOptions {
                device,
                ..cuda.clone()
            };
            CudaDevice::new(&cuda).map(Some)
        }
        DeviceChoice::Auto => match CudaDevice::new(cuda) {
            Ok(device) => Ok(Some(device)),
            Err(DeviceError::Unavailable { reason, .. }) => {
                tracing::info!("running on the CPU: {reason}");
                Ok(None)
            }
            Err(error) => Err(error),
        },
    }
}

/// Refuses the choice of a CUDA device, which this build does not support.
#[cfg(not(feature = "cuda"))]
fn refuse_cuda(choice: DeviceChoice) -> Result<(), DeviceError> {
    match choice {
        DeviceChoice::Cuda(index) => Err(DeviceError::Unavailable {
            device: format!("cuda:{index}"),
            reason: "this quell was built without the feature 'cuda'".to_owned(),
        }),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(()),
    }
}

impl LoadOptions {
    /// Returns the description of the device that these options choose. The device is
    /// initialised for this and released again.
    ///
    /// # Errors
    /// Returns [`LoadError::Device`] if the device cannot be used.
    pub fn device_info(&self) -> Result<DeviceInfo, LoadError> {
        struct Describe;

        impl DeviceWork for Describe {
            type Output = DeviceInfo;

            fn run<D: Device>(self, device: D) -> Result<DeviceInfo, LoadError> {
                Ok(device.info())
            }
        }

        on_device(self, true, Describe)
    }
}
