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

    /// Computes `out[r] = table[t mod n] + added[t / n][p]` for every row `r` of the batch, where
    /// `t` is its token, `n` the number of rows of `table`, and `p` its position. `added` has a
    /// row for each position of segment 0, followed by as many for each further segment. A token
    /// of segment `s` is thus given as `t + s · n`. Tokens must not be samples of an earlier step.
    /// Devlin et al., *BERT*, 2018.
    fn embed_positions(
        &mut self,
        table: &Self::Linear,
        added: &Self::Vector,
        segments: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
