//! Attention over the paged KV cache.

use super::{DeviceError, DeviceTypes};

/// Head counts and head size of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Number of query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Number of key-value heads.
    pub kv_heads: usize,
    /// Number of elements per head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Returns the number of columns of a row that holds query, key and value.
    pub fn qkv_columns(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Returns the number of columns of the attention output.
    pub fn q_columns(&self) -> usize {
        self.q_heads * self.head_dim
    }
}

/// Parameters of an attention operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Head counts and head size.
    pub heads: HeadShape,
    /// Factor applied to `q · k`.
    pub scale: f32,
    /// Sliding window: a token attends to itself and to the `window − 1` tokens before it.
    /// `None` means all tokens before it.
    pub window: Option<usize>,
    /// Soft cap on the scaled scores, `s → cap · tanh(s / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

/// The part of a [`Device`](super::Device) that computes attention.
pub trait AttentionOps: DeviceTypes {
    /// Computes causal attention of every row over the cached tokens of its sequence, including
    /// its own. `out` has `heads.q_columns()` columns.
    fn attend(
        &mut self,
        qkv: &Self::Tensor,
        spec: &AttentionSpec,
        cache: &Self::Cache,
        layer: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
