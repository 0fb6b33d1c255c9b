//! Devices: where weights live and a step's arithmetic happens.
//!
//! [`Device`] is a set of typed, already fused operations. The model families in
//! `model/` are written once against it. A device knows tokens, rows, blocks and
//! weights; it knows nothing of requests.
//!
//! # Shapes
//!
//! An activation [`Device::Tensor`] is a row-major matrix: one row a token of the
//! step. Query, key and value of a token lie in one row,
//! `[q_heads · head_dim | kv_heads · head_dim | kv_heads · head_dim]`.
//!
//! # Determinism
//!
//! A row's result depends on that row (and on the cached keys and values of its
//! own sequence) only: never on which other rows are in the batch, on how a prompt
//! was cut into chunks, or on the number of threads. Every implementation keeps
//! this to the bit; the tests in `tests/` rely on it.

mod blocks;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod pooling;

pub use pooling::PooledRows;

use crate::sampling::{SampleRow, Sampled};
use crate::weights::DType;
use thiserror::Error;

/// Why a device could not do what it was asked to.
#[derive(Debug, Error, Clone)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device cannot be used on this machine at all.
    #[error("device '{device}' cannot be used: {reason}")]
    Unavailable {
        /// As given on the command line: `cuda:0`, …
        device: String,
        /// What is missing.
        reason: String,
    },
    /// The model or an option asks for something this device does not have.
    #[error("the {device} device does not support {what}; {expected}")]
    Unsupported {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// What was asked for.
        what: String,
        /// What would have been accepted.
        expected: String,
    },
    /// Memory could not be had.
    #[error("the {device} device could not allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// How much was asked for.
        bytes: usize,
        /// For what.
        what: String,
    },
    /// An operation failed; what it computed must not be used.
    #[error("the {device} device failed in {operation}: {reason}")]
    Failed {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// The operation.
        operation: &'static str,
        /// The device's own words.
        reason: String,
    },
    /// The device cannot be used any more.
    #[error("the {device} device is lost since {operation}: {reason}")]
    Lost {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// The operation that showed it.
        operation: &'static str,
        /// The device's own words.
        reason: String,
    },
}

/// What a device is, for `quell inspect` and the start-up log.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// `cpu` or `cuda:N`.
    pub name: String,
    /// The hardware, the instruction set or image chosen, the number of threads.
    pub description: String,
    /// What else `quell inspect` lists, by name.
    pub details: Vec<(&'static str, String)>,
}

/// The order in which the rows of a stored matrix are to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As they are stored.
    AsStored,
    /// Query and key projections of llama-family GGUF files: within each head the
    /// two halves that RoPE rotates are stored interleaved. They are used
    /// un-interleaved, so that every model has the same, half-split, RoPE.
    RopeInterleaved {
        /// Rows of one head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Which stored row is row `row` of the matrix as used.
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

/// Some rows of a weight matrix as stored in a model file.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    /// How the weights are stored.
    pub dtype: DType,
    /// Number of rows (outputs).
    pub rows: usize,
    /// Number of columns (inputs); a whole number of blocks of `dtype`.
    pub columns: usize,
    /// `dtype.bytes_for(columns)` bytes a row, row after row.
    pub data: &'a [u8],
    /// The order to use the rows in.
    pub order: RowOrder,
}

/// A linear layer to load: `y = W x + b`, where `W` is `parts` stacked row-wise.
///
/// Stacking is how fused projections (query, key and value; gate and up) are made
/// of separately stored ones; the parts may differ in `dtype`, not in `columns`.
#[derive(Clone, Debug)]
pub struct LinearSpec<'a> {
    /// The stacked parts, first outputs first.
    pub parts: Vec<WeightRows<'a>>,
    /// One value an output row of all parts together, if the layer has a bias.
    pub bias: Option<Vec<f32>>,
}

/// Rotary position embedding: how positions turn into angles.
///
/// The pair `(i, i + rotary_dim / 2)` of a head is rotated by
/// `position · inverse_frequencies[i]`, and cosine and sine are multiplied by
/// `magnitude` (1 except for YaRN and LongRoPE).
/// Su et al., *RoFormer*, 2021.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// One entry a rotated pair: `rotary_dim / 2` of them.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosine and sine.
    pub magnitude: f32,
    /// Positions are below this.
    pub max_positions: usize,
}

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Columns of a row that holds query, key and value.
    pub fn qkv_columns(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the attention output.
    pub fn q_columns(&self) -> usize {
        self.q_heads * self.head_dim
    }
}

/// RMSNorm on queries and keys before RoPE.
#[derive(Debug)]
pub struct QkNorm<'a, D: Device> {
    /// Weight for the queries: `head_dim` values when `per_head`, else all heads'.
    pub q: &'a D::Vector,
    /// Weight for the keys, likewise.
    pub k: &'a D::Vector,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Whether each head is normalised on its own (Qwen 3, Gemma 3) or all heads
    /// of a row together (OLMo 2).
    pub per_head: bool,
}

/// What attention does beside `softmax(q · k) v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// The heads.
    pub heads: HeadShape,
    /// Factor on `q · k`.
    pub scale: f32,
    /// A token sees itself and the `window − 1` tokens before it; all when `None`.
    pub window: Option<usize>,
    /// `s → cap · tanh(s / cap)` on the scaled scores (Gemma 2).
    pub softcap: Option<f32>,
}

/// The non-linearity of a gated feed-forward layer, `act(gate) · up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
}

/// How a mixture-of-experts layer chooses: softmax over all experts, then the
/// `top_k` largest (ties: the lower index), their weights scaled to sum to 1 if
/// `normalize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingSpec {
    /// Experts a token goes to.
    pub top_k: usize,
    /// Whether the chosen weights are scaled to sum to 1.
    pub normalize: bool,
    /// The experts' non-linearity.
    pub activation: Activation,
}

/// How exactly a matrix of activations has to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// In the device's own type for activations.
    Activation,
    /// In float32: the residual stream, logits.
    Full,
}

/// What remains to be done for a step whose inputs were staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    /// The operations of the forward pass are to be enqueued, then
    /// [`Device::finish`] called.
    Enqueue,
    /// The device has recorded the forward pass of such a step before and has
    /// enqueued all of it: only sampling is left.
    Replayed,
}

/// What remains to be done for a step whose operations were enqueued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// Nothing: only sampling is left.
    Done,
    /// The device wanted to record the operations and could not. Nothing of them was
    /// computed: they are to be enqueued again, then [`Device::finish`] called.
    Repeat,
}

/// The largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Tokens of a step.
    pub rows: usize,
    /// Sequences of a step, and rows that are sampled.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub sequence_tokens: usize,
    /// Tokens a block of the key-value cache.
    pub block_tokens: usize,
    /// Logits of a sampled row.
    pub vocabulary: usize,
}

/// The size of the paged key-value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Attention layers.
    pub layers: usize,
    /// Key and value heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Blocks in all.
    pub blocks: usize,
    /// Tokens a block.
    pub block_tokens: usize,
}

/// The rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSequence {
    /// Its rows: consecutive tokens of the sequence.
    pub rows: std::ops::Range<usize>,
    /// Where its block table lies in [`Batch::tables`].
    pub table: std::ops::Range<usize>,
}

/// A token id that only the device knows yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// The row that needs it.
    pub row: usize,
    /// Which sample of the step before this one it is.
    pub sample: usize,
}

/// The input of one step: flat arrays, one entry a row unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids; ignored where `feedback` names the row.
    pub tokens: Vec<u32>,
    /// Rows whose token is what the previous step sampled.
    pub feedback: Vec<Feedback>,
    /// Position of each token in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Where each token's key and value go: `block · block_tokens + offset`.
    pub slots: Vec<u32>,
    /// One entry a sequence; their rows follow each other without a gap.
    pub sequences: Vec<BatchSequence>,
    /// The sequences' block tables, one after the other: entry `i` of a table is
    /// the block of positions `i · block_tokens ..`.
    pub tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub sample_rows: Vec<usize>,
}

impl Batch {
    /// Number of tokens.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Empties every array and keeps its memory.
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

/// A place that holds weights and a key-value cache and computes steps.
///
/// Operations *enqueue*; only [`Device::collect`] waits for a result (a device
/// whose operations are synchronous, like the CPU, has nothing left to wait for).
/// `rows` is how many leading rows of the operands take part. Operand shapes are
/// the caller's contract, checked with assertions in debug builds.
pub trait Device: Sized + 'static {
    /// A loaded [`LinearSpec`].
    type Linear;
    /// A loaded vector of float32 numbers (a norm's weight).
    type Vector;
    /// A loaded [`RopeSpec`].
    type Rope;
    /// The loaded experts of a layer.
    type Experts;
    /// A matrix of activations.
    type Tensor;
    /// The key-value cache of all layers.
    type Cache;
    /// Host memory for blocks of a cache.
    type HostBlocks;
    /// Samples on their way to the host.
    type Pending;
    /// Sums of rows on their way to the host.
    type Pooling;

    /// What this device is.
    fn info(&self) -> DeviceInfo;

    /// Bytes of weights and bytes of cache per token that this device would hold,
    /// for the memory plan: the cache first needs `CacheShape` with one block.
    fn cache_bytes(&self, shape: &CacheShape) -> usize;

    /// Loads a linear layer.
    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<Self::Linear, DeviceError>;
    /// Loads a vector.
    fn load_vector(&mut self, values: &[f32]) -> Result<Self::Vector, DeviceError>;
    /// Loads a rotary embedding.
    fn load_rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope, DeviceError>;
    /// Loads the experts of one layer: entry `e` of both is expert `e`; `gate_up`
    /// has the gate's rows first.
    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
    ) -> Result<Self::Experts, DeviceError>;
    /// Bytes of weights loaded so far, as this device keeps them.
    fn weight_bytes(&self) -> usize;

    /// Tells the device how large steps will be, before anything is allocated, so
    /// that it can set aside what their inputs and intermediates need.
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
    /// Bytes that the key-value cache may take when the settings name none. Asked
    /// when all else is loaded and allocated.
    fn cache_budget(&self) -> Result<usize, DeviceError>;
    /// Allocates the key-value cache.
    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<Self::Cache, DeviceError>;
    /// Sets host memory aside that so many blocks of a cache of this shape can be swapped
    /// out to, a slot each. Memory is taken as slots are first written to, not before.
    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<Self::HostBlocks, DeviceError>;
    /// Bytes a second that blocks are swapped at, one way: an estimate, for deciding
    /// whether to swap or to compute anew.
    fn swap_bandwidth(&self) -> f64;

    /// Steps that may be in flight at the same time: 1 or 2. With 2, `collect` is
    /// asked for a step when the next one is enqueued already.
    fn depth(&self) -> usize {
        1
    }

    /// Takes the inputs of the next step; the operations below refer to them.
    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError>;

    /// Ends the forward pass that `stage` asked to enqueue, which went as `outcome`
    /// says; `sample` comes after it.
    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        outcome.map(|()| Finished::Done)
    }

    /// `out[r] = scale · table[token of row r]` for every row of the batch.
    fn embed(
        &mut self,
        table: &Self::Linear,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `out = x / rms(x) · weight`. Zhang & Sennrich, *RMSNorm*, 2019.
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `residual += x; out = residual / rms(residual) · weight`.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `residual += x / rms(x) · weight` (post-norm layers).
    fn rms_norm_add(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        residual: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `residual += x`.
    fn add(
        &mut self,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        rows: usize,
    ) -> Result<(), DeviceError>;

    /// `out = W x + b`.
    fn linear(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Linear,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Normalises queries and keys (if `norm`), rotates both in place, and writes
    /// keys and values to the cache, for every row of the batch.
    fn rope_store(
        &mut self,
        qkv: &mut Self::Tensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Self::Rope,
        cache: &mut Self::Cache,
        layer: usize,
    ) -> Result<(), DeviceError>;

    /// Causal attention of every row over the cached tokens of its sequence, its
    /// own included. `out` has `heads.q_columns()` columns.
    fn attend(
        &mut self,
        qkv: &Self::Tensor,
        spec: &AttentionSpec,
        cache: &Self::Cache,
        layer: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// `out = activation(gate) · up`, where a row of `gate_up` is `[gate | up]`.
    fn gated_activation(
        &mut self,
        gate_up: &Self::Tensor,
        activation: Activation,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// A mixture-of-experts feed-forward layer: `router` holds one logit an expert.
    /// The experts' outputs are summed in the order of their index.
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

    /// `x → cap · tanh(x / cap)`.
    fn softcap(&mut self, x: &mut Self::Tensor, cap: f32, rows: usize) -> Result<(), DeviceError>;

    /// Chooses a token for each row of `logits`, as `rows` prescribes.
    fn sample(
        &mut self,
        logits: &Self::Tensor,
        rows: &[SampleRow],
    ) -> Result<Self::Pending, DeviceError>;

    /// Waits for a step and gives its samples, in the order of its sample rows.
    fn collect(&mut self, pending: Self::Pending) -> Result<Vec<Sampled>, DeviceError>;

    /// Takes samples back that have been read, so that a later step can use their memory.
    fn recycle(&mut self, samples: Vec<Sampled>) {
        drop(samples);
    }

    /// Adds up rows of `x`: a sum for each of `ranges`. Comes after [`Device::finish`].
    fn pool(
        &mut self,
        x: &Self::Tensor,
        ranges: &[std::ops::Range<usize>],
    ) -> Result<Self::Pooling, DeviceError>;

    /// Waits for a step and gives its sums, in the order of the ranges.
    fn collect_pooled(&mut self, pooling: Self::Pooling) -> Result<Vec<PooledRows>, DeviceError>;

    /// Copies blocks, keys and values of all layers; a pair is a source and a target. No
    /// block may be a target twice, or a source and a target.
    ///
    /// As all operations, this and the two below come after what is enqueued already and
    /// before what is enqueued later; nobody waits. Where one is refused because of its
    /// pairs, nothing is copied.
    fn copy_blocks(
        &mut self,
        cache: &mut Self::Cache,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Copies blocks to host memory, one after the other; a pair is a block and the slot
    /// it goes to.
    fn swap_out(
        &mut self,
        cache: &Self::Cache,
        host: &mut Self::HostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Copies blocks back, one after the other; a pair is a slot, which was swapped out to
    /// before, and the block it goes to.
    fn swap_in(
        &mut self,
        cache: &mut Self::Cache,
        host: &Self::HostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Overwrites blocks with NaN, so that a test notices whoever reads them.
    fn poison(&mut self, cache: &mut Self::Cache, blocks: &[u32]) -> Result<(), DeviceError>;
}
