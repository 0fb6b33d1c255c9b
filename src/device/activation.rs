//! Element-wise non-linearities.

use super::{DeviceError, DeviceTypes};

/// Non-linearity of a gated feed-forward layer, `act(gate) · up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// SiLU, `x · sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// The part of a [`Device`](super::Device) that computes element-wise non-linearities.
pub trait ActivationOps: DeviceTypes {
    /// Computes `out = activation(gate) · up`, where a row of `gate_up` is `[gate | up]`.
    fn gated_activation(
        &mut self,
        gate_up: &Self::Tensor,
        activation: Activation,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Applies `x → cap · tanh(x / cap)` in place.
    fn softcap(&mut self, x: &mut Self::Tensor, cap: f32, rows: usize) -> Result<(), DeviceError>;
}
