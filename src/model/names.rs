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
    /// From the layer's input to the latent of the queries.
    QueryDown,
    /// The norm of that latent.
    QueryDownNorm,
    /// From that latent to the queries.
    QueryUp,
    /// From the layer's input to the queries, where keys and values have a latent and queries do
    /// not.
    LatentQuery,
    /// From the layer's input to the latent of keys and values, and to the rotated part of the key.
    LatentDown,
    /// The norm of that latent.
    LatentNorm,
    /// From that latent to the keys and values of all heads.
    LatentUp,
    /// From the queries of each head to what is multiplied with the latent: the transposed weights
    /// of the keys. Only in GGUF files.
    LatentKeys,
    /// From the latent to the values of each head. Only in GGUF files.
    LatentValues,
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
    /// The factor on the residual stream after a layer.
    LayerScale,
    /// The gate of a layer's own input.
    PerLayerGate,
    /// The projection of a layer's own input.
    PerLayerProjection,
    /// The norm of what that projection gives.
    PerLayerNorm,
    /// The weight of the norm on the router's input, where it has one of its own.
    RouterScale,
    /// The norm on the output of the dense part beside experts.
    SharedOutputNorm,
    /// The norm on the input of the experts, where they have one of their own.
    ExpertInputNorm,
    /// The norm on the output of the experts.
    ExpertOutputNorm,
    /// The factors on the experts' outputs.
    ExpertScales,
    /// The two matrices of the path beside a mixer, and the norm of its output.
    SideLeft,
    SideRight,
    SideNorm,
    /// The router of residual streams, and the norm of its input.
    StreamRouter,
    StreamRouterNorm,
    /// What the router's outputs predict and correct streams with.
    StreamPrediction,
    StreamCorrection,
    /// The factors on the active stream where it gates a layer's own input.
    StreamScale,
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
        Part::RouterScale | Part::ExpertScales => ".scale",
        _ => ".weight",
    }
}

/// What follows the name of a part in a Hugging Face checkpoint.
pub(super) fn huggingface_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections | Part::Sinks | Part::LayerScale | Part::StreamScale => "",
        Part::RouterScale | Part::ExpertScales => "",
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
        Part::QueryDown => "attn_q_a",
        Part::QueryDownNorm => "attn_q_a_norm",
        Part::QueryUp => "attn_q_b",
        Part::LatentQuery => "attn_q",
        Part::LatentDown => "attn_kv_a_mqa",
        Part::LatentNorm => "attn_kv_a_norm",
        Part::LatentUp => "attn_kv_b",
        Part::LatentKeys => "attn_k_b",
        Part::LatentValues => "attn_v_b",
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
        Part::LayerScale => "layer_output_scale",
        Part::PerLayerGate => "inp_gate",
        Part::PerLayerProjection => "proj",
        Part::PerLayerNorm => "post_norm",
        Part::RouterScale => "ffn_gate_inp",
        Part::SharedOutputNorm => "post_ffw_norm_1",
        Part::ExpertInputNorm => "pre_ffw_norm_2",
        Part::ExpertOutputNorm => "post_ffw_norm_2",
        Part::ExpertScales => "ffn_down_exps",
        Part::SideLeft => "laurel_l",
        Part::SideRight => "laurel_r",
        Part::SideNorm => "laurel_post_norm",
        Part::StreamRouter => "altup_router",
        Part::StreamRouterNorm => "altup_router_norm",
        Part::StreamPrediction => "altup_predict_coef",
        Part::StreamCorrection => "altup_correct_coef",
        Part::StreamScale => "altup_correct_scale",
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
        Part::QueryDown => "self_attn.q_a_proj",
        Part::QueryDownNorm => "self_attn.q_a_layernorm",
        Part::QueryUp => "self_attn.q_b_proj",
        Part::LatentQuery => "self_attn.q_proj",
        Part::LatentDown => "self_attn.kv_a_proj_with_mqa",
        Part::LatentNorm => "self_attn.kv_a_layernorm",
        Part::LatentUp | Part::LatentKeys | Part::LatentValues => "self_attn.kv_b_proj",
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
        Part::LayerScale => "layer_scalar",
        Part::PerLayerGate => "per_layer_input_gate",
        Part::PerLayerProjection => "per_layer_projection",
        Part::PerLayerNorm => "post_per_layer_input_norm",
        Part::RouterScale => "router.scale",
        Part::SharedOutputNorm => "post_feedforward_layernorm_1",
        Part::ExpertInputNorm => "pre_feedforward_layernorm_2",
        Part::ExpertOutputNorm => "post_feedforward_layernorm_2",
        Part::ExpertScales => "router.per_expert_scale",
        Part::SideLeft => "laurel.linear_left",
        Part::SideRight => "laurel.linear_right",
        Part::SideNorm => "laurel.post_laurel_norm",
        Part::StreamRouter => "altup.modality_router",
        Part::StreamRouterNorm => "altup.router_norm",
        Part::StreamPrediction => "altup.prediction_coefs",
        Part::StreamCorrection => "altup.correction_coefs",
        Part::StreamScale => "altup.correct_output_scale",
    };
    name.to_owned()
}

/// The name of the bias that belongs to a weight.
pub(super) fn bias(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}
