//! Token embeddings.

use super::{DeviceError, DeviceTypes};

/// The part of a [`Device`](super::Device) that embeds tokens.
pub trait EmbeddingOps: DeviceTypes {
    /// Computes `out[r] = scale · table[token of row r]` for every row of the batch.
    fn embed(
        &mut self,
        table: &Self::Linear,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
