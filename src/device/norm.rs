//! Norms, and additions to the residual stream.

use super::{DeviceError, DeviceTypes};

/// The part of a [`Device`](super::Device) that computes norms and adds to the residual stream.
pub trait NormOps: DeviceTypes {
    /// Loads a vector.
    fn load_vector(&mut self, values: &[f32]) -> Result<Self::Vector, DeviceError>;

    /// Computes `out = x / rms(x) · weight`. One of `x` and `out` has full precision, and the other
    /// one that of activations. Zhang & Sennrich, *RMSNorm*, 2019.
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

    /// Subtracts the mean of each row, in place. An RMSNorm of the result is a layer norm without
    /// a bias. Ba et al., *Layer Normalization*, 2016.
    fn centre(&mut self, x: &mut Self::Tensor, rows: usize) -> Result<(), DeviceError>;

    /// Computes `residual = layer norm of (residual + x)`, where `x` may be missing, and copies the
    /// result to `out`. The norm multiplies by the first of `parameters` and adds the second one.
    /// This is how the layers of the original Transformer end: Vaswani et al., *Attention Is All
    /// You Need*, 2017.
    fn add_layer_norm(
        &mut self,
        residual: &mut Self::Tensor,
        x: Option<&Self::Tensor>,
        parameters: [&Self::Vector; 2],
        epsilon: f32,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Computes `residual += x / rms(x) · weight`, for post-norm layers. If the weight is shorter than
    /// a row, the row consists of parts of that length, each of which is normalised on its own.
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
}
