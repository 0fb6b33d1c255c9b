//! The supported model architectures, one file each.
//!
//! Each file defines the architecture's names, how its hyperparameters are read from
//! `config.json` and from GGUF metadata, how its tensors are stored, and what its layers
//! compute. Code that several architectures share is in the readers ([`Config`], [`Metadata`]), in
//! [`Hyperparameters`], or in the file that needed it first. No file outside this folder names an
//! architecture.

mod bert;
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
mod roberta;
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

/// All architectures, in the order in which error messages list them.
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
    &bert::ARCHITECTURE,
    &roberta::ARCHITECTURE,
];

/// An architecture: its names, how its files are read, and what its layers compute.
pub struct Architecture {
    /// `model_type` in `config.json`.
    name: &'static str,
    /// Other values of `model_type` that are read as this architecture.
    aliases: &'static [&'static str],
    /// Defaults of its configuration class in transformers.
    pub(super) class: ConfigClass,
    /// Reads `config.json`.
    pub(super) read_config: ReadConfig,
    /// How GGUF files describe it; `None` if they use another architecture's name for it.
    gguf: Option<GgufFormat>,
    /// How its tensors are stored.
    pub(super) storage: Storage,
    /// Returns what the layer with the given index computes.
    pub(super) layer: fn(&Hyperparameters, usize) -> LayerSpec,
}

/// Reads a model's hyperparameters from its `config.json`.
type ReadConfig = fn(&Config<'_>) -> Result<Hyperparameters, ModelError>;
/// Reads a model's hyperparameters from its GGUF metadata.
pub(super) type ReadMetadata = fn(&Metadata<'_>) -> Result<Hyperparameters, ModelError>;

/// How GGUF files describe an architecture.
#[derive(Debug)]
pub(super) struct GgufFormat {
    /// Value of `general.architecture`.
    name: &'static str,
    /// Other values of `general.architecture` that are read as this architecture.
    aliases: &'static [&'static str],
    /// Reads the metadata.
    pub(super) read: ReadMetadata,
    /// Keys that `read` handles itself. For other architectures, their values are refused if they
    /// would change the results or if they differ between layers.
    pub(super) settings: &'static [&'static str],
}

/// How an architecture's tensors are stored.
#[derive(Clone, Copy)]
pub(super) struct Storage {
    /// Name of the token embedding in Hugging Face checkpoints, between the prefix and `.weight`.
    pub(super) embedding: &'static str,
    /// What may precede all these names in Hugging Face checkpoints. Models that were saved without
    /// their output projection have nothing there.
    pub(super) prefixes: &'static [&'static str],
    /// What precedes a layer's number in Hugging Face checkpoints, between the prefix and `.N.`.
    pub(super) layers: &'static str,
    /// Name of the norm before the output projection.
    pub(super) final_norm: FinalNorm,
    /// Returns a tensor's name in Hugging Face checkpoints, between `layers.N.` and its suffix.
    pub(super) huggingface_name: fn(Part) -> String,
    /// Returns a tensor's name in GGUF files, between `blk.N.` and its suffix.
    pub(super) gguf_name: fn(Part) -> String,
    /// Whether the query, key and value projections are one tensor. Only random weights need this:
    /// readers look at the names of the stored tensors.
    #[cfg_attr(not(any(feature = "cli", feature = "internals")), allow(dead_code))]
    pub(super) fuses_qkv: bool,
    /// Whether the gate and up projections are one tensor, in dense layers and in the dense part
    /// beside experts. A file that has a tensor with the gate's own name is read unfused.
    pub(super) fuses_gate_up: bool,
    /// Whether Hugging Face checkpoints store norm weights as `weight − 1`. GGUF converters add
    /// the 1.
    pub(super) norm_weights_are_offsets: bool,
    /// Order in which the rows of the query and key projections are stored.
    pub(super) rope_rows: RopeRows,
    /// Tensors in which Hugging Face checkpoints stack all experts of a layer; `None` if each
    /// expert always has tensors of its own.
    pub(super) stacked_experts: Option<StackedExperts>,
}

/// Names of the norm before the output projection, without `.weight`.
#[derive(Clone, Copy, Debug)]
pub(super) struct FinalNorm {
    /// Name in Hugging Face checkpoints, after the prefix.
    pub(super) huggingface: &'static str,
    /// Name in GGUF files.
    pub(super) gguf: &'static str,
}

/// Names of the tensors that stack all experts of a layer, and their layout. A bias has the name of
/// its tensor with `_bias` appended, or with `bias` in place of a final `weight`.
#[derive(Clone, Copy, Debug)]
pub(super) struct StackedExperts {
    /// Gate and up projections, `[experts, 2 · width, hidden]` unless transposed.
    pub(super) gate_up: &'static str,
    /// Down projections, `[experts, hidden, width]` unless transposed.
    pub(super) down: &'static str,
    /// Whether the matrix of each expert is transposed. Otherwise, a checkpoint may also have
    /// separate tensors for each expert.
    pub(super) are_transposed: bool,
    /// Whether the gates and ups of an expert alternate, which is supported for transposed
    /// matrices only. Otherwise, all gates of the expert come first.
    pub(super) alternates: bool,
}

/// Which files store query and key rows with the two halves that RoPE rotates interleaved within
/// each head. Such rows are reordered when they are loaded. Norm weights for queries and keys are
/// not reordered: no architecture that has them is stored interleaved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RopeRows {
    /// No files: the first half is followed by the second.
    Halves,
    /// GGUF files only.
    InterleavedInGguf,
    /// Files of both formats.
    Interleaved,
}

impl Storage {
    /// The layout of most architectures.
    const COMMON: Self = Self {
        embedding: "embed_tokens",
        prefixes: &[
            "model.",
            "language_model.model.",
            "model.language_model.",
            "backbone.",
            "",
        ],
        layers: "layers",
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
    /// files describe it.
    pub(super) fn from_gguf_name(
        name: &str,
    ) -> Result<(&'static Self, &'static GgufFormat), ModelError> {
        let formats = || {
            ALL.iter()
                .filter_map(|one| Some((*one, one.gguf.as_ref()?)))
        };
        let names_it = |format: &GgufFormat| format.name == name || format.aliases.contains(&name);
        match formats().find(|(_, format)| names_it(format)) {
            Some(found) => Ok(found),
            None => Err(unknown(name, formats().map(|(_, format)| format.name))),
        }
    }

    /// Returns the architecture's name: `model_type` in `config.json`.
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
