//! Hyperparameters of a model, read from either file format. The architecture builds the layers
//! from them.

use super::architectures::Architecture;
use super::key_names::{KeyNames, Keys};
use super::layer::{
    Attention, Experts, FeedForward, GatedDelta, Latent, LayerSpec, Mixer, NormKind, NormPlacement,
    PerLayerInputs, Streams,
};
use super::{Biases, LearnedPositions, ModelConfig, ModelError, RopeConfig};
use crate::device::{
    Activation, ConvSpec, DeltaHeads, HeadShape, Mamba2Spec, QueryScale, RouterScore,
};
use std::collections::{HashMap, HashSet};

/// Limit on the layers for which settings are collected, so that a wrong number of layers allocates
/// no huge list before it is refused, when the hyperparameters are validated.
pub(super) const MOST_LAYERS: usize = 1 << 16;

/// Hyperparameters of a model, from `config.json` or GGUF metadata.
#[derive(Clone, Debug)]
pub(super) struct Hyperparameters {
    pub(super) layers: usize,
    /// Width of the residual stream.
    pub(super) hidden: usize,
    /// Intermediate size of the dense feed-forward parts.
    pub(super) intermediate: usize,
    pub(super) activation: Activation,
    pub(super) heads: HeadShape,
    /// Number of tokens in the vocabulary.
    pub(super) vocabulary: usize,
    /// Longest sequence that the model supports, in tokens.
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
    /// Latent attention, if all layers with attention use it. `heads`, `attention_scale` and
    /// `rope` then describe the attention over latents.
    pub(super) latent: Option<Latent>,
    /// Layers whose queries and keys are not rotated.
    pub(super) unrotated: HashSet<usize>,
    /// Whether queries and keys are normalised. Only architectures whose models differ in this
    /// read it.
    pub(super) has_qk_norm: bool,
    /// Factor on the queries that depends on their position, if there is one.
    pub(super) query_scale: Option<QueryScale>,
    /// Whether windows do not slide: the sequence is cut into chunks of `window` tokens, and a
    /// token attends to those of its own chunk.
    pub(super) is_chunked: bool,
    /// Whether tokens attend to no tokens after them.
    pub(super) is_causal: bool,
    /// The sliding window of each layer; `None` for full attention.
    pub(super) windows: Vec<Option<usize>>,
    pub(super) experts: Option<Experts>,
    /// Layers whose feed-forward part is dense although there are experts.
    pub(super) dense_layers: HashSet<usize>,
    /// The mixer of the recurrent layers, if the model may have any.
    pub(super) recurrent: Option<Mixer>,
    /// Layers whose mixer is `recurrent` instead of attention.
    pub(super) recurrent_layers: HashSet<usize>,
    /// Layers that consist of a feed-forward part only.
    pub(super) without_mixer: HashSet<usize>,
    /// Layers that consist of a mixer only.
    pub(super) without_feed_forward: HashSet<usize>,
    /// Optional features, and sizes that differ between layers.
    pub(super) variations: Variations,
    pub(super) biases: Biases,
    /// Number of multi-token prediction layers after the others. They are not computed.
    pub(super) prediction_layers: usize,
    /// IDs of the tokens that end a sequence.
    pub(super) end_tokens: Vec<u32>,
    /// Keys of the settings in the file, for error messages.
    pub(super) names: KeyNames,
}

/// Features that only some models or layers have, and sizes that differ between layers.
#[derive(Clone, Debug, Default)]
pub(super) struct Variations {
    /// Heads by layer; other layers have [`Hyperparameters::heads`].
    pub(super) heads: HashMap<usize, HeadShape>,
    /// Widths of dense parts by layer; other layers have [`Hyperparameters::intermediate`].
    pub(super) widths: HashMap<usize, usize>,
    /// Number of layers at the end of the model that share caches. Each shares the cache of the
    /// last layer before them all that has the same window.
    pub(super) shared_caches: usize,
    /// Layers whose values are the output of the key projection.
    pub(super) keys_as_values: HashSet<usize>,
    /// Layers after which the residual stream is multiplied by a stored factor.
    pub(super) scaled: HashSet<usize>,
    /// Per-layer inputs, if the model has them.
    pub(super) inputs: Option<PerLayerInputs>,
    /// The residual streams, if there is more than one.
    pub(super) streams: Option<Streams>,
    /// Learned embeddings of positions and segments, if the model has them.
    pub(super) learned_positions: Option<LearnedPositions>,
    /// Rank of the paths beside mixers, if there are any.
    pub(super) side_rank: Option<usize>,
    /// Threshold of sparse gates by layer, in standard deviations above their mean. See
    /// [`FeedForward::Dense`].
    pub(super) cuts: HashMap<usize, f32>,
}

impl Hyperparameters {
    /// Returns the indices of the first `count` layers.
    pub(super) fn leading_layers(&self, count: usize) -> HashSet<usize> {
        (0..count.min(self.layers).min(MOST_LAYERS)).collect()
    }

    /// Builds the model's configuration, with the layers that the architecture derives from the
    /// numbers.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] for the first number that is not valid.
    pub(super) fn into_model(
        self,
        architecture: &'static Architecture,
    ) -> Result<ModelConfig, ModelError> {
        self.validate()?;
        let layers = (0..self.layers).map(|layer| (architecture.layer)(&self, layer));
        let layers: Vec<LayerSpec> = layers.collect();
        if layers.iter().all(|layer| layer.heads().is_none()) {
            let found = format!("such that none of {} layers has attention", self.layers);
            let expected = "such that at least one has it";
            return Err(self.refused(|keys| keys.mixers, found, expected));
        }
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
            per_layer_inputs: self.variations.inputs,
            streams: self.variations.streams,
            learned_positions: self.variations.learned_positions,
            biases: self.biases,
            prediction_layers: self.prediction_layers,
            end_tokens: self.end_tokens,
        };
        model.check_layers()
    }

    /// Returns a layer with the common structure: norms on the inputs of the mixer and of the
    /// feed-forward part, and no norms on queries and keys.
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
            has_scale: self.variations.scaled.contains(&index),
            side_rank: self.variations.side_rank,
        }
    }

    fn mixer(&self, index: usize) -> Mixer {
        match self.recurrent {
            _ if self.without_mixer.contains(&index) => Mixer::None,
            Some(mixer) if self.recurrent_layers.contains(&index) => mixer,
            _ => match self.latent {
                Some(latent) => Mixer::Latent(latent),
                None => Mixer::Attention(self.attention(index)),
            },
        }
    }

    /// Returns the attention of a layer with the common structure: without norms on queries, keys
    /// or values, without sinks and without a gate.
    pub(super) fn attention(&self, index: usize) -> Attention {
        let window = self.windows[index];
        let slides = window.is_some() && self.sliding_rope != self.rope;
        let is_rotated = !self.unrotated.contains(&index);
        Attention {
            heads: self.heads_of(index),
            scale: self.attention_scale,
            window,
            is_chunked: self.is_chunked && window.is_some(),
            is_causal: self.is_causal,
            has_sinks: false,
            rope: is_rotated.then_some(usize::from(slides)),
            query_scale: self.query_scale,
            qk_norm: None,
            softcap: self.attention_softcap,
            has_gate: false,
            normalizes_values: false,
            keys_are_values: self.variations.keys_as_values.contains(&index),
            shares: self.owner(index),
        }
    }

    /// Returns the heads of a layer.
    fn heads_of(&self, index: usize) -> HeadShape {
        let own = self.variations.heads.get(&index);
        own.copied().unwrap_or(self.heads)
    }

    /// Returns the layer whose cache a layer shares, if it shares one.
    fn owner(&self, index: usize) -> Option<usize> {
        let first = self.layers.checked_sub(self.variations.shared_caches)?;
        if index < first {
            return None;
        }
        (0..first).rfind(|&owner| self.windows[owner] == self.windows[index])
    }

    /// Returns the layers without a window.
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
                width: self.width_of(index),
                activation: self.activation,
                cut: self.variations.cuts.get(&index).copied(),
            },
        }
    }

    /// Returns the width of a layer's dense part.
    fn width_of(&self, index: usize) -> usize {
        let own = self.variations.widths.get(&index);
        own.copied().unwrap_or(self.intermediate)
    }

    /// Checks the numbers in [`Variations`].
    fn check_variations(&self) -> Result<(), ModelError> {
        let Variations {
            heads,
            widths,
            shared_caches,
            inputs,
            learned_positions,
            ..
        } = &self.variations;
        for heads in heads.values() {
            self.check_heads(*heads)?;
        }
        for &width in widths.values() {
            self.check_size(|keys| keys.intermediate, width, 1 << 22)?;
        }
        if let Some(inputs) = inputs {
            self.check_size(|keys| keys.input_width, inputs.width, 1 << 16)?;
            self.check_size(|keys| keys.input_vocabulary, inputs.vocabulary, 1 << 26)?;
        }
        if let Some(learned_positions) = learned_positions {
            self.check_size(|keys| keys.segments, learned_positions.segments, 16)?;
        }
        let first = self.layers.saturating_sub(*shared_caches);
        let mut sharing = first..self.layers;
        if let Some(layer) = sharing.find(|&layer| self.owner(layer).is_none()) {
            let expected =
                format!("a layer like layer {layer} before the layers that share caches");
            return Err(self.refused(|keys| keys.shared_caches, shared_caches, expected));
        }
        Ok(())
    }

    /// Checks that the numbers are consistent and within plausible limits.
    fn validate(&self) -> Result<(), ModelError> {
        if let Some(latent) = self.latent {
            self.check_latent(latent)?;
        }
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
        self.check_variations()?;
        // All layers with a window share one rotary embedding, and so do all layers without, so
        // their heads must have the same size.
        let of_kind = |slides: bool| {
            let mut layers =
                (0..self.layers).filter(move |&at| self.windows[at].is_some() == slides);
            let first = layers
                .next()
                .map_or(self.heads, |layer| self.heads_of(layer));
            let alike = layers.all(|layer| self.heads_of(layer).head_dim == first.head_dim);
            (first.head_dim, alike)
        };
        let (full, sliding) = (of_kind(false), of_kind(true));
        if !(full.1 && sliding.1) {
            let expected = "the same in all layers of one kind";
            return Err(self.refused(|keys| keys.head_dim, "different", expected));
        }
        self.rope.validate(full.0, &self.names)?;
        self.sliding_rope.validate(sliding.0, &self.names)
    }

    /// Returns the error for a number with a value that is not accepted.
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

    fn check_latent(&self, latent: Latent) -> Result<(), ModelError> {
        let shape = latent.shape;
        self.check_size(|keys| keys.q_heads, shape.heads, 1 << 14)?;
        self.check_size(|keys| keys.latent, shape.latent, 1 << 14)?;
        self.check_size(|keys| keys.rotated, shape.rotated, 1 << 14)?;
        self.check_size(|keys| keys.plain, shape.plain, 1 << 14)?;
        self.check_size(|keys| keys.value, shape.value, 1 << 14)?;
        if let Some(rank) = latent.query_rank {
            self.check_size(|keys| keys.query_rank, rank, 1 << 20)?;
        }
        if !shape.rotated.is_multiple_of(2) {
            return Err(self.refused(|keys| keys.rotated, shape.rotated, "even"));
        }
        if !shape.key_columns().is_multiple_of(2) {
            return Err(self.refused(|keys| keys.latent, shape.latent, "even"));
        }
        if latent.scale.is_finite() && latent.scale > 0.0 {
            return Ok(());
        }
        let key = self.names.of_rope(|keys| keys.latent_scale);
        let found = format!("such that scores are multiplied by {}", latent.scale);
        Err(ModelError::setting(key, found, "a usual number"))
    }

    fn check_sizes(&self) -> Result<(), ModelError> {
        self.check_size(|keys| keys.layers, self.layers, 4096)?;
        self.check_size(|keys| keys.hidden, self.hidden, 1 << 20)?;
        self.check_size(|keys| keys.intermediate, self.intermediate, 1 << 22)?;
        self.check_size(|keys| keys.vocabulary, self.vocabulary, 1 << 26)?;
        self.check_size(|keys| keys.context, self.context, 1 << 30)?;
        self.check_heads(self.heads)
    }

    fn check_heads(&self, heads: HeadShape) -> Result<(), ModelError> {
        let HeadShape {
            q_heads,
            kv_heads,
            head_dim,
            ..
        } = heads;
        self.check_size(|keys| keys.q_heads, q_heads, 1 << 14)?;
        self.check_size(|keys| keys.kv_heads, kv_heads, 1 << 14)?;
        self.check_size(|keys| keys.head_dim, head_dim, 1 << 14)?;
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
            Mixer::Attention(_) | Mixer::Latent(_) | Mixer::None => Ok(()),
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
        // The scale is one over the square root of the setting.
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
        let (scale, groups, top_groups) = match experts.routing.score {
            RouterScore::Softmax => return Ok(()),
            RouterScore::GroupedSoftmax(own) => (own.scale, own.groups, own.top_groups),
            RouterScore::Sigmoid(own) => (own.scale, own.groups, own.top_groups),
        };
        if !(scale.is_finite() && scale > 0.0) {
            let expected = "a positive number";
            return Err(self.refused(|keys| keys.expert_scale, scale, expected));
        }
        if let Err(expected) = experts.routing.check(count) {
            let found = format!("{top_groups} of {groups}");
            let expected = format!("such that experts can be chosen: {expected}");
            return Err(self.refused(|keys| keys.expert_groups, found, expected));
        }
        Ok(())
    }
}
