//! How to load a model, and where to run it.

use crate::device::cpu::CpuOptions;
#[cfg(feature = "cuda")]
use crate::device::cuda::CudaOptions;

/// How to load a model.
///
/// Construct it with `..LoadOptions::default()`: fields are added in minor releases.
#[derive(Default)]
pub struct LoadOptions {
    /// The device to run on.
    pub device: DeviceChoice,
    /// Settings of the CPU device.
    pub cpu: CpuOptions,
    /// Settings of the CUDA device. [`DeviceChoice::Cuda`] overrides the index in them.
    #[cfg(feature = "cuda")]
    pub cuda: CudaOptions,
    /// Which sampling settings [`Engine::sampling_defaults`](crate::Engine::sampling_defaults)
    /// returns.
    pub generation_config: GenerationConfig,
    /// Called after each part of the model that is loaded, and after each step that is run to
    /// warm up the device, with the number of these done and the number of all.
    pub progress: Option<Box<dyn FnMut(usize, usize) + Send>>,
}

impl LoadOptions {
    /// Returns the default options with the CPU as the device.
    pub fn cpu() -> Self {
        Self {
            device: DeviceChoice::Cpu,
            ..Self::default()
        }
    }
}

impl std::fmt::Debug for LoadOptions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = formatter.debug_struct("LoadOptions");
        debug.field("device", &self.device).field("cpu", &self.cpu);
        #[cfg(feature = "cuda")]
        debug.field("cuda", &self.cuda);
        debug.field("generation_config", &self.generation_config);
        debug.finish_non_exhaustive()
    }
}

/// The device that a model runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceChoice {
    /// A CUDA device if one can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device with this index.
    Cuda(usize),
}

/// Which sampling settings apply to requests that set none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GenerationConfig {
    /// The model's own, from `generation_config.json` or `general.sampling` metadata.
    #[default]
    Model,
    /// None. The temperature is 1, and all tokens may be chosen.
    None,
}
