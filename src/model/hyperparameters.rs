//! The numbers that both formats tell of a model, before its architecture makes layers of
//! them.

use super::architectures::Architecture;
use super::key_names::{KeyNames, Keys};
use super::layer::{
    Attention, Experts, FeedForward, GatedDelta, LayerSpec, Mixer, NormKind, NormPlacement,
};
use super::{Biases, ModelConfig, ModelError, RopeConfig};
use crate::device::{Activation, HeadShape, QueryScale, RouterScore};
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
    pub(super) norm: NormKind,
    pub(super) norm_epsilon: f32,
    /// Factor on the token embeddings.
    pub(super) embedding_scale: f32,
    /// Factor on `q · k`.
    pub(super) attention_scale: f32,
    pub(super) attention_softcap: Option<f32>,
    pub(super) logit_softcap: Option<f32>,
    /// Factor on logits.
    pub(super) logit_scale: f32,
    /// Position embedding of the layers with full attention.
    pub(super) rope: RopeConfig,
    /// Position embedding of the layers with a sliding window.
    pub(super) sliding_rope: RopeConfig,
    /// Layers whose queries and keys are not rotated.
    pub(super) unrotated: HashSet<usize>,
    /// Whether queries and keys are normalised, in architectures whose models may do without.
    pub(super) has_qk_norm: bool,
    /// Factor on the queries that depends on their position.
    pub(super) query_scale: Option<QueryScale>,
    /// Whether the windows are chunks: a token sees those of its own chunk of that many.
    pub(super) is_chunked: bool,
    /// The sliding window of each layer; `None` for full attention.
    pub(super) windows: Vec<Option<usize>>,
    pub(super) experts: Option<Experts>,
    /// Layers whose feed-forward part is dense although there are experts.
    pub(super) dense_layers: HashSet<usize>,
    /// The gated delta net of the recurrent layers.
    pub(super) gated_delta: Option<GatedDelta>,
    /// Layers that are recurrent: they have no attention.
    pub(super) recurrent: HashSet<usize>,
    pub(super) biases: Biases,
    /// Layers after the others that predict further tokens, and are not computed.
    pub(super) prediction_layers: usize,
    /// Tokens that end a sequence.
    pub(super) end_tokens: Vec<u32>,
    /// What the file calls the numbers.
    pub(super) names: KeyNames,
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
            norm: self.norm,
            logit_scale: self.logit_scale,
            norm_epsilon: self.norm_epsilon,
            logit_softcap: self.logit_softcap,
            biases: self.biases,
            prediction_layers: self.prediction_layers,
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
        let slides = window.is_some() && self.sliding_rope != self.rope;
        let is_rotated = !self.unrotated.contains(&index);
        Attention {
            heads: self.heads,
            scale: self.attention_scale,
            window,
            is_chunked: self.is_chunked && window.is_some(),
            has_sinks: false,
            rope: is_rotated.then_some(usize::from(slides)),
            query_scale: self.query_scale,
            qk_norm: None,
            softcap: self.attention_softcap,
            has_gate: false,
        }
    }

    /// The layers with full attention.
    pub(super) fn layers_without_window(&self) -> HashSet<usize> {
        let layers = self.windows.iter().enumerate();
        let full = layers.filter(|(_, window)| window.is_none());
        full.map(|(layer, _)| layer).collect()
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
            return Err(self.refused(|keys| keys.window, 0, "at least 1"));
        }
        if self.windows.len() != self.layers {
            let expected = format!("one entry for each of the {} layers", self.layers);
            let found = format!("{} entries long", self.windows.len());
            return Err(self.refused(|keys| keys.layer_types, found, expected));
        }
        if let Some(experts) = self.experts {
            self.check_experts(experts)?;
        }
        if let Some(delta) = self.gated_delta {
            self.check_delta(delta)?;
        }
        self.rope.validate(self.heads.head_dim, &self.names)?;
        self.sliding_rope.validate(self.heads.head_dim, &self.names)
    }

    /// The error for a number with this value.
    fn refused(
        &self,
        key: fn(&Keys) -> &'static str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> ModelError {
        ModelError::setting(self.names.of(key), value, expected)
    }

    fn check_size(
        &self,
        key: fn(&Keys) -> &'static str,
        value: usize,
        limit: usize,
    ) -> Result<(), ModelError> {
        if value == 0 || value > limit {
            return Err(self.refused(key, value, format!("from 1 to {limit}")));
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), ModelError> {
        let HeadShape {
            q_heads,
            kv_heads,
            head_dim,
        } = self.heads;
        self.check_size(|keys| keys.layers, self.layers, 4096)?;
        self.check_size(|keys| keys.hidden, self.hidden, 1 << 20)?;
        self.check_size(|keys| keys.intermediate, self.intermediate, 1 << 22)?;
        self.check_size(|keys| keys.q_heads, q_heads, 1 << 14)?;
        self.check_size(|keys| keys.kv_heads, kv_heads, 1 << 14)?;
        self.check_size(|keys| keys.head_dim, head_dim, 1 << 14)?;
        self.check_size(|keys| keys.vocabulary, self.vocabulary, 1 << 26)?;
        self.check_size(|keys| keys.context, self.context, 1 << 30)?;
        if !q_heads.is_multiple_of(kv_heads) {
            let expected = format!("a multiple of the {kv_heads} key-value heads");
            return Err(self.refused(|keys| keys.q_heads, q_heads, expected));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.refused(|keys| keys.head_dim, head_dim, "even"));
        }
        Ok(())
    }

    fn check_factors(&self) -> Result<(), ModelError> {
        let positive = |key, value: f32| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(self.refused(key, value, "a positive number")),
        };
        positive(|keys| keys.norm_epsilon, self.norm_epsilon)?;
        // The scale is one over the root of the setting.
        let scale = self.attention_scale;
        if !scale.is_finite() || scale <= 0.0 {
            let expected = "a positive number";
            let setting = 1.0 / (scale * scale);
            return Err(self.refused(|keys| keys.attention_scale, setting, expected));
        }
        let cap = self.attention_softcap.unwrap_or(1.0);
        positive(|keys| keys.attention_softcap, cap)?;
        let cap = self.logit_softcap.unwrap_or(1.0);
        positive(|keys| keys.logit_softcap, cap)?;
        positive(|keys| keys.logit_scale, self.logit_scale)?;
        positive(|keys| keys.embedding_scale, self.embedding_scale)
    }

    fn check_delta(&self, GatedDelta { heads, taps }: GatedDelta) -> Result<(), ModelError> {
        self.check_size(|keys| keys.delta_key_heads, heads.key_heads, 1 << 14)?;
        self.check_size(|keys| keys.delta_value_heads, heads.value_heads, 1 << 14)?;
        if !heads.value_heads.is_multiple_of(heads.key_heads) {
            let expected = format!("a multiple of the {} key heads", heads.key_heads);
            return Err(self.refused(|keys| keys.delta_value_heads, heads.value_heads, expected));
        }
        let check_dim = |key, dim: usize| {
            self.check_size(key, dim, 1 << 12)?;
            match dim.is_multiple_of(16) {
                true => Ok(()),
                false => Err(self.refused(key, dim, "a multiple of 16 per head")),
            }
        };
        check_dim(|keys| keys.delta_key_dim, heads.key_dim)?;
        check_dim(|keys| keys.delta_value_dim, heads.value_dim)?;
        if !(2..=8).contains(&taps) {
            return Err(self.refused(|keys| keys.delta_taps, taps, "from 2 to 8"));
        }
        Ok(())
    }

    fn check_experts(&self, experts: Experts) -> Result<(), ModelError> {
        let (count, top_k) = (experts.count, experts.routing.top_k);
        self.check_size(|keys| keys.experts, count, 4096)?;
        self.check_size(|keys| keys.expert_width, experts.width, 1 << 22)?;
        if top_k == 0 || top_k > count {
            let expected = format!("from 1 to the {count} experts");
            return Err(self.refused(|keys| keys.experts_per_token, top_k, expected));
        }
        if let Some(shared) = experts.shared {
            self.check_size(|keys| keys.shared_experts, shared, 1 << 22)?;
        }
        let RouterScore::Sigmoid(sigmoid) = experts.routing.score else {
            return Ok(());
        };
        if !(sigmoid.scale.is_finite() && sigmoid.scale > 0.0) {
            let expected = "a positive number";
            return Err(self.refused(|keys| keys.expert_scale, sigmoid.scale, expected));
        }
        if let Err(expected) = experts.routing.check(count) {
            let found = format!("{} of {}", sigmoid.top_groups, sigmoid.groups);
            let expected = format!("such that experts can be chosen: {expected}");
            return Err(self.refused(|keys| keys.expert_groups, found, expected));
        }
        Ok(())
    }
}
