//! A model of any size with random weights, described by a `config.json`: speed does
//! not depend on what the weights are.

use super::layer::{Attention, FeedForward, GatedDelta, Mixer, ShortConv};
use super::names::{self, Part};
use super::{ModelConfig, ModelError};
use crate::weights::{DType, RandomContent, RandomTensor, RandomWeights};

/// The tensors that a Hugging Face checkpoint of the model has.
pub(super) fn tensors(config: &ModelConfig, prefix: &str, tied: bool) -> Vec<RandomTensor> {
    let mut list = List {
        config,
        prefix,
        tensors: Vec::new(),
    };
    let (vocabulary, hidden) = (config.vocabulary, config.hidden);
    list.matrix(format!("{prefix}embed_tokens.weight"), vocabulary, hidden);
    for layer in 0..config.layers.len() {
        list.layer(layer);
    }
    list.norm(format!("{prefix}norm.weight"), hidden);
    if !tied {
        list.matrix("lm_head.weight".to_owned(), vocabulary, hidden);
    }
    list.tensors
}

/// The weights of the tensors above, in `format`.
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
    fn layer(&mut self, layer: usize) {
        let config = self.config;
        let (spec, hidden) = (&config.layers[layer], config.hidden);
        match spec.mixer {
            Mixer::Attention(attention) => self.attention(layer, &attention),
            Mixer::ShortConv(conv) => self.short_conv(layer, conv),
            Mixer::GatedDelta(delta) => self.gated_delta(layer, delta),
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
        match spec.feed_forward {
            FeedForward::Experts(experts) => {
                let width = experts.width;
                let bias = config.biases.feed_forward;
                self.part(layer, Part::Router, experts.count, hidden);
                self.bias(layer, Part::Router, experts.count, bias);
                match config.architecture.storage.stacked_experts {
                    Some(stacked) if stacked.is_transposed => {
                        let gate_up = (stacked.gate_up, [hidden, 2 * width]);
                        self.stacked(layer, experts.count, gate_up);
                        self.stacked(layer, experts.count, (stacked.down, [width, hidden]));
                    }
                    _ => {
                        for expert in 0..experts.count {
                            self.part(layer, Part::ExpertGate(expert), width, hidden);
                            self.part(layer, Part::ExpertUp(expert), width, hidden);
                            self.part(layer, Part::ExpertDown(expert), hidden, width);
                        }
                    }
                }
                if experts.has_corrections {
                    self.vector(self.name(layer, Part::Corrections), experts.count, 0.0);
                }
                if let Some(shared) = experts.shared {
                    self.part(layer, Part::SharedGate, shared, hidden);
                    self.part(layer, Part::SharedUp, shared, hidden);
                    self.part(layer, Part::SharedDown, hidden, shared);
                }
                if experts.has_shared_gate {
                    self.part(layer, Part::SharedGateOut, 1, hidden);
                }
            }
            FeedForward::Dense { width, .. } => {
                let bias = config.biases.feed_forward;
                if config.architecture.storage.fuses_gate_up {
                    self.part(layer, Part::FusedGateUp, 2 * width, hidden);
                } else {
                    self.part(layer, Part::Gate, width, hidden);
                    self.part(layer, Part::Up, width, hidden);
                    self.bias(layer, Part::Gate, width, bias);
                    self.bias(layer, Part::Up, width, bias);
                }
                self.part(layer, Part::Down, hidden, width);
                self.bias(layer, Part::Down, hidden, bias);
            }
        }
    }

    fn short_conv(&mut self, layer: usize, conv: ShortConv) {
        let hidden = self.config.hidden;
        self.part(layer, Part::ConvInput, 3 * hidden, hidden);
        self.part(layer, Part::ConvOutput, hidden, hidden);
        let convolution = self.name(layer, Part::Convolution);
        if conv.has_bias {
            self.vector(names::bias(&convolution), hidden, 0.0);
        }
        self.convolution(layer, hidden, conv.taps);
    }

    fn gated_delta(&mut self, layer: usize, GatedDelta { heads, taps }: GatedDelta) {
        let (hidden, values) = (self.config.hidden, heads.value_columns());
        self.part(layer, Part::DeltaQkv, heads.qkv_columns(), hidden);
        self.part(layer, Part::DeltaGate, values, hidden);
        self.part(layer, Part::DeltaBeta, heads.value_heads, hidden);
        self.part(layer, Part::DeltaAlpha, heads.value_heads, hidden);
        self.part(layer, Part::DeltaOut, hidden, values);
        self.convolution(layer, heads.qkv_columns(), taps);
        for (part, length, value) in [
            (Part::DeltaDecay, heads.value_heads, 0.0),
            (Part::DeltaBias, heads.value_heads, 0.0),
            (Part::DeltaNorm, heads.value_dim, 1.0),
        ] {
            self.vector(self.name(layer, part), length, value);
        }
    }

    fn convolution(&mut self, layer: usize, channels: usize, taps: usize) {
        self.tensors.push(RandomTensor {
            name: self.name(layer, Part::Convolution),
            shape: vec![channels, 1, taps],
            content: RandomContent::Weights,
        });
    }

    fn attention(&mut self, layer: usize, attention: &Attention) {
        let (config, hidden) = (self.config, self.config.hidden);
        let heads = attention.heads;
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        if config.architecture.storage.fuses_qkv {
            self.part(layer, Part::FusedQkv, q + 2 * kv, hidden);
        } else {
            let queries = if attention.has_gate { 2 * q } else { q };
            for (part, rows) in [(Part::Query, queries), (Part::Key, kv), (Part::Value, kv)] {
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
            self.part_norm(layer, Part::KeyNorm, k);
        }
    }

    fn name(&self, layer: usize, part: Part) -> String {
        let name = (self.config.architecture.storage.huggingface_name)(part);
        let suffix = names::huggingface_suffix(part);
        format!("{}layers.{layer}.{name}{suffix}", self.prefix)
    }

    fn part(&mut self, layer: usize, part: Part, rows: usize, columns: usize) {
        self.matrix(self.name(layer, part), rows, columns);
    }

    /// A tensor of all experts, with a bias of 0 if the model has one there.
    fn stacked(&mut self, layer: usize, count: usize, (name, shape): (&str, [usize; 2])) {
        let name = format!("{}layers.{layer}.{name}", self.prefix);
        let [inputs, outputs] = shape;
        if self.config.biases.feed_forward == Some(true) {
            self.tensors.push(RandomTensor {
                name: format!("{name}_bias"),
                shape: vec![count, outputs],
                content: RandomContent::Constant(0.0),
            });
        }
        self.tensors.push(RandomTensor {
            name,
            shape: vec![count, inputs, outputs],
            content: RandomContent::Weights,
        });
    }

    /// A bias of 0, if the model has one there.
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

    /// A norm that scales by 1.
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
