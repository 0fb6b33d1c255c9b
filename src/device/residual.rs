//! What some models do to the residual stream besides adding to it: factors, inputs of single
//! layers, and several streams.

use super::{Activation, DeviceError, DeviceTypes};

/// Parts of a model that not every device computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelParts {
    /// Attention layers whose heads differ from those of other layers.
    pub uneven_heads: bool,
    /// Layers that attend to the keys and values of another layer.
    pub shared_caches: bool,
    /// Norms on values.
    pub value_norms: bool,
    /// Factors on the residual stream after a layer.
    pub layer_scales: bool,
    /// Inputs of single layers, which depend on the token.
    pub per_layer_inputs: bool,
    /// Experts and a dense part beside them that have norms of their own.
    pub expert_norms: bool,
    /// Several residual streams.
    pub streams: bool,
    /// Gates of which only the largest are not 0.
    pub sparse_gates: bool,
}

impl ModelParts {
    /// None of these.
    #[cfg(any(test, feature = "internals"))]
    pub const NONE: Self = Self {
        uneven_heads: false,
        shared_caches: false,
        value_norms: false,
        layer_scales: false,
        per_layer_inputs: false,
        expert_norms: false,
        streams: false,
        sparse_gates: false,
    };

    /// Returns what the model has of these, in words.
    #[cfg(any(test, feature = "cuda", feature = "internals"))]
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            (self.streams, "several residual streams"),
            (self.per_layer_inputs, "inputs of single layers"),
            (self.shared_caches, "layers that share a KV cache"),
            (
                self.uneven_heads,
                "attention heads that differ between layers",
            ),
            (self.expert_norms, "norms of experts and the part beside"),
            (self.value_norms, "norms on values"),
            (self.sparse_gates, "sparse gates"),
            (self.layer_scales, "factors of layers"),
        ];
        let all = all.into_iter().filter(|(is_there, _)| *is_there);
        all.map(|(_, name)| name)
    }
}

/// The part of a [`Device`](super::Device) for models whose residual stream is not only added to.
/// A device that computes none of them refuses such a model in
/// [`ResidualOps::check_parts`], before anything is loaded.
pub trait ResidualOps: DeviceTypes {
    /// Fails with [`DeviceError::Unsupported`], which names the part, unless the device computes
    /// all of these parts.
    fn check_parts(&self, parts: &ModelParts) -> Result<(), DeviceError>;

    /// Copies the leading rows of `x`.
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

    /// Computes `residual += x / rms(x) · weight`, where a row consists of parts as long as the
    /// weight, each of which is normalised separately.
    fn rms_norm_add_parts(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        epsilon: f32,
        rows: usize,
        residual: &mut Self::Tensor,
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

    /// Computes `out[i] = streams[i] + Σ_j factors[i, j] · streams[j]` for each row. `factors` has
    /// the columns `i · streams.len() + j`. Baykal et al., *Alternating Updates for Efficient
    /// Transformers*, 2023.
    fn mix_streams(
        &mut self,
        streams: &[Self::Tensor],
        factors: &Self::Tensor,
        rows: usize,
        out: &mut [Self::Tensor],
    ) -> Result<(), DeviceError>;

    /// Computes `streams[i] += (1 + factors[i]) · (updated − streams[active])` for each row.
    fn correct_streams(
        &mut self,
        updated: &Self::Tensor,
        factors: &Self::Tensor,
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
