//! Finds a model's tensors, whatever its file calls them.

use super::{Family, ModelConfig, ModelError, NormPlacement, gguf, huggingface, inventory, random};
use crate::device::{LinearSpec, RowOrder, WeightRows};
use crate::weights::{DType, Gguf, ModelFolder, ParameterCount, TensorView, WeightSource, quant};
use std::borrow::Cow;

/// Who named the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    Gguf,
    /// With what stands before `layers.0` in this checkpoint.
    HuggingFace {
        prefix: &'static str,
    },
}

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
}

/// A model's numbers together with its weights.
pub struct ModelSource {
    config: ModelConfig,
    weights: Box<dyn WeightSource>,
    naming: Naming,
    /// Whether the output projection is the embedding where the file has none of its own.
    tied: bool,
}

/// A linear layer whose weights have been read.
pub(super) struct StoredLinear<'a> {
    parts: Vec<StoredRows<'a>>,
    bias: Option<Vec<f32>>,
}

/// Some rows of a linear layer, as they are stored.
struct StoredRows<'a> {
    dtype: DType,
    rows: usize,
    columns: usize,
    data: Cow<'a, [u8]>,
    order: RowOrder,
}

impl StoredLinear<'_> {
    /// The layer as a device takes it.
    pub(super) fn spec(&self) -> LinearSpec<'_> {
        let parts = self.parts.iter().map(|part| WeightRows {
            dtype: part.dtype,
            rows: part.rows,
            columns: part.columns,
            data: &part.data,
            order: part.order,
        });
        LinearSpec {
            parts: parts.collect(),
            bias: self.bias.clone(),
        }
    }
}

impl std::fmt::Debug for ModelSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ModelSource")
            .field("config", &self.config)
            .field("naming", &self.naming)
            .finish_non_exhaustive()
    }
}

impl ModelSource {
    /// The model of a GGUF file.
    pub fn from_gguf(file: Gguf) -> Result<Self, ModelError> {
        let source = Self {
            config: gguf::read(&file)?,
            weights: Box::new(file),
            naming: Naming::Gguf,
            // Converters leave out a tied output projection; nothing else says that it is.
            tied: true,
        };
        inventory::check(&source)?;
        Ok(source)
    }

    /// The model of a Hugging Face folder.
    pub fn from_folder(folder: ModelFolder) -> Result<Self, ModelError> {
        let config = huggingface::read(folder.config())?;
        let tied = huggingface::ties_embeddings(folder.config())?;
        let prefixes = ["model.", "language_model.model.", "model.language_model."];
        let prefix = prefixes
            .into_iter()
            .find(|prefix| {
                folder
                    .tensor(&format!("{prefix}embed_tokens.weight"))
                    .is_some()
            })
            .unwrap_or("model.");
        let source = Self {
            config,
            weights: Box::new(folder),
            naming: Naming::HuggingFace { prefix },
            tied,
        };
        inventory::check(&source)?;
        Ok(source)
    }

    /// A model with random weights in `format`, of the size that a Hugging Face
    /// `config.json` says.
    ///
    /// # Errors
    /// What is wrong with the settings, or that the weights cannot be had in the format.
    pub fn random(settings: &serde_json::Value, format: DType) -> Result<Self, ModelError> {
        let config = huggingface::read(settings)?;
        let tied = huggingface::ties_embeddings(settings)?;
        let prefix = "model.";
        let tensors = random::tensors(&config, prefix, tied);
        Ok(Self {
            weights: Box::new(random::weights(tensors, format)?),
            config,
            naming: Naming::HuggingFace { prefix },
            tied,
        })
    }

    /// The model's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How many weights the file holds.
    pub fn parameters(&self) -> ParameterCount {
        self.weights.count()
    }

    /// The names of all tensors in the file.
    pub(super) fn names(&self) -> Vec<&str> {
        self.weights.names()
    }

    /// Whether the file has a tensor of this name.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.weights.tensor(name).is_some()
    }

    /// Who named the tensors.
    pub(super) fn naming(&self) -> Naming {
        self.naming
    }

    /// The name of the token embedding.
    pub(super) fn embedding_name(&self) -> String {
        match self.naming {
            Naming::Gguf => "token_embd.weight".to_owned(),
            Naming::HuggingFace { prefix } => format!("{prefix}embed_tokens.weight"),
        }
    }

    /// The name of the output projection; `None` when it is the embedding.
    ///
    /// # Errors
    /// [`ModelError::MissingHead`] when it is not there and is not the embedding either.
    pub(super) fn output_name(&self) -> Result<Option<&'static str>, ModelError> {
        let names: &[&str] = match self.naming {
            Naming::Gguf => &["output.weight"],
            Naming::HuggingFace { .. } => &["lm_head.weight", "language_model.lm_head.weight"],
        };
        match names.iter().find(|name| self.holds(name)) {
            Some(name) => Ok(Some(name)),
            None if self.tied => Ok(None),
            None => Err(ModelError::MissingHead {
                name: names[0].to_owned(),
            }),
        }
    }

    /// The name of the norm before the output projection.
    pub(super) fn final_norm_name(&self) -> String {
        match self.naming {
            Naming::Gguf => "output_norm.weight".to_owned(),
            Naming::HuggingFace { prefix } => format!("{prefix}norm.weight"),
        }
    }

    /// The token embedding.
    pub(super) fn embedding(&self) -> Result<StoredLinear<'_>, ModelError> {
        let (rows, columns) = (self.config.vocabulary, self.config.hidden);
        let rows = self.matrix(&self.embedding_name(), rows, columns)?;
        Ok(plain(vec![rows]))
    }

    /// The output projection; `None` when it is the embedding, or a copy of it that the
    /// model says it is. One that differs is used whatever the model says.
    pub(super) fn output(&self) -> Result<Option<StoredLinear<'_>>, ModelError> {
        let Some(name) = self.output_name()? else {
            return Ok(None);
        };
        let output = self.matrix(name, self.config.vocabulary, self.config.hidden)?;
        if self.tied && self.naming != Naming::Gguf {
            let embedding = self.tensor(&self.embedding_name())?;
            let alike = embedding.dtype == output.dtype;
            if alike && self.weights.read(&embedding)? == output.data {
                return Ok(None);
            }
        }
        Ok(Some(plain(vec![output])))
    }

    /// The norm before the output projection.
    pub(super) fn final_norm(&self) -> Result<Vec<f32>, ModelError> {
        self.norm_weight(&self.final_norm_name(), self.config.hidden)
    }

    /// The weight of a norm of a layer.
    pub(super) fn norm(
        &self,
        layer: usize,
        part: Part,
        length: usize,
    ) -> Result<Vec<f32>, ModelError> {
        self.norm_weight(&self.name(layer, part), length)
    }

    /// Query, key and value of a layer, stacked.
    pub(super) fn qkv(&self, layer: usize) -> Result<StoredLinear<'_>, ModelError> {
        let heads = self.config.heads;
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        if self.fuses_qkv(layer) {
            return self.linear(layer, &[(Part::FusedQkv, q + 2 * kv)], self.config.hidden);
        }
        let parts = [(Part::Query, q), (Part::Key, kv), (Part::Value, kv)];
        let mut spec = self.linear(layer, &parts, self.config.hidden)?;
        if self.interleaves() {
            let order = RowOrder::RopeInterleaved {
                head_dim: heads.head_dim,
            };
            spec.parts[0].order = order;
            spec.parts[1].order = order;
            if let Some(bias) = &mut spec.bias {
                reorder(&mut bias[..q], order);
                reorder(&mut bias[q..q + kv], order);
            }
        }
        Ok(spec)
    }

    /// Whether query and key rows are stored interleaved for RoPE.
    fn interleaves(&self) -> bool {
        self.naming == Naming::Gguf && self.config.family.gguf_interleaves_rope()
    }

    /// Whether query, key and value of a layer are one tensor.
    pub(super) fn fuses_qkv(&self, layer: usize) -> bool {
        // Fused rows would have to be taken apart to undo an interleaving.
        !self.interleaves() && self.holds(&self.name(layer, Part::FusedQkv))
    }

    /// The attention's output projection.
    pub(super) fn attention_out(&self, layer: usize) -> Result<StoredLinear<'_>, ModelError> {
        let columns = self.config.heads.q_columns();
        self.linear(layer, &[(Part::AttentionOut, self.config.hidden)], columns)
    }

    /// Gate and up projection of a dense layer, stacked.
    pub(super) fn gate_up(&self, layer: usize) -> Result<StoredLinear<'_>, ModelError> {
        let (width, hidden) = (self.config.intermediate, self.config.hidden);
        // Phi 3: one tensor for both, which GGUF files call `ffn_up`.
        if self.config.family == Family::Phi3 {
            return self.linear(layer, &[(Part::FusedGateUp, 2 * width)], hidden);
        }
        self.linear(layer, &[(Part::Gate, width), (Part::Up, width)], hidden)
    }

    /// Down projection of a dense layer.
    pub(super) fn down(&self, layer: usize) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(
            layer,
            &[(Part::Down, self.config.hidden)],
            self.config.intermediate,
        )
    }

    /// The router of a mixture of experts.
    pub(super) fn router(
        &self,
        layer: usize,
        experts: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::Router, experts)], self.config.hidden)
    }

    /// Gate and up projection of one expert, stacked, and its down projection.
    pub(super) fn expert(
        &self,
        layer: usize,
        expert: usize,
        width: usize,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let hidden = self.config.hidden;
        let gate = self.expert_rows(layer, Part::ExpertGate(expert), expert, width, hidden)?;
        let up = self.expert_rows(layer, Part::ExpertUp(expert), expert, width, hidden)?;
        let down = self.expert_rows(layer, Part::ExpertDown(expert), expert, hidden, width)?;
        Ok((plain(vec![gate, up]), plain(vec![down])))
    }

    /// The name of the weight of a part of a layer.
    pub(super) fn name(&self, layer: usize, part: Part) -> String {
        match self.naming {
            Naming::Gguf => format!("blk.{layer}.{}.weight", gguf_name(part)),
            Naming::HuggingFace { prefix } => {
                let name = huggingface_name(self.config.family, part);
                format!("{prefix}layers.{layer}.{name}.weight")
            }
        }
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        self.weights
            .tensor(name)
            .ok_or_else(|| ModelError::MissingTensor {
                name: name.to_owned(),
            })
    }

    /// A linear layer of stacked parts, each of so many rows, with their biases if
    /// the file has any.
    fn linear(
        &self,
        layer: usize,
        parts: &[(Part, usize)],
        columns: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let mut spec = plain(Vec::with_capacity(parts.len()));
        let mut bias = Vec::new();
        let mut biased = false;
        for &(part, rows) in parts {
            let name = self.name(layer, part);
            spec.parts.push(self.matrix(&name, rows, columns)?);
            let bias_name = bias_name(&name);
            if self.has_bias(part, &bias_name) {
                bias.extend(self.vector(&bias_name, rows)?);
                biased = true;
            } else {
                bias.resize(bias.len() + rows, 0.0);
            }
        }
        spec.bias = biased.then_some(bias);
        Ok(spec)
    }

    /// Whether a part has a bias, which is there if so: by the model's settings or, where
    /// they do not say, by the file.
    pub(super) fn has_bias(&self, part: Part, name: &str) -> bool {
        let biases = self.config.biases;
        let said = match part {
            Part::Query | Part::Key | Part::Value | Part::FusedQkv => biases.qkv,
            Part::AttentionOut => biases.attention_out,
            _ => biases.feed_forward,
        };
        said.unwrap_or_else(|| self.holds(name))
    }

    fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<StoredRows<'_>, ModelError> {
        self.rows(&self.tensor(name)?, rows, columns)
    }

    /// Reads the rows of a matrix.
    fn rows(
        &self,
        tensor: &TensorView<'_>,
        rows: usize,
        columns: usize,
    ) -> Result<StoredRows<'_>, ModelError> {
        if tensor.shape != [rows, columns] {
            return Err(ModelError::WrongShape {
                name: tensor.name.to_owned(),
                found: tensor.shape.to_vec(),
                expected: vec![rows, columns],
            });
        }
        Ok(StoredRows {
            dtype: tensor.dtype,
            rows,
            columns,
            data: self.weights.read(tensor)?,
            order: RowOrder::AsStored,
        })
    }

    /// An expert's matrix: a tensor of its own, or a slice of a stacked one.
    fn expert_rows(
        &self,
        layer: usize,
        part: Part,
        expert: usize,
        rows: usize,
        columns: usize,
    ) -> Result<StoredRows<'_>, ModelError> {
        if let Some(name) = self.stacked_name(layer, part)
            && let Some(tensor) = self.weights.tensor(&name)
        {
            let slice = tensor.slice(expert).ok_or_else(|| ModelError::WrongShape {
                name: name.clone(),
                found: tensor.shape.to_vec(),
                expected: vec![expert + 1, rows, columns],
            })?;
            return self.rows(&slice, rows, columns);
        }
        self.matrix(&self.name(layer, part), rows, columns)
    }

    /// The name of the tensor that all experts of a layer are stacked in, if files have one.
    pub(super) fn stacked_name(&self, layer: usize, part: Part) -> Option<String> {
        let name = match (self.naming, part) {
            (Naming::Gguf, Part::ExpertGate(_)) => "ffn_gate_exps",
            (Naming::Gguf, Part::ExpertUp(_)) => "ffn_up_exps",
            (Naming::Gguf, Part::ExpertDown(_)) => "ffn_down_exps",
            _ => return None,
        };
        Some(format!("blk.{layer}.{name}.weight"))
    }

    fn norm_weight(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        let mut values = self.vector(name, length)?;
        if self.naming != Naming::Gguf && self.config.family.norm_weights_are_offsets() {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(values)
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != [length] {
            return Err(ModelError::WrongShape {
                name: name.to_owned(),
                found: tensor.shape.to_vec(),
                expected: vec![length],
            });
        }
        if !tensor.dtype.is_float() {
            return Err(ModelError::WrongFormat {
                name: name.to_owned(),
                found: tensor.dtype.to_string(),
                expected: "F32, F16 or BF16",
            });
        }
        let mut values = vec![0.0; length];
        quant::dequantize(tensor.dtype, &self.weights.read(&tensor)?, &mut values);
        Ok(values)
    }
}

fn plain(parts: Vec<StoredRows<'_>>) -> StoredLinear<'_> {
    StoredLinear { parts, bias: None }
}

/// The name of the bias that belongs to a weight.
pub(super) fn bias_name(weight: &str) -> String {
    format!("{}bias", weight.trim_end_matches("weight"))
}

fn reorder(values: &mut [f32], order: RowOrder) {
    let stored = values.to_vec();
    for (row, value) in values.iter_mut().enumerate() {
        *value = stored[order.stored_row(row)];
    }
}

fn gguf_name(part: Part) -> String {
    match part {
        Part::AttentionNorm => "attn_norm".to_owned(),
        Part::Query => "attn_q".to_owned(),
        Part::Key => "attn_k".to_owned(),
        Part::Value => "attn_v".to_owned(),
        Part::FusedQkv => "attn_qkv".to_owned(),
        Part::AttentionOut => "attn_output".to_owned(),
        Part::QueryNorm => "attn_q_norm".to_owned(),
        Part::KeyNorm => "attn_k_norm".to_owned(),
        Part::PostAttentionNorm => "post_attention_norm".to_owned(),
        Part::FeedForwardNorm => "ffn_norm".to_owned(),
        Part::Gate => "ffn_gate".to_owned(),
        Part::Up | Part::FusedGateUp => "ffn_up".to_owned(),
        Part::Down => "ffn_down".to_owned(),
        Part::PostFeedForwardNorm => "post_ffw_norm".to_owned(),
        Part::Router => "ffn_gate_inp".to_owned(),
        Part::ExpertGate(expert) => format!("ffn_gate.{expert}"),
        Part::ExpertUp(expert) => format!("ffn_up.{expert}"),
        Part::ExpertDown(expert) => format!("ffn_down.{expert}"),
    }
}

pub(super) fn huggingface_name(family: Family, part: Part) -> String {
    let mixtral = family == Family::Mixtral;
    let expert = |index: usize, mixtral_name: &str, name: &str| {
        if mixtral {
            format!("block_sparse_moe.experts.{index}.{mixtral_name}")
        } else {
            format!("mlp.experts.{index}.{name}_proj")
        }
    };
    match part {
        Part::AttentionNorm => "input_layernorm".to_owned(),
        Part::Query => "self_attn.q_proj".to_owned(),
        Part::Key => "self_attn.k_proj".to_owned(),
        Part::Value => "self_attn.v_proj".to_owned(),
        Part::FusedQkv => "self_attn.qkv_proj".to_owned(),
        Part::AttentionOut => "self_attn.o_proj".to_owned(),
        Part::QueryNorm => "self_attn.q_norm".to_owned(),
        Part::KeyNorm => "self_attn.k_norm".to_owned(),
        Part::PostAttentionNorm => "post_attention_layernorm".to_owned(),
        Part::FeedForwardNorm if family.norm_placement() == NormPlacement::Before => {
            "post_attention_layernorm".to_owned()
        }
        Part::FeedForwardNorm => "pre_feedforward_layernorm".to_owned(),
        Part::Gate => "mlp.gate_proj".to_owned(),
        Part::Up => "mlp.up_proj".to_owned(),
        Part::FusedGateUp => "mlp.gate_up_proj".to_owned(),
        Part::Down => "mlp.down_proj".to_owned(),
        Part::PostFeedForwardNorm => "post_feedforward_layernorm".to_owned(),
        Part::Router if mixtral => "block_sparse_moe.gate".to_owned(),
        Part::Router => "mlp.gate".to_owned(),
        Part::ExpertGate(index) => expert(index, "w1", "gate"),
        Part::ExpertUp(index) => expert(index, "w3", "up"),
        Part::ExpertDown(index) => expert(index, "w2", "down"),
    }
}
