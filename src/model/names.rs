//! The names of tensors, as most architectures have them.

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
    SharedDown,
    /// The sinks of the attention's heads.
    Sinks,
}

/// What follows the name of a part in a GGUF file.
pub(super) fn gguf_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections => ".bias",
        _ => ".weight",
    }
}

/// What follows the name of a part in a Hugging Face checkpoint.
pub(super) fn huggingface_suffix(part: Part) -> &'static str {
    match part {
        Part::Corrections | Part::Sinks => "",
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
        Part::SharedUp => "ffn_up_shexp",
        Part::SharedDown => "ffn_down_shexp",
        Part::Sinks => "attn_sinks",
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
        Part::SharedDown => "mlp.shared_experts.down_proj",
        Part::Sinks => "self_attn.sinks",
    };
    name.to_owned()
}

/// The name of the bias that belongs to a weight.
pub(super) fn bias(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}
