//! A checkpoint's numbers.

use super::{Family, ModelError, RopeConfig};
use crate::device::HeadShape;

/// The mixture of experts of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertConfig {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that a token goes to.
    pub top_k: usize,
    /// Whether the chosen experts' weights are scaled to sum to 1.
    pub normalize: bool,
    /// Width of an expert's hidden layer.
    pub intermediate: usize,
}

/// Which projections have a bias: `None` means those that the file has one for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: Option<bool>,
    /// The attention's output projections.
    pub attention_out: Option<bool>,
    /// The feed-forward layers' projections.
    pub feed_forward: Option<bool>,
}

impl Biases {
    /// As the file has them: GGUF metadata does not say.
    pub const AS_STORED: Self = Self {
        qkv: None,
        attention_out: None,
        feed_forward: None,
    };

    /// None at all.
    pub const NONE: Self = Self {
        qkv: Some(false),
        attention_out: Some(false),
        feed_forward: Some(false),
    };
}

/// Everything about a model but its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// How it is computed.
    pub family: Family,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layers' hidden layer.
    pub intermediate: usize,
    /// The attention heads.
    pub heads: HeadShape,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence that it was made for.
    pub context: usize,
    /// Added to the mean square in norms.
    pub norm_epsilon: f32,
    /// Factor on `q · k`.
    pub attention_scale: f32,
    /// Soft cap on attention scores.
    pub attention_softcap: Option<f32>,
    /// Soft cap on logits.
    pub logit_softcap: Option<f32>,
    /// Position embedding of the layers with full attention.
    pub rope: RopeConfig,
    /// Position embedding of the layers with a sliding window.
    pub sliding_rope: RopeConfig,
    /// The window of the sliding layers.
    pub window: Option<usize>,
    /// Which layers have a sliding window; one entry a layer.
    pub sliding_layers: Vec<bool>,
    /// The mixture of experts, if there is one.
    pub experts: Option<ExpertConfig>,
    /// Layers whose feed-forward part is dense although there are experts.
    pub dense_layers: Vec<usize>,
    /// Which projections have a bias.
    pub biases: Biases,
    /// Tokens that end a sequence, as far as the model's own settings say.
    pub end_tokens: Vec<u32>,
}

impl ModelConfig {
    /// Checks that the numbers are consistent and of a size that can be meant.
    pub(super) fn validate(self) -> Result<Self, ModelError> {
        let HeadShape {
            q_heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let sizes = [
            ("number of layers", self.layers, 4096),
            ("hidden size", self.hidden, 1 << 20),
            ("feed-forward size", self.intermediate, 1 << 22),
            ("number of attention heads", q_heads, 1 << 14),
            ("number of key-value heads", kv_heads, 1 << 14),
            ("head size", head_dim, 1 << 14),
            ("vocabulary size", self.vocabulary, 1 << 26),
            ("context length", self.context, 1 << 30),
        ];
        for (key, value, limit) in sizes {
            if value == 0 || value > limit {
                return Err(ModelError::setting(
                    key,
                    value,
                    format!("from 1 to {limit}"),
                ));
            }
        }
        if !q_heads.is_multiple_of(kv_heads) {
            let expected = format!("a multiple of the {kv_heads} key-value heads");
            return Err(ModelError::setting(
                "number of attention heads",
                q_heads,
                expected,
            ));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(ModelError::setting("head size", head_dim, "even"));
        }
        for (key, value) in [
            ("norm epsilon", self.norm_epsilon),
            ("attention scale", self.attention_scale),
            ("attention soft cap", self.attention_softcap.unwrap_or(1.0)),
            ("logit soft cap", self.logit_softcap.unwrap_or(1.0)),
        ] {
            if !value.is_finite() || value <= 0.0 {
                return Err(ModelError::setting(key, value, "a positive number"));
            }
        }
        if self.window == Some(0) {
            return Err(ModelError::setting("sliding window", 0, "at least 1"));
        }
        if self.sliding_layers.len() != self.layers {
            let expected = format!("one entry for each of the {} layers", self.layers);
            return Err(ModelError::setting(
                "list of layer types",
                format!("{} entries long", self.sliding_layers.len()),
                expected,
            ));
        }
        if let Some(experts) = self.experts {
            let ExpertConfig {
                count,
                top_k,
                intermediate,
                ..
            } = experts;
            if count == 0 || count > 4096 || intermediate == 0 || intermediate > 1 << 22 {
                return Err(ModelError::setting(
                    "number of experts",
                    count,
                    "from 1 to 4096",
                ));
            }
            if top_k == 0 || top_k > count {
                let expected = format!("from 1 to the {count} experts");
                return Err(ModelError::setting(
                    "number of experts a token",
                    top_k,
                    expected,
                ));
            }
        }
        self.rope.validate(head_dim)?;
        self.sliding_rope.validate(head_dim)?;
        Ok(self)
    }

    /// The longest sequence unless a longer one, up to [`ModelConfig::context`], is asked
    /// for. It is shorter for models with LongRoPE: beyond it other factors apply, to short
    /// sequences as well, since cached keys are rotated already.
    pub fn native_context(&self) -> usize {
        self.rope.native_context(self.context)
    }

    /// The window of a layer, if it has one.
    pub fn layer_window(&self, layer: usize) -> Option<usize> {
        self.window.filter(|_| self.sliding_layers[layer])
    }

    /// Whether a layer's feed-forward part is a mixture of experts.
    pub fn layer_experts(&self, layer: usize) -> Option<ExpertConfig> {
        self.experts.filter(|_| !self.dense_layers.contains(&layer))
    }
}
