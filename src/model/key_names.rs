//! Keys of a model's settings in each file format, for error messages.

/// The keys of one format, without their prefix: relative to [`KeyNames::place`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    pub(super) layers: &'static str,
    pub(super) hidden: &'static str,
    pub(super) intermediate: &'static str,
    pub(super) q_heads: &'static str,
    pub(super) kv_heads: &'static str,
    pub(super) head_dim: &'static str,
    pub(super) vocabulary: &'static str,
    pub(super) context: &'static str,
    pub(super) norm_epsilon: &'static str,
    pub(super) attention_scale: &'static str,
    pub(super) attention_softcap: &'static str,
    pub(super) logit_softcap: &'static str,
    pub(super) logit_scale: &'static str,
    pub(super) embedding_scale: &'static str,
    pub(super) window: &'static str,
    pub(super) layer_types: &'static str,
    /// The key that decides whether any layer has attention.
    pub(super) mixers: &'static str,
    pub(super) experts: &'static str,
    pub(super) expert_width: &'static str,
    pub(super) experts_per_token: &'static str,
    pub(super) expert_groups: &'static str,
    pub(super) expert_scale: &'static str,
    pub(super) shared_experts: &'static str,
    pub(super) taps: &'static str,
    pub(super) recurrent_heads: &'static str,
    pub(super) recurrent_head_dim: &'static str,
    pub(super) recurrent_groups: &'static str,
    pub(super) state_size: &'static str,
    pub(super) shared_caches: &'static str,
    pub(super) input_width: &'static str,
    pub(super) segments: &'static str,
    pub(super) input_vocabulary: &'static str,
    pub(super) query_rank: &'static str,
    pub(super) latent: &'static str,
    /// Number of elements of each query that are not rotated.
    pub(super) plain: &'static str,
    pub(super) rotated: &'static str,
    pub(super) value: &'static str,
    pub(super) rope_base: &'static str,
    pub(super) rope_dimension: &'static str,
    // The keys from here on are relative to `KeyNames::rope_place`.
    pub(super) rope_factor: &'static str,
    pub(super) rope_low_frequency: &'static str,
    pub(super) rope_high_frequency: &'static str,
    pub(super) rope_original_context: &'static str,
    pub(super) rope_beta_fast: &'static str,
    pub(super) rope_beta_slow: &'static str,
    pub(super) rope_attention_factor: &'static str,
    pub(super) latent_scale: &'static str,
}

/// The keys of GGUF metadata.
pub(super) const GGUF: Keys = Keys {
    layers: "block_count",
    hidden: "embedding_length",
    intermediate: "feed_forward_length",
    q_heads: "attention.head_count",
    kv_heads: "attention.head_count_kv",
    head_dim: "attention.key_length",
    vocabulary: "vocab_size",
    context: "context_length",
    norm_epsilon: "attention.layer_norm_rms_epsilon",
    // The scale follows from the head dimension, unless the architecture reads a key of its own.
    attention_scale: "attention.key_length",
    attention_softcap: "attn_logit_softcapping",
    logit_softcap: "final_logit_softcapping",
    logit_scale: "logit_scale",
    embedding_scale: "embedding_scale",
    window: "attention.sliding_window",
    layer_types: "attention.sliding_window_pattern",
    mixers: "block_count",
    experts: "expert_count",
    expert_width: "expert_feed_forward_length",
    experts_per_token: "expert_used_count",
    expert_groups: "expert_group_used_count",
    expert_scale: "expert_weights_scale",
    shared_experts: "expert_shared_count",
    taps: "ssm.conv_kernel",
    recurrent_heads: "ssm.time_step_rank",
    recurrent_head_dim: "ssm.inner_size",
    recurrent_groups: "ssm.group_count",
    state_size: "ssm.state_size",
    shared_caches: "attention.shared_kv_layers",
    input_width: "embedding_length_per_layer_input",
    // GGUF has no key of the architecture's for it: it is the number of rows of their embeddings.
    segments: "token_type_count",
    // GGUF has no key for it: it is the number of rows of the embeddings.
    input_vocabulary: "vocab_size",
    query_rank: "attention.q_lora_rank",
    latent: "attention.kv_lora_rank",
    plain: "attention.key_length_mla",
    rotated: "rope.dimension_count",
    value: "attention.value_length_mla",
    rope_base: "rope.freq_base",
    rope_dimension: "rope.dimension_count",
    rope_factor: "factor",
    rope_low_frequency: "low_freq_factor",
    rope_high_frequency: "high_freq_factor",
    rope_original_context: "original_context_length",
    rope_beta_fast: "yarn_beta_fast",
    rope_beta_slow: "yarn_beta_slow",
    rope_attention_factor: "attn_factor",
    latent_scale: "yarn_log_multiplier",
};

/// The keys of `config.json`.
pub(super) const HUGGINGFACE: Keys = Keys {
    layers: "num_hidden_layers",
    hidden: "hidden_size",
    intermediate: "intermediate_size",
    q_heads: "num_attention_heads",
    kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    vocabulary: "vocab_size",
    context: "max_position_embeddings",
    norm_epsilon: "rms_norm_eps",
    attention_scale: "query_pre_attn_scalar",
    attention_softcap: "attn_logit_softcapping",
    logit_softcap: "final_logit_softcapping",
    logit_scale: "logit_scale",
    embedding_scale: "embedding_multiplier",
    window: "sliding_window",
    layer_types: "layer_types",
    mixers: "layer_types",
    experts: "num_experts",
    expert_width: "moe_intermediate_size",
    experts_per_token: "num_experts_per_tok",
    expert_groups: "topk_group",
    expert_scale: "routed_scaling_factor",
    shared_experts: "n_shared_experts",
    taps: "mamba_d_conv",
    recurrent_heads: "mamba_n_heads",
    recurrent_head_dim: "mamba_d_head",
    recurrent_groups: "mamba_n_groups",
    state_size: "mamba_d_state",
    shared_caches: "num_kv_shared_layers",
    input_width: "hidden_size_per_layer_input",
    segments: "type_vocab_size",
    input_vocabulary: "vocab_size_per_layer_input",
    query_rank: "q_lora_rank",
    latent: "kv_lora_rank",
    plain: "qk_nope_head_dim",
    rotated: "qk_rope_head_dim",
    value: "v_head_dim",
    rope_base: "rope_theta",
    rope_dimension: "partial_rotary_factor",
    rope_factor: "factor",
    rope_low_frequency: "low_freq_factor",
    rope_high_frequency: "high_freq_factor",
    rope_original_context: "original_max_position_embeddings",
    rope_beta_fast: "beta_fast",
    rope_beta_slow: "beta_slow",
    rope_attention_factor: "attention_factor",
    latent_scale: "mscale_all_dim",
};

/// The keys of one file.
#[derive(Clone, Debug)]
pub(super) struct KeyNames {
    pub(super) keys: Keys,
    /// Prefix of each key, such as `llama.` or `text_config.`.
    pub(super) place: String,
    /// Prefix of the RoPE scaling keys, such as `rope_scaling.`.
    pub(super) rope_place: String,
}

impl KeyNames {
    /// Returns the full name of a key.
    pub(super) fn of(&self, key: fn(&Keys) -> &'static str) -> String {
        format!("{}{}", self.place, key(&self.keys))
    }

    /// Returns the full name of a RoPE scaling key.
    pub(super) fn of_rope(&self, key: fn(&Keys) -> &'static str) -> String {
        format!("{}{}", self.rope_place, key(&self.keys))
    }
}
