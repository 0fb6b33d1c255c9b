//! The CUDA device: runs kernels on an NVIDIA GPU.
//!
//! It needs only the NVIDIA driver, which is looked up when a device is created (`probe`).
//! Kernels are embedded as portable images (`images`) and launched through typed methods
//! (`launch`). Operations are enqueued on one stream; steps that only decode are recorded as
//! CUDA graphs and replayed (`graphs`).
//!
//! A row's result does not depend on the other rows of the batch: every kernel adds in an order
//! that is fixed per row and output, no kernel uses floating-point atomic additions, and
//! attention splits the keys into units of 128 at fixed positions.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod activation;
mod attention;
mod blas;
mod cache;
mod context;
mod embedding;
mod error;
mod experts;
mod graphs;
mod images;
mod launch;
mod linear;
mod load;
mod memory;
mod norm;
mod options;
mod pack;
mod pooling;
mod probe;
mod rope;
mod sampling;
mod step;
mod swap;
mod timing;
mod transfer;

pub use cache::CudaCache;
pub use experts::CudaExperts;
pub use linear::CudaLinear;
pub use memory::CudaTensor;
pub use norm::CudaVector;
pub use options::{CudaActivations, CudaOptions};
pub use pooling::CudaPooling;
pub use rope::CudaRope;
pub use sampling::CudaPending;
pub use swap::CudaHostBlocks;

use crate::device::*;
use crate::sampling::{SampleRow, Sampled};
use activation::ActivationKernels;
use attention::AttentionKernels;
use cache::CacheKernels;
use context::Context;
use embedding::EmbeddingKernels;
use experts::{ExpertKernels, ExpertScratch};
use graphs::Graphs;
use images::Modules;
use linear::{LinearKernels, Products, QuantKernels};
use norm::NormKernels;
use pooling::Pooler;
use rope::RopeKernels;
use sampling::{Sampler, SamplingKernels};
use step::StepInputs;

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
    linear: LinearKernels,
    norm: NormKernels,
    pooler: Pooler,
    products: Products,
    quant: QuantKernels,
    rope: RopeKernels,
    sampling: SamplingKernels,
    sampler: Sampler,
    step: StepInputs,
    limits: Option<DeviceLimits>,
    weight_bytes: usize,
    context: Context,
}

impl CudaDevice {
    /// Checks whether GPU `index` exists and can be used, without creating a context on it.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`], with a one-line reason, if the GPU cannot be used.
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
        let context = Context::new(found.device)
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
            graphs: Graphs::default(),
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
            linear: LinearKernels::load(&modules)?,
            norm: NormKernels::load(&modules)?,
            pooler: Pooler::new(),
            products: Products::new(&context, options)?,
            quant: QuantKernels::load(&modules)?,
            rope: RopeKernels::load(&modules)?,
            sampling: SamplingKernels::load(&modules)?,
            sampler: Sampler::new(),
            step: StepInputs::new(),
            limits: None,
            weight_bytes: 0,
            context,
        })
    }

    /// Returns the number of driver errors during clean-up so far; each was logged when it
    /// occurred.
    pub fn cleanup_errors(&self) -> u64 {
        self.context.handle.errors.cleanup_errors()
    }

    /// Creates a matrix with `columns` columns from row-major `values`, rounded to `precision`.
    /// Values beyond the last whole row are ignored. For tests and benchmarks.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the matrix cannot be allocated, and other errors if the
    /// driver fails.
    pub fn tensor(
        &mut self,
        columns: usize,
        precision: Precision,
        values: &[f32],
    ) -> Result<CudaTensor, DeviceError> {
        let rows = values.len().checked_div(columns).unwrap_or(0);
        let tensor = CudaTensor::new(&self.context, rows, columns, precision)?;
        let values = &values[..rows * columns];
        let buffer = tensor.buffer();
        match precision {
            Precision::Full => self.context.write(buffer, 0, values)?,
            Precision::Activation => {
                let encode = |value: &f32| self.options.activations.encode(*value);
                let encoded: Vec<u16> = values.iter().map(encode).collect();
                self.context.write(buffer, 0, &encoded)?;
            }
        }
        Ok(tensor)
    }

    /// Reads the first `rows` rows of a matrix, after waiting for all enqueued work. For tests
    /// and benchmarks.
    ///
    /// # Errors
    /// Fails if the driver fails, or if a decode step is being recorded as a graph.
    pub fn values(&self, tensor: &CudaTensor, rows: usize) -> Result<Vec<f32>, DeviceError> {
        let count = rows.min(tensor.rows()) * tensor.columns();
        match tensor.precision() {
            Precision::Full => self.context.read(tensor.ptr(), count),
            Precision::Activation => {
                let encoded: Vec<u16> = self.context.read(tensor.ptr(), count)?;
                let decode = |bits| self.options.activations.decode(bits);
                Ok(encoded.into_iter().map(decode).collect())
            }
        }
    }

    /// Calls `load` and counts the device memory that it allocates as weights.
    fn weights<T>(
        &mut self,
        load: impl FnOnce(&mut Self) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let before = self.context.handle.allocated.get();
        let loaded = load(self)?;
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

impl Device for CudaDevice {
    type Linear = CudaLinear;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Experts = CudaExperts;
    type Tensor = CudaTensor;
    type Cache = CudaCache;
    type HostBlocks = CudaHostBlocks;
    type Pending = CudaPending;
    type Pooling = CudaPooling;

    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn cache_bytes(&self, shape: &CacheShape) -> usize {
        self.cache_bytes_op(shape)
    }

    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<CudaLinear, DeviceError> {
        self.weights(|device| device.load_linear_op(spec))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<CudaVector, DeviceError> {
        self.weights(|device| device.load_vector_op(values))
    }

    fn load_rope(&mut self, spec: &RopeSpec) -> Result<CudaRope, DeviceError> {
        self.load_rope_op(spec)
    }

    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
    ) -> Result<CudaExperts, DeviceError> {
        self.weights(|device| device.load_experts_op(gate_up, down))
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn reserve(&mut self, limits: &DeviceLimits) -> Result<(), DeviceError> {
        self.limits = Some(*limits);
        self.step.reserve(&self.context, limits)
    }

    fn allocate(
        &mut self,
        rows: usize,
        columns: usize,
        precision: Precision,
    ) -> Result<CudaTensor, DeviceError> {
        CudaTensor::new(&self.context, rows, columns, precision)
    }

    fn cache_budget(&self) -> Result<usize, DeviceError> {
        let (free, total) = self.context.memory_info()?;
        let reserve = (total as f64 * f64::from(1.0 - self.options.utilisation)) as usize;
        Ok(free.saturating_sub(reserve))
    }

    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<CudaCache, DeviceError> {
        self.allocate_cache_op(shape)
    }

    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<CudaHostBlocks, DeviceError> {
        Ok(self.allocate_host_blocks_op(shape, blocks))
    }

    /// Assumes half of the 20 GB/s that PCIe 4.0 x16 moves, because each copy is only some tens
    /// of KiB. Not measured.
    fn swap_bandwidth(&self) -> f64 {
        10e9
    }

    fn depth(&self) -> usize {
        2
    }

    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError> {
        self.graphs.abandon(&self.context);
        self.step.take(&self.context, batch, self.options.graphs)?;
        self.graphs.begin(&self.context, &self.step)
    }

    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        self.graphs.finish(&self.context, outcome)
    }

    fn embed(
        &mut self,
        table: &CudaLinear,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.embed_op(table, scale, out)
    }

    fn rms_norm(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.rms_norm_op(x, weight, epsilon, rows, out)
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.add_rms_norm_op(residual, x, weight, epsilon, rows, out)
    }

    fn rms_norm_add(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        residual: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.rms_norm_add_op(x, weight, epsilon, rows, residual)
    }

    fn add(
        &mut self,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        self.add_op(residual, x, rows)
    }

    fn linear(
        &mut self,
        x: &CudaTensor,
        weight: &CudaLinear,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.linear_op(x, weight, rows, out)
    }

    fn rope_store(
        &mut self,
        qkv: &mut CudaTensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &CudaRope,
        cache: &mut CudaCache,
        layer: usize,
    ) -> Result<(), DeviceError> {
        self.rope_store_op(qkv, heads, norm, rope, cache, layer)
    }

    fn attend(
        &mut self,
        qkv: &CudaTensor,
        spec: &AttentionSpec,
        cache: &CudaCache,
        layer: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.attend_op(qkv, spec, cache, layer, out)
    }

    fn gated_activation(
        &mut self,
        gate_up: &CudaTensor,
        activation: Activation,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.gated_activation_op(gate_up, activation, rows, out)
    }

    fn experts(
        &mut self,
        x: &CudaTensor,
        router: &CudaTensor,
        routing: RoutingSpec,
        experts: &CudaExperts,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.experts_op(x, router, routing, experts, rows, out)
    }

    fn gather_samples(&mut self, x: &CudaTensor, out: &mut CudaTensor) -> Result<(), DeviceError> {
        self.gather_samples_op(x, out)
    }

    fn softcap(&mut self, x: &mut CudaTensor, cap: f32, rows: usize) -> Result<(), DeviceError> {
        self.softcap_op(x, cap, rows)
    }

    fn sample(
        &mut self,
        logits: &CudaTensor,
        rows: &[SampleRow],
    ) -> Result<CudaPending, DeviceError> {
        let pending = self.sample_op(logits, rows)?;
        self.step.set_sampled(rows.len());
        Ok(pending)
    }

    fn collect(&mut self, pending: CudaPending) -> Result<Vec<Sampled>, DeviceError> {
        self.collect_op(pending)
    }

    fn recycle(&mut self, samples: Vec<Sampled>) {
        self.sampler.recycle(samples);
    }

    fn pool(
        &mut self,
        x: &CudaTensor,
        ranges: &[std::ops::Range<usize>],
    ) -> Result<CudaPooling, DeviceError> {
        self.pool_op(x, ranges)
    }

    fn collect_pooled(&mut self, pooling: CudaPooling) -> Result<Vec<PooledRows>, DeviceError> {
        pooling.receive()
    }

    fn copy_blocks(
        &mut self,
        cache: &mut CudaCache,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        self.copy_blocks_op(cache, pairs)
    }

    fn swap_out(
        &mut self,
        cache: &CudaCache,
        host: &mut CudaHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        self.swap_out_op(cache, host, pairs)
    }

    fn swap_in(
        &mut self,
        cache: &mut CudaCache,
        host: &CudaHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        self.swap_in_op(cache, host, pairs)
    }

    fn poison(&mut self, cache: &mut CudaCache, blocks: &[u32]) -> Result<(), DeviceError> {
        self.poison_op(cache, blocks)
    }
}
