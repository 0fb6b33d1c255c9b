//! What one layer of a decoder computes.
//!
//! An architecture describes a model as a list of [`LayerSpec`]s. The decoder computes them, and
//! the inventory and the random weights are derived from them. Nothing else needs to know which
//! architecture they came from.

use crate::device::{
    Activation, DeltaHeads, Device, HeadShape, LatentShape, Mamba2Spec, QueryScale, RoutingSpec,
};

/// One layer: a mixer, which combines information across tokens, and a feed-forward part, which
/// processes each token on its own. The output of each is added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSpec {
    /// The part that combines information across tokens.
    pub mixer: Mixer,
    /// Where the mixer's norms are.
    pub mixer_norms: NormPlacement,
    /// The part that processes each token on its own.
    pub feed_forward: FeedForward,
    /// Where the feed-forward part's norms are.
    pub feed_forward_norms: NormPlacement,
    /// Whether the residual stream is multiplied by a stored factor after the layer.
    pub has_scale: bool,
    /// Rank of a learned path beside the mixer (LAuReL, Gemma 3n), if there is one. The path
    /// multiplies the mixer's input by two matrices and normalises the result. After the mixer, the
    /// result and the mixer's input are added to the residual stream, and the sum is divided by √2.
    pub side_rank: Option<usize>,
}

/// The part of a layer that combines information across the tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention over cached keys and values.
    Attention(Attention),
    /// Causal softmax attention over one cached latent per token, from which the keys and values of
    /// all heads are projected.
    Latent(Latent),
    /// A gated convolution over the last few tokens.
    ShortConv(ShortConv),
    /// A Mamba-2 recurrence.
    Mamba2(Mamba2),
    /// The gated delta rule: linear attention with a state of one matrix per head.
    GatedDelta(GatedDelta),
    /// No mixer: the layer consists of a feed-forward part only. `mixer_norms` is
    /// [`NormPlacement::BesideMixer`], which has no norms.
    None,
}

/// The gated depthwise convolution of a layer (LFM2). It has as many channels as the residual
/// stream has columns.
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
    /// Dimensions of the recurrence.
    pub recurrence: Mamba2Spec,
    /// Number of tokens that take part in a result of the convolution, its own included.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub has_conv_bias: bool,
    /// Value added to the mean square in the gated norm.
    pub norm_epsilon: f32,
}

/// The gated delta net of a layer (Qwen 3 Next): queries, keys and values go through a convolution
/// over the last few tokens and SiLU, and the results of each head through a gated RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedDelta {
    /// Head counts and head sizes.
    pub heads: DeltaHeads,
    /// Number of tokens that take part in a result of the convolution, its own included.
    pub taps: usize,
}

/// The latent attention of a layer. DeepSeek-AI, *DeepSeek-V2*, 2024.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latent {
    /// Sizes of the heads and of the latent.
    pub shape: LatentShape,
    /// Number of elements of the latent from which the queries are projected; `None` if they are
    /// projected from the layer's input.
    pub query_rank: Option<usize>,
    /// Factor on `q · k`.
    pub scale: f32,
    /// Index of the position embedding in [`ModelConfig::ropes`](super::ModelConfig::ropes).
    pub rope: usize,
    /// Value added to the mean square in the norms of latents.
    pub norm_epsilon: f32,
    /// Whether files store the two halves that RoPE rotates interleaved.
    pub is_interleaved: bool,
}

/// The attention of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Head counts and head size.
    pub heads: HeadShape,
    /// Factor on `q · k`.
    pub scale: f32,
    /// Sliding window: a token attends to itself and to the `window − 1` tokens before it. `None`
    /// means all tokens before it.
    pub window: Option<usize>,
    /// Whether the window does not slide: the sequence is cut into chunks of `window` tokens, and a
    /// token attends to those of its own chunk.
    pub is_chunked: bool,
    /// Whether a token attends to no token after it. In an encoder, it attends to all tokens of its
    /// text, or with a window to the nearest ones on both sides.
    pub is_causal: bool,
    /// Whether each head has an attention sink: a score that takes part in the softmax without a
    /// value.
    pub has_sinks: bool,
    /// Index of the position embedding in [`ModelConfig::ropes`](super::ModelConfig::ropes);
    /// `None` if queries and keys are not rotated.
    pub rope: Option<usize>,
    /// Factor on the queries that depends on their position, if there is one.
    pub query_scale: Option<QueryScale>,
    /// How queries and keys are normalised before RoPE, if they are.
    pub qk_norm: Option<QkNormKind>,
    /// Soft cap on the scaled scores: `s → cap · tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// Whether the output is multiplied by the sigmoid of a gate, which is projected from the
    /// layer's input.
    pub has_gate: bool,
    /// Whether values are normalised, each head on its own and without weights. `qk_norm` is then
    /// [`QkNormKind::PerHead`].
    pub normalizes_values: bool,
    /// Whether the values are the output of the key projection, before norms and RoPE.
    pub keys_are_values: bool,
    /// Index of the earlier layer whose keys and values this layer attends to, if it has none of
    /// its own. It then has no key and value projections.
    pub shares: Option<usize>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FeedForward {
    /// `down(activation(gate(x)) · up(x))`, or `down(activation(up(x)))` if the activation has no
    /// gate.
    Dense {
        /// Number of rows of `gate` and of `up`.
        width: usize,
        /// The non-linearity.
        activation: Activation,
        /// Threshold of sparse gates, in standard deviations:
        /// `gate → max(0, gate − mean(gate) − cut · σ(gate))`, before the activation. `None` leaves
        /// gates as they are.
        cut: Option<f32>,
    },
    /// A mixture of experts: dense parts of which a router chooses some for each token.
    Experts(Experts),
    /// No feed-forward part: the layer consists of a mixer only. `feed_forward_norms` is
    /// [`NormPlacement::BesideMixer`], which has no norms.
    None,
}

/// The mixture of experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// Number of experts.
    pub count: usize,
    /// Number of rows of an expert's `gate` and of its `up`.
    pub width: usize,
    /// How the router chooses and weights experts, and their non-linearity.
    pub routing: RoutingSpec,
    /// Whether each expert has a correction that is added to its weight when experts are chosen.
    pub has_corrections: bool,
    /// Width of the dense part beside the experts (shared experts), which is computed for every
    /// token; `None` if there is none.
    pub shared: Option<usize>,
    /// Whether the output of the dense part is multiplied by the sigmoid of a gate, one number per
    /// token that is projected from the input.
    pub has_shared_gate: bool,
    /// Whether the experts and the dense part beside them have norms of their own (Gemma 4): on
    /// the inputs of the router and of the experts, which are the residual stream, and on the
    /// outputs of the experts and of the dense part. Each expert then has a factor on its output.
    pub has_own_norms: bool,
}

/// Several residual streams, of which layers update one directly (AltUp, Gemma 3n).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streams {
    /// Number of streams.
    pub count: usize,
    /// Index of the stream that layers update directly.
    pub active: usize,
    /// Whether the active stream is multiplied by stored factors before it gates the per-layer
    /// input.
    pub scales_output: bool,
}

/// Per-layer inputs: an input of each layer that depends only on the token and on its embedding
/// (Gemma 3n, Gemma 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerLayerInputs {
    /// Width of one layer's input.
    pub width: usize,
    /// Number of tokens with an embedding for per-layer inputs. Other tokens use that of token 0.
    pub vocabulary: usize,
    /// The non-linearity of the gate through which the input is added.
    pub activation: Activation,
}

/// What the norms of the residual stream compute. Norms of queries and keys are always RMSNorms.
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
    /// On its input and on its output.
    BeforeAndAfter,
    /// No norms. If a layer has a mixer and a feed-forward part with this placement, the two run in
    /// parallel: the feed-forward part reads the mixer's normalised input, and both outputs are
    /// added to the residual stream.
    BesideMixer,
    /// A layer norm with a bias on the sum of the residual stream and the output, which it replaces.
    /// Vaswani et al., *Attention Is All You Need*, 2017.
    OnSum,
}

/// How queries and keys are normalised before RoPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormKind {
    /// Each head on its own.
    PerHead,
    /// Each head on its own, with weights of 1 that are not stored.
    PerHeadUnweighted,
    /// All heads of a token together.
    WholeRow,
}

impl LayerSpec {
    /// Returns the same layer with queries and keys normalised in this way. A layer without
    /// [`Mixer::Attention`] is unchanged.
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

    /// Returns the layer's attention, unless its mixer is another one, such as latent attention.
    pub fn attention(&self) -> Option<&Attention> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention),
            _ => None,
        }
    }

    /// Returns the heads of the layer's attention, if it has any. For latent attention, they are
    /// those of the attention over latents.
    pub fn heads(&self) -> Option<HeadShape> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention.heads),
            Mixer::Latent(latent) => Some(latent.shape.heads()),
            _ => None,
        }
    }

    /// Returns the layer's sliding window, if it has one.
    pub fn window(&self) -> Option<usize> {
        self.attention()?.window
    }

    /// Returns the numbers of elements in the state of the mixer's convolution and of its
    /// recurrence. Both are 0 for attention, which keeps keys and values instead. `hidden` is the
    /// width of the residual stream.
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

    /// Returns the numbers of elements that `device` stores for the convolution and for the
    /// recurrence. A device may store more than the state itself.
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
    /// Returns the lengths of the stored weights of the query norm and of the key norm, or `None`
    /// if no weights are stored.
    pub fn qk_norm_lengths(&self) -> Option<(usize, usize)> {
        let heads = self.heads;
        Some(match self.qk_norm? {
            QkNormKind::PerHead => (heads.head_dim, heads.head_dim),
            QkNormKind::PerHeadUnweighted => return None,
            QkNormKind::WholeRow => (heads.q_columns(), heads.kv_heads * heads.head_dim),
        })
    }

    /// Returns the number of columns of the projected queries, together with those of the keys and
    /// values unless the layer shares them.
    pub fn projected_columns(&self) -> usize {
        match self.shares {
            Some(_) => self.heads.q_columns(),
            None => self.heads.qkv_columns(),
        }
    }
}

impl NormPlacement {
    /// Returns whether there is a norm on the input.
    pub fn is_before(self) -> bool {
        matches!(self, Self::Before | Self::BeforeAndAfter)
    }

    /// Returns whether the input is the residual stream itself.
    pub fn reads_residual(self) -> bool {
        self == Self::After
    }

    /// Returns whether there is a norm on the output.
    pub fn is_after(self) -> bool {
        matches!(self, Self::After | Self::BeforeAndAfter)
    }
}
