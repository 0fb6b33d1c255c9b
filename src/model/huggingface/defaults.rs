//! What transformers' configuration classes say where a `config.json` says nothing.
//!
//! Checkpoints leave out what is as in the class, and transformers fills it in. The values
//! are those of each family's `configuration_*.py`.

use crate::model::Family;

/// The defaults of one family's configuration class.
pub(super) struct Defaults {
    pub(super) vocabulary: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) layers: usize,
    pub(super) q_heads: usize,
    /// `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
    /// `None`: the hidden size divided by the query heads.
    pub(super) head_dim: Option<usize>,
    pub(super) context: usize,
    pub(super) norm_epsilon: f32,
    pub(super) rope_theta: f32,
    /// The sliding window, where the family has one and it is on.
    pub(super) window: Option<usize>,
    pub(super) attention_softcap: Option<f32>,
    pub(super) logit_softcap: Option<f32>,
    /// `query_pre_attn_scalar`; `None` for families that do not read it.
    pub(super) query_scale: Option<f32>,
    /// Experts, and how many of them a token goes to.
    pub(super) experts: Option<(usize, usize)>,
    pub(super) ties_embeddings: bool,
}

/// `max_window_layers` of the Qwen families: the layers before it have no window.
pub(super) const QWEN_FULL_LAYERS: usize = 28;
/// `sliding_window_pattern` of Gemma 3: each so manieth layer has no window.
pub(super) const GEMMA3_PATTERN: usize = 6;
/// `moe_intermediate_size` of Qwen 3 MoE.
pub(super) const QWEN3_EXPERT_WIDTH: usize = 768;
/// `original_max_position_embeddings` of Phi 3.
pub(super) const PHI3_ORIGINAL_CONTEXT: usize = 4096;
/// `rope_local_base_freq` of Gemma 3.
pub(super) const GEMMA3_LOCAL_THETA: f32 = 10_000.0;

impl Defaults {
    pub(super) fn of(family: Family) -> Self {
        let llama = Self {
            vocabulary: 32_000,
            hidden: 4096,
            intermediate: 11_008,
            layers: 32,
            q_heads: 32,
            kv_heads: None,
            head_dim: None,
            context: 2048,
            norm_epsilon: 1e-6,
            rope_theta: 10_000.0,
            window: None,
            attention_softcap: None,
            logit_softcap: None,
            query_scale: None,
            experts: None,
            ties_embeddings: false,
        };
        let mistral = Self {
            intermediate: 14_336,
            kv_heads: Some(8),
            context: 131_072,
            window: Some(4096),
            ..llama
        };
        let qwen = Self {
            vocabulary: 151_936,
            intermediate: 22_016,
            kv_heads: Some(32),
            context: 32_768,
            window: Some(4096),
            ..llama
        };
        let gemma = Self {
            hidden: 2304,
            intermediate: 9216,
            layers: 26,
            q_heads: 8,
            kv_heads: Some(4),
            head_dim: Some(256),
            window: Some(4096),
            query_scale: Some(256.0),
            ties_embeddings: true,
            ..llama
        };
        match family {
            Family::Llama => llama,
            Family::Mistral => mistral,
            Family::Mixtral => Self {
                norm_epsilon: 1e-5,
                rope_theta: 1e6,
                window: None,
                experts: Some((8, 2)),
                ..mistral
            },
            Family::Qwen2 => qwen,
            Family::Qwen3 => Self {
                head_dim: Some(128),
                ..qwen
            },
            Family::Qwen3Moe => Self {
                hidden: 2048,
                intermediate: 6144,
                layers: 24,
                kv_heads: Some(4),
                experts: Some((128, 8)),
                ..qwen
            },
            Family::Gemma2 => Self {
                vocabulary: 256_000,
                context: 8192,
                attention_softcap: Some(50.0),
                logit_softcap: Some(30.0),
                ..gemma
            },
            Family::Gemma3 => Self {
                vocabulary: 262_208,
                context: 131_072,
                rope_theta: 1e6,
                ..gemma
            },
            Family::Phi3 => Self {
                vocabulary: 32_064,
                hidden: 3072,
                intermediate: 8192,
                context: 4096,
                norm_epsilon: 1e-5,
                ..llama
            },
            Family::Olmo2 => Self {
                vocabulary: 50_304,
                norm_epsilon: 1e-5,
                ..llama
            },
        }
    }
}
