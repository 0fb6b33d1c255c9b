//! Rotary position embeddings.

use super::{CacheLayer, DeviceError, DeviceTypes, HeadShape};

/// Specification of a rotary position embedding, which turns positions into angles.
///
/// The pair `(i, i + rotary_dim / 2)` of a head is rotated by
/// `position · inverse_frequencies[i]`. The cosine and the sine are multiplied by `magnitude`,
/// which is 1 except for YaRN and LongRoPE. Su et al., *RoFormer*, 2021.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequency of each rotated pair; `rotary_dim / 2` entries. If there are none,
    /// nothing is rotated.
    pub inverse_frequencies: Vec<f32>,
    /// Factor applied to the cosine and the sine.
    pub magnitude: f32,
    /// Exclusive upper bound of the positions.
    pub max_positions: usize,
}

impl RopeSpec {
    /// Returns the specification of an embedding that rotates nothing.
    pub fn nothing(max_positions: usize) -> Self {
        Self {
            inverse_frequencies: Vec::new(),
            magnitude: 1.0,
            max_positions,
        }
    }
}

/// A factor on queries that grows with their position, in stages of `interval` positions:
/// `1 + slope · ln(1 + ⌊(position + offset) / interval⌋)`. Nakanishi, *Scalable-Softmax*, 2025.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    /// Slope of the factor over the logarithm of the stage.
    pub slope: f32,
    /// Number of positions per stage; at least 1.
    pub interval: u32,
    /// Added to positions.
    pub offset: u32,
}

impl QueryScale {
    /// Returns the factor at a position.
    pub fn factor(&self, position: u32) -> f32 {
        let stage = (u64::from(position) + u64::from(self.offset)) / u64::from(self.interval);
        self.slope * (stage as f32 + 1.0).ln() + 1.0
    }
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
    /// Whether values are normalised as well, each head separately and without a weight (Gemma 4).
    pub values: bool,
}

/// How queries and keys are normalised and rotated, and queries scaled.
pub struct Rotary<'a, D: RopeOps> {
    /// The norm before the rotation, if there is one.
    pub norm: Option<QkNorm<'a, D>>,
    /// The rotary embedding.
    pub rope: &'a D::Rope,
    /// The factor on rotated queries, if there is one.
    pub query_scale: Option<QueryScale>,
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

    /// Normalises and rotates queries as [`RopeOps::rope_store`] does, where a row of `q` holds
    /// nothing else. For layers that attend to the cache of another layer. `norm` is a weight of
    /// `head_dim` values and what is added to the mean square.
    fn rope_queries(
        &mut self,
        q: &mut Self::Tensor,
        heads: HeadShape,
        norm: Option<(&Self::Vector, f32)>,
        rope: &Self::Rope,
    ) -> Result<(), DeviceError>;

    /// Multiplies the queries of every row of the batch by the factor of their position. Comes
    /// after [`RopeOps::rope_store`], since norms would undo it.
    fn scale_queries(
        &mut self,
        qkv: &mut Self::Tensor,
        heads: HeadShape,
        scale: QueryScale,
    ) -> Result<(), DeviceError>;
}
