//! How tests load models on the CUDA device.

use quell::{CudaOptions, DeviceChoice, LoadOptions};

/// Returns options that load a model on the tests' GPU, without the warm-up, which
/// `tests/cuda/memory.rs` tests.
pub fn load_options(cuda: CudaOptions) -> LoadOptions {
    LoadOptions {
        device: DeviceChoice::Cuda(0),
        cuda: CudaOptions { warm_up: 0, ..cuda },
        ..LoadOptions::default()
    }
}
