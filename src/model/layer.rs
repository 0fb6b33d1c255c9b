//! What one layer of a decoder computes.
//!
//! An architecture describes a model as a list of [`LayerSpec`]s. The decoder computes
//! them, the inventory and the random weights follow from them, and nothing else needs to
//! know which architecture they came from.

use crate::device::{Activation, HeadShape, LatentShape, QueryScale, RoutingSpec};

/// One layer: a mixer, which lets tokens see each other, and a feed-forward part, which
/// works on each token alone. The output of each is added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSpec {
    /// How tokens see each other.
    pub mixer: Mixer,
    /// Where the mixer's norms are.
    pub mixer_norms: NormPlacement,
    /// What is computed for each token alone.
    pub feed_forward: FeedForward,
    /// Where the feed-forward part's norms are.
    pub feed_forward_norms: NormPlacement,
}

/// How the tokens of a sequence see each other in a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixer {
    /// Causal softmax attention over cached keys and values.
    Attention(Attention),
    /// Causal softmax attention over a cached latent per token, which holds keys and values of all
    /// heads.
    Latent(Latent),
}

/// The latent attention of a layer. DeepSeek-AI, *DeepSeek-V2*, 2024.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latent {
    /// The sizes.
    pub shape: LatentShape,
    /// Number of elements of the queries' own latent, of which they are made; `None` if they are
    /// made of the layer's input.
    pub query_rank: Option<usize>,
    /// Factor on `q · k`.
    pub scale: f32,
    /// Index of its position embedding in [`ModelConfig::ropes`](super::ModelConfig::ropes).
    pub rope: usize,
    /// Added to the mean square in the norms of latents.
    pub norm_epsilon: f32,
    /// Whether the rotated rows are stored with the two halves that RoPE rotates interleaved.
    pub is_interleaved: bool,
}

/// The attention of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// The heads.
    pub heads: HeadShape,
    /// Factor on `q · k`.
    pub scale: f32,
    /// A token sees itself and the `window − 1` tokens before it; all when `None`.
    pub window: Option<usize>,
    /// Whether the window does not slide: a token sees those of its own chunk of that many.
    pub is_chunked: bool,
    /// Whether each head has a sink: a score that takes part in the softmax without a value.
    pub has_sinks: bool,
    /// Index of its position embedding in [`ModelConfig::ropes`](super::ModelConfig::ropes);
    /// `None` if queries and keys are not rotated.
    pub rope: Option<usize>,
    /// Factor on the queries that depends on their position, if there is one.
    pub query_scale: Option<QueryScale>,
    /// How queries and keys are normalised before RoPE, if they are.
    pub qk_norm: Option<QkNormKind>,
    /// Soft cap on the scaled scores: `s → cap · tanh(s / cap)`.
    pub softcap: Option<f32>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FeedForward {
    /// `down(activation(gate(x)) · up(x))`.
    Dense {
        /// Rows of `gate` and of `up`.
        width: usize,
        /// The non-linearity.
        activation: Activation,
    },
    /// A mixture of such parts, of which a router chooses some for each token.
    Experts(Experts),
}

/// The mixture of experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// Number of experts.
    pub count: usize,
    /// Rows of an expert's `gate` and of its `up`.
    pub width: usize,
    /// How the router chooses, and the experts' non-linearity.
    pub routing: RoutingSpec,
    /// Whether the choice of each expert is corrected by a number of its own.
    pub has_corrections: bool,
    /// Width of a dense part beside the experts, which computes every token; `None` if there is
    /// none.
    pub shared: Option<usize>,
}

/// What the norms of the residual stream compute. Those of queries and keys are RMSNorms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) · weight`.
    Rms,
    /// `(x − mean(x)) / σ(x) · weight`, without a bias.
    Layer,
}

/// Where the norms of a mixer or of a feed-forward part are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// On its input.
    Before,
    /// On its output.
    After,
    /// On both.
    BeforeAndAfter,
    /// Nowhere. A feed-forward part with this placement computes beside the mixer: it reads
    /// the mixer's normalised input, and both outputs are added to the residual stream.
    BesideMixer,
}

/// How queries and keys are normalised before RoPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormKind {
    /// Each head on its own.
    PerHead,
    /// Each head on its own, with weights of 1 that are not stored.
    PerHeadUnweighted,
    /// All heads of a row together.
    WholeRow,
}

impl LayerSpec {
    /// The same layer, with queries and keys normalised in this way.
    pub(super) fn with_qk_norm(self, kind: QkNormKind) -> Self {
        let mixer = match self.mixer {
            Mixer::Attention(attention) => Mixer::Attention(Attention {
                qk_norm: Some(kind),
                ..attention
            }),
            other => other,
        };
        Self { mixer, ..self }
    }

    /// The layer's attention, unless it is latent.
    pub fn attention(&self) -> Option<&Attention> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention),
            Mixer::Latent(_) => None,
        }
    }

    /// The heads of what attends to the layer's cache.
    pub fn heads(&self) -> HeadShape {
        match &self.mixer {
            Mixer::Attention(attention) => attention.heads,
            Mixer::Latent(latent) => latent.shape.heads(),
        }
    }

    /// The layer's sliding window, if it has one.
    pub fn window(&self) -> Option<usize> {
        self.attention()?.window
    }
}

impl Attention {
    /// Lengths of the stored weights of the query norm and of the key norm, if there are some.
    pub fn qk_norm_lengths(&self) -> Option<(usize, usize)> {
        let heads = self.heads;
        Some(match self.qk_norm? {
            QkNormKind::PerHead => (heads.head_dim, heads.head_dim),
            QkNormKind::PerHeadUnweighted => return None,
            QkNormKind::WholeRow => (heads.q_columns(), heads.kv_heads * heads.head_dim),
        })
    }
}

impl NormPlacement {
    /// Whether there is a norm on the input.
    pub fn is_before(self) -> bool {
        matches!(self, Self::Before | Self::BeforeAndAfter)
    }

    /// Whether the input is the residual stream itself.
    pub fn reads_residual(self) -> bool {
        self == Self::After
    }

    /// Whether there is a norm on the output.
    pub fn is_after(self) -> bool {
        matches!(self, Self::After | Self::BeforeAndAfter)
    }
}
