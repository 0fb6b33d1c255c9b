//! The recurrence of Mamba-2 layers. Dao & Gu, *Transformers are SSMs*, 2024.

use super::{DeviceError, RecurrentOps, StatePart};

/// Dimensions of the recurrence of a Mamba-2 layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mamba2Spec {
    /// Number of heads.
    pub heads: usize,
    /// Number of columns of a head; a multiple of [`Mamba2Spec::HEAD_DIM`].
    pub head_dim: usize,
    /// Number of elements of the state for each column; a multiple of [`Mamba2Spec::STATE_SIZE`].
    pub state_size: usize,
    /// Number of groups of equally many heads that share `b` and `c`.
    pub groups: usize,
    /// Least and largest length of a step of time.
    pub step_limits: [f32; 2],
}

/// The weights of the recurrence of a Mamba-2 layer: a number for each head in every vector.
#[derive(Clone, Copy, Debug)]
pub struct Mamba2Weights<'a, V> {
    /// How fast the state decays: negative numbers.
    pub rates: &'a V,
    /// Factors on the inputs that bypass the state.
    pub skips: &'a V,
    /// What is added to the lengths of steps before softplus.
    pub step_biases: &'a V,
}

impl Mamba2Spec {
    /// The size of a head is a multiple of this.
    pub const HEAD_DIM: usize = 16;
    /// The size of a state is a multiple of this.
    pub const STATE_SIZE: usize = 8;

    /// Returns the number of columns of all heads.
    pub fn columns(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the number of columns that the convolution before the recurrence has.
    pub fn channels(&self) -> usize {
        self.columns() + 2 * self.groups * self.state_size
    }

    /// Returns the number of columns of the projection of a row's input.
    pub fn projected(&self) -> usize {
        self.columns() + self.channels() + self.heads
    }

    /// Returns the number of elements of the state.
    pub fn state_elements(&self) -> usize {
        self.columns() * self.state_size
    }
}

/// The part of a [`Device`](super::Device) that computes Mamba-2 layers.
pub trait Mamba2Ops: RecurrentOps {
    /// Checks that this device computes layers of these sizes. Called before they are loaded.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if it does not.
    fn check_mamba2(&self, spec: &Mamba2Spec) -> Result<(), DeviceError> {
        let _ = spec;
        Ok(())
    }

    /// Returns the number of elements that this device keeps of all tokens so far: those of the
    /// state, and what else it needs; a multiple of 16.
    fn mamba2_elements(&self, spec: &Mamba2Spec) -> usize {
        spec.state_elements()
    }

    /// Computes the recurrence of all rows. `part` has [`Mamba2Ops::mamba2_elements`] elements. The
    /// input is a projection, whose rows are `[z | x | b | c | dt]`, and the convolution of
    /// `[x | b | c]` of each row. With `step = softplus(dt + step_bias)`, limited to the spec's
    /// limits, a head computes
    ///
    /// ```text
    /// state = exp(step · rate) · state + step · x ⊗ b
    /// out   = state · c + skip · x
    /// ```
    fn mamba2(
        &mut self,
        input: (&Self::Tensor, &Self::Tensor),
        spec: &Mamba2Spec,
        weights: Mamba2Weights<'_, Self::Vector>,
        cache: &mut Self::Cache,
        part: StatePart,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `x = norm(x · silu(gate)) · weight` in place, where the norm is an RMSNorm of each
    /// of `groups` equal parts of a row, and the gate is in the first columns of `gates`.
    fn gated_norm(
        &mut self,
        x: &mut Self::Tensor,
        gates: &Self::Tensor,
        weight: &Self::Vector,
        groups: usize,
        epsilon: f32,
        rows: usize,
    ) -> Result<(), DeviceError>;
}
