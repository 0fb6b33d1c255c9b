//! A model of any size with random weights, described by a `config.json`: speed does
//! not depend on what the weights are.

use super::tensors::{Part, huggingface_name};
use super::{Family, ModelConfig, ModelError, NormPlacement, QkNormKind};
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
    for layer in 0..config.layers {
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
        let (hidden, heads) = (config.hidden, config.heads);
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        if config.family == Family::Phi3 {
            self.part(layer, Part::FusedQkv, q + 2 * kv, hidden);
        } else {
            for (part, rows) in [(Part::Query, q), (Part::Key, kv), (Part::Value, kv)] {
                self.part(layer, part, rows, hidden);
                self.bias(layer, part, rows, config.biases.qkv);
            }
        }
        self.part(layer, Part::AttentionOut, hidden, q);
        let bias = config.biases.attention_out;
        self.bias(layer, Part::AttentionOut, hidden, bias);
        if let Some(kind) = config.family.qk_norm() {
            let (q, k) = match kind {
                QkNormKind::PerHead => (heads.head_dim, heads.head_dim),
                QkNormKind::WholeRow => (q, kv),
            };
            self.part_norm(layer, Part::QueryNorm, q);
            self.part_norm(layer, Part::KeyNorm, k);
        }
        let placement = config.family.norm_placement();
        if placement != NormPlacement::After {
            self.part_norm(layer, Part::AttentionNorm, hidden);
            self.part_norm(layer, Part::FeedForwardNorm, hidden);
        }
        if placement != NormPlacement::Before {
            self.part_norm(layer, Part::PostAttentionNorm, hidden);
            self.part_norm(layer, Part::PostFeedForwardNorm, hidden);
        }
        match config.layer_experts(layer) {
            Some(experts) => {
                let width = experts.intermediate;
                self.part(layer, Part::Router, experts.count, hidden);
                for expert in 0..experts.count {
                    self.part(layer, Part::ExpertGate(expert), width, hidden);
                    self.part(layer, Part::ExpertUp(expert), width, hidden);
                    self.part(layer, Part::ExpertDown(expert), hidden, width);
                }
            }
            None => {
                let width = config.intermediate;
                if config.family == Family::Phi3 {
                    self.part(layer, Part::FusedGateUp, 2 * width, hidden);
                } else {
                    self.part(layer, Part::Gate, width, hidden);
                    self.part(layer, Part::Up, width, hidden);
                    self.bias(layer, Part::Gate, width, config.biases.feed_forward);
                    self.bias(layer, Part::Up, width, config.biases.feed_forward);
                }
                self.part(layer, Part::Down, hidden, width);
                self.bias(layer, Part::Down, hidden, config.biases.feed_forward);
            }
        }
    }

    fn name(&self, layer: usize, part: Part, kind: &str) -> String {
        let part = huggingface_name(self.config.family, part);
        format!("{}layers.{layer}.{part}.{kind}", self.prefix)
    }

    fn part(&mut self, layer: usize, part: Part, rows: usize, columns: usize) {
        self.matrix(self.name(layer, part, "weight"), rows, columns);
    }

    /// A bias of 0, if the model has one there.
    fn bias(&mut self, layer: usize, part: Part, length: usize, is_there: Option<bool>) {
        if is_there == Some(true) {
            self.vector(self.name(layer, part, "bias"), length, 0.0);
        }
    }

    fn part_norm(&mut self, layer: usize, part: Part, length: usize) {
        self.norm(self.name(layer, part, "weight"), length);
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
        let offset = self.config.family.norm_weights_are_offsets();
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
