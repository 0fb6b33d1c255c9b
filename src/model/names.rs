//! The tensors of a layer, and the names that most architectures give them.

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
    /// Projection from the layer's input to the latent of the queries.
    QueryDown,
    /// Norm of the latent of the queries.
    QueryDownNorm,
    /// Projection from the latent of the queries to the queries.
    QueryUp,
    /// Projection from the layer's input to the queries, if keys and values have a latent but
    /// queries do not.
    LatentQuery,
    /// Projection from the layer's input to the latent of keys and values, and to the rotated part
    /// of the key.
    LatentDown,
    /// Norm of the latent of keys and values.
    LatentNorm,
    /// Projection from that latent to the keys and values of all heads.
    LatentUp,
    /// Transposed key weights of each head, by which queries are multiplied before their dot
    /// product with the latent. Only in GGUF files.
    LatentKeys,
    /// Projection from the latent to the values of each head. Only in GGUF files.
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
    /// Corrections added to the experts' weights when experts are chosen.
    Corrections,
    SharedGate,
    SharedUp,
    FusedSharedGateUp,
    SharedDown,
    /// Projection to the gate of the dense part beside the experts.
    SharedGateOut,
    /// Attention sinks, one per query head.
    Sinks,
    /// Factor on the residual stream after a layer.
    LayerScale,
    /// Projection to the gate of the per-layer input.
    PerLayerGate,
    /// Projection of the gated per-layer input.
    PerLayerProjection,
    /// Norm of the projected per-layer input.
    PerLayerNorm,
    /// Weight of the norm on the router's input, if the router has a norm of its own.
    RouterScale,
    /// Norm on the output of the dense part beside the experts.
    SharedOutputNorm,
    /// Norm on the input of the experts, if they have a norm of their own.
    ExpertInputNorm,
    /// Norm on the output of the experts.
    ExpertOutputNorm,
    /// Factors on the experts' outputs, one per expert.
    ExpertScales,
    /// First matrix of the path beside a mixer.
    SideLeft,
    /// Second matrix of the path beside a mixer.
    SideRight,
    /// Norm on the output of the path beside a mixer.
    SideNorm,
    /// Router of the residual streams.
    StreamRouter,
    /// Norm on the input of the router of the residual streams.
    StreamRouterNorm,
    /// Weights that turn the router's outputs into the factors that predict streams.
    StreamPrediction,
    /// Weights that turn the router's outputs into the factors that correct streams.
    StreamCorrection,
    /// Factors on the active stream before it gates the per-layer input.
    StreamScale,
    /// Projection before a convolution.
    ConvInput,
    /// Weights of a convolution.
    Convolution,
    /// Projection after a convolution.
    ConvOutput,
    /// Projection to the queries, keys and values of a gated delta net.
    DeltaQkv,
    /// Projection to the output gate of a gated delta net.
    DeltaGate,
    /// Projection to the inputs of a gated delta net's update strengths.
    DeltaBeta,
    /// Projection to the inputs of a gated delta net's decays.
    DeltaAlpha,
    /// `DeltaBeta` and `DeltaAlpha` in one tensor, whose rows are grouped by head of keys.
    DeltaFusedBetaAlpha,
    /// Projection before a recurrence. In a gated delta net, it fuses `DeltaQkv` and `DeltaGate`,
    /// and its rows are grouped by head of keys.
    RecurrentInput,
    /// Logarithms of the rates at which a state decays; the negated rates in GGUF files.
    DecayRates,
    /// Biases of the lengths of a recurrence's time steps.
    StepBiases,
    /// Factors on the inputs that bypass the state.
    Skips,
    /// Norm after a recurrence.
    RecurrentNorm,
    /// Projection after a recurrence.
    RecurrentOutput,
}

/// The tensors that may hold the gate and up projections of a feed-forward part.
#[derive(Clone, Copy, Debug)]
pub(super) struct GateUp {
    pub(super) gate: Part,
    pub(super) up: Part,
    /// Both in one tensor.
    pub(super) fused: Part,
}

impl GateUp {
    /// Tensors of a dense feed-forward part.
    pub(super) const DENSE: Self = Self {
        gate: Part::Gate,
        up: Part::Up,
        fused: Part::FusedGateUp,
    };

    /// Tensors of a dense part beside experts.
    pub(super) const SHARED: Self = Self {
        gate: Part::SharedGate,
        up: Part::SharedUp,
        fused: Part::FusedSharedGateUp,
    };

    /// Returns the tensors that exist for this activation, each with its number of rows. `width` is
    /// the number of results of the activation.
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

/// Returns the suffix after the name of a part in a GGUF file.
pub(super) fn gguf_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections | Part::StepBiases => ".bias",
        Part::DecayRates | Part::Skips => "",
        Part::RouterScale | Part::ExpertScales => ".scale",
        _ => ".weight",
    }
}

/// Returns the suffix after the name of a part in a Hugging Face checkpoint.
pub(super) fn huggingface_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections | Part::Sinks | Part::LayerScale | Part::StreamScale => "",
        Part::RouterScale | Part::ExpertScales => "",
        Part::DecayRates | Part::StepBiases | Part::Skips => "",
        _ => ".weight",
    }
}

/// Returns the name of a part in a GGUF file, between `blk.N.` and its suffix.
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

/// Returns the name of the tensor in which a GGUF file stacks a part of all experts of a layer,
/// between `blk.N.` and `.weight`. `None` if the part does not belong to an expert.
pub(super) fn gguf_stacked(part: Part) -> Option<&'static str> {
    match part {
        Part::ExpertGate(_) => Some("ffn_gate_exps"),
        Part::ExpertUp(_) => Some("ffn_up_exps"),
        Part::ExpertDown(_) => Some("ffn_down_exps"),
        _ => None,
    }
}

/// Returns the name of a part in a Hugging Face checkpoint, between `layers.N.` and its suffix.
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
        // Most architectures have no norm on the attention's output, and use its name for the
        // norm before the feed-forward part.
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

/// Returns the name of the bias that belongs to a weight.
pub(super) fn bias(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}
