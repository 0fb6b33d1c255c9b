//! What a configuration class of transformers says where a `config.json` says nothing.
//!
//! Checkpoints leave out what is as in the class, and transformers fills it in. The values
//! of each class are those of its `configuration_*.py`.

use crate::device::Activation;

/// The defaults of a configuration class.
#[derive(Clone, Copy, Debug)]
pub(in crate::model) struct ConfigClass {
    /// `vocab_size`.
    pub(in crate::model) vocabulary: usize,
    /// `hidden_size`.
    pub(in crate::model) hidden: usize,
    /// `intermediate_size`.
    pub(in crate::model) intermediate: usize,
    /// `hidden_act`. Another one is refused.
    pub(in crate::model) activation: Activation,
    /// Whether `intermediate_size` may be a list with an entry for each layer.
    pub(in crate::model) lists_widths: bool,
    /// `num_hidden_layers`.
    pub(in crate::model) layers: usize,
    /// `num_attention_heads`.
    pub(in crate::model) q_heads: usize,
    /// `num_key_value_heads`; `None`: as many as query heads.
    pub(in crate::model) kv_heads: Option<usize>,
    /// `head_dim`; `None`: the hidden size divided by the query heads.
    pub(in crate::model) head_dim: Option<usize>,
    /// `query_pre_attn_scalar`; `None` for classes that do not have it.
    pub(in crate::model) query_scale: Option<f32>,
    /// `sliding_window`.
    pub(in crate::model) window: Option<usize>,
    /// What `layer_types` calls the layers that do not have full attention.
    pub(in crate::model) local_attention: &'static str,
    /// `max_position_embeddings`.
    pub(in crate::model) context: usize,
    /// `rms_norm_eps`.
    pub(in crate::model) norm_epsilon: f32,
    /// `rope_theta`.
    pub(in crate::model) rope_theta: f32,
    /// How the settings of the position embedding are understood.
    pub(in crate::model) rope: RopeRules,
    /// `tie_word_embeddings`.
    pub(in crate::model) ties_embeddings: bool,
}

/// How a class understands the settings of the position embedding.
#[derive(Clone, Copy, Debug)]
pub(in crate::model) struct RopeRules {
    /// `partial_rotary_factor`, where it counts. Other classes rotate all of a head whatever
    /// it says, or fail.
    pub(in crate::model) partial: Option<f32>,
    /// The key of the number of rotated elements, which counts where there is no
    /// `partial_rotary_factor`.
    pub(in crate::model) dimension_key: Option<&'static str>,
    /// Other names of the RoPE type `longrope`.
    pub(in crate::model) longrope_aliases: &'static [&'static str],
    /// `original_max_position_embeddings`, which then counts beside the RoPE parameters
    /// only. `None`: it may be in them, and is `max_position_embeddings` otherwise.
    pub(in crate::model) original_context: Option<usize>,
    /// Whether there is the RoPE type `proportional`.
    pub(in crate::model) is_proportional: bool,
}

impl RopeRules {
    /// The rules of most classes.
    pub(in crate::model) const COMMON: Self = Self {
        partial: None,
        dimension_key: None,
        longrope_aliases: &[],
        original_context: None,
        is_proportional: false,
    };
}
