//! Rotary position embeddings.

use super::{CacheLayer, DeviceError, DeviceTypes, HeadShape};

/// Specification of a rotary position embedding, which turns positions into angles.
///
/// The pair `(i, i + rotary_dim / 2)` of a head is rotated by
/// `position · inverse_frequencies[i]`. The cosine and the sine are multiplied by `magnitude`,
/// which is 1 except for YaRN and LongRoPE. Su et al., *RoFormer*, 2021.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequency of each rotated pair; `rotary_dim / 2` entries.
    pub inverse_frequencies: Vec<f32>,
    /// Factor applied to the cosine and the sine.
    pub magnitude: f32,
    /// Exclusive upper bound of the positions.
    pub max_positions: usize,
}

/// RMSNorm applied to queries and keys before RoPE.
#[derive(Debug)]
pub struct QkNorm<'a, D: DeviceTypes> {
    /// Weight for the queries: `head_dim` values if `per_head`, otherwise `head_dim` values per
    /// query head.
    pub q: &'a D::Vector,
    /// Weight for the keys: `head_dim` values if `per_head`, otherwise `head_dim` values per
    /// key head.
    pub k: &'a D::Vector,
    /// Value added to the mean square.
    pub epsilon: f32,
    /// Whether each head is normalised separately (Qwen 3, Gemma 3) or all heads of a row
    /// together (OLMo 2).
    pub per_head: bool,
}

/// How queries and keys are normalised and rotated.
pub struct Rotary<'a, D: RopeOps + ?Sized> {
    /// The norm before the rotation, if there is one.
    pub norm: Option<QkNorm<'a, D>>,
    /// The rotary embedding.
    pub rope: &'a D::Rope,
}

/// The part of a [`Device`](super::Device) that rotates queries and keys and writes the KV
/// cache.
pub trait RopeOps: DeviceTypes {
    /// A loaded [`RopeSpec`].
    type Rope;

    /// Returns the number of bytes that a rotary embedding takes on this device.
    fn rope_bytes(&self, spec: &RopeSpec) -> usize {
        let _ = spec;
        0
    }

    /// Loads a rotary embedding. Equal ones share their memory.
    fn load_rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope, DeviceError>;

    /// Normalises the queries and keys if `norm` is given, rotates both in place, and writes
    /// the keys and values to the cache at the slots of the layer's group, for every row of the
    /// batch.
    fn rope_store(
        &mut self,
        qkv: &mut Self::Tensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Self::Rope,
        cache: &mut Self::Cache,
        layer: CacheLayer,
    ) -> Result<(), DeviceError>;
}
