//! The gated delta rule: linear attention whose state is one matrix per head.

use super::{DeviceError, NormOps, RecurrentOps, StatePart};

/// Head counts and head sizes of a gated delta net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaHeads {
    /// Number of heads of queries and of keys.
    pub key_heads: usize,
    /// Number of heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Number of elements per head of a query and of a key; a multiple of [`DeltaHeads::DIM`].
    pub key_dim: usize,
    /// Number of elements per head of a value; a multiple of [`DeltaHeads::DIM`].
    pub value_dim: usize,
    /// The head of queries and keys that a head of values belongs to.
    pub order: DeltaOrder,
}

/// How heads of values share the heads of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaOrder {
    /// Consecutive heads of values belong to the same head.
    Grouped,
    /// Consecutive heads of values belong to consecutive heads, again and again.
    Tiled,
}

impl DeltaHeads {
    /// The sizes of heads are multiples of this.
    pub const DIM: usize = 16;

    /// Returns the number of columns of a row's queries, and of its keys.
    pub fn key_columns(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Returns the number of columns of a row's values, and of its results.
    pub fn value_columns(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Returns the number of columns of a row that holds query, key and value.
    pub fn qkv_columns(&self) -> usize {
        2 * self.key_columns() + self.value_columns()
    }

    /// Returns the number of elements of the state.
    pub fn state_elements(&self) -> usize {
        self.key_dim * self.value_columns()
    }

    /// Returns the head of queries and keys that a head of values belongs to.
    pub fn key_head(&self, value_head: usize) -> usize {
        match self.order {
            DeltaOrder::Grouped => value_head / (self.value_heads / self.key_heads),
            DeltaOrder::Tiled => value_head % self.key_heads,
        }
    }
}

/// What a row of a gated delta net is computed from, apart from its gates.
pub struct DeltaInput<'a, D: RecurrentOps> {
    /// `[queries | keys | values]`.
    pub qkv: &'a D::Tensor,
    /// `−e^A` of each head of values.
    pub decay: &'a D::Vector,
    /// What is added to the decay's input, for each head of values.
    pub bias: &'a D::Vector,
}

/// What is added to the sum of the squares of a query or of a key before its root divides it.
pub const DELTA_EPSILON: f32 = 1e-6;

/// The part of a [`Device`](super::Device) that computes gated delta nets.
pub trait DeltaOps: RecurrentOps + NormOps {
    /// Checks that this device computes nets of these sizes. Called before they are loaded.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if it does not.
    fn check_delta(&self, heads: &DeltaHeads) -> Result<(), DeviceError> {
        let _ = heads;
        Ok(())
    }

    /// Returns the number of elements that this device keeps of all tokens so far: those of the
    /// state, and what else it needs; a multiple of 16.
    fn delta_elements(&self, heads: &DeltaHeads) -> usize {
        heads.state_elements()
    }

    /// Computes the gated delta rule for all rows. Yang et al., *Gated Delta Networks*, 2024.
    ///
    /// A row of `gates` is `[b | a]`, with one number per head of values each. The contents are
    /// unspecified afterwards. With `β = sigmoid(b)`, `α = exp(decay · softplus(a + bias))`, and
    /// `q` and `k` divided by their lengths, the state `S` of a head becomes
    /// `α S + k ⊗ β (v − α Sᵀ k)`, and the result is `Sᵀ q / √key_dim`.
    ///
    /// `part` has [`DeltaOps::delta_elements`] elements.
    fn gated_delta(
        &mut self,
        input: &DeltaInput<'_, Self>,
        gates: &mut Self::Tensor,
        heads: &DeltaHeads,
        cache: &mut Self::Cache,
        part: StatePart,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `x = x / rms(x) · weight · silu(gate)` in place, each head on its own. A head has
    /// as many columns as the weight. `gate` is a matrix, and the first of its columns that hold
    /// the gate.
    fn gated_rms_norm(
        &mut self,
        x: &mut Self::Tensor,
        gate: (&Self::Tensor, usize),
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
    ) -> Result<(), DeviceError>;
}
