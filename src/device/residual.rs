//! What some models do to the residual stream besides adding to it: factors, inputs of single
//! layers, and several streams.

use super::{Activation, DeviceError, DeviceTypes};

/// The part of a [`Device`](super::Device) for models whose residual stream is not only added to.
pub trait ResidualOps: DeviceTypes {
    /// Copies the leading rows of `x`, and rounds them to the precision of `out`.
    fn copy(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Multiplies all elements by `factor`, in place.
    fn scale(&mut self, x: &mut Self::Tensor, factor: f32, rows: usize) -> Result<(), DeviceError>;

    /// Like [`EmbeddingOps::embed`](super::EmbeddingOps::embed), where a token outside the table
    /// has the embedding of token 0.
    fn embed_within(
        &mut self,
        table: &Self::Linear,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `gate = activation(gate) · inputs`, where the columns of `inputs` begin at
    /// `first`.
    fn gate_columns(
        &mut self,
        gate: &mut Self::Tensor,
        activation: Activation,
        inputs: &Self::Tensor,
        first: usize,
        rows: usize,
    ) -> Result<(), DeviceError>;

    /// Computes `out = x · weight`, element by element of each row.
    fn multiply(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Scales each row of `x` in place so that its root mean square is that of `like`. The mean
    /// square of `x` counts as at least `floor`.
    fn match_magnitude(
        &mut self,
        x: &mut Self::Tensor,
        like: &Self::Tensor,
        floor: f32,
        rows: usize,
    ) -> Result<(), DeviceError>;

    /// Computes `out[i] = streams[i] + Σ_j factors[i, j] · streams[j]` for each row. The factors of
    /// a row are `weight · routed`: `routed` has a column for each stream, and `weight` a row of as
    /// many numbers for each factor, `i · streams.len() + j`. Baykal et al., *Alternating Updates for
    /// Efficient Transformers*, 2023.
    fn mix_streams(
        &mut self,
        streams: &[Self::Tensor],
        routed: &Self::Tensor,
        weight: &Self::Vector,
        rows: usize,
        out: &mut [Self::Tensor],
    ) -> Result<(), DeviceError>;

    /// Computes `streams[i] += (1 + factors[i]) · (updated − streams[active])` for each row. The
    /// factors of a row are `weight · routed`, as in [`ResidualOps::mix_streams`]; `factors` are the
    /// two of them.
    fn correct_streams(
        &mut self,
        updated: &Self::Tensor,
        factors: (&Self::Tensor, &Self::Vector),
        active: usize,
        rows: usize,
        streams: &mut [Self::Tensor],
    ) -> Result<(), DeviceError>;

    /// Computes `gate = max(0, gate − mean(gate) − deviations · σ(gate))` in place, where a row is
    /// `[gate | up]`.
    fn cut_gate(
        &mut self,
        gate_up: &mut Self::Tensor,
        deviations: f32,
        rows: usize,
    ) -> Result<(), DeviceError>;
}
