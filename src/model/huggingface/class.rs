//! Defaults of transformers' configuration classes, for settings that a `config.json` leaves out.
//!
//! Checkpoints leave out settings that have the default of the class, and transformers fills them
//! in. The values of each class are those of its `configuration_*.py`.

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
    /// `hidden_act`. Other values are refused.
    pub(in crate::model) activation: Activation,
    /// Whether `intermediate_size` may be a list with an entry for each layer.
    pub(in crate::model) lists_widths: bool,
    /// `num_hidden_layers`.
    pub(in crate::model) layers: usize,
    /// `num_attention_heads`.
    pub(in crate::model) q_heads: usize,
    /// `num_key_value_heads`; `None` means as many as query heads.
    pub(in crate::model) kv_heads: Option<usize>,
    /// `head_dim`; `None` means the hidden size divided by the number of query heads.
    pub(in crate::model) head_dim: Option<usize>,
    /// `query_pre_attn_scalar`; `None` for classes that do not have it.
    pub(in crate::model) query_scale: Option<f32>,
    /// `sliding_window`.
    pub(in crate::model) window: Option<usize>,
    /// Name in `layer_types` of the layers that do not have full attention.
    pub(in crate::model) local_attention: &'static str,
    /// `max_position_embeddings`.
    pub(in crate::model) context: usize,
    /// `rms_norm_eps`.
    pub(in crate::model) norm_epsilon: f32,
    /// `rope_theta`.
    pub(in crate::model) rope_theta: f32,
    /// How the class reads the settings of the position embedding.
    pub(in crate::model) rope: RopeRules,
    /// Whether `use_bidirectional_attention` may be true.
    pub(in crate::model) may_encode: bool,
    /// `tie_word_embeddings`.
    pub(in crate::model) ties_embeddings: bool,
}

/// How a class reads the settings of the position embedding.
#[derive(Clone, Copy, Debug)]
pub(in crate::model) struct RopeRules {
    /// Default of `partial_rotary_factor`. `None` for classes that ignore it and rotate whole
    /// heads, or fail; values other than 1 are then refused.
    pub(in crate::model) partial: Option<f32>,
    /// Key of the number of rotated elements per head, which is used if the file has no
    /// `partial_rotary_factor`.
    pub(in crate::model) dimension_key: Option<&'static str>,
    /// Other names of the RoPE type `longrope`.
    pub(in crate::model) longrope_aliases: &'static [&'static str],
    /// Default of `original_max_position_embeddings`, for classes that read it only beside the RoPE
    /// parameters. `None` for classes that also read it within them; its default is then
    /// `max_position_embeddings`.
    pub(in crate::model) original_context: Option<usize>,
    /// Whether the class has the RoPE type `proportional`.
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
