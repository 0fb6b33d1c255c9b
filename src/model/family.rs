//! The families of models, and what sets each apart from the common decoder.

use crate::device::Activation;

/// A family: checkpoints that are computed alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1, 2, 3 and everything built the same way (SmolLM2, TinyLlama, …).
    Llama,
    /// Mistral: Llama with a sliding window. In GGUF files it is called llama.
    Mistral,
    /// Mixtral: Mistral with a mixture of experts. In GGUF files it is called llama.
    Mixtral,
    /// Qwen 2 and 2.5: biases on query, key and value.
    Qwen2,
    /// Qwen 3: queries and keys normalised by head.
    Qwen3,
    /// Qwen 3 with a mixture of experts.
    Qwen3Moe,
    /// Gemma 2: norms before and after, soft-capped scores and logits.
    Gemma2,
    /// Gemma 3: as Gemma 2 without the caps, with query and key norms and two RoPEs.
    Gemma3,
    /// Phi 3, 3.5 and 4-mini: fused projections, LongRoPE.
    Phi3,
    /// OLMo 2: norms after each sub-layer only; queries and keys normalised.
    Olmo2,
}

/// Where a layer's norms are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// On the input of each sub-layer (Llama).
    Before,
    /// On its output (OLMo 2).
    After,
    /// On both (Gemma 2 and 3).
    BeforeAndAfter,
}

/// How queries and keys are normalised before RoPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormKind {
    /// Each head on its own.
    PerHead,
    /// All heads of a row together.
    WholeRow,
}

impl Family {
    const ALL: [Self; 10] = [
        Self::Llama,
        Self::Mistral,
        Self::Mixtral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Olmo2,
    ];

    /// `model_type` of `config.json`.
    pub fn huggingface_name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Mixtral => "mixtral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
        }
    }

    /// `general.architecture` of GGUF metadata.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral | Self::Mixtral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
        }
    }

    /// The family that `config.json` names, `gemma3` (with vision) read as its text
    /// part.
    pub fn from_huggingface(name: &str) -> Option<Self> {
        let name = if name == "gemma3" {
            "gemma3_text"
        } else {
            name
        };
        Self::ALL
            .into_iter()
            .find(|family| family.huggingface_name() == name)
    }

    /// The family that GGUF metadata names; [`Family::Llama`] for all that call
    /// themselves so.
    pub fn from_gguf(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|family| family.gguf_name() == name)
    }

    /// All names of one kind, for an error message.
    pub(super) fn supported(name: fn(Self) -> &'static str) -> String {
        let mut names: Vec<&str> = Self::ALL.into_iter().map(name).collect();
        names.dedup();
        names.join(", ")
    }

    /// Where a layer's norms are.
    pub fn norm_placement(self) -> NormPlacement {
        match self {
            Self::Gemma2 | Self::Gemma3 => NormPlacement::BeforeAndAfter,
            Self::Olmo2 => NormPlacement::After,
            _ => NormPlacement::Before,
        }
    }

    /// Whether and how queries and keys are normalised.
    pub fn qk_norm(self) -> Option<QkNormKind> {
        match self {
            Self::Qwen3 | Self::Qwen3Moe | Self::Gemma3 => Some(QkNormKind::PerHead),
            Self::Olmo2 => Some(QkNormKind::WholeRow),
            _ => None,
        }
    }

    /// The non-linearity of the feed-forward layers.
    pub fn activation(self) -> Activation {
        match self {
            Self::Gemma2 | Self::Gemma3 => Activation::GeluTanh,
            _ => Activation::Silu,
        }
    }

    /// Whether norm weights are stored as `weight − 1` in Hugging Face checkpoints
    /// (GGUF converters add the 1).
    pub fn norm_weights_are_offsets(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    /// Whether embeddings are multiplied by the root of the hidden size.
    pub fn scales_embeddings(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    /// Whether GGUF files store query and key rows interleaved for RoPE.
    pub fn gguf_interleaves_rope(self) -> bool {
        self.gguf_name() == "llama"
    }
}
