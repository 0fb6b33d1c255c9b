//! A model's configuration: everything about it but its weights.

use super::architectures::Architecture;
use super::layer::{
    Attention, Experts, FeedForward, GatedDelta, Latent, LayerSpec, Mixer, NormKind, NormPlacement,
    PerLayerInputs, QkNormKind, Streams,
};
use super::{LearnedPositions, ModelError, RopeConfig};
use crate::device::{Device, HeadShape, StatePart};
use std::fmt::Debug;

/// Which projections have a bias. `None` leaves it to the file: a projection has a bias if the file
/// holds one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: Option<bool>,
    /// Output projections of attention.
    pub attention_out: Option<bool>,
    /// Projections of feed-forward parts, including routers and experts.
    pub feed_forward: Option<bool>,
    /// Projections of recurrent mixers.
    pub recurrent: Option<bool>,
}

impl Biases {
    /// The file decides for every projection, since GGUF metadata does not say.
    pub const AS_STORED: Self = Self {
        qkv: None,
        attention_out: None,
        feed_forward: None,
        recurrent: None,
    };

    /// No projection has a bias.
    pub const NONE: Self = Self {
        qkv: Some(false),
        attention_out: Some(false),
        feed_forward: Some(false),
        recurrent: Some(false),
    };
}

/// Configuration of a model: its layers, and what belongs to no layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture that its files name.
    pub architecture: &'static Architecture,
    /// What each layer computes; never empty.
    pub layers: Vec<LayerSpec>,
    /// The position embeddings, which layers refer to by index. The first one belongs to the
    /// layers with full attention.
    pub ropes: Vec<RopeConfig>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence that the model supports, in tokens.
    pub context: usize,
    /// Factor applied to the token embeddings.
    pub embedding_scale: f32,
    /// What the norms of the residual stream compute.
    pub norm: NormKind,
    /// Value added to the mean square, or to the variance, in norms.
    pub norm_epsilon: f32,
    /// Factor applied to logits.
    pub logit_scale: f32,
    /// Soft cap on logits: `x → cap · tanh(x / cap)`.
    pub logit_softcap: Option<f32>,
    /// Per-layer inputs, if the model has them.
    pub per_layer_inputs: Option<PerLayerInputs>,
    /// The residual streams, if there is more than one.
    pub streams: Option<Streams>,
    /// Learned embeddings of positions and segments, if the model has them.
    pub learned_positions: Option<LearnedPositions>,
    /// Which projections have a bias.
    pub biases: Biases,
    /// Number of multi-token prediction layers that files hold after these. They are not computed.
    pub prediction_layers: usize,
    /// IDs of the tokens that end a sequence, according to the model's settings. May be empty.
    pub end_tokens: Vec<u32>,
}

/// Layout of the recurrent state of one sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateLayout {
    /// Number of float32 elements in the state, all layers together; 0 if no layer is recurrent.
    pub elements: usize,
    /// Parts of each layer: one for its convolution, and one for its recurrence. A part is empty
    /// if the layer does not need it.
    pub layers: Vec<[StatePart; 2]>,
}

impl ModelConfig {
    /// Returns the default maximum sequence length in tokens; settings may raise it up to
    /// [`ModelConfig::context`]. It is shorter than that for models with LongRoPE: with a larger
    /// maximum, other factors apply to short sequences as well, since cached keys are already
    /// rotated.
    pub fn native_context(&self) -> usize {
        self.ropes[0].native_context(self.context)
    }

    /// Returns the heads of the first layer with attention. Those of other layers may differ.
    #[cfg(any(test, feature = "cli", feature = "internals"))]
    pub fn heads(&self) -> HeadShape {
        let mut heads = self.layers.iter().filter_map(LayerSpec::heads);
        heads.next().unwrap_or_default()
    }

    /// Returns the attention of each layer whose mixer is attention, except for latent attention.
    pub fn attentions(&self) -> impl Iterator<Item = &Attention> {
        self.layers.iter().filter_map(LayerSpec::attention)
    }

    /// Returns the layout of a sequence's recurrent state on a device.
    pub fn states<D: Device>(&self, device: &D) -> StateLayout {
        let mut layout = StateLayout::default();
        for layer in &self.layers {
            let parts = layer.kept_elements(self.hidden, device).map(|elements| {
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

    /// Returns whether tokens attend only to tokens before them. Otherwise, the model is an encoder,
    /// which computes all tokens of a text in one step and generates nothing.
    pub fn is_causal(&self) -> bool {
        self.attentions().all(|attention| attention.is_causal)
    }

    /// Returns whether there is a norm after the last layer.
    pub(super) fn has_final_norm(&self) -> bool {
        let last = self.layers.last();
        last.is_none_or(|layer| layer.feed_forward_norms != NormPlacement::OnSum)
    }

    /// Returns the number of layers that keep a recurrent state.
    pub fn recurrent_layers(&self) -> usize {
        let layers = self.layers.iter();
        let states = layers.map(|layer| layer.state_elements(self.hidden));
        states.filter(|parts| *parts != [0, 0]).count()
    }

    /// Returns the heads of the layer whose keys and values take the most KV cache memory.
    pub fn cache_heads(&self) -> HeadShape {
        let heads = self.layers.iter().filter_map(LayerSpec::heads);
        let largest = heads.max_by_key(|heads| (heads.cache_elements(), heads.q_heads));
        largest.unwrap_or_default()
    }

    /// Returns the heads of a layer with the fewest key-value heads, if they differ from
    /// [`ModelConfig::cache_heads`].
    pub fn narrow_heads(&self) -> Option<HeadShape> {
        let heads = self.layers.iter().filter_map(LayerSpec::heads);
        let narrow = heads.min_by_key(|heads| heads.kv_heads);
        narrow.filter(|narrow| *narrow != self.cache_heads())
    }

    /// Returns the sliding window of the first layer that has one.
    #[cfg(any(test, feature = "cli"))]
    pub fn window(&self) -> Option<usize> {
        let mut layers = self.layers.iter();
        layers.find_map(LayerSpec::window)
    }

    /// Returns the latent attention of the layers that have it.
    pub fn latent(&self) -> Option<&Latent> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match &layer.mixer {
            Mixer::Latent(latent) => Some(latent),
            _ => None,
        })
    }

    /// Returns the width of the first dense feed-forward part, if there is one.
    #[cfg(any(test, feature = "cli"))]
    pub fn dense_width(&self) -> Option<usize> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match layer.feed_forward {
            FeedForward::Dense { width, .. } => Some(width),
            FeedForward::Experts(_) | FeedForward::None => None,
        })
    }

    /// Returns the mixture of experts of the layers that have one.
    pub fn experts(&self) -> Option<Experts> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match layer.feed_forward {
            FeedForward::Dense { .. } | FeedForward::None => None,
            FeedForward::Experts(experts) => Some(experts),
        })
    }

    /// Returns the width of the dense parts beside the experts, if there are any.
    #[cfg(test)]
    pub fn shared_width(&self) -> Option<usize> {
        self.experts()?.shared
    }

    /// Returns the gated delta net of the layers that have one.
    pub fn gated_delta(&self) -> Option<GatedDelta> {
        self.layers.iter().find_map(|layer| match layer.mixer {
            Mixer::GatedDelta(delta) => Some(delta),
            _ => None,
        })
    }

    /// Returns the rank of the paths beside mixers, if there are any.
    pub fn side_rank(&self) -> Option<usize> {
        self.layers.iter().find_map(|layer| layer.side_rank)
    }

    /// Returns each distinct width of the dense parts, including those beside experts, together
    /// with the number of columns of `[gate | up]`.
    pub fn dense_widths(&self) -> Vec<[usize; 2]> {
        let mut widths = Vec::new();
        for layer in &self.layers {
            let dense = match layer.feed_forward {
                FeedForward::Dense {
                    width, activation, ..
                } => Some((width, activation)),
                FeedForward::Experts(experts) => experts
                    .shared
                    .map(|width| (width, experts.routing.activation)),
                FeedForward::None => None,
            };
            let columns = dense.map(|(width, own)| [width, own.gate_up_columns(width)]);
            widths.extend(columns.filter(|columns| !widths.contains(columns)));
        }
        widths
    }

    /// Checks that the layers fit together: that a shared cache matches, and that layers of the
    /// same kind have the same sizes, since they share the activations of a step.
    pub(super) fn check_layers(self) -> Result<Self, ModelError> {
        let (experts, delta) = (self.experts(), self.gated_delta());
        for (index, layer) in self.layers.iter().enumerate() {
            self.check_attention(index)?;
            self.check_side_path(index)?;
            if let Mixer::GatedDelta(own) = layer.mixer
                && Some(own) != delta
            {
                return Err(uneven(index, "gated delta net", own, delta));
            }
            if let Mixer::Latent(latent) = layer.mixer
                && let Some(first) = self.latent()
                && latent != *first
            {
                return Err(uneven(index, "latent attention", latent, first));
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
                FeedForward::None | FeedForward::Dense { .. } => {}
                FeedForward::Experts(own) => {
                    let first = experts.unwrap_or(own);
                    if own != first {
                        return Err(uneven(index, "experts", own, first));
                    }
                    // The outputs of the experts and of the dense part are added to the residual
                    // stream one after the other, so no norm can apply to their sum.
                    let adds_both = own.shared.is_some() && !own.has_own_norms;
                    if adds_both && layer.feed_forward_norms != NormPlacement::Before {
                        let key = format!("layer {index}'s norms beside shared experts");
                        let found = format!("{:?}", layer.feed_forward_norms);
                        return Err(ModelError::setting(key, found, "Before"));
                    }
                }
            }
        }
        Ok(self)
    }

    /// Checks that a path beside a mixer can read the mixer's normalised input and has the same
    /// rank as in other layers, and that no layer of a model with several residual streams has a
    /// factor, since it would apply to only one of them.
    fn check_side_path(&self, index: usize) -> Result<(), ModelError> {
        let layer = &self.layers[index];
        if layer.has_scale && self.streams.is_some() {
            let key = format!("layer {index}'s factor beside several streams");
            return Err(ModelError::setting(key, "there", "none"));
        }
        if layer.side_rank.is_none() {
            return Ok(());
        }
        let (own, first) = (layer.side_rank, self.side_rank());
        if own != first {
            return Err(uneven(index, "rank of the path beside", own, first));
        }
        if layer.mixer_norms != NormPlacement::BeforeAndAfter {
            let key = format!("layer {index}'s norms beside a path");
            let found = format!("{:?}", layer.mixer_norms);
            return Err(ModelError::setting(key, found, "BeforeAndAfter"));
        }
        Ok(())
    }

    /// Checks that a layer can share the cache of the layer that it names, and that values are
    /// normalised only if queries and keys are. A layer that shares a cache cannot normalise whole
    /// rows.
    fn check_attention(&self, index: usize) -> Result<(), ModelError> {
        let Some(own) = self.layers[index].attention() else {
            return Ok(());
        };
        if own.normalizes_values && own.qk_norm != Some(QkNormKind::PerHead) {
            let key = format!("layer {index}'s norm of queries and keys");
            let found = format!("{:?}", own.qk_norm);
            return Err(ModelError::setting(
                key,
                found,
                "PerHead beside a norm of values",
            ));
        }
        let Some(owner) = own.shares else {
            return Ok(());
        };
        let earlier = &self.layers[..index];
        let other = earlier.get(owner).and_then(LayerSpec::attention);
        let kv = |heads: HeadShape| (heads.kv_heads, heads.head_dim);
        let fits = other.is_some_and(|other| {
            let alike = kv(other.heads) == kv(own.heads) && other.window == own.window;
            alike && other.shares.is_none() && other.is_chunked == own.is_chunked
        });
        if fits && own.qk_norm != Some(QkNormKind::WholeRow) {
            return Ok(());
        }
        let expected = "an earlier layer with the same heads and window and a cache of its own";
        let key = format!("layer {index}'s cache");
        Err(ModelError::setting(
            key,
            format!("that of layer {owner}"),
            expected,
        ))
    }
}

/// Returns the error for a layer whose sizes differ from those of the first layer of its kind.
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
    fn layers_that_do_not_fit_together_are_refused_by_number() {
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
                    attention.shares = Some(4);
                }
            },
            ["layer 5's cache is that of layer 4", "the same heads"],
        );
        refused(
            |layers| {
                if let Mixer::Attention(attention) = &mut layers[5].mixer {
                    attention.shares = Some(5);
                }
            },
            ["layer 5's cache", "an earlier layer"],
        );
        refused(
            |layers| {
                if let Mixer::Attention(attention) = &mut layers[1].mixer {
                    (attention.normalizes_values, attention.qk_norm) = (true, None);
                }
            },
            ["layer 1's norm of queries and keys", "PerHead"],
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
