//! The CPU device: the embedded default, and the reference that other devices are compared
//! with.
//!
//! Weights are repacked once at load (`packed`) into the layout that the kernels (`integer`,
//! `float`) stream. Kernels are written once against sixteen-lane vectors (`simd`) and run on a
//! few threads with one barrier per operation (`workers`). Operations compute immediately, so
//! [`collect`](crate::device::SamplingOps::collect) has nothing left to wait for.
//!
//! The result of a row does not depend on the other rows. A kernel does the same float
//! operations in the same order for each row and output, however many rows or outputs share its
//! registers, and a sum is never split between threads.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod activation;
mod attention;
mod cache;
mod delta;
mod embedding;
mod error;
mod experts;
mod float;
mod integer;
mod layout;
mod linear;
mod mamba2;
mod memory;
mod norm;
mod options;
mod packed;
mod pooling;
mod product;
mod quantise;
mod recurrent;
mod rope;
mod rowwise;
mod sampler;
mod sampling;
mod simd;
mod step;
mod swap;
mod tensor;
mod workers;

pub use cache::CpuCache;
pub use linear::CpuLinear;
pub use norm::CpuVector;
pub use options::{Activations, CpuOptions, KvType, SimdLevel};
#[cfg(any(test, feature = "internals"))]
pub use rope::CpuRope;
pub use tensor::CpuTensor;

use super::{Device, DeviceError, DeviceInfo, DeviceTypes};
use crate::sampling::Samples;
use attention::Attention;
use linear::Multiplier;
use memory::Arena;
use rope::RopeTables;
use simd::Isa;
use step::StagedBatch;
use workers::Workers;

/// A device that computes on the CPU.
pub struct CpuDevice {
    workers: Workers,
    multiplier: Multiplier,
    kv_half: bool,
    weights: Arena,
    weight_bytes: usize,
    staged: StagedBatch,
    ropes: RopeTables,
    attention: Attention,
    experts: experts::Scratch,
    /// Tokens that the last step sampled, for rows of the next step that refer to them.
    sampled: Vec<u32>,
    /// Samples that the caller has read, kept to reuse their memory.
    spare_samples: Samples,
}

impl CpuDevice {
    /// Creates the device and starts its worker threads.
    ///
    /// # Errors
    /// Returns [`DeviceError::Unsupported`] if the machine lacks the requested instruction set,
    /// and [`DeviceError::Unavailable`] if a core is not available to the process or if a
    /// thread cannot be started.
    pub fn new(options: &CpuOptions) -> Result<Self, DeviceError> {
        let isa = Isa::choose(options.simd)?;
        let threads = options
            .threads
            .unwrap_or_else(|| match options.cores.len() {
                0 => workers::parallelism(),
                cores => cores,
            });
        let kv_half = match options.kv {
            KvType::F16 => true,
            KvType::F32 => false,
            KvType::Auto => options.activations != Activations::F32,
        };
        Ok(Self {
            workers: Workers::new(threads, &options.cores)?,
            multiplier: Multiplier::new(isa, options.activations),
            kv_half,
            weights: Arena::default(),
            weight_bytes: 0,
            staged: StagedBatch::default(),
            ropes: RopeTables::default(),
            attention: Attention::default(),
            experts: experts::Scratch::default(),
            sampled: Vec::new(),
            spare_samples: Samples::default(),
        })
    }
}

impl DeviceTypes for CpuDevice {
    type Tensor = CpuTensor;
    type Vector = CpuVector;
    type Linear = CpuLinear;
    type Cache = CpuCache;
}

impl Device for CpuDevice {
    fn info(&self) -> DeviceInfo {
        let (isa, threads) = (self.multiplier.isa.name(), self.workers.count());
        let activations = match self.multiplier.activations {
            Activations::F32 => "float32",
            Activations::Auto | Activations::Int8 => "int8 for quantised weights",
        };
        let kv = if self.kv_half { "float16" } else { "float32" };
        DeviceInfo {
            name: "cpu".to_owned(),
            description: format!(
                "{isa}, {threads} threads, activations in {activations}, keys and values in {kv}"
            ),
            details: Vec::new(),
        }
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }
}
