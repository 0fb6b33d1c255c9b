//! Checks that every tensor of a file is either used or known to be harmless. Any other tensor is
//! refused by name, since a model that is computed without some of its weights gives wrong results.

use super::layer::{
    Attention, FeedForward, Latent, LayerSpec, Mamba2, Mixer, NormPlacement, ShortConv,
};
use super::learned_positions::PositionPart;
use super::names::{self, GateUp, Part};
use super::per_layer::PerLayerPart;
use super::tensors::Naming;
use super::{ModelError, ModelSource};
use crate::device::Activation;
use std::collections::HashSet;

/// Name prefixes of tensors that do not belong to the text model: vision and audio towers with
/// their projectors, multi-token prediction layers, and the heads of reward models.
const OTHER_MODELS: [&str; 18] = [
    "audio_tower.",
    "mm_projector.",
    "model.audio_tower.",
    "model.embed_audio.",
    "model.embed_vision.",
    "model.multi_modal_projector.",
    "model.vision_model.",
    "model.vision_tower.",
    "model.visual.",
    "mtp.",
    "multi_modal_projector.",
    "v_head.",
    "vision_model.",
    "vision_tower.",
    "visual.",
    // In GGUF files.
    "a.",
    "mm.",
    "v.",
];

/// Name prefixes of the heads of encoders: classifiers, linear layers after pooling, and those that
/// only training needs.
const HEADS: [&str; 9] = [
    "classifier.",
    "cls.",
    "dense_2.",
    "dense_3.",
    "lm_head.bias",
    "lm_head.decoder.",
    "lm_head.dense.",
    "lm_head.layer_norm.",
    "pooler.",
];

/// Name suffixes of tensors whose contents are computed anyway: RoPE frequencies, sines and
/// cosines, and causal masks, which old checkpoints store.
const COMPUTED: [&str; 6] = [
    ".attn.masked_bias",
    ".attn_rot_embd",
    ".attn_rot_embd.weight",
    ".rotary_emb.cos_cached",
    ".rotary_emb.inv_freq",
    ".rotary_emb.sin_cached",
];

/// Name suffixes of tensors that quantisers store.
const OF_QUANTISERS: [&str; 14] = [
    ".absmax",
    ".g_idx",
    ".input_scale",
    ".k_scale",
    ".output_scale",
    ".quant_map",
    ".qweight",
    ".qzeros",
    ".scale",
    ".scales",
    ".v_scale",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
];

/// Checks that the file holds every tensor of the model, and no other one that would change the
/// results.
///
/// # Errors
/// [`ModelError::MissingTensor`], [`ModelError::MissingHead`] and
/// [`ModelError::UnusedTensor`], each with the tensor's name.
pub(super) fn check(source: &ModelSource) -> Result<(), ModelError> {
    let mut inventory = Inventory {
        source,
        used: HashSet::new(),
    };
    inventory.whole_model()?;
    for (layer, spec) in source.config().layers.iter().enumerate() {
        inventory.layer(layer, spec)?;
    }
    let used = inventory.used;
    let mut names = source.names().into_iter();
    let skipped = source.prediction_layers();
    let is_skipped = |name: &str| skipped.iter().any(|layer| name.starts_with(layer));
    let is_head = |name: &str| is_head(source, name);
    let is_unused = |name: &&str| {
        !used.contains(*name) && !is_harmless(name) && !is_skipped(name) && !is_head(name)
    };
    match names.find(is_unused) {
        None => {
            let others = source.names().into_iter();
            let tensors = others.filter(|name| is_of_another_model(name)).count();
            if tensors > 0 {
                tracing::info!(tensors, "skipped tensors that the text model does not have");
            }
            Ok(())
        }
        Some(name) => Err(ModelError::UnusedTensor {
            name: name.to_owned(),
            architecture: source.config().architecture.name(),
            hint: hint(name),
        }),
    }
}

/// Returns whether a tensor belongs to a head. Those of encoders are read when they are used, with
/// [`ModelSource::floats`]. A causal model in a GGUF file may hold copies of the rows of its output
/// projection that two answers have.
fn is_head(source: &ModelSource, name: &str) -> bool {
    if source.config().is_causal() {
        return source.naming() == Naming::Gguf && name == "cls.output.weight";
    }
    let own = name.strip_prefix(source.prefix()).unwrap_or(name);
    HEADS
        .iter()
        .any(|prefix| own.starts_with(prefix) || name.starts_with(prefix))
}

fn is_of_another_model(name: &str) -> bool {
    OTHER_MODELS.iter().any(|prefix| name.starts_with(prefix))
}

fn is_harmless(name: &str) -> bool {
    is_of_another_model(name) || COMPUTED.iter().any(|suffix| name.ends_with(suffix))
}

fn hint(name: &str) -> &'static str {
    if OF_QUANTISERS.iter().any(|suffix| name.ends_with(suffix)) {
        " (it belongs to a quantisation that is not supported; see quantization_config)"
    } else if name.contains("lora_") {
        " (it belongs to a LoRA adapter, which must be merged into the weights first)"
    } else {
        ""
    }
}

struct Inventory<'a> {
    source: &'a ModelSource,
    /// Names of the tensors that the model is computed from.
    used: HashSet<String>,
}

impl Inventory<'_> {
    fn require(&mut self, name: String) -> Result<(), ModelError> {
        if !self.source.holds(&name) {
            return Err(ModelError::MissingTensor { name });
        }
        self.used.insert(name);
        Ok(())
    }

    /// Requires the tensors that belong to no layer.
    fn whole_model(&mut self) -> Result<(), ModelError> {
        self.require(self.source.embedding_name())?;
        if self.source.config().has_final_norm() {
            self.require(self.source.final_norm_name())?;
        }
        if self.source.config().learned_positions.is_some() {
            for part in PositionPart::ALL {
                self.require(self.source.position_name(part))?;
            }
        }
        if let Some(name) = self.source.output_name()? {
            self.used.insert(name.to_owned());
        }
        if self.source.config().per_layer_inputs.is_some() {
            for part in PerLayerPart::ALL {
                self.require(self.source.per_layer_name(part))?;
            }
        }
        let streams = self.source.config().streams;
        for stream in 1..streams.map_or(0, |streams| streams.count) {
            for is_begin in [true, false] {
                self.require(self.source.stream_projection_name(stream, is_begin))?;
            }
        }
        if self.source.naming() == Naming::Gguf {
            for name in ["rope_freqs", "rope_factors_short", "rope_factors_long"] {
                self.used.insert(format!("{name}.weight"));
            }
        }
        Ok(())
    }

    fn layer(&mut self, layer: usize, spec: &LayerSpec) -> Result<(), ModelError> {
        for part in norms(spec) {
            self.require(self.source.name(layer, part))?;
        }
        for part in norms_on_sums(spec) {
            let weight = self.source.name(layer, part);
            self.require(names::bias(&weight))?;
            self.require(weight)?;
        }
        self.beside(layer, spec)?;
        match spec.mixer {
            Mixer::Attention(attention) => self.attention(layer, &attention)?,
            Mixer::Latent(latent) => self.latent(layer, &latent)?,
            Mixer::ShortConv(conv) => self.short_conv(layer, conv)?,
            Mixer::Mamba2(spec) => self.mamba2(layer, spec)?,
            Mixer::GatedDelta(_) => self.gated_delta(layer)?,
            Mixer::None => {}
        }
        match spec.feed_forward {
            FeedForward::Experts(experts) => {
                self.linear(layer, Part::Router)?;
                let activation = experts.routing.activation;
                let first = usize::from(!activation.is_gated());
                let parts = [Part::ExpertGate, Part::ExpertUp, Part::ExpertDown];
                for part in &parts[first..] {
                    self.experts(layer, experts.count, *part)?;
                }
                if experts.has_corrections {
                    self.require(self.source.name(layer, Part::Corrections))?;
                }
                if experts.has_own_norms {
                    for part in EXPERT_NORMS {
                        self.require(self.source.name(layer, part))?;
                    }
                    self.require(self.source.name(layer, Part::ExpertScales))?;
                }
                if experts.has_shared_gate {
                    self.linear(layer, Part::SharedGateOut)?;
                }
                match experts.shared {
                    Some(_) => self.dense(layer, GateUp::SHARED, activation, Part::SharedDown),
                    None => Ok(()),
                }
            }
            FeedForward::Dense { activation, .. } => {
                self.dense(layer, GateUp::DENSE, activation, Part::Down)
            }
            FeedForward::None => Ok(()),
        }
    }

    /// Requires the tensors that a layer has besides its mixer and its feed-forward part.
    fn beside(&mut self, layer: usize, spec: &LayerSpec) -> Result<(), ModelError> {
        if spec.has_scale {
            self.require(self.source.name(layer, Part::LayerScale))?;
        }
        if self.source.config().per_layer_inputs.is_some() {
            for part in [Part::PerLayerGate, Part::PerLayerProjection] {
                self.linear(layer, part)?;
            }
            self.require(self.source.name(layer, Part::PerLayerNorm))?;
        }
        if spec.side_rank.is_some() {
            self.linear(layer, Part::SideLeft)?;
            self.linear(layer, Part::SideRight)?;
            self.require(self.source.name(layer, Part::SideNorm))?;
        }
        if self.source.config().streams.is_some() {
            for part in [
                Part::StreamRouter,
                Part::StreamPrediction,
                Part::StreamCorrection,
            ] {
                self.linear(layer, part)?;
            }
            self.require(self.source.name(layer, Part::StreamRouterNorm))?;
            // Checkpoints store it even if the model does not use it.
            self.require(self.source.name(layer, Part::StreamScale))?;
        }
        Ok(())
    }

    fn dense(
        &mut self,
        layer: usize,
        gate_up: GateUp,
        activation: Activation,
        down: Part,
    ) -> Result<(), ModelError> {
        for (part, _) in self.source.gate_up_parts(layer, gate_up, activation, 0) {
            self.linear(layer, part)?;
        }
        self.linear(layer, down)
    }

    fn attention(&mut self, layer: usize, attention: &Attention) -> Result<(), ModelError> {
        if attention.shares.is_some() {
            self.linear(layer, Part::Query)?;
            // Published checkpoints hold these although the model was trained without them.
            for part in [Part::Key, Part::Value, Part::KeyNorm] {
                self.used.insert(self.source.name(layer, part));
            }
        } else if self.source.fuses_qkv(layer) {
            self.linear(layer, Part::FusedQkv)?;
        } else {
            self.linear(layer, Part::Query)?;
            self.linear(layer, Part::Key)?;
            if !attention.keys_are_values {
                self.linear(layer, Part::Value)?;
            }
        }
        self.linear(layer, Part::AttentionOut)?;
        match attention.has_sinks {
            true => self.require(self.source.name(layer, Part::Sinks)),
            false => Ok(()),
        }
    }

    fn latent(&mut self, layer: usize, latent: &Latent) -> Result<(), ModelError> {
        let splits = self.source.splits_latent_up(layer);
        for part in latent.linear_parts(splits) {
            self.linear(layer, part)?;
        }
        // Some old GGUF files hold the split matrices beside the whole one.
        if self.source.naming() == Naming::Gguf && !splits {
            for part in [Part::LatentKeys, Part::LatentValues] {
                let name = self.source.name(layer, part);
                if self.source.holds(&name) {
                    self.require(name)?;
                }
            }
        }
        for &part in latent.norms() {
            self.require(self.source.name(layer, part))?;
        }
        Ok(())
    }

    fn short_conv(&mut self, layer: usize, conv: ShortConv) -> Result<(), ModelError> {
        self.linear(layer, Part::ConvInput)?;
        self.linear(layer, Part::ConvOutput)?;
        self.convolution(layer, conv.has_bias)
    }

    fn convolution(&mut self, layer: usize, has_bias: bool) -> Result<(), ModelError> {
        let weight = self.source.name(layer, Part::Convolution);
        let bias = names::bias(&weight);
        self.require(weight)?;
        match has_bias {
            true => self.require(bias),
            false => Ok(()),
        }
    }

    fn mamba2(&mut self, layer: usize, spec: Mamba2) -> Result<(), ModelError> {
        self.linear(layer, Part::RecurrentInput)?;
        self.linear(layer, Part::RecurrentOutput)?;
        for part in [
            Part::DecayRates,
            Part::StepBiases,
            Part::Skips,
            Part::RecurrentNorm,
        ] {
            self.require(self.source.name(layer, part))?;
        }
        self.convolution(layer, spec.has_conv_bias)
    }

    fn gated_delta(&mut self, layer: usize) -> Result<(), ModelError> {
        for part in self.source.delta_projections(layer) {
            self.linear(layer, part)?;
        }
        for part in [Part::DecayRates, Part::StepBiases, Part::RecurrentNorm] {
            self.require(self.source.name(layer, part))?;
        }
        self.convolution(layer, false)
    }

    /// Requires the weight of a projection, and its bias if it has one.
    fn linear(&mut self, layer: usize, part: Part) -> Result<(), ModelError> {
        let weight = self.source.name(layer, part);
        let bias = names::bias(&weight);
        self.require(weight)?;
        match self.source.has_bias(part, &bias) {
            true => self.require(bias),
            false => Ok(()),
        }
    }

    /// Requires one projection of all experts of a layer: a stacked tensor, or a tensor per expert.
    fn experts(
        &mut self,
        layer: usize,
        count: usize,
        part: fn(usize) -> Part,
    ) -> Result<(), ModelError> {
        for weight in self.source.expert_names(layer, count, part) {
            let bias = self.source.expert_bias_name(&weight);
            self.require(weight)?;
            if self.source.has_bias(part(0), &bias) {
                self.require(bias)?;
            }
        }
        Ok(())
    }
}

/// Norms of a mixture of experts that has norms of its own, including the dense part beside it.
const EXPERT_NORMS: [Part; 4] = [
    Part::RouterScale,
    Part::SharedOutputNorm,
    Part::ExpertInputNorm,
    Part::ExpertOutputNorm,
];

/// Returns the norms of a layer on sums with the residual stream.
fn norms_on_sums(spec: &LayerSpec) -> impl Iterator<Item = Part> {
    let norms = [
        (Part::PostAttentionNorm, spec.mixer_norms),
        (Part::PostFeedForwardNorm, spec.feed_forward_norms),
    ];
    let norms = norms.into_iter();
    norms.filter_map(|(part, placement)| (placement == NormPlacement::OnSum).then_some(part))
}

/// Returns the norms of a layer's mixer and feed-forward part, and of its queries and keys.
fn norms(spec: &LayerSpec) -> impl Iterator<Item = Part> {
    let (mixer, feed_forward) = (spec.mixer_norms, spec.feed_forward_norms);
    let attention = spec.attention();
    let has_qk_norm = attention.is_some_and(|own| own.qk_norm_lengths().is_some());
    let has_keys = attention.is_none_or(|own| own.shares.is_none());
    let norms = [
        (Part::AttentionNorm, mixer.is_before()),
        (Part::PostAttentionNorm, mixer.is_after()),
        (Part::FeedForwardNorm, feed_forward.is_before()),
        (Part::PostFeedForwardNorm, feed_forward.is_after()),
        (Part::QueryNorm, has_qk_norm),
        (Part::KeyNorm, has_qk_norm && has_keys),
    ];
    let norms = norms.into_iter().filter(|(_, is_there)| *is_there);
    norms.map(|(part, _)| part)
}
