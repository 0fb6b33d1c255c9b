//! Devices, which hold the weights and compute the steps.
//!
//! [`Device`] is a set of typed operations that are already fused. The model families in
//! `model/` are written once against it. A device knows about tokens, rows, blocks and weights,
//! but not about requests.
//!
//! # Shapes
//!
//! An activation [`Device::Tensor`] is a row-major matrix with one row per token of the step.
//! The query, key and value of a token are in one row,
//! `[q_heads · head_dim | kv_heads · head_dim | kv_heads · head_dim]`.
//!
//! # Determinism
//!
//! The result of a row depends only on that row and on the cached keys and values of its own
//! sequence. It does not depend on the other rows in the batch, on how a prompt was cut into
//! chunks, or on the number of threads. Every implementation guarantees this bit for bit, and
//! the tests in `tests/` rely on it.

mod blocks;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod pooling;

pub use pooling::PooledRows;

use crate::sampling::{SampleRow, Sampled};
use crate::weights::DType;
use thiserror::Error;

/// Error of a device operation.
#[derive(Debug, Error, Clone)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device cannot be used on this machine at all.
    #[error("device '{device}' cannot be used: {reason}")]
    Unavailable {
        /// Name of the device as on the command line, for example `cuda:0`.
        device: String,
        /// What is missing.
        reason: String,
    },
    /// The model or an option needs something that this device does not support.
    #[error("the {device} device does not support {what}; {expected}")]
    Unsupported {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// What was asked for.
        what: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The device could not allocate memory.
    #[error("the {device} device could not allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// Number of bytes requested.
        bytes: usize,
        /// What the memory was for.
        what: String,
    },
    /// An operation failed. Its results must not be used.
    #[error("the {device} device failed in {operation}: {reason}")]
    Failed {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// Name of the operation.
        operation: &'static str,
        /// Error message of the device.
        reason: String,
    },
    /// The device can no longer be used.
    #[error("the {device} device was lost during {operation}: {reason}")]
    Lost {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// Name of the operation that detected the loss.
        operation: &'static str,
        /// Error message of the device.
        reason: String,
    },
}

/// Description of a device, for `quell inspect` and the start-up log.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// `cpu` or `cuda:N`.
    pub name: String,
    /// Hardware, chosen instruction set or kernel image, and number of threads.
    pub description: String,
    /// Further entries for `quell inspect`, as pairs of a name and a value.
    pub details: Vec<(&'static str, String)>,
}

/// Order in which the rows of a stored matrix are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// The stored order.
    AsStored,
    /// The order of the query and key projections of llama-family GGUF files. Within each head,
    /// the two halves that RoPE rotates are stored interleaved. Loading de-interleaves them, so
    /// that every model uses the same half-split RoPE.
    RopeInterleaved {
        /// Number of rows per head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Returns the index of the stored row that is used as row `row`.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::RopeInterleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

/// Rows of a weight matrix as stored in a model file.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    /// Storage format of the weights.
    pub dtype: DType,
    /// Number of rows (outputs).
    pub rows: usize,
    /// Number of columns (inputs); must be a multiple of the block length of `dtype`.
    pub columns: usize,
    /// The stored bytes, row after row, `dtype.bytes_for(columns)` bytes per row.
    pub data: &'a [u8],
    /// Order in which the rows are used.
    pub order: RowOrder,
}

/// Specification of a linear layer to load: `y = W x + b`, where `W` is the row-wise stack of
/// `parts`.
///
/// Fused projections (query, key and value; gate and up) are made by stacking projections that
/// are stored separately. The parts may differ in `dtype` but not in `columns`.
#[derive(Clone, Debug)]
pub struct LinearSpec<'a> {
    /// The stacked parts, in the order of their outputs.
    pub parts: Vec<WeightRows<'a>>,
    /// Bias, if the layer has one: one value per output row of all parts together.
    pub bias: Option<Vec<f32>>,
}

/// Specification of a rotary position embedding, which turns positions into angles.
///
/// The pair `(i, i + rotary_dim / 2)` of a head is rotated by
/// `position · inverse_frequencies[i]`. The cosine and the sine are multiplied by `magnitude`,
/// which is 1 except for YaRN and LongRoPE. Su et al., *RoFormer*, 2021.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequency of each rotated pair; `rotary_dim / 2` entries.
    pub inverse_frequencies: Vec<f32>,
    /// Factor applied to the cosine and the sine.
    pub magnitude: f32,
    /// Exclusive upper bound of the positions.
    pub max_positions: usize,
}

/// Head counts and head size of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Number of query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Number of key-value heads.
    pub kv_heads: usize,
    /// Number of elements per head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Returns the number of columns of a row that holds query, key and value.
    pub fn qkv_columns(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Returns the number of columns of the attention output.
    pub fn q_columns(&self) -> usize {
        self.q_heads * self.head_dim
    }
}

/// RMSNorm applied to queries and keys before RoPE.
#[derive(Debug)]
pub struct QkNorm<'a, D: Device> {
    /// Weight for the queries: `head_dim` values if `per_head`, otherwise `head_dim` values per
    /// query head.
    pub q: &'a D::Vector,
    /// Weight for the keys: `head_dim` values if `per_head`, otherwise `head_dim` values per
    /// key head.
    pub k: &'a D::Vector,
    /// Value added to the mean square.
    pub epsilon: f32,
    /// Whether each head is normalised separately (Qwen 3, Gemma 3) or all heads of a row
    /// together (OLMo 2).
    pub per_head: bool,
}

/// Parameters of an attention operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Head counts and head size.
    pub heads: HeadShape,
    /// Factor applied to `q · k`.
    pub scale: f32,
    /// Sliding window: a token attends to itself and to the `window − 1` tokens before it.
    /// `None` means all tokens before it.
    pub window: Option<usize>,
    /// Soft cap on the scaled scores, `s → cap · tanh(s / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

/// Non-linearity of a gated feed-forward layer, `act(gate) · up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// SiLU, `x · sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// How a mixture-of-experts layer chooses its experts.
///
/// Takes the softmax over all experts and chooses the `top_k` experts with the largest weights;
/// of equal weights, the lower index wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingSpec {
    /// Number of experts per token.
    pub top_k: usize,
    /// Whether the weights of the chosen experts are scaled to sum to 1.
    pub normalize: bool,
    /// Non-linearity of the experts.
    pub activation: Activation,
}

/// Precision in which a matrix of activations is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// The device's own activation type.
    Activation,
    /// Float32, for the residual stream and the logits.
    Full,
}

/// What the caller must do next after staging a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    /// Enqueue the operations of the forward pass, then call [`Device::finish`].
    Enqueue,
    /// Only sample. The device had recorded the forward pass of a step of this size and has
    /// enqueued all of it.
    Replayed,
}

/// What the caller must do next after enqueueing the operations of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// Only sample.
    Done,
    /// Enqueue the operations again, then call [`Device::finish`] again. The device tried to
    /// record the operations and failed, and computed none of them.
    Repeat,
}

/// Upper limits on the size of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Maximum number of tokens per step.
    pub rows: usize,
    /// Maximum number of sequences per step, and of sampled rows per step.
    pub sequences: usize,
    /// Maximum number of tokens per sequence.
    pub sequence_tokens: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// Number of logits per sampled row.
    pub vocabulary: usize,
}

/// Dimensions of the paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Number of attention layers.
    pub layers: usize,
    /// Number of key-value heads per layer.
    pub kv_heads: usize,
    /// Number of elements per head.
    pub head_dim: usize,
    /// Total number of blocks.
    pub blocks: usize,
    /// Number of tokens per block.
    pub block_tokens: usize,
}

/// The rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of the sequence, which are consecutive tokens.
    pub rows: std::ops::Range<usize>,
    /// Range of its block table in [`Batch::tables`].
    pub table: std::ops::Range<usize>,
}

/// Reference to a token id that so far only the device knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// Row that takes the token.
    pub row: usize,
    /// Index of the sample in the previous step.
    pub sample: usize,
}

/// Input of one step, as flat arrays with one entry per row unless stated otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids. The entry of a row that `feedback` names is ignored.
    pub tokens: Vec<u32>,
    /// Rows whose token is a sample of the previous step.
    pub feedback: Vec<Feedback>,
    /// Position of each token in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Slot that each token's key and value are written to: `block · block_tokens + offset`.
    pub slots: Vec<u32>,
    /// One entry per sequence. Their rows follow each other without gaps.
    pub sequences: Vec<BatchSequence>,
    /// Block tables of the sequences, one after the other. Entry `i` of a table is the block of
    /// the positions from `i · block_tokens`.
    pub tables: Vec<u32>,
    /// Rows whose logits are needed, in ascending order.
    pub sample_rows: Vec<usize>,
}

impl Batch {
    /// Returns the number of tokens.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Empties every array but keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.feedback.clear();
        self.positions.clear();
        self.slots.clear();
        self.sequences.clear();
        self.tables.clear();
        self.sample_rows.clear();
    }
}

/// A compute device: holds weights and a KV cache, and computes steps.
///
/// Operations are *enqueued*, in order. Only [`Device::collect`] and [`Device::collect_pooled`]
/// wait for results. On a device whose operations are synchronous, like the CPU, nothing is
/// left to wait for. The parameter `rows` is the number of leading rows of the operands that
/// take part.
///
/// # Errors
/// An operation returns [`DeviceError::Failed`] if the shapes of its operands, for which the
/// caller is responsible, do not fit together. Every fallible operation can also return the
/// other kinds of [`DeviceError`]. The results of a failed operation must not be used.
pub trait Device: Sized + 'static {
    /// A loaded [`LinearSpec`].
    type Linear;
    /// A loaded vector of float32 numbers, such as the weight of a norm.
    type Vector;
    /// A loaded [`RopeSpec`].
    type Rope;
    /// The loaded experts of a layer.
    type Experts;
    /// A matrix of activations.
    type Tensor;
    /// The KV cache of all layers.
    type Cache;
    /// Host memory for swapped-out blocks.
    type HostBlocks;
    /// Samples on their way to the host.
    type Pending;
    /// Sums of rows on their way to the host.
    type Pooling;

    /// Returns a description of this device.
    fn info(&self) -> DeviceInfo;

    /// Returns the number of bytes that a KV cache of this shape takes on this device, all
    /// layers and blocks together. For the size of one block, pass a shape with `blocks` set to
    /// 1.
    fn cache_bytes(&self, shape: &CacheShape) -> usize;

    /// Loads a linear layer.
    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<Self::Linear, DeviceError>;
    /// Loads a vector.
    fn load_vector(&mut self, values: &[f32]) -> Result<Self::Vector, DeviceError>;
    /// Loads a rotary embedding.
    fn load_rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope, DeviceError>;
    /// Loads the experts of one layer. Entry `e` of both lists is expert `e`. In `gate_up`, the
    /// rows of the gate come first.
    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
    ) -> Result<Self::Experts, DeviceError>;
    /// Returns the number of bytes that the weights loaded so far take on this device.
    fn weight_bytes(&self) -> usize;

    /// Tells the device how large steps can get, so that it can reserve memory for their inputs
    /// and intermediates. Must be called before anything is allocated.
    fn reserve(&mut self, limits: &DeviceLimits) -> Result<(), DeviceError> {
        let _ = limits;
        Ok(())
    }
    /// Allocates a matrix of activations.
    fn allocate(
        &mut self,
        rows: usize,
        columns: usize,
        precision: Precision,
    ) -> Result<Self::Tensor, DeviceError>;
    /// Returns the number of bytes that the KV cache may take if the settings do not say. Must
    /// be called after everything else is loaded and allocated.
    fn cache_budget(&self) -> Result<usize, DeviceError>;
    /// Allocates the KV cache.
    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<Self::Cache, DeviceError>;
    /// Reserves host memory into which `blocks` blocks of a cache of this shape can be swapped
    /// out, one slot per block. A slot takes memory only once it is first written.
    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<Self::HostBlocks, DeviceError>;
    /// Swap bandwidth in bytes per second, one direction. An estimate, for deciding whether to
    /// swap a sequence out or to recompute it.
    fn swap_bandwidth(&self) -> f64;

    /// Returns the maximum number of steps in flight, 1 or 2. With 2, a step is collected after
    /// the next one has been enqueued.
    fn depth(&self) -> usize {
        1
    }

    /// Takes the inputs of the next step, which the operations below then use.
    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError>;

    /// Ends the forward pass after [`Device::stage`] returned [`Staged::Enqueue`] and the
    /// caller enqueued the operations. `outcome` is the result of enqueueing them. Must be
    /// called before [`Device::sample`].
    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        outcome.map(|()| Finished::Done)
    }

    /// Computes `out[r] = scale · table[token of row r]` for every row of the batch.
    fn embed(
        &mut self,
        table: &Self::Linear,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `out = x / rms(x) · weight`. Zhang & Sennrich, *RMSNorm*, 2019.
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `residual += x`, then `out = residual / rms(residual) · weight`.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `residual += x / rms(x) · weight`, for post-norm layers.
    fn rms_norm_add(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        residual: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `residual += x`.
    fn add(
        &mut self,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        rows: usize,
    ) -> Result<(), DeviceError>;

    /// Computes `out = W x + b`.
    fn linear(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Linear,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Normalises the queries and keys if `norm` is given, rotates both in place, and writes
    /// the keys and values to the cache, for every row of the batch.
    fn rope_store(
        &mut self,
        qkv: &mut Self::Tensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Self::Rope,
        cache: &mut Self::Cache,
        layer: usize,
    ) -> Result<(), DeviceError>;

    /// Computes causal attention of every row over the cached tokens of its sequence, including
    /// its own. `out` has `heads.q_columns()` columns.
    fn attend(
        &mut self,
        qkv: &Self::Tensor,
        spec: &AttentionSpec,
        cache: &Self::Cache,
        layer: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `out = activation(gate) · up`, where a row of `gate_up` is `[gate | up]`.
    fn gated_activation(
        &mut self,
        gate_up: &Self::Tensor,
        activation: Activation,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes a mixture-of-experts feed-forward layer. `router` has one logit per expert. The
    /// outputs of a row's experts are summed in the order of their index.
    fn experts(
        &mut self,
        x: &Self::Tensor,
        router: &Self::Tensor,
        routing: RoutingSpec,
        experts: &Self::Experts,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Copies the batch's sample rows of `x` to the leading rows of `out`.
    fn gather_samples(
        &mut self,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Applies `x → cap · tanh(x / cap)` in place.
    fn softcap(&mut self, x: &mut Self::Tensor, cap: f32, rows: usize) -> Result<(), DeviceError>;

    /// Chooses a token for each row of `logits`, as the entries of `rows` prescribe.
    fn sample(
        &mut self,
        logits: &Self::Tensor,
        rows: &[SampleRow],
    ) -> Result<Self::Pending, DeviceError>;

    /// Waits for a step and returns its samples, in the order of its sample rows.
    fn collect(&mut self, pending: Self::Pending) -> Result<Vec<Sampled>, DeviceError>;

    /// Takes back samples that the caller has read, so that a later step can reuse their
    /// memory.
    fn recycle(&mut self, samples: Vec<Sampled>) {
        drop(samples);
    }

    /// Computes the sum of the rows of `x` in each of `ranges`. Must be called after
    /// [`Device::finish`].
    fn pool(
        &mut self,
        x: &Self::Tensor,
        ranges: &[std::ops::Range<usize>],
    ) -> Result<Self::Pooling, DeviceError>;

    /// Waits for a step and returns its sums, in the order of the ranges.
    fn collect_pooled(&mut self, pooling: Self::Pooling) -> Result<Vec<PooledRows>, DeviceError>;

    /// Copies blocks within the cache, keys and values of all layers. Each pair is a source and
    /// a target. A block must not be a target twice, nor both a source and a target.
    ///
    /// Like all operations, this one and the two below run after everything already enqueued
    /// and before everything enqueued later, and the caller does not wait. If an operation
    /// rejects its pairs, it copies nothing.
    fn copy_blocks(
        &mut self,
        cache: &mut Self::Cache,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Copies blocks to host memory, in the order of the pairs. Each pair is a block and the
    /// slot it is copied to.
    fn swap_out(
        &mut self,
        cache: &Self::Cache,
        host: &mut Self::HostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Copies blocks back from host memory, in the order of the pairs. Each pair is a slot that
    /// was swapped out to before, and the block it is copied to.
    fn swap_in(
        &mut self,
        cache: &mut Self::Cache,
        host: &Self::HostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Overwrites blocks with NaN, so that tests detect reads of blocks that were freed.
    fn poison(&mut self, cache: &mut Self::Cache, blocks: &[u32]) -> Result<(), DeviceError>;
}
