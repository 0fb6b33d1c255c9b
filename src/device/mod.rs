//! Devices, which hold the weights and compute the steps.
//!
//! [`Device`] is a set of typed operations that are already fused. The model families in
//! `model/` are written once against it. A device knows about tokens, rows, blocks and weights,
//! but not about requests.
//!
//! The operations are divided into parts, one trait and one file each, such as [`NormOps`] in
//! `norm.rs`. Each device implements a part in a file of its own, such as `cpu/norm.rs` and
//! `cuda/norm.rs`. Generic code only needs the bound `D: Device`. Code that calls operations of
//! a concrete device imports the parts with `use crate::device::*`.
//!
//! # Shapes
//!
//! An activation [`DeviceTypes::Tensor`] is a row-major matrix with one row per token of the
//! step. The query, key and value of a token are in one row,
//! `[q_heads · head_dim | kv_heads · head_dim | kv_heads · head_dim]`. Where values are in the
//! keys ([`Values::InKeys`]), the last part is missing.
//!
//! # Determinism
//!
//! The result of a row depends only on that row and on the cached keys and values of its own
//! sequence. It does not depend on the other rows in the batch, on how a prompt was cut into
//! chunks, or on the number of threads. Every implementation guarantees this bit for bit, and
//! the tests in `tests/` rely on it.

mod activation;
mod attention;
mod batch;
mod blocks;
mod cache;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod delta;
mod embedding;
mod error;
mod experts;
mod latent;
mod linear;
mod mamba2;
mod norm;
mod pooling;
mod recurrent;
mod residual;
mod rope;
mod sampling;
mod step;
mod swap;
mod tensor;
mod types;

pub use activation::{Activation, ActivationOps};
pub use attention::{
    ATTENTION_SPAN, AttentionOps, AttentionSpec, HeadShape, RotaryAttention, Values,
};
pub use batch::{Batch, BatchGroup, BatchSequence, Feedback};
pub use cache::{CacheLayer, CacheOps, CacheShape};
pub use delta::{DELTA_EPSILON, DeltaHeads, DeltaInput, DeltaOps, DeltaOrder};
pub use embedding::EmbeddingOps;
pub use error::DeviceError;
pub use experts::{ExpertOps, RouterScore, RoutingSpec, SigmoidRouting, SoftmaxRouting};
pub use latent::{LatentOps, LatentShape, Latents};
pub use linear::{LinearOps, LinearSpec, RowOrder, WeightRows};
pub use mamba2::{Mamba2Ops, Mamba2Spec, Mamba2Weights};
pub use norm::NormOps;
pub use pooling::{PooledRows, PoolingOps};
pub use recurrent::{
    BatchState, ConvInput, ConvSpec, RecurrentOps, SNAPSHOT_TOKENS, StatePart, StateShape,
    StateSnapshot,
};
pub use residual::ResidualOps;
pub use rope::{QkNorm, QueryScale, RopeOps, RopeSpec, Rotary};
pub use sampling::SamplingOps;
pub use step::{DeviceLimits, ExpertShape, Finished, ModelShape, Staged, StepMemory, StepOps};
pub use swap::SwapOps;
pub use tensor::{Precision, TensorOps};
pub use types::DeviceTypes;

/// Description of a device, for `quell inspect` and the start-up log.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// `cpu` or `cuda:N`.
    pub name: String,
    /// Hardware, chosen instruction set or kernel image, and number of threads.
    pub description: String,
    /// Further entries for `quell inspect`, as pairs of a name and a value.
    pub details: Vec<(&'static str, String)>,
}

/// A compute device: holds weights and a KV cache, and computes steps.
///
/// Operations are *enqueued*, in order. Only [`SamplingOps::collect`] and
/// [`PoolingOps::collect_pooled`] wait for results. On a device whose operations are
/// synchronous, like the CPU, nothing is left to wait for. The parameter `rows` is the number of
/// leading rows of the operands that take part.
///
/// # Errors
/// An operation returns [`DeviceError::Failed`] if the shapes of its operands, for which the
/// caller is responsible, do not fit together. Every fallible operation can also return the
/// other kinds of [`DeviceError`]. The results of a failed operation must not be used.
pub trait Device:
    StepOps
    + TensorOps
    + EmbeddingOps
    + NormOps
    + LinearOps
    + RopeOps
    + AttentionOps
    + LatentOps
    + ActivationOps
    + ExpertOps
    + SamplingOps
    + PoolingOps
    + CacheOps
    + RecurrentOps
    + DeltaOps
    + Mamba2Ops
    + ResidualOps
    + SwapOps
{
    /// Returns a description of this device.
    fn info(&self) -> DeviceInfo;

    /// Returns the number of bytes that the weights loaded so far take on this device.
    fn weight_bytes(&self) -> usize;
}
