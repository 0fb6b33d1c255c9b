//! Everything about a model but its weights.

use super::architectures::Architecture;
use super::layer::{
    Attention, Experts, FeedForward, GatedDelta, LayerSpec, Mixer, NormKind, NormPlacement,
};
use super::{ModelError, RopeConfig};
use crate::device::{Activation, HeadShape, StatePart};
use std::fmt::Debug;

/// Which projections have a bias: `None` means those that the file has one for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: Option<bool>,
    /// The attention's output projections.
    pub attention_out: Option<bool>,
    /// The feed-forward layers' projections.
    pub feed_forward: Option<bool>,
    /// The projections of recurrent mixers.
    pub recurrent: Option<bool>,
}

impl Biases {
    /// As the file has them: GGUF metadata does not say.
    pub const AS_STORED: Self = Self {
        qkv: None,
        attention_out: None,
        feed_forward: None,
        recurrent: None,
    };

    /// None at all.
    pub const NONE: Self = Self {
        qkv: Some(false),
        attention_out: Some(false),
        feed_forward: Some(false),
        recurrent: Some(false),
    };
}

/// Everything about a model but its weights: its layers, and what belongs to no layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture that its files name.
    pub architecture: &'static Architecture,
    /// What each layer computes. There is at least one.
    pub layers: Vec<LayerSpec>,
    /// The position embeddings that layers refer to by index. The first is that of the
    /// layers with full attention.
    pub ropes: Vec<RopeConfig>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence that it was made for.
    pub context: usize,
    /// Factor on the token embeddings.
    pub embedding_scale: f32,
    /// What the norms of the residual stream compute.
    pub norm: NormKind,
    /// Added to the mean square, or the variance, in norms.
    pub norm_epsilon: f32,
    /// Factor on logits.
    pub logit_scale: f32,
    /// Soft cap on logits.
    pub logit_softcap: Option<f32>,
    /// Which projections have a bias.
    pub biases: Biases,
    /// Layers that files hold after these, to predict further tokens. They are not computed.
    pub prediction_layers: usize,
    /// Tokens that end a sequence, as far as the model's own settings say.
    pub end_tokens: Vec<u32>,
}

/// Where recurrent layers keep what they know of the tokens so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateLayout {
    /// Number of float32 numbers of a sequence's state, all layers together; 0 if no layer is
    /// recurrent.
    pub elements: usize,
    /// The parts of each layer: that of its convolution, and that of its recurrence. They are
    /// empty where there is none.
    pub layers: Vec<[StatePart; 2]>,
}

impl ModelConfig {
    /// The longest sequence unless a longer one, up to [`ModelConfig::context`], is asked
    /// for. It is shorter for models with LongRoPE: beyond it other factors apply, to short
    /// sequences as well, since cached keys are rotated already.
    pub fn native_context(&self) -> usize {
        self.ropes[0].native_context(self.context)
    }

    /// The attention heads, which are the same in every layer that has attention.
    pub fn heads(&self) -> HeadShape {
        let first = self.attentions().next();
        first.map(|attention| attention.heads).unwrap_or_default()
    }

    /// The attention of the layers that have it, which keep keys and values.
    pub fn attentions(&self) -> impl Iterator<Item = &Attention> {
        self.layers.iter().filter_map(LayerSpec::attention)
    }

    /// Where the recurrent layers keep what they know of the tokens so far.
    pub fn states(&self) -> StateLayout {
        let mut layout = StateLayout::default();
        for layer in &self.layers {
            let parts = layer.state_elements(self.hidden).map(|elements| {
                let part = StatePart {
                    offset: layout.elements,
                    elements,
                };
                layout.elements = layout
                    .elements
                    .saturating_add(elements.next_multiple_of(16));
                part
            });
            layout.layers.push(parts);
        }
        layout
    }

    /// The number of layers that keep a state.
    pub fn recurrent_layers(&self) -> usize {
        let layers = self.layers.iter();
        let states = layers.map(|layer| layer.state_elements(self.hidden));
        states.filter(|parts| *parts != [0, 0]).count()
    }

    /// The sliding window of the layers that have one.
    #[cfg(any(test, feature = "cli"))]
    pub fn window(&self) -> Option<usize> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| layer.attention()?.window)
    }

    /// The width of the dense feed-forward parts, if there are any.
    pub fn dense_width(&self) -> Option<usize> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match layer.feed_forward {
            FeedForward::Dense { width, .. } => Some(width),
            FeedForward::Experts(_) | FeedForward::None => None,
        })
    }

    /// The activation of the dense feed-forward parts, if there are any.
    pub(super) fn dense_activation(&self) -> Option<Activation> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match layer.feed_forward {
            FeedForward::Dense { activation, .. } => Some(activation),
            FeedForward::Experts(_) | FeedForward::None => None,
        })
    }

    /// The mixture of experts of the layers that have one.
    pub fn experts(&self) -> Option<Experts> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match layer.feed_forward {
            FeedForward::Dense { .. } | FeedForward::None => None,
            FeedForward::Experts(experts) => Some(experts),
        })
    }

    /// The width of the dense parts beside the experts, if there are any.
    pub fn shared_width(&self) -> Option<usize> {
        self.experts()?.shared
    }

    /// The gated delta net of the layers that have one.
    pub fn gated_delta(&self) -> Option<GatedDelta> {
        self.layers.iter().find_map(|layer| match layer.mixer {
            Mixer::GatedDelta(delta) => Some(delta),
            _ => None,
        })
    }

    /// Checks that the layers fit the memory that they share: the cache has one shape for
    /// all of them, and so have the intermediates of a step.
    pub(super) fn check_layers(self) -> Result<Self, ModelError> {
        if self.attentions().next().is_none() {
            let expected = "at least one layer with attention";
            return Err(ModelError::setting(
                "layer_types",
                "recurrent only",
                expected,
            ));
        }
        let (heads, dense, experts) = (self.heads(), self.dense_width(), self.experts());
        let delta = self.gated_delta();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(attention) = layer.attention()
                && attention.heads != heads
            {
                return Err(uneven(index, "heads", attention.heads, heads));
            }
            if let Mixer::GatedDelta(own) = layer.mixer
                && Some(own) != delta
            {
                return Err(uneven(index, "gated delta net", own, delta));
            }
            let has_norms_after =
                layer.mixer_norms.is_after() || layer.feed_forward_norms.is_after();
            if self.norm != NormKind::Rms && has_norms_after {
                let expected = "Rms for norms on outputs";
                let key = format!("layer {index}'s kind of norm");
                return Err(ModelError::setting(
                    key,
                    format!("{:?}", self.norm),
                    expected,
                ));
            }
            match layer.feed_forward {
                FeedForward::None => {}
                FeedForward::Dense { width, activation } => {
                    let first = dense.unwrap_or(width);
                    if width != first {
                        return Err(uneven(index, "feed-forward size", width, first));
                    }
                    let first = self.dense_activation().unwrap_or(activation);
                    if activation.is_gated() != first.is_gated() {
                        return Err(uneven(index, "activation", activation, first));
                    }
                }
                FeedForward::Experts(own) => {
                    let first = experts.unwrap_or(own);
                    if own != first {
                        return Err(uneven(index, "experts", own, first));
                    }
                    // Both are added to the residual stream, one after the other.
                    if own.shared.is_some() && layer.feed_forward_norms != NormPlacement::Before {
                        let key = format!("layer {index}'s norms beside shared experts");
                        let found = format!("{:?}", layer.feed_forward_norms);
                        return Err(ModelError::setting(key, found, "Before"));
                    }
                }
            }
        }
        Ok(self)
    }
}

/// The error for a layer whose sizes are not those of the first layer of its kind.
fn uneven(layer: usize, what: &str, found: impl Debug, expected: impl Debug) -> ModelError {
    ModelError::setting(
        format!("layer {layer}'s {what}"),
        format!("{found:?}"),
        format!("{expected:?}, as in the layers before it"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::huggingface;
    use serde_json::json;

    #[test]
    fn layers_that_could_not_share_memory_are_refused_by_number() {
        let sparse = json!({"model_type": "qwen3_moe", "decoder_sparse_step": 2});
        let model = huggingface::read(&sparse).unwrap();
        let refused = |change: fn(&mut [LayerSpec]), parts: [&str; 2]| {
            let mut model = model.clone();
            change(&mut model.layers);
            let error = model.check_layers().unwrap_err().to_string();
            let named = parts.iter().all(|part| error.contains(part));
            assert!(named, "{parts:?} are not in: {error}");
        };
        refused(
            |layers| {
                if let Mixer::Attention(attention) = &mut layers[5].mixer {
                    attention.heads.kv_heads = 2;
                }
            },
            ["layer 5's heads", "kv_heads: 4"],
        );
        refused(
            |layers| {
                if let FeedForward::Dense { width, .. } = &mut layers[2].feed_forward {
                    *width = 64;
                }
            },
            ["layer 2's feed-forward size is 64", "6144"],
        );
        refused(
            |layers| {
                if let FeedForward::Experts(experts) = &mut layers[3].feed_forward {
                    experts.count = 7;
                }
            },
            ["layer 3's experts", "count: 128"],
        );
    }
}
