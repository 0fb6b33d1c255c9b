//! Latent attention: the products that turn it into attention with one key-value head.
//!
//! Keys and values are products of a short vector per token, the *latent*, with the weights of
//! each head. The product of a query and a key is that of the query, multiplied with the head's
//! weights, and the latent. So only the latent is cached, and attention is that of all heads over
//! the latents; the weights of the values are applied to its results. DeepSeek-AI, *DeepSeek-V2*,
//! 2024, section 2.1.

use super::{DeviceError, HeadShape, LinearOps, LinearSpec, Values};

/// Sizes of latent attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatentShape {
    /// Number of heads.
    pub heads: usize,
    /// Number of elements of each query that are rotated. They come first. The key has as many,
    /// which all heads share.
    pub rotated: usize,
    /// Number of elements of each query that are not rotated.
    pub plain: usize,
    /// Number of elements of the latent.
    pub latent: usize,
    /// Number of elements of each head's value.
    pub value: usize,
}

impl LatentShape {
    /// Returns the heads of the attention over latents. A key is the rotated part, followed by the
    /// latent, which is the value, too.
    pub fn heads(&self) -> HeadShape {
        HeadShape {
            q_heads: self.heads,
            kv_heads: 1,
            head_dim: self.key_columns(),
            values: Values::InKeys(self.latent),
        }
    }

    /// Returns the number of columns of a row of queries.
    pub fn query_columns(&self) -> usize {
        self.heads * (self.rotated + self.plain)
    }

    /// Returns the number of columns of a row that holds the key: its rotated part, and the latent.
    pub fn key_columns(&self) -> usize {
        // The sizes of a file may not be checked yet.
        self.rotated.saturating_add(self.latent)
    }

    /// Returns the number of columns of a row of values.
    pub fn value_columns(&self) -> usize {
        self.heads * self.value
    }

    /// Checks the weights by which the plain parts of queries are multiplied, of so many heads and
    /// this size, and the length of the norm of the latents. The error says what does not fit.
    pub fn check_weights(
        &self,
        heads: usize,
        (inputs, outputs): (usize, usize),
        norm: usize,
    ) -> Result<(), String> {
        let found = (heads, inputs, outputs, norm);
        if found == (self.heads, self.plain, self.latent, self.latent) {
            return Ok(());
        }
        Err(format!(
            "{heads} heads of {outputs} × {inputs} weights and a norm of {norm} do not fit {self:?}"
        ))
    }
}

/// The latents of the rows of a step, and what is done to them.
pub struct Latents<'a, D: LatentOps> {
    /// The sizes.
    pub shape: LatentShape,
    /// The queries, `[heads][rotated | plain]`.
    pub queries: &'a D::Tensor,
    /// The keys, `[rotated | latent]`.
    pub keys: &'a D::Tensor,
    /// The weight of the norm of the latents.
    pub norm: &'a D::Vector,
    /// Value added to the mean square of the latents.
    pub epsilon: f32,
    /// The weights by which the plain part of each head's query is multiplied, `[latent, plain]`.
    pub absorbed: &'a D::HeadLinear,
}

/// The part of a [`Device`](super::Device) that computes what latent attention needs beside
/// attention.
pub trait LatentOps: LinearOps {
    /// Loaded weights of linear layers, one for each head.
    type HeadLinear;

    /// Loads linear layers of the same size without biases, one for each head.
    fn load_heads(&mut self, heads: &[LinearSpec<'_>]) -> Result<Self::HeadLinear, DeviceError>;

    /// Computes the queries and the key of the attention over latents, as
    /// [`RopeOps::rope_store`](super::RopeOps::rope_store) takes them for [`LatentShape::heads`]:
    /// each query is the rotated part, copied, and the product of the plain part and the head's
    /// weights; the key is the rotated part, copied, and the normalised latent.
    fn latent_qkv(
        &mut self,
        latents: &Latents<'_, Self>,
        rows: usize,
        qkv: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Multiplies each head's part of a row, `[heads][inputs]`, with the head's weights. `out` is
    /// `[heads][outputs]`.
    fn multiply_heads(
        &mut self,
        x: &Self::Tensor,
        weights: &Self::HeadLinear,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
