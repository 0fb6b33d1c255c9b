//! The numbers that both formats tell of a model, before its architecture makes layers of
//! them.

use super::architectures::Architecture;
use super::key_names::{KeyNames, Keys};
use super::layer::{
    Attention, Experts, FeedForward, GatedDelta, LayerSpec, Mixer, NormKind, NormPlacement,
};
use super::{Biases, ModelConfig, ModelError, RopeConfig};
use crate::device::{
    Activation, ConvSpec, DeltaHeads, HeadShape, Mamba2Spec, QueryScale, RouterScore,
};
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
    /// The mixer of the recurrent layers, in architectures that have some.
    pub(super) recurrent: Option<Mixer>,
    /// Layers that have it instead of attention.
    pub(super) recurrent_layers: HashSet<usize>,
    /// Layers that are only a feed-forward part.
    pub(super) without_mixer: HashSet<usize>,
    /// Layers that are only a mixer.
    pub(super) without_feed_forward: HashSet<usize>,
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
        let norms_before = |part_is_there| match part_is_there {
            true => NormPlacement::Before,
            false => NormPlacement::BesideMixer,
        };
        let mixer = self.mixer(index);
        let feed_forward = self.feed_forward(index);
        LayerSpec {
            mixer,
            mixer_norms: norms_before(mixer != Mixer::None),
            feed_forward,
            feed_forward_norms: norms_before(feed_forward != FeedForward::None),
        }
    }

    fn mixer(&self, index: usize) -> Mixer {
        match self.recurrent {
            _ if self.without_mixer.contains(&index) => Mixer::None,
            Some(mixer) if self.recurrent_layers.contains(&index) => mixer,
            _ => Mixer::Attention(self.attention(index)),
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
            _ if self.without_feed_forward.contains(&index) => FeedForward::None,
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
        self.check_recurrent()?;
        if let Some(experts) = self.experts {
            self.check_experts(experts)?;
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

    fn check_recurrent(&self) -> Result<(), ModelError> {
        let Some(mixer) = self.recurrent else {
            return match self.recurrent_layers.is_empty() {
                true => Ok(()),
                false => Err(self.refused(|keys| keys.kv_heads, 0, "at least 1 in every layer")),
            };
        };
        match mixer {
            Mixer::Attention(_) | Mixer::None => Ok(()),
            Mixer::ShortConv(conv) => {
                if !self.hidden.is_multiple_of(ConvSpec::CHANNELS) {
                    let expected = format!("a multiple of {}", ConvSpec::CHANNELS);
                    return Err(self.refused(|keys| keys.hidden, self.hidden, expected));
                }
                self.check_taps(conv.taps)
            }
            Mixer::Mamba2(spec) => {
                self.check_recurrence(spec.recurrence)?;
                self.check_taps(spec.taps)
            }
            Mixer::GatedDelta(GatedDelta { heads, taps }) => {
                self.check_delta(heads)?;
                self.check_taps(taps)
            }
        }
    }

    fn check_recurrence(&self, spec: Mamba2Spec) -> Result<(), ModelError> {
        self.check_size(|keys| keys.recurrent_heads, spec.heads, 1 << 14)?;
        self.check_size(|keys| keys.recurrent_head_dim, spec.head_dim, 1 << 14)?;
        self.check_size(|keys| keys.recurrent_groups, spec.groups, 1 << 14)?;
        self.check_size(|keys| keys.state_size, spec.state_size, 1 << 14)?;
        if !spec.head_dim.is_multiple_of(Mamba2Spec::HEAD_DIM) {
            let expected = format!(
                "such that heads have a multiple of {} columns",
                Mamba2Spec::HEAD_DIM
            );
            return Err(self.refused(|keys| keys.recurrent_head_dim, spec.head_dim, expected));
        }
        if !spec.heads.is_multiple_of(spec.groups) {
            let expected = format!("a divisor of the {} heads", spec.heads);
            return Err(self.refused(|keys| keys.recurrent_groups, spec.groups, expected));
        }
        if !spec.state_size.is_multiple_of(Mamba2Spec::STATE_SIZE) {
            let expected = format!("a multiple of {}", Mamba2Spec::STATE_SIZE);
            return Err(self.refused(|keys| keys.state_size, spec.state_size, expected));
        }
        Ok(())
    }

    fn check_delta(&self, heads: DeltaHeads) -> Result<(), ModelError> {
        let (key_heads, value_heads) = (heads.key_heads, heads.value_heads);
        self.check_size(|keys| keys.recurrent_groups, key_heads, 1 << 14)?;
        self.check_size(|keys| keys.recurrent_heads, value_heads, 1 << 14)?;
        if !value_heads.is_multiple_of(key_heads) {
            let expected = format!("a multiple of the {key_heads} key heads");
            return Err(self.refused(|keys| keys.recurrent_heads, value_heads, expected));
        }
        let check_dim = |key, dim: usize| {
            self.check_size(key, dim, 1 << 12)?;
            match dim.is_multiple_of(DeltaHeads::DIM) {
                true => Ok(()),
                false => {
                    let expected = format!("a multiple of {}", DeltaHeads::DIM);
                    Err(self.refused(key, dim, expected))
                }
            }
        };
        check_dim(|keys| keys.state_size, heads.key_dim)?;
        check_dim(|keys| keys.recurrent_head_dim, heads.value_dim)
    }

    fn check_taps(&self, taps: usize) -> Result<(), ModelError> {
        match ConvSpec::TAPS.contains(&taps) {
            true => Ok(()),
            false => {
                let (least, most) = (ConvSpec::TAPS.start(), ConvSpec::TAPS.end());
                let expected = format!("from {least} to {most}");
                Err(self.refused(|keys| keys.taps, taps, expected))
            }
        }
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
