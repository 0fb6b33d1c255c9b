//! The CUDA device: runs kernels on an NVIDIA GPU.
//!
//! It needs only the NVIDIA driver, which is looked up when a device is created (`probe`).
//! Kernels are embedded as portable images (`images`) and launched through typed methods
//! (`launch`). Operations are enqueued on one stream; steps that only decode are recorded as
//! CUDA graphs and replayed (`graphs`). On GPUs that can do so, a kernel begins while the one
//! before it still runs (`overlap`).
//!
//! A row's result does not depend on the other rows of the batch: every kernel adds in an order
//! that is fixed per row and output, no kernel uses floating-point atomic additions, and
//! attention splits the keys into units of 128 at fixed positions.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod activation;
mod attention;
mod blas;
mod cache;
mod capture;
mod context;
mod cublaslt;
mod delta;
mod embedding;
mod error;
mod experts;
mod graphs;
mod handle;
mod images;
mod latent;
mod launch;
mod linear;
mod load;
mod mamba2;
mod memory;
mod norm;
mod options;
mod overlap;
mod pack;
mod pooling;
mod probe;
mod recurrent;
mod residual;
mod rope;
mod sampling;
mod scratch;
mod signature;
mod step;
mod steps;
mod swap;
mod tensor;
#[cfg(any(test, feature = "internals"))]
mod timing;
mod transfer;
mod units;
mod weights;

pub use cache::CudaCache;
#[cfg(any(test, feature = "internals"))]
pub use experts::CudaExperts;
#[cfg(any(test, feature = "internals"))]
pub use latent::CudaHeads;
pub use norm::CudaVector;
pub use options::{CudaActivations, CudaOptions};
#[cfg(any(test, feature = "internals"))]
pub use rope::CudaRope;
#[cfg(any(test, feature = "internals"))]
pub use sampling::CudaPending;
pub use tensor::CudaTensor;
pub use weights::CudaLinear;

use super::{Device, DeviceError, DeviceInfo, DeviceLimits, DeviceTypes};
use activation::ActivationKernels;
use attention::AttentionKernels;
use cache::CacheKernels;
use context::Context;
use embedding::EmbeddingKernels;
use experts::{ExpertKernels, ExpertScratch};
use graphs::Graphs;
use images::Modules;
use latent::LatentKernels;
use linear::{LinearKernels, Products, QuantKernels};
use norm::NormKernels;
use pooling::Pooler;
use recurrent::RecurrentKernels;
use residual::ResidualKernels;
use rope::RopeKernels;
use sampling::{Sampler, SamplingKernels};
use step::StepInputs;
use transfer::Uploads;

/// A [`Device`] that computes on an NVIDIA GPU.
///
/// It is not `Send`: it stays on the thread that created it.
pub struct CudaDevice {
    /// Declared first so that it is dropped first: graphs refer to memory of the other fields.
    graphs: Graphs,
    info: DeviceInfo,
    options: CudaOptions,
    activation: ActivationKernels,
    attention: AttentionKernels,
    cache: CacheKernels,
    embedding: EmbeddingKernels,
    expert_scratch: ExpertScratch,
    experts: ExpertKernels,
    latent: LatentKernels,
    linear: LinearKernels,
    /// Short lists of blocks for the kernels that are enqueued next.
    lists: Uploads,
    norm: NormKernels,
    pooler: Pooler,
    products: Products,
    quant: QuantKernels,
    recurrent: RecurrentKernels,
    residual: ResidualKernels,
    rope: RopeKernels,
    sampling: SamplingKernels,
    sampler: Sampler,
    step: StepInputs,
    limits: Option<DeviceLimits>,
    weight_bytes: usize,
    /// Bytes of the GPU's memory.
    memory: usize,
    context: Context,
}

impl CudaDevice {
    /// Checks whether GPU `index` exists and can be used, without creating a context on it.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`], with a one-line reason, if the GPU cannot be used.
    #[cfg(any(test, feature = "internals"))]
    pub fn available(index: usize) -> Result<(), DeviceError> {
        probe::find(index).map(|_| ())
    }

    /// Creates a context on the GPU and loads the kernels.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`], with a one-line reason, if the GPU or a requested library
    /// cannot be used; [`DeviceError::Unsupported`] if an option is out of range; other errors
    /// if the driver fails or the kernel images do not match this build.
    pub fn new(options: &CudaOptions) -> Result<Self, DeviceError> {
        let utilisation = options.utilisation;
        if !(utilisation > 0.0 && utilisation <= 1.0) {
            return Err(error::unsupported(
                format!("a utilisation of {utilisation}"),
                "it must be more than 0 and at most 1",
            ));
        }
        let found = probe::find(options.device)?;
        let overlaps = options.overlap && found.capability >= overlap::CAPABILITY;
        let context = Context::new(found.device, overlaps)
            .map_err(|error| probe::refused(options.device, &found, error))?;
        let modules = Modules::new(&context, options.activations, found.capability);
        let (capability, memory) = (found.capability, found.memory >> 20);
        let description = format!(
            "{}, compute capability {}.{}, {} multiprocessors, {memory} MiB, kernels as {}, \
             activations in {}",
            found.name,
            capability / 10,
            capability % 10,
            found.multiprocessors,
            modules.description(),
            options.activations.name(),
        );
        Ok(Self {
            graphs: Graphs::new(options.max_graphs),
            info: DeviceInfo {
                name: format!("cuda:{}", options.device),
                description,
                details: vec![
                    ("gpu", found.name.clone()),
                    (
                        "compute capability",
                        format!("{}.{}", capability / 10, capability % 10),
                    ),
                    ("multiprocessors", found.multiprocessors.to_string()),
                    ("memory", format!("{memory} MiB")),
                    (
                        "driver",
                        format!("CUDA {}.{}", found.driver / 1000, found.driver % 1000 / 10),
                    ),
                    ("kernels", modules.description()),
                    ("activations", options.activations.name().to_owned()),
                ],
            },
            options: options.clone(),
            activation: ActivationKernels::load(&modules)?,
            attention: AttentionKernels::load(&modules)?,
            cache: CacheKernels::load(&modules)?,
            embedding: EmbeddingKernels::load(&modules)?,
            expert_scratch: ExpertScratch::default(),
            experts: ExpertKernels::load(&modules)?,
            latent: LatentKernels::load(&modules)?,
            linear: LinearKernels::load(&modules)?,
            lists: Uploads::outside_graphs("a list"),
            norm: NormKernels::load(&modules)?,
            pooler: Pooler::new(),
            products: Products::new(&context, options, found.room())?,
            quant: QuantKernels::load(&modules)?,
            recurrent: RecurrentKernels::load(&modules)?,
            residual: ResidualKernels::load(&modules)?,
            rope: RopeKernels::load(&modules)?,
            sampling: SamplingKernels::load(&modules)?,
            sampler: Sampler::new(),
            step: StepInputs::new(),
            limits: None,
            weight_bytes: 0,
            memory: found.memory,
            context,
        })
    }

    /// Returns the number of driver errors during clean-up so far; each was logged when it
    /// occurred.
    #[cfg(any(test, feature = "internals"))]
    pub fn cleanup_errors(&self) -> u64 {
        self.context.handle.errors.cleanup_errors()
    }

    /// Calls `load` and counts the device memory that it allocates as weights.
    fn weights<T>(
        &mut self,
        load: impl FnOnce(&Context) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let before = self.context.handle.allocated.get();
        let loaded = load(&self.context)?;
        let after = self.context.handle.allocated.get();
        self.weight_bytes += after.saturating_sub(before);
        Ok(loaded)
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.graphs.abandon(&self.context);
    }
}

impl DeviceTypes for CudaDevice {
    type Tensor = CudaTensor;
    type Vector = CudaVector;
    type Linear = CudaLinear;
    type Cache = CudaCache;
}

impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }
}
