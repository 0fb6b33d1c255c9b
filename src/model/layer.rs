//! What one layer of a decoder computes.
//!
//! An architecture describes a model as a list of [`LayerSpec`]s. The decoder computes
//! them, the inventory and the random weights follow from them, and nothing else needs to
//! know which architecture they came from.

use crate::device::{
    Activation, DeltaHeads, Device, HeadShape, LatentShape, Mamba2Spec, QueryScale, RoutingSpec,
};

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
    /// Whether the residual stream is multiplied by a stored factor after the layer.
    pub has_scale: bool,
    /// Rank of a learned path beside the mixer (LAuReL, Gemma 3n): a product of two matrices with
    /// the mixer's input, which is normalised and added, as is the input, to the residual stream
    /// after the mixer. The sum is divided by the root of 2.
    pub side_rank: Option<usize>,
}

/// How the tokens of a sequence see each other in a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixer {
    /// Causal softmax attention over cached keys and values.
    Attention(Attention),
    /// Causal softmax attention over a cached latent per token, which holds keys and values of all
    /// heads.
    Latent(Latent),
    /// A gated convolution over the last few tokens.
    ShortConv(ShortConv),
    /// A Mamba-2 recurrence.
    Mamba2(Mamba2),
    /// The gated delta rule: linear attention with a state of one matrix per head.
    GatedDelta(GatedDelta),
    /// They do not: the layer is only a feed-forward part. Its mixer's norms are nowhere.
    None,
}

/// The gated convolution of a layer (LFM2): each channel of the residual stream on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortConv {
    /// Number of tokens that take part in a result, its own included.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub has_bias: bool,
}

/// The Mamba-2 recurrence of a layer: a projection, a convolution with SiLU, the recurrence, and
/// a gated norm in as many groups as the recurrence has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mamba2 {
    /// The dimensions of the recurrence.
    pub recurrence: Mamba2Spec,
    /// Number of tokens that take part in a result of the convolution, its own included.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub has_conv_bias: bool,
    /// Added to the mean square in the gated norm.
    pub norm_epsilon: f32,
}

/// The gated delta net of a layer (Qwen 3 Next): queries, keys and values go through a convolution
/// over the last few tokens and SiLU, and the results of each head through a gated RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedDelta {
    /// The heads.
    pub heads: DeltaHeads,
    /// Number of tokens that take part in a result of the convolution, its own included.
    pub taps: usize,
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
    /// Whether the output is multiplied by the sigmoid of a gate, which is projected from the
    /// input beside the queries.
    pub has_gate: bool,
    /// Whether values are normalised, each head on its own and without weights. There is then a
    /// norm on queries and keys as well.
    pub normalizes_values: bool,
    /// Whether values are what the key projection gives, before norms and RoPE.
    pub keys_are_values: bool,
    /// Index of an earlier layer whose keys and values it attends to; it then has no projections
    /// for keys and values of its own.
    pub shares: Option<usize>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FeedForward {
    /// `down(activation(gate(x)) · up(x))`, or `down(activation(up(x)))` if the activation has no
    /// gate.
    Dense {
        /// Rows of `gate` and of `up`.
        width: usize,
        /// The non-linearity.
        activation: Activation,
        /// Gates less than this many deviations above their mean become 0, and the others are
        /// what they exceed it by; `None` if gates are left as they are.
        cut: Option<f32>,
    },
    /// A mixture of such parts, of which a router chooses some for each token.
    Experts(Experts),
    /// Nothing: the layer is only a mixer. The norms of its feed-forward part are nowhere.
    None,
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
    /// Whether the output of the dense part is multiplied by the sigmoid of a number that is
    /// projected from the input.
    pub has_shared_gate: bool,
    /// Whether the experts and the dense part beside them have norms of their own (Gemma 4): on
    /// the inputs of the router and of the experts, which are the residual stream, and on the
    /// outputs of the experts and of the dense part. Each expert then has a factor on its output.
    pub has_own_norms: bool,
}

/// Several residual streams, of which the layers compute one (AltUp, Gemma 3n).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streams {
    /// Number of streams.
    pub count: usize,
    /// Index of the stream that the layers compute.
    pub active: usize,
    /// Whether stored factors multiply that stream where it gates a layer's own input.
    pub scales_output: bool,
}

/// An input of each layer that depends on the token and on its embedding only (Gemma 3n).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerLayerInputs {
    /// Width of the input of one layer.
    pub width: usize,
    /// Tokens that have an embedding for it. Others have that of token 0.
    pub vocabulary: usize,
    /// The non-linearity of the gate through which it comes in.
    pub activation: Activation,
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
    /// Nowhere. A feed-forward part with this placement computes beside the mixer, if there are
    /// both: it reads the mixer's normalised input, and both outputs are added to the residual
    /// stream.
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

    /// The layer's attention, if it has some that is not latent.
    pub fn attention(&self) -> Option<&Attention> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention),
            _ => None,
        }
    }

    /// The heads of what attends to the layer's cache, if it has one.
    pub fn heads(&self) -> Option<HeadShape> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention.heads),
            Mixer::Latent(latent) => Some(latent.shape.heads()),
            _ => None,
        }
    }

    /// The layer's sliding window, if it has one.
    pub fn window(&self) -> Option<usize> {
        self.attention()?.window
    }

    /// Numbers of elements of the mixer's state: those of its convolution, and those of its
    /// recurrence. Both are 0 for attention, which keeps keys and values. `hidden` is the width of
    /// the residual stream.
    pub fn state_elements(&self, hidden: usize) -> [usize; 2] {
        match self.mixer {
            Mixer::Attention(_) | Mixer::Latent(_) | Mixer::None => [0, 0],
            Mixer::ShortConv(ShortConv { taps, .. }) => [hidden * taps.saturating_sub(1), 0],
            Mixer::Mamba2(Mamba2 {
                recurrence, taps, ..
            }) => {
                let convolution = recurrence.channels() * taps.saturating_sub(1);
                [convolution, recurrence.state_elements()]
            }
            Mixer::GatedDelta(GatedDelta { heads, taps }) => [
                heads.qkv_columns() * taps.saturating_sub(1),
                heads.state_elements(),
            ],
        }
    }

    /// Numbers of elements that a device keeps of all tokens so far: at least those of the state.
    pub fn kept_elements<D: Device>(&self, hidden: usize, device: &D) -> [usize; 2] {
        let [convolution, state] = self.state_elements(hidden);
        let recurrence = match &self.mixer {
            Mixer::GatedDelta(GatedDelta { heads, .. }) => device.delta_elements(heads),
            Mixer::Mamba2(Mamba2 { recurrence, .. }) => device.mamba2_elements(recurrence),
            _ => state,
        };
        [convolution, recurrence]
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

    /// Columns of the result of its first projection: queries, and keys and values of its own.
    pub fn projected_columns(&self) -> usize {
        match self.shares {
            Some(_) => self.heads.q_columns(),
            None => self.heads.qkv_columns(),
        }
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
