//! Element-wise non-linearities.

use super::{DeviceError, LinearOps};

/// Non-linearity of a feed-forward layer, `act(gate) · up` unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// SiLU, `x · sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
    /// `gate · sigmoid(slope · gate) · (up + 1)`, where `gate` is at most `limit`, and `up` is
    /// between `−limit` and `limit`.
    ClampedSwiGlu {
        /// Factor on the gate in the sigmoid.
        slope: f32,
        /// Positive.
        limit: f32,
    },
    /// `max(x, 0)²`, without a gate: where others have `[gate | up]`, there is only `up`.
    SquaredRelu,
    /// GELU in its exact form, `x/2 · (1 + erf(x / √2))`, without a gate. Hendrycks & Gimpel,
    /// *Gaussian Error Linear Units*, 2016.
    Gelu,
}

impl Activation {
    /// Returns whether there is a gate.
    pub fn is_gated(self) -> bool {
        !matches!(self, Self::SquaredRelu | Self::Gelu)
    }

    /// Returns the number of columns of `[gate | up]` for this many results.
    pub fn gate_up_columns(self, columns: usize) -> usize {
        match self.is_gated() {
            true => columns.saturating_mul(2),
            false => columns,
        }
    }
}

/// The part of a [`Device`](super::Device) that computes element-wise non-linearities.
pub trait ActivationOps: LinearOps {
    /// Computes `out = activation(gate) · up`, where `[gate | up]` is `weight` times `x`. `gate_up`
    /// is scratch memory for `[gate | up]`: a device may leave it unused, and its contents are
    /// unspecified afterwards. The result has the same bits either way.
    fn gated_linear(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Linear,
        activation: Activation,
        rows: usize,
        gate_up: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError> {
        self.linear(x, weight, rows, gate_up)?;
        self.gated_activation(gate_up, activation, rows, out)
    }

    /// Computes `out = activation(gate) · up`, where a row of `gate_up` is `[gate | up]`, or only
    /// `up` if the activation is not gated.
    fn gated_activation(
        &mut self,
        gate_up: &Self::Tensor,
        activation: Activation,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Applies `x → cap · tanh(x / cap)` in place.
    fn softcap(&mut self, x: &mut Self::Tensor, cap: f32, rows: usize) -> Result<(), DeviceError>;

    /// Multiplies `x` by `sigmoid(gate)` in place. `gate` has as many columns as `x`, or fewer: each
    /// then applies to the same number of adjacent columns of `x`.
    fn sigmoid_gate(
        &mut self,
        x: &mut Self::Tensor,
        gate: &Self::Tensor,
        rows: usize,
    ) -> Result<(), DeviceError>;
}
