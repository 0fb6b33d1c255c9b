//! Attention over the paged KV cache.

use super::{CacheLayer, DeviceError, RopeOps, Rotary};

/// Number of positions in a span of keys. Spans are counted from the start of the sequence. A
/// multiple of 16.
///
/// Devices may read a span as a whole. A block table must therefore hold every block from the
/// beginning of the span that contains the first position that a row of its sequence attends to.
/// The blocks before it may be missing, and no device reads them. Within the span, a key before
/// the window contributes nothing to the result.
pub const ATTENTION_SPAN: usize = 128;

/// Head counts and head size of an attention layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadShape {
    /// Number of query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Number of key-value heads.
    pub kv_heads: usize,
    /// Number of elements per query and key.
    pub head_dim: usize,
    /// Where the values are.
    pub values: Values,
}

/// Where the values of key-value heads are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Values {
    /// Beside the keys. A value has as many elements as a key.
    #[default]
    BesideKeys,
    /// In the keys: a value is the last elements of its key, this many, and only the keys are
    /// cached. This is how latent attention works. DeepSeek-AI, *DeepSeek-V2*, 2024.
    InKeys(usize),
}

impl Values {
    /// Returns the number of elements of a value whose key has `head_dim` elements.
    pub fn elements(self, head_dim: usize) -> usize {
        match self {
            Self::BesideKeys => head_dim,
            Self::InKeys(elements) => elements,
        }
    }

    /// Returns the number of elements that are kept for a token and a key-value head, whose key
    /// has `head_dim` elements.
    pub fn kept_elements(self, head_dim: usize) -> usize {
        match self {
            Self::BesideKeys => 2 * head_dim,
            Self::InKeys(_) => head_dim,
        }
    }

    /// Checks that values fit in keys of `head_dim` elements. The error says why not.
    pub(super) fn check(self, head_dim: usize) -> Result<(), String> {
        match self {
            Self::InKeys(elements) if elements == 0 || elements > head_dim => Err(format!(
                "values of {elements} elements in keys of {head_dim}"
            )),
            _ => Ok(()),
        }
    }
}

impl HeadShape {
    /// Returns the number of columns of a row that holds query, key and value.
    pub fn qkv_columns(&self) -> usize {
        self.q_columns() + self.kv_heads * self.values.kept_elements(self.head_dim)
    }

    /// Returns the number of columns of the queries of a row.
    pub fn q_columns(&self) -> usize {
        self.q_heads * self.head_dim
    }

    /// Returns the number of elements of a value.
    pub fn value_dim(&self) -> usize {
        self.values.elements(self.head_dim)
    }

    /// Returns the number of columns of the attention output.
    pub fn out_columns(&self) -> usize {
        self.q_heads * self.value_dim()
    }

    /// Returns the number of elements that a token's keys and values take in the KV cache, where
    /// each value is padded to whole vectors.
    pub fn cache_elements(&self) -> usize {
        self.kv_heads
            * match self.values {
                Values::BesideKeys => self.head_dim + self.head_dim.next_multiple_of(16),
                Values::InKeys(_) => self.head_dim,
            }
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
    /// Whether the window does not slide: the sequence is cut into chunks of that many tokens,
    /// and a token attends to those of its own chunk. Without meaning if there is no window.
    pub chunked: bool,
    /// Whether a token attends to no token after it. Otherwise, it attends to all tokens after it,
    /// or to the `window − 1` nearest ones. The step must then have all tokens of each sequence.
    pub causal: bool,
    /// Soft cap on the scaled scores, `s → cap · tanh(s / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

/// The part of a [`Device`](super::Device) that computes attention.
pub trait AttentionOps: RopeOps {
    /// Fails with [`DeviceError::Unsupported`] unless the device computes attention of these heads:
    /// causal attention if `causal`, and otherwise in both directions.
    fn check_heads(&self, heads: HeadShape, causal: bool) -> Result<(), DeviceError> {
        let _ = (heads, causal);
        Ok(())
    }

    /// Computes attention of every row over the cached tokens of its sequence, including its own.
    /// `out` has `heads.out_columns()` columns. `qkv` may also hold queries only, for layers
    /// that attend to the cache of another one.
    ///
    /// A sink is a score, one per query head: if there are sinks, the softmax is computed as if
    /// there were one more key with that score, whose value is zero. Xiao et al., *Efficient
    /// Streaming Language Models with Attention Sinks*, 2023.
    ///
    /// Fails if a block table of the layer's group begins too late for the window, see
    /// [`ATTENTION_SPAN`], or ends too early for the rows.
    fn attend(
        &mut self,
        qkv: &Self::Tensor,
        spec: &AttentionSpec,
        sinks: Option<&Self::Vector>,
        cache: &Self::Cache,
        layer: CacheLayer,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;

    /// Does what [`rope_then_attend`] does, in one kernel if the device has one for the step.
    /// Leaves anything in `qkv`.
    fn rope_attend(
        &mut self,
        qkv: &mut Self::Tensor,
        attention: &RotaryAttention<'_, Self>,
        cache: &mut Self::Cache,
        layer: CacheLayer,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError> {
        rope_then_attend(self, qkv, attention, cache, layer, out)
    }
}

/// Does [`RopeOps::rope_store`], [`RopeOps::scale_queries`] and [`AttentionOps::attend`], one
/// after the other.
pub(super) fn rope_then_attend<D: AttentionOps>(
    device: &mut D,
    qkv: &mut D::Tensor,
    attention: &RotaryAttention<'_, D>,
    cache: &mut D::Cache,
    layer: CacheLayer,
    out: &mut D::Tensor,
) -> Result<(), DeviceError> {
    let RotaryAttention {
        rotary,
        spec,
        sinks,
    } = attention;
    let (norm, rope) = (rotary.norm.as_ref(), rotary.rope);
    device.rope_store(qkv, spec.heads, norm, rope, cache, layer)?;
    if let Some(scale) = rotary.query_scale {
        device.scale_queries(qkv, spec.heads, scale)?;
    }
    device.attend(qkv, spec, *sinks, cache, layer, out)
}

/// Attention, and what is done to queries and keys before it.
pub struct RotaryAttention<'a, D: RopeOps> {
    /// What is done to queries and keys.
    pub rotary: Rotary<'a, D>,
    /// The attention.
    pub spec: AttentionSpec,
    /// Sinks, if there are some; see [`AttentionOps::attend`].
    pub sinks: Option<&'a D::Vector>,
}

/// Checks that the block tables of `group` begin early enough for `window`, where `longest` is the
/// longest window that they begin early enough for. `usize::MAX` stands for no window. The error
/// says what is missing.
pub(super) fn check_window(group: usize, window: usize, longest: usize) -> Result<(), String> {
    if window <= longest {
        return Ok(());
    }
    let needed = match window {
        usize::MAX => "all tokens".to_owned(),
        window => format!("a window of {window} tokens"),
    };
    Err(format!(
        "block tables of group {group} begin too late: they are enough for a window of {longest} \
         tokens, but a layer attends to {needed}"
    ))
}
