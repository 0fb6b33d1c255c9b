//! The numbers that both formats tell of a model, before its architecture makes layers of
//! them.

use super::architectures::Architecture;
use super::layer::{Attention, Experts, FeedForward, LayerSpec, Mixer, NormPlacement};
use super::{Biases, ModelConfig, ModelError, RopeConfig};
use crate::device::{Activation, HeadShape};
use std::collections::HashSet;

/// The numbers of a model, from `config.json` or GGUF metadata.
#[derive(Clone, Debug)]
pub(super) struct Hyperparameters {
    pub(super) layers: usize,
    /// Width of the residual stream.
    pub(super) hidden: usize,
    /// Width of the dense feed-forward parts' hidden layer.
    pub(super) intermediate: usize,
    pub(super) activation: Activation,
    pub(super) heads: HeadShape,
    /// Tokens of the vocabulary.
    pub(super) vocabulary: usize,
    /// Longest sequence that the model was made for.
    pub(super) context: usize,
    pub(super) norm_epsilon: f32,
    /// Factor on the token embeddings.
    pub(super) embedding_scale: f32,
    /// Factor on `q · k`.
    pub(super) attention_scale: f32,
    pub(super) attention_softcap: Option<f32>,
    pub(super) logit_softcap: Option<f32>,
    /// Position embedding of the layers with full attention.
    pub(super) rope: RopeConfig,
    /// Position embedding of the layers with a sliding window.
    pub(super) sliding_rope: RopeConfig,
    /// The sliding window of each layer; `None` for full attention.
    pub(super) windows: Vec<Option<usize>>,
    pub(super) experts: Option<Experts>,
    /// Layers whose feed-forward part is dense although there are experts.
    pub(super) dense_layers: HashSet<usize>,
    pub(super) biases: Biases,
    /// Tokens that end a sequence.
    pub(super) end_tokens: Vec<u32>,
}

impl Hyperparameters {
    /// The model, with the layers that the architecture makes of the numbers.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] for the first number that makes no sense.
    pub(super) fn into_model(
        self,
        architecture: &'static Architecture,
    ) -> Result<ModelConfig, ModelError> {
        self.validate()?;
        let layers = (0..self.layers).map(|layer| (architecture.layer)(&self, layer));
        let layers = layers.collect();
        let mut ropes = vec![self.rope];
        if self.sliding_rope != ropes[0] {
            ropes.push(self.sliding_rope);
        }
        let model = ModelConfig {
            architecture,
            layers,
            ropes,
            hidden: self.hidden,
            vocabulary: self.vocabulary,
            context: self.context,
            embedding_scale: self.embedding_scale,
            norm_epsilon: self.norm_epsilon,
            logit_softcap: self.logit_softcap,
            biases: self.biases,
            end_tokens: self.end_tokens,
        };
        model.check_layers()
    }

    /// A layer as the numbers alone tell it: norms on the inputs, and no norms on queries
    /// and keys.
    pub(super) fn layer(&self, index: usize) -> LayerSpec {
        LayerSpec {
            mixer: Mixer::Attention(self.attention(index)),
            mixer_norms: NormPlacement::Before,
            feed_forward: self.feed_forward(index),
            feed_forward_norms: NormPlacement::Before,
        }
    }

    /// The attention of a layer as the numbers alone tell it.
    pub(super) fn attention(&self, index: usize) -> Attention {
        let window = self.windows[index];
        Attention {
            heads: self.heads,
            scale: self.attention_scale,
            window,
            rope: usize::from(window.is_some() && self.sliding_rope != self.rope),
            qk_norm: None,
            softcap: self.attention_softcap,
        }
    }

    fn feed_forward(&self, index: usize) -> FeedForward {
        match self.experts {
            Some(experts) if !self.dense_layers.contains(&index) => FeedForward::Experts(experts),
            _ => FeedForward::Dense {
                width: self.intermediate,
                activation: self.activation,
            },
        }
    }

    /// Checks that the numbers are consistent and of a size that can be meant.
    fn validate(&self) -> Result<(), ModelError> {
        self.check_sizes()?;
        self.check_factors()?;
        if self.windows.contains(&Some(0)) {
            return Err(ModelError::setting("sliding window", 0, "at least 1"));
        }
        if self.windows.len() != self.layers {
            let expected = format!("one entry for each of the {} layers", self.layers);
            return Err(ModelError::setting(
                "list of layer types",
                format!("{} entries long", self.windows.len()),
                expected,
            ));
        }
        if let Some(experts) = self.experts {
            check_experts(experts)?;
        }
        self.rope.validate(self.heads.head_dim)?;
        self.sliding_rope.validate(self.heads.head_dim)
    }

    fn check_sizes(&self) -> Result<(), ModelError> {
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
            check_size(key, value, limit)?;
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
        Ok(())
    }

    fn check_factors(&self) -> Result<(), ModelError> {
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
        Ok(())
    }
}

fn check_size(key: &str, value: usize, limit: usize) -> Result<(), ModelError> {
    if value == 0 || value > limit {
        let expected = format!("from 1 to {limit}");
        return Err(ModelError::setting(key, value, expected));
    }
    Ok(())
}

fn check_experts(experts: Experts) -> Result<(), ModelError> {
    let (count, top_k) = (experts.count, experts.routing.top_k);
    check_size("number of experts", count, 4096)?;
    check_size("feed-forward size of an expert", experts.width, 1 << 22)?;
    if top_k == 0 || top_k > count {
        let expected = format!("from 1 to the {count} experts");
        return Err(ModelError::setting(
            "number of experts a token",
            top_k,
            expected,
        ));
    }
    Ok(())
}
