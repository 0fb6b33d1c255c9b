//! Makes a model of any size with random weights from a `config.json`, to measure speed, which
//! does not depend on the values of the weights.

use super::layer::{
    Attention, FeedForward, GatedDelta, Latent, LayerSpec, Mamba2, Mixer, NormPlacement, ShortConv,
};
use super::learned_positions::PositionPart;
use super::names::{self, GateUp, Part};
use super::per_layer::PerLayerPart;
use super::{ModelConfig, ModelError};
use crate::weights::{DType, RandomContent, RandomTensor, RandomWeights};

/// Returns the tensors of a Hugging Face checkpoint of the model.
pub(super) fn tensors(config: &ModelConfig, prefix: &str, tied: bool) -> Vec<RandomTensor> {
    let mut list = List {
        config,
        prefix,
        tensors: Vec::new(),
    };
    let (vocabulary, hidden) = (config.vocabulary, config.hidden);
    let storage = config.architecture.storage;
    let embedding = storage.embedding;
    list.matrix(format!("{prefix}{embedding}.weight"), vocabulary, hidden);
    list.per_layer_inputs();
    list.streams();
    list.learned_positions();
    for layer in 0..config.layers.len() {
        list.layer(layer);
    }
    if config.has_final_norm() {
        let norm = storage.final_norm.huggingface;
        list.norm(format!("{prefix}{norm}.weight"), hidden);
    }
    if !tied {
        list.matrix("lm_head.weight".to_owned(), vocabulary, hidden);
    }
    list.tensors
}

/// Creates the weights of these tensors, stored in `format`.
pub(super) fn weights(
    tensors: Vec<RandomTensor>,
    format: DType,
) -> Result<RandomWeights, ModelError> {
    RandomWeights::new(tensors, format).map_err(|unfit| {
        let formats: Vec<&str> = RandomWeights::FORMATS
            .iter()
            .map(|one| one.name())
            .collect();
        let expected = format!(
            "one of {} whose blocks divide the {} columns of {}",
            formats.join(", "),
            unfit.columns,
            unfit.name
        );
        ModelError::setting("weights' format", unfit.format, expected)
    })
}

struct List<'a> {
    config: &'a ModelConfig,
    prefix: &'a str,
    tensors: Vec<RandomTensor>,
}

impl List<'_> {
    /// Adds the tensors of per-layer inputs that belong to no single layer.
    fn per_layer_inputs(&mut self) {
        let Some(inputs) = self.config.per_layer_inputs else {
            return;
        };
        let all = self.config.layers.len() * inputs.width;
        for part in PerLayerPart::ALL {
            let name = self.prefix.to_owned() + part.huggingface();
            match part {
                PerLayerPart::Table => self.matrix(name, inputs.vocabulary, all),
                PerLayerPart::Projection => self.matrix(name, all, self.config.hidden),
                PerLayerPart::Norm => self.norm(name, inputs.width),
            }
        }
    }

    /// Adds the projections to and from residual streams.
    fn streams(&mut self) {
        let (count, hidden) = (
            self.config.streams.map_or(0, |own| own.count),
            self.config.hidden,
        );
        for name in ["altup_projections", "altup_unembed_projections"] {
            for stream in 1..count {
                let name = format!("{}{name}.{}.weight", self.prefix, stream - 1);
                self.matrix(name, hidden, hidden);
            }
        }
    }

    /// Adds the embeddings of positions and segments, and the norm of the input.
    fn learned_positions(&mut self) {
        let Some(learned_positions) = self.config.learned_positions else {
            return;
        };
        let hidden = self.config.hidden;
        for part in PositionPart::ALL {
            let name = self.prefix.to_owned() + part.huggingface();
            match part {
                PositionPart::Positions => {
                    self.matrix(name, learned_positions.unused + self.config.context, hidden);
                }
                PositionPart::Segments => self.matrix(name, learned_positions.segments, hidden),
                PositionPart::NormWeight => self.norm(name, hidden),
                PositionPart::NormBias => self.vector(name, hidden, 0.0),
            }
        }
    }

    fn layer(&mut self, layer: usize) {
        let config = self.config;
        let (spec, hidden) = (&config.layers[layer], config.hidden);
        self.beside(layer, spec);
        match spec.mixer {
            Mixer::Attention(attention) => self.attention(layer, &attention),
            Mixer::Latent(latent) => self.latent(layer, &latent),
            Mixer::ShortConv(conv) => self.short_conv(layer, conv),
            Mixer::Mamba2(spec) => self.mamba2(layer, spec),
            Mixer::GatedDelta(delta) => self.gated_delta(layer, delta),
            Mixer::None => {}
        }
        for (part, is_there) in [
            (Part::AttentionNorm, spec.mixer_norms.is_before()),
            (Part::FeedForwardNorm, spec.feed_forward_norms.is_before()),
            (Part::PostAttentionNorm, spec.mixer_norms.is_after()),
            (
                Part::PostFeedForwardNorm,
                spec.feed_forward_norms.is_after(),
            ),
        ] {
            if is_there {
                self.part_norm(layer, part, hidden);
            }
        }
        for (part, placement) in [
            (Part::PostAttentionNorm, spec.mixer_norms),
            (Part::PostFeedForwardNorm, spec.feed_forward_norms),
        ] {
            if placement == NormPlacement::OnSum {
                self.part_norm(layer, part, hidden);
                self.bias(layer, part, hidden, Some(true));
            }
        }
        match spec.feed_forward {
            FeedForward::Experts(experts) => {
                let width = experts.width;
                let bias = config.biases.feed_forward;
                self.part(layer, Part::Router, experts.count, hidden);
                self.bias(layer, Part::Router, experts.count, bias);
                match config.architecture.storage.stacked_experts {
                    Some(stacked) => {
                        let shape = |outputs, inputs| match stacked.are_transposed {
                            true => [inputs, outputs],
                            false => [outputs, inputs],
                        };
                        let gate_up = (stacked.gate_up, shape(2 * width, hidden));
                        self.stacked(layer, experts.count, gate_up, 2 * width);
                        let down = (stacked.down, shape(hidden, width));
                        self.stacked(layer, experts.count, down, hidden);
                    }
                    None => {
                        for expert in 0..experts.count {
                            if experts.routing.activation.is_gated() {
                                self.part(layer, Part::ExpertGate(expert), width, hidden);
                            }
                            self.part(layer, Part::ExpertUp(expert), width, hidden);
                            self.part(layer, Part::ExpertDown(expert), hidden, width);
                        }
                    }
                }
                if experts.has_corrections {
                    self.vector(self.name(layer, Part::Corrections), experts.count, 0.0);
                }
                if experts.has_own_norms {
                    self.vector(self.name(layer, Part::RouterScale), hidden, 1.0);
                    self.vector(self.name(layer, Part::ExpertScales), experts.count, 1.0);
                    for part in [
                        Part::SharedOutputNorm,
                        Part::ExpertInputNorm,
                        Part::ExpertOutputNorm,
                    ] {
                        self.part_norm(layer, part, hidden);
                    }
                }
                if let Some(shared) = experts.shared {
                    let fuses = config.architecture.storage.fuses_gate_up;
                    let activation = experts.routing.activation;
                    for (part, rows) in GateUp::SHARED.parts(activation, shared, fuses) {
                        self.part(layer, part, rows, hidden);
                    }
                    self.part(layer, Part::SharedDown, hidden, shared);
                }
                if experts.has_shared_gate {
                    self.part(layer, Part::SharedGateOut, 1, hidden);
                }
            }
            FeedForward::None => {}
            FeedForward::Dense {
                width, activation, ..
            } => {
                let bias = config.biases.feed_forward;
                let fuses = config.architecture.storage.fuses_gate_up;
                for (part, rows) in GateUp::DENSE.parts(activation, width, fuses) {
                    self.part(layer, part, rows, hidden);
                    self.bias(layer, part, rows, bias);
                }
                self.part(layer, Part::Down, hidden, width);
                self.bias(layer, Part::Down, hidden, bias);
            }
        }
    }

    /// Adds the tensors that a layer has besides its mixer and its feed-forward part.
    fn beside(&mut self, layer: usize, spec: &LayerSpec) {
        let (config, hidden) = (self.config, self.config.hidden);
        if let Some(rank) = spec.side_rank {
            self.part(layer, Part::SideLeft, rank, hidden);
            self.part(layer, Part::SideRight, hidden, rank);
            self.part_norm(layer, Part::SideNorm, hidden);
        }
        if let Some(count) = config.streams.map(|streams| streams.count) {
            self.part(layer, Part::StreamRouter, count, hidden);
            self.part(layer, Part::StreamPrediction, count * count, count);
            self.part(layer, Part::StreamCorrection, count, count);
            self.part_norm(layer, Part::StreamRouterNorm, hidden);
            self.vector(self.name(layer, Part::StreamScale), hidden, 1.0);
        }
        if spec.has_scale {
            self.vector(self.name(layer, Part::LayerScale), 1, 1.0);
        }
        if let Some(inputs) = config.per_layer_inputs {
            self.part(layer, Part::PerLayerGate, inputs.width, hidden);
            self.part(layer, Part::PerLayerProjection, hidden, inputs.width);
            self.part_norm(layer, Part::PerLayerNorm, hidden);
        }
    }

    fn short_conv(&mut self, layer: usize, conv: ShortConv) {
        let hidden = self.config.hidden;
        let bias = self.config.biases.recurrent;
        self.part(layer, Part::ConvInput, 3 * hidden, hidden);
        self.bias(layer, Part::ConvInput, 3 * hidden, bias);
        self.part(layer, Part::ConvOutput, hidden, hidden);
        self.bias(layer, Part::ConvOutput, hidden, bias);
        self.convolution(layer, hidden, conv.taps, conv.has_bias);
    }

    fn convolution(&mut self, layer: usize, channels: usize, taps: usize, has_bias: bool) {
        let name = self.name(layer, Part::Convolution);
        if has_bias {
            self.vector(names::bias(&name), channels, 0.0);
        }
        self.tensors.push(RandomTensor {
            name,
            shape: vec![channels, 1, taps],
            content: RandomContent::Weights,
        });
    }

    fn gated_delta(&mut self, layer: usize, GatedDelta { heads, taps }: GatedDelta) {
        let (hidden, values) = (self.config.hidden, heads.value_columns());
        self.part(layer, Part::DeltaQkv, heads.qkv_columns(), hidden);
        self.part(layer, Part::DeltaGate, values, hidden);
        self.part(layer, Part::DeltaBeta, heads.value_heads, hidden);
        self.part(layer, Part::DeltaAlpha, heads.value_heads, hidden);
        self.part(layer, Part::RecurrentOutput, hidden, values);
        self.convolution(layer, heads.qkv_columns(), taps, false);
        for (part, length, value) in [
            (Part::DecayRates, heads.value_heads, 0.0),
            (Part::StepBiases, heads.value_heads, 0.0),
            (Part::RecurrentNorm, heads.value_dim, 1.0),
        ] {
            self.vector(self.name(layer, part), length, value);
        }
    }

    fn mamba2(&mut self, layer: usize, spec: Mamba2) {
        let (hidden, bias) = (self.config.hidden, self.config.biases.recurrent);
        let recurrence = spec.recurrence;
        let (columns, projected) = (recurrence.columns(), recurrence.projected());
        self.part(layer, Part::RecurrentInput, projected, hidden);
        self.bias(layer, Part::RecurrentInput, projected, bias);
        self.part(layer, Part::RecurrentOutput, hidden, columns);
        self.bias(layer, Part::RecurrentOutput, hidden, bias);
        for part in [Part::DecayRates, Part::StepBiases, Part::Skips] {
            self.vector(self.name(layer, part), recurrence.heads, 0.0);
        }
        self.part_norm(layer, Part::RecurrentNorm, columns);
        self.convolution(layer, recurrence.channels(), spec.taps, spec.has_conv_bias);
    }

    fn latent(&mut self, layer: usize, latent: &Latent) {
        let (config, hidden, shape) = (self.config, self.config.hidden, latent.shape);
        let queries = shape.query_columns();
        match latent.query_rank {
            Some(rank) => {
                self.part(layer, Part::QueryDown, rank, hidden);
                self.bias(layer, Part::QueryDown, rank, config.biases.qkv);
                self.part_norm(layer, Part::QueryDownNorm, rank);
                self.part(layer, Part::QueryUp, queries, rank);
            }
            None => self.part(layer, Part::LatentQuery, queries, hidden),
        }
        let down = shape.key_columns();
        self.part(layer, Part::LatentDown, down, hidden);
        self.bias(layer, Part::LatentDown, down, config.biases.qkv);
        self.part_norm(layer, Part::LatentNorm, shape.latent);
        let up = shape.heads * (shape.plain + shape.value);
        self.part(layer, Part::LatentUp, up, shape.latent);
        self.part(layer, Part::AttentionOut, hidden, shape.value_columns());
        let bias = config.biases.attention_out;
        self.bias(layer, Part::AttentionOut, hidden, bias);
    }

    fn attention(&mut self, layer: usize, attention: &Attention) {
        let (config, hidden) = (self.config, self.config.hidden);
        let heads = attention.heads;
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        if config.architecture.storage.fuses_qkv {
            self.part(layer, Part::FusedQkv, q + 2 * kv, hidden);
        } else {
            let queries = if attention.has_gate { 2 * q } else { q };
            let parts = [
                (Part::Query, queries, true),
                (Part::Key, kv, attention.shares.is_none()),
                (
                    Part::Value,
                    kv,
                    attention.shares.is_none() && !attention.keys_are_values,
                ),
            ];
            let parts = parts.into_iter().filter(|(.., is_there)| *is_there);
            for (part, rows, _) in parts {
                self.part(layer, part, rows, hidden);
                self.bias(layer, part, rows, config.biases.qkv);
            }
        }
        self.part(layer, Part::AttentionOut, hidden, q);
        let bias = config.biases.attention_out;
        self.bias(layer, Part::AttentionOut, hidden, bias);
        if attention.has_sinks {
            self.vector(self.name(layer, Part::Sinks), heads.q_heads, 0.0);
        }
        if let Some((q, k)) = attention.qk_norm_lengths() {
            self.part_norm(layer, Part::QueryNorm, q);
            if attention.shares.is_none() {
                self.part_norm(layer, Part::KeyNorm, k);
            }
        }
    }

    fn name(&self, layer: usize, part: Part) -> String {
        let name = (self.config.architecture.storage.huggingface_name)(part);
        let suffix = names::huggingface_suffix(part);
        let layers = self.config.architecture.storage.layers;
        format!("{}{layers}.{layer}.{name}{suffix}", self.prefix)
    }

    fn part(&mut self, layer: usize, part: Part, rows: usize, columns: usize) {
        self.matrix(self.name(layer, part), rows, columns);
    }

    /// Adds a stacked tensor of all experts, and a bias of zeros if feed-forward parts have biases.
    fn stacked(
        &mut self,
        layer: usize,
        count: usize,
        (name, [rows, columns]): (&str, [usize; 2]),
        outputs: usize,
    ) {
        let name = format!("{}layers.{layer}.{name}", self.prefix);
        if self.config.biases.feed_forward == Some(true) {
            self.tensors.push(RandomTensor {
                name: format!("{name}_bias"),
                shape: vec![count, outputs],
                content: RandomContent::Constant(0.0),
            });
        }
        self.tensors.push(RandomTensor {
            name,
            shape: vec![count, rows, columns],
            content: RandomContent::Weights,
        });
    }

    /// Adds a bias of zeros if `is_there` is `Some(true)`.
    fn bias(&mut self, layer: usize, part: Part, length: usize, is_there: Option<bool>) {
        if is_there == Some(true) {
            self.vector(names::bias(&self.name(layer, part)), length, 0.0);
        }
    }

    fn part_norm(&mut self, layer: usize, part: Part, length: usize) {
        self.norm(self.name(layer, part), length);
    }

    fn matrix(&mut self, name: String, rows: usize, columns: usize) {
        self.tensors.push(RandomTensor {
            name,
            shape: vec![rows, columns],
            content: RandomContent::Weights,
        });
    }

    /// Adds a norm that scales by 1.
    fn norm(&mut self, name: String, length: usize) {
        let offset = self.config.architecture.storage.norm_weights_are_offsets;
        self.vector(name, length, if offset { 0.0 } else { 1.0 });
    }

    fn vector(&mut self, name: String, length: usize, value: f32) {
        self.tensors.push(RandomTensor {
            name,
            shape: vec![length],
            content: RandomContent::Constant(value),
        });
    }
}
