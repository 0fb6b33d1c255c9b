//! Matrices of activations.

use super::{DeviceError, DeviceTypes};

/// Precision in which a matrix of activations is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// The device's own activation type.
    Activation,
    /// Float32, for the residual stream and the logits.
    Full,
}

/// The part of a [`Device`](super::Device) that allocates matrices of activations and copies
/// their rows.
pub trait TensorOps: DeviceTypes {
    /// Allocates a matrix of activations.
    fn allocate(
        &mut self,
        rows: usize,
        columns: usize,
        precision: Precision,
    ) -> Result<Self::Tensor, DeviceError>;

    /// Returns the number of bytes that such a matrix takes on this device, or `usize::MAX` if
    /// the number overflows.
    fn tensor_bytes(&self, rows: usize, columns: usize, precision: Precision) -> usize;

    /// Copies the batch's sample rows of `x` to the leading rows of `out`.
    fn gather_samples(
        &mut self,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
