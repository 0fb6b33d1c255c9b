//! The architectures that quell computes, one file each.
//!
//! Each file gives the architecture's names, how its hyperparameters are read from
//! `config.json` and from GGUF metadata, how its tensors are stored, and what its layers
//! compute. What several architectures share is in the readers ([`Config`], [`Metadata`]), in
//! [`Hyperparameters`], or in the file that needed it first. No other file names an
//! architecture.

mod cohere2;
mod deepseek_v2;
mod deepseek_v3;
mod ernie4_5;
mod exaone4;
mod gemma2;
mod gemma3;
mod gemma3n;
mod gemma4;
mod glm4;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granite;
mod granitemoehybrid;
mod lfm2;
mod lfm2_moe;
mod llama;
mod llama4;
mod minimax_m2;
mod ministral3;
mod mistral;
mod mixtral;
mod nemotron_h;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_5;
mod qwen3_5_moe;
mod qwen3_moe;
mod qwen3_next;
mod seed_oss;
mod smollm3;
#[cfg(test)]
mod tests;

use super::ModelError;
use super::gguf::Metadata;
use super::huggingface::{Config, ConfigClass};
use super::hyperparameters::Hyperparameters;
use super::layer::LayerSpec;
use super::names::{self, Part};

/// Every architecture. Where error messages list names, they are in this order.
static ALL: &[&Architecture] = &[
    &llama::ARCHITECTURE,
    &mistral::ARCHITECTURE,
    &mixtral::ARCHITECTURE,
    &qwen2::ARCHITECTURE,
    &qwen3::ARCHITECTURE,
    &qwen3_moe::ARCHITECTURE,
    &gemma2::ARCHITECTURE,
    &gemma3::ARCHITECTURE,
    &gemma3n::ARCHITECTURE,
    &gemma4::ARCHITECTURE,
    &phi3::ARCHITECTURE,
    &olmo2::ARCHITECTURE,
    &olmo3::ARCHITECTURE,
    &granite::ARCHITECTURE,
    &smollm3::ARCHITECTURE,
    &seed_oss::ARCHITECTURE,
    &ernie4_5::ARCHITECTURE,
    &exaone4::ARCHITECTURE,
    &glm4::ARCHITECTURE,
    &cohere2::ARCHITECTURE,
    &ministral3::ARCHITECTURE,
    &gpt_oss::ARCHITECTURE,
    &glm4_moe::ARCHITECTURE,
    &minimax_m2::ARCHITECTURE,
    &llama4::ARCHITECTURE,
    &lfm2::ARCHITECTURE,
    &lfm2_moe::ARCHITECTURE,
    &granitemoehybrid::ARCHITECTURE,
    &nemotron_h::ARCHITECTURE,
    &qwen3_next::ARCHITECTURE,
    &qwen3_5::ARCHITECTURE,
    &qwen3_5_moe::ARCHITECTURE,
    &deepseek_v2::ARCHITECTURE,
    &deepseek_v3::ARCHITECTURE,
    &glm4_moe_lite::ARCHITECTURE,
];

/// An architecture: its names, how its files are read, and what its layers compute.
pub struct Architecture {
    /// `model_type` in `config.json`.
    name: &'static str,
    /// Other values of `model_type` that are read as this architecture.
    aliases: &'static [&'static str],
    /// Its configuration class in transformers.
    pub(super) class: ConfigClass,
    /// Reads `config.json`.
    pub(super) read_config: ReadConfig,
    /// How GGUF files hold it; `None` if they call it by another architecture's name, or if such
    /// files are not read.
    gguf: Option<GgufFormat>,
    /// How its tensors are stored.
    pub(super) storage: Storage,
    /// What the layer of an index computes.
    pub(super) layer: fn(&Hyperparameters, usize) -> LayerSpec,
}

/// Reads the numbers of a model from its `config.json`.
type ReadConfig = fn(&Config<'_>) -> Result<Hyperparameters, ModelError>;
/// Reads the numbers of a model from its GGUF metadata.
pub(super) type ReadMetadata = fn(&Metadata<'_>) -> Result<Hyperparameters, ModelError>;

/// How GGUF files hold an architecture.
#[derive(Debug)]
pub(super) struct GgufFormat {
    /// `general.architecture`.
    name: &'static str,
    /// Reads the metadata.
    pub(super) read: ReadMetadata,
    /// Keys that it reads and that would be refused otherwise, since they change the results.
    pub(super) settings: &'static [&'static str],
}

/// How an architecture's tensors are stored.
#[derive(Clone, Copy)]
pub(super) struct Storage {
    /// The name of the token embedding in Hugging Face checkpoints, between the prefix and
    /// `.weight`.
    pub(super) embedding: &'static str,
    /// The name of the norm before the output projection.
    pub(super) final_norm: FinalNorm,
    /// The name of a part of a layer in Hugging Face checkpoints, after `layers.N.`.
    pub(super) huggingface_name: fn(Part) -> String,
    /// The name of a part of a layer in GGUF files, after `blk.N.`.
    pub(super) gguf_name: fn(Part) -> String,
    /// Whether query, key and value are one tensor. Only random weights need to know: readers
    /// find out by the names of the tensors.
    #[cfg_attr(not(any(feature = "cli", feature = "internals")), allow(dead_code))]
    pub(super) fuses_qkv: bool,
    /// Whether gate and up are one tensor, also those of a dense part beside experts, unless a
    /// file has a tensor with the gate's own name.
    pub(super) fuses_gate_up: bool,
    /// Whether Hugging Face checkpoints store norm weights as `weight − 1`. GGUF
    /// converters add the 1.
    pub(super) norm_weights_are_offsets: bool,
    /// How the rows of queries and keys are stored.
    pub(super) rope_rows: RopeRows,
    /// The tensors in which Hugging Face checkpoints stack all experts of a layer; `None` if
    /// each expert always has its own.
    pub(super) stacked_experts: Option<StackedExperts>,
}

/// The name of the norm before the output projection, without `.weight`.
#[derive(Clone, Copy, Debug)]
pub(super) struct FinalNorm {
    /// In Hugging Face checkpoints, after the prefix.
    pub(super) huggingface: &'static str,
    /// In GGUF files.
    pub(super) gguf: &'static str,
}

/// Tensors of all experts of a layer. Biases, if there are some, are in tensors of these names
/// with `_bias` behind them.
#[derive(Clone, Copy, Debug)]
pub(super) struct StackedExperts {
    /// Gates and ups, `[experts, 2 · width, hidden]`.
    pub(super) gate_up: &'static str,
    /// `[experts, hidden, width]`.
    pub(super) down: &'static str,
    /// Whether the matrix of each expert is transposed. Where it is not, a checkpoint may have
    /// tensors for each expert instead.
    pub(super) are_transposed: bool,
    /// Whether gates and ups alternate, which only transposed ones do. Otherwise, all gates come
    /// first.
    pub(super) alternates: bool,
}

/// Where the two halves that RoPE rotates are stored interleaved within each head. Their rows
/// are put in order as they are loaded. Weights of norms on queries and keys are not: no
/// architecture that has some is stored interleaved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RopeRows {
    /// Nowhere.
    Halves,
    /// In GGUF files.
    InterleavedInGguf,
    /// In both formats.
    Interleaved,
}

impl Storage {
    /// The layout of most architectures.
    const COMMON: Self = Self {
        embedding: "embed_tokens",
        final_norm: FinalNorm {
            huggingface: "norm",
            gguf: "output_norm",
        },
        huggingface_name: names::huggingface,
        gguf_name: names::gguf,
        fuses_qkv: false,
        fuses_gate_up: false,
        norm_weights_are_offsets: false,
        rope_rows: RopeRows::Halves,
        stacked_experts: None,
    };
}

impl Architecture {
    /// Returns the architecture that a `config.json` names in `model_type`.
    pub(super) fn from_model_type(name: &str) -> Result<&'static Self, ModelError> {
        let names_it = |one: &&&Self| one.name == name || one.aliases.contains(&name);
        let found = ALL.iter().find(names_it).copied();
        found.ok_or_else(|| unknown(name, ALL.iter().map(|one| one.name)))
    }

    /// Returns the architecture that a GGUF file names in `general.architecture`, and how such
    /// files hold it.
    pub(super) fn from_gguf_name(
        name: &str,
    ) -> Result<(&'static Self, &'static GgufFormat), ModelError> {
        let formats = || {
            ALL.iter()
                .filter_map(|one| Some((*one, one.gguf.as_ref()?)))
        };
        match formats().find(|(_, format)| format.name == name) {
            Some(found) => Ok(found),
            None => Err(unknown(name, formats().map(|(_, format)| format.name))),
        }
    }

    /// Returns its name: `model_type` in `config.json`.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl std::fmt::Debug for Architecture {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Architecture({})", self.name)
    }
}

impl PartialEq for Architecture {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

fn unknown(found: &str, supported: impl Iterator<Item = &'static str>) -> ModelError {
    ModelError::UnknownArchitecture {
        found: found.to_owned(),
        supported: supported.collect::<Vec<_>>().join(", "),
    }
}
