//! Finds a model's tensors, whatever its file calls them.

use super::{Family, ModelConfig, ModelError, NormPlacement, gguf, huggingface, random};
use crate::device::{LinearSpec, RowOrder, WeightRows};
use crate::weights::{DType, Gguf, ModelFolder, ParameterCount, TensorView, WeightSource, quant};

/// Who named the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
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
    /// Whether the output projection is the embedding, although a tensor for it may
    /// be there.
    tied: bool,
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
        let config = gguf::read(&file)?;
        Ok(Self {
            config,
            weights: Box::new(file),
            naming: Naming::Gguf,
            tied: false,
        })
    }

    /// The model of a Hugging Face folder.
    pub fn from_folder(folder: ModelFolder) -> Result<Self, ModelError> {
        let config = huggingface::read(folder.config())?;
        let tied = huggingface::ties_embeddings(folder.config());
        let prefixes = ["model.", "language_model.model.", "model.language_model."];
        let prefix = prefixes
            .into_iter()
            .find(|prefix| {
                folder
                    .tensor(&format!("{prefix}embed_tokens.weight"))
                    .is_some()
            })
            .unwrap_or("model.");
        let naming = Naming::HuggingFace { prefix };
        Ok(Self {
            config,
            weights: Box::new(folder),
            naming,
            tied,
        })
    }

    /// A model with random weights in `format`, of the size that a Hugging Face
    /// `config.json` says.
    ///
    /// # Errors
    /// What is wrong with the settings, or that the weights cannot be had in the format.
    pub fn random(settings: &serde_json::Value, format: DType) -> Result<Self, ModelError> {
        let config = huggingface::read(settings)?;
        let tied = huggingface::ties_embeddings(settings);
        // Gemma's configurations leave out that they are tied.
        let tied = tied || config.family.scales_embeddings();
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

    /// The token embedding.
    pub(super) fn embedding(&self) -> Result<(String, LinearSpec<'_>), ModelError> {
        let name = match self.naming {
            Naming::Gguf => "token_embd.weight".to_owned(),
            Naming::HuggingFace { prefix } => format!("{prefix}embed_tokens.weight"),
        };
        let rows = self.matrix(&name, self.config.vocabulary, self.config.hidden)?;
        Ok((name, plain(vec![rows])))
    }

    /// The output projection; `None` when it is the embedding.
    pub(super) fn output(&self) -> Result<Option<(String, LinearSpec<'_>)>, ModelError> {
        let name = match self.naming {
            Naming::Gguf => "output.weight",
            Naming::HuggingFace { .. } => "lm_head.weight",
        };
        if self.tied || self.weights.tensor(name).is_none() {
            return Ok(None);
        }
        let rows = self.matrix(name, self.config.vocabulary, self.config.hidden)?;
        Ok(Some((name.to_owned(), plain(vec![rows]))))
    }

    /// The norm before the output projection.
    pub(super) fn final_norm(&self) -> Result<Vec<f32>, ModelError> {
        let name = match self.naming {
            Naming::Gguf => "output_norm.weight".to_owned(),
            Naming::HuggingFace { prefix } => format!("{prefix}norm.weight"),
        };
        self.norm_weight(&name, self.config.hidden)
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
    pub(super) fn qkv(&self, layer: usize) -> Result<LinearSpec<'_>, ModelError> {
        let heads = self.config.heads;
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        // Fused rows would have to be taken apart to undo an interleaving.
        let interleaved = self.naming == Naming::Gguf && self.config.family.gguf_interleaves_rope();
        if !interleaved && self.has(layer, Part::FusedQkv) {
            return self.linear(layer, &[(Part::FusedQkv, q + 2 * kv)], self.config.hidden);
        }
        let parts = [(Part::Query, q), (Part::Key, kv), (Part::Value, kv)];
        let mut spec = self.linear(layer, &parts, self.config.hidden)?;
        if interleaved {
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

    /// The attention's output projection.
    pub(super) fn attention_out(&self, layer: usize) -> Result<LinearSpec<'_>, ModelError> {
        let columns = self.config.heads.q_columns();
        self.linear(layer, &[(Part::AttentionOut, self.config.hidden)], columns)
    }

    /// Gate and up projection of a dense layer, stacked.
    pub(super) fn gate_up(&self, layer: usize) -> Result<LinearSpec<'_>, ModelError> {
        let (width, hidden) = (self.config.intermediate, self.config.hidden);
        // Phi 3: one tensor for both, which GGUF files call `ffn_up`.
        if self.config.family == Family::Phi3 {
            return self.linear(layer, &[(Part::FusedGateUp, 2 * width)], hidden);
        }
        self.linear(layer, &[(Part::Gate, width), (Part::Up, width)], hidden)
    }

    /// Down projection of a dense layer.
    pub(super) fn down(&self, layer: usize) -> Result<LinearSpec<'_>, ModelError> {
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
    ) -> Result<LinearSpec<'_>, ModelError> {
        self.linear(layer, &[(Part::Router, experts)], self.config.hidden)
    }

    /// Gate and up projection of one expert, stacked, and its down projection.
    pub(super) fn expert(
        &self,
        layer: usize,
        expert: usize,
        width: usize,
    ) -> Result<(LinearSpec<'_>, LinearSpec<'_>), ModelError> {
        let hidden = self.config.hidden;
        let gate = self.expert_rows(layer, Part::ExpertGate(expert), expert, width, hidden)?;
        let up = self.expert_rows(layer, Part::ExpertUp(expert), expert, width, hidden)?;
        let down = self.expert_rows(layer, Part::ExpertDown(expert), expert, hidden, width)?;
        Ok((plain(vec![gate, up]), plain(vec![down])))
    }

    /// Tells the source that a layer's tensors have been loaded.
    pub(super) fn release_layer(&self, layer: usize) {
        let prefix = match self.naming {
            Naming::Gguf => format!("blk.{layer}."),
            Naming::HuggingFace { prefix } => format!("{prefix}layers.{layer}."),
        };
        for name in self.weights.names() {
            if name.starts_with(&prefix) {
                self.weights.release(name);
            }
        }
    }

    /// Tells the source that a tensor has been loaded.
    pub(super) fn release(&self, name: &str) {
        self.weights.release(name);
    }

    fn has(&self, layer: usize, part: Part) -> bool {
        self.weights.tensor(&self.name(layer, part)).is_some()
    }

    fn name(&self, layer: usize, part: Part) -> String {
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
    ) -> Result<LinearSpec<'_>, ModelError> {
        let mut spec = plain(Vec::with_capacity(parts.len()));
        let mut bias = Vec::new();
        let mut biased = false;
        for &(part, rows) in parts {
            let name = self.name(layer, part);
            spec.parts.push(self.matrix(&name, rows, columns)?);
            let bias_name = format!("{}bias", name.trim_end_matches("weight"));
            if self.weights.tensor(&bias_name).is_some() {
                bias.extend(self.vector(&bias_name, rows)?);
                biased = true;
            } else {
                bias.resize(bias.len() + rows, 0.0);
            }
        }
        spec.bias = biased.then_some(bias);
        Ok(spec)
    }

    fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<WeightRows<'_>, ModelError> {
        as_rows(name, &self.tensor(name)?, rows, columns)
    }

    /// An expert's matrix: a tensor of its own, or a slice of a stacked one.
    fn expert_rows(
        &self,
        layer: usize,
        part: Part,
        expert: usize,
        rows: usize,
        columns: usize,
    ) -> Result<WeightRows<'_>, ModelError> {
        let stacked = match (self.naming, part) {
            (Naming::Gguf, Part::ExpertGate(_)) => Some("ffn_gate_exps"),
            (Naming::Gguf, Part::ExpertUp(_)) => Some("ffn_up_exps"),
            (Naming::Gguf, Part::ExpertDown(_)) => Some("ffn_down_exps"),
            _ => None,
        };
        let stacked = stacked.map(|name| format!("blk.{layer}.{name}.weight"));
        if let Some(name) = stacked
            && let Some(tensor) = self.weights.tensor(&name)
        {
            let slice = tensor.slice(expert).ok_or_else(|| ModelError::WrongShape {
                name: name.clone(),
                found: tensor.shape.to_vec(),
                expected: vec![expert + 1, rows, columns],
            })?;
            return as_rows(&name, &slice, rows, columns);
        }
        self.matrix(&self.name(layer, part), rows, columns)
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
        quant::dequantize(tensor.dtype, tensor.data, &mut values);
        self.weights.release(name);
        Ok(values)
    }
}

fn plain(parts: Vec<WeightRows<'_>>) -> LinearSpec<'_> {
    LinearSpec { parts, bias: None }
}

fn as_rows<'a>(
    name: &str,
    tensor: &TensorView<'a>,
    rows: usize,
    columns: usize,
) -> Result<WeightRows<'a>, ModelError> {
    if tensor.shape != [rows, columns] {
        return Err(ModelError::WrongShape {
            name: name.to_owned(),
            found: tensor.shape.to_vec(),
            expected: vec![rows, columns],
        });
    }
    let order = RowOrder::AsStored;
    Ok(WeightRows {
        dtype: tensor.dtype,
        rows,
        columns,
        data: tensor.data,
        order,
    })
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
