//! Everything about a model but its weights.

use super::architectures::Architecture;
use super::layer::{
    Attention, Experts, FeedForward, GatedDelta, Latent, LayerSpec, Mixer, NormKind, NormPlacement,
    PerLayerInputs, QkNormKind, Streams,
};
use super::{ModelError, RopeConfig};
use crate::device::{Device, HeadShape, StatePart};
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
    /// The inputs of single layers, if there are such inputs.
    pub per_layer_inputs: Option<PerLayerInputs>,
    /// The residual streams, if there are several.
    pub streams: Option<Streams>,
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

    /// The heads of the first layer that attends to a cache. Those of others may differ.
    #[cfg(any(test, feature = "cli", feature = "internals"))]
    pub fn heads(&self) -> HeadShape {
        let mut heads = self.layers.iter().filter_map(LayerSpec::heads);
        heads.next().unwrap_or_default()
    }

    /// The attention of the layers that have some that is not latent.
    pub fn attentions(&self) -> impl Iterator<Item = &Attention> {
        self.layers.iter().filter_map(LayerSpec::attention)
    }

    /// Where the recurrent layers keep what they know of the tokens so far on a device.
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

    /// The number of layers that keep a state.
    pub fn recurrent_layers(&self) -> usize {
        let layers = self.layers.iter();
        let states = layers.map(|layer| layer.state_elements(self.hidden));
        states.filter(|parts| *parts != [0, 0]).count()
    }

    /// The heads of the layer whose keys and values take the most room.
    pub fn cache_heads(&self) -> HeadShape {
        let heads = self.layers.iter().filter_map(LayerSpec::heads);
        let largest = heads.max_by_key(|heads| (heads.cache_elements(), heads.q_heads));
        largest.unwrap_or_default()
    }

    /// The heads of a layer with the fewest key-value heads, if they differ from
    /// [`ModelConfig::cache_heads`].
    pub fn narrow_heads(&self) -> Option<HeadShape> {
        let heads = self.layers.iter().filter_map(LayerSpec::heads);
        let narrow = heads.min_by_key(|heads| heads.kv_heads);
        narrow.filter(|narrow| *narrow != self.cache_heads())
    }

    /// The sliding window of the layers that have one.
    #[cfg(any(test, feature = "cli"))]
    pub fn window(&self) -> Option<usize> {
        let mut layers = self.layers.iter();
        layers.find_map(LayerSpec::window)
    }

    /// The latent attention of the layers that have it.
    pub fn latent(&self) -> Option<&Latent> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match &layer.mixer {
            Mixer::Latent(latent) => Some(latent),
            _ => None,
        })
    }

    /// The width of the dense feed-forward parts, if there are any.
    #[cfg(any(test, feature = "cli"))]
    pub fn dense_width(&self) -> Option<usize> {
        let mut layers = self.layers.iter();
        layers.find_map(|layer| match layer.feed_forward {
            FeedForward::Dense { width, .. } => Some(width),
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
    #[cfg(test)]
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

    /// The rank of the paths beside mixers, if there are any.
    pub fn side_rank(&self) -> Option<usize> {
        self.layers.iter().find_map(|layer| layer.side_rank)
    }

    /// The different widths of dense parts, those beside experts included, each with the number of
    /// columns before its activation.
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

    /// Checks that the layers fit together: those that share a cache, and the experts, which
    /// share the intermediates of a step.
    pub(super) fn check_layers(self) -> Result<Self, ModelError> {
        if self.layers.iter().all(|layer| layer.heads().is_none()) {
            let expected = "at least one layer with attention";
            return Err(ModelError::setting(
                "layer_types",
                "recurrent only",
                expected,
            ));
        }
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
                    // Both are added to the residual stream, one after the other.
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

    /// Checks that a path beside a mixer finds the mixer's input, and has the rank of the others,
    /// and that no single stream would have to be multiplied out of several.
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

    /// Checks that a layer that shares a cache finds one, and that norms of values are beside
    /// norms of keys.
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
