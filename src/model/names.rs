//! The names of tensors, as most architectures have them.

use crate::device::Activation;

/// A tensor of a layer, by its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    AttentionNorm,
    Query,
    Key,
    Value,
    FusedQkv,
    AttentionOut,
    QueryNorm,
    KeyNorm,
    PostAttentionNorm,
    FeedForwardNorm,
    Gate,
    Up,
    FusedGateUp,
    Down,
    PostFeedForwardNorm,
    Router,
    ExpertGate(usize),
    ExpertUp(usize),
    ExpertDown(usize),
    /// What is added to the experts' weights to choose.
    Corrections,
    SharedGate,
    SharedUp,
    FusedSharedGateUp,
    SharedDown,
    /// The projection to the gate of the dense part beside the experts.
    SharedGateOut,
    /// The sinks of the attention's heads.
    Sinks,
    /// The projection before a convolution.
    ConvInput,
    /// The weights of a convolution.
    Convolution,
    /// The projection after a convolution.
    ConvOutput,
    /// Queries, keys and values of a gated delta net.
    DeltaQkv,
    /// The gate of the outputs of a gated delta net.
    DeltaGate,
    /// What the strengths of the updates of a gated delta net come from.
    DeltaBeta,
    /// What the decays of a gated delta net come from.
    DeltaAlpha,
    /// Both of these, with rows that are grouped by head of keys.
    DeltaFusedBetaAlpha,
    /// The projection before a recurrence. That of a gated delta net stands for `DeltaQkv` and
    /// `DeltaGate`, and its rows are grouped by head of keys.
    RecurrentInput,
    /// The logarithms of the rates at which a state decays, or in GGUF files the negated rates.
    DecayRates,
    /// What is added to the lengths of a recurrence's steps.
    StepBiases,
    /// Factors on the inputs that bypass a state.
    Skips,
    /// The norm after a recurrence.
    RecurrentNorm,
    /// The projection after a recurrence.
    RecurrentOutput,
}

/// The parts that may hold the gate and the up projection of a feed-forward part.
#[derive(Clone, Copy, Debug)]
pub(super) struct GateUp {
    pub(super) gate: Part,
    pub(super) up: Part,
    /// Both in one tensor.
    pub(super) fused: Part,
}

impl GateUp {
    /// Those of a dense feed-forward part.
    pub(super) const DENSE: Self = Self {
        gate: Part::Gate,
        up: Part::Up,
        fused: Part::FusedGateUp,
    };

    /// Those of a dense part beside experts.
    pub(super) const SHARED: Self = Self {
        gate: Part::SharedGate,
        up: Part::SharedUp,
        fused: Part::FusedSharedGateUp,
    };

    /// Returns the parts that there are, with their rows, for an activation of `width` results.
    pub(super) fn parts(
        self,
        activation: Activation,
        width: usize,
        are_fused: bool,
    ) -> Vec<(Part, usize)> {
        match (activation.is_gated(), are_fused) {
            (false, _) => vec![(self.up, width)],
            (true, true) => vec![(self.fused, 2 * width)],
            (true, false) => vec![(self.gate, width), (self.up, width)],
        }
    }
}

/// What follows the name of a part in a GGUF file.
pub(super) fn gguf_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections | Part::StepBiases => ".bias",
        Part::DecayRates | Part::Skips => "",
        _ => ".weight",
    }
}

/// What follows the name of a part in a Hugging Face checkpoint.
pub(super) fn huggingface_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections | Part::Sinks => "",
        Part::DecayRates | Part::StepBiases | Part::Skips => "",
        _ => ".weight",
    }
}

/// The name of a part in a GGUF file, between `blk.N.` and its suffix.
pub(super) fn gguf(part: Part) -> String {
    let name = match part {
        Part::AttentionNorm => "attn_norm",
        Part::Query => "attn_q",
        Part::Key => "attn_k",
        Part::Value => "attn_v",
        Part::FusedQkv => "attn_qkv",
        Part::AttentionOut => "attn_output",
        Part::QueryNorm => "attn_q_norm",
        Part::KeyNorm => "attn_k_norm",
        Part::PostAttentionNorm => "post_attention_norm",
        Part::FeedForwardNorm => "ffn_norm",
        Part::Gate => "ffn_gate",
        // Converters name the fused tensor after its second half.
        Part::Up | Part::FusedGateUp => "ffn_up",
        Part::Down => "ffn_down",
        Part::PostFeedForwardNorm => "post_ffw_norm",
        Part::Router => "ffn_gate_inp",
        Part::ExpertGate(expert) => return format!("ffn_gate.{expert}"),
        Part::ExpertUp(expert) => return format!("ffn_up.{expert}"),
        Part::ExpertDown(expert) => return format!("ffn_down.{expert}"),
        Part::Corrections => "exp_probs_b",
        Part::SharedGate => "ffn_gate_shexp",
        Part::SharedUp | Part::FusedSharedGateUp => "ffn_up_shexp",
        Part::SharedDown => "ffn_down_shexp",
        Part::SharedGateOut => "ffn_gate_inp_shexp",
        Part::Sinks => "attn_sinks",
        Part::ConvInput => "shortconv.in_proj",
        Part::Convolution => "shortconv.conv",
        Part::ConvOutput => "shortconv.out_proj",
        Part::DeltaQkv => "attn_qkv",
        Part::DeltaGate => "attn_gate",
        Part::DeltaBeta => "ssm_beta",
        Part::DeltaAlpha => "ssm_alpha",
        Part::DeltaFusedBetaAlpha => "ssm_ba",
        Part::RecurrentInput => "ssm_in",
        Part::DecayRates => "ssm_a",
        Part::StepBiases => "ssm_dt",
        Part::Skips => "ssm_d",
        Part::RecurrentNorm => "ssm_norm",
        Part::RecurrentOutput => "ssm_out",
    };
    name.to_owned()
}

/// The name of the tensor in which a GGUF file stacks a part of all experts of a layer,
/// between `blk.N.` and `.weight`.
pub(super) fn gguf_stacked(part: Part) -> Option<&'static str> {
    match part {
        Part::ExpertGate(_) => Some("ffn_gate_exps"),
        Part::ExpertUp(_) => Some("ffn_up_exps"),
        Part::ExpertDown(_) => Some("ffn_down_exps"),
        _ => None,
    }
}

/// The name of a part in a Hugging Face checkpoint, between `layers.N.` and its
/// suffix.
pub(super) fn huggingface(part: Part) -> String {
    let name = match part {
        Part::AttentionNorm => "input_layernorm",
        Part::Query => "self_attn.q_proj",
        Part::Key => "self_attn.k_proj",
        Part::Value => "self_attn.v_proj",
        Part::FusedQkv => "self_attn.qkv_proj",
        Part::AttentionOut => "self_attn.o_proj",
        Part::QueryNorm => "self_attn.q_norm",
        Part::KeyNorm => "self_attn.k_norm",
        // Where there is a norm before the feed-forward part only, it has this name, too.
        Part::PostAttentionNorm | Part::FeedForwardNorm => "post_attention_layernorm",
        Part::Gate => "mlp.gate_proj",
        Part::Up => "mlp.up_proj",
        Part::FusedGateUp => "mlp.gate_up_proj",
        Part::Down => "mlp.down_proj",
        Part::PostFeedForwardNorm => "post_feedforward_layernorm",
        Part::Router => "mlp.gate",
        Part::ExpertGate(expert) => return format!("mlp.experts.{expert}.gate_proj"),
        Part::ExpertUp(expert) => return format!("mlp.experts.{expert}.up_proj"),
        Part::ExpertDown(expert) => return format!("mlp.experts.{expert}.down_proj"),
        Part::Corrections => "mlp.gate.e_score_correction_bias",
        Part::SharedGate => "mlp.shared_experts.gate_proj",
        Part::SharedUp => "mlp.shared_experts.up_proj",
        Part::FusedSharedGateUp => "mlp.shared_experts.gate_up_proj",
        Part::SharedDown => "mlp.shared_experts.down_proj",
        Part::SharedGateOut => "mlp.shared_expert_gate",
        Part::Sinks => "self_attn.sinks",
        Part::ConvInput => "conv.in_proj",
        Part::Convolution => "conv.conv",
        Part::ConvOutput => "conv.out_proj",
        Part::DeltaQkv => "linear_attn.in_proj_qkv",
        Part::DeltaGate => "linear_attn.in_proj_z",
        Part::DeltaBeta => "linear_attn.in_proj_b",
        Part::DeltaAlpha => "linear_attn.in_proj_a",
        Part::DeltaFusedBetaAlpha => "linear_attn.in_proj_ba",
        Part::RecurrentInput => "mamba.in_proj",
        Part::DecayRates => "mamba.A_log",
        Part::StepBiases => "mamba.dt_bias",
        Part::Skips => "mamba.D",
        Part::RecurrentNorm => "mamba.norm",
        Part::RecurrentOutput => "mamba.out_proj",
    };
    name.to_owned()
}

/// The name of the bias that belongs to a weight.
pub(super) fn bias(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}
