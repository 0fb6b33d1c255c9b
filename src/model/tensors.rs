//! Finds a model's tensors, whatever its file calls them.

use super::architectures::RopeRows;
use super::names::{self, GateUp, Part};
use super::stored::{StoredLinear, StoredRows};
use super::{ModelConfig, ModelError, gguf, huggingface, inventory, stored};
use crate::device::{Activation, HeadShape, RowOrder};
use crate::weights::{Gguf, ModelFolder, ParameterCount, TensorView, WeightSource, quant};
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

/// What may stand before `layers.0` in a Hugging Face checkpoint.
const PREFIXES: [&str; 4] = [
    "model.",
    "language_model.model.",
    "model.language_model.",
    "backbone.",
];

/// A model's numbers together with its weights.
pub struct ModelSource {
    config: ModelConfig,
    weights: Box<dyn WeightSource>,
    naming: Naming,
    /// Whether the output projection is the embedding where the file has none of its own.
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
        huggingface::refuse_quantised(folder.config())?;
        let config = huggingface::read(folder.config())?;
        let tied = huggingface::ties_embeddings(folder.config())?;
        let embedding = config.architecture.storage.embedding;
        let prefix = PREFIXES
            .into_iter()
            .find(|prefix| {
                let name = format!("{prefix}{embedding}.weight");
                folder.tensor(&name).is_some()
            })
            .unwrap_or(PREFIXES[0]);
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
    #[cfg(any(test, feature = "cli", feature = "internals"))]
    pub fn random(
        settings: &serde_json::Value,
        format: crate::weights::DType,
    ) -> Result<Self, ModelError> {
        use super::random::{tensors, weights};

        let config = huggingface::read(settings)?;
        let tied = huggingface::ties_embeddings(settings)?;
        let prefix = PREFIXES[0];
        let tensors = tensors(&config, prefix, tied);
        Ok(Self {
            weights: Box::new(weights(tensors, format)?),
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

    /// Reads the bytes of a tensor.
    pub(super) fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, ModelError> {
        Ok(self.weights.read(tensor)?)
    }

    /// Whether the file has a tensor of this name.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.weights.tensor(name).is_some()
    }

    /// Who named the tensors.
    pub(super) fn naming(&self) -> Naming {
        self.naming
    }

    /// Beginnings of the names of tensors of layers that predict further tokens, which are not
    /// computed.
    pub(super) fn prediction_layers(&self) -> Vec<String> {
        let first = self.config.layers.len();
        let layers = first..first + self.config.prediction_layers;
        layers.map(|layer| self.layer_prefix(layer)).collect()
    }

    /// The name of the token embedding.
    pub(super) fn embedding_name(&self) -> String {
        match self.naming {
            Naming::Gguf => "token_embd.weight".to_owned(),
            Naming::HuggingFace { prefix } => {
                let name = self.config.architecture.storage.embedding;
                format!("{prefix}{name}.weight")
            }
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
        let name = self.config.architecture.storage.final_norm;
        match self.naming {
            Naming::Gguf => format!("{}.weight", name.gguf),
            Naming::HuggingFace { prefix } => format!("{prefix}{}.weight", name.huggingface),
        }
    }

    /// The token embedding.
    pub(super) fn embedding(&self) -> Result<StoredLinear<'_>, ModelError> {
        let (rows, columns) = (self.config.vocabulary, self.config.hidden);
        let rows = self.matrix(&self.embedding_name(), rows, columns)?;
        Ok(StoredLinear::new(vec![rows]))
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
        Ok(Some(StoredLinear::new(vec![output])))
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
    pub(super) fn qkv(
        &self,
        layer: usize,
        heads: HeadShape,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let hidden = self.config.hidden;
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        if self.fuses_qkv(layer) {
            return self.linear(layer, &[(Part::FusedQkv, q + 2 * kv)], hidden);
        }
        let parts = [(Part::Query, q), (Part::Key, kv), (Part::Value, kv)];
        let mut qkv = self.linear(layer, &parts, hidden)?;
        if let Some(order) = self.rope_order(layer) {
            qkv.order_first(2, order);
        }
        Ok(qkv)
    }

    /// Query, key and value of a layer whose attention has a gate, stacked, and that gate. Files
    /// hold the rows of each head of queries together with those of its gate.
    pub(super) fn gated_qkv(
        &self,
        layer: usize,
        heads: HeadShape,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let hidden = self.config.hidden;
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        let both = self.linear(layer, &[(Part::Query, 2 * q)], hidden)?;
        let rows = stored::ungrouped(heads.q_heads, &[heads.head_dim; 2]);
        let others = self.linear(layer, &[(Part::Key, kv), (Part::Value, kv)], hidden)?;
        let qkv = both.select(&rows[..q]).stack(others);
        Ok((qkv, both.select(&rows[q..])))
    }

    /// The order in which the rows of queries and keys of a layer are stored, unless it is that
    /// in which they are used. It does not matter where they are not rotated.
    fn rope_order(&self, layer: usize) -> Option<RowOrder> {
        let attention = self.config.layers[layer].attention()?;
        let rope = &self.config.ropes[attention.rope?];
        let is_interleaved = match self.config.architecture.storage.rope_rows {
            RopeRows::Halves => false,
            RopeRows::InterleavedInGguf => self.naming == Naming::Gguf,
            RopeRows::Interleaved => true,
        };
        is_interleaved.then_some(RowOrder::RopeInterleaved {
            head_dim: attention.heads.head_dim,
            rotary_dim: rope.rotary_dim,
        })
    }

    /// Whether query, key and value of a layer are one tensor.
    pub(super) fn fuses_qkv(&self, layer: usize) -> bool {
        // Fused rows would have to be taken apart to undo an interleaving.
        self.rope_order(layer).is_none() && self.holds(&self.name(layer, Part::FusedQkv))
    }

    /// The attention's output projection.
    pub(super) fn attention_out(
        &self,
        layer: usize,
        heads: HeadShape,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let part = (Part::AttentionOut, self.config.hidden);
        self.linear(layer, &[part], heads.q_columns())
    }

    /// Gate and up projection of a dense layer, stacked, or the latter alone.
    pub(super) fn gate_up(
        &self,
        layer: usize,
        width: usize,
        activation: Activation,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let parts = self.gate_up_parts(layer, GateUp::DENSE, activation, width);
        self.linear(layer, &parts, self.config.hidden)
    }

    /// The parts of a layer that hold gate and up projection, as the file has them.
    pub(super) fn gate_up_parts(
        &self,
        layer: usize,
        parts: GateUp,
        activation: Activation,
        width: usize,
    ) -> Vec<(Part, usize)> {
        let fuses = self.config.architecture.storage.fuses_gate_up;
        let are_fused = fuses && !self.holds(&self.name(layer, parts.gate));
        parts.parts(activation, width, are_fused)
    }

    /// Down projection of a dense layer.
    pub(super) fn down(&self, layer: usize, width: usize) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::Down, self.config.hidden)], width)
    }

    /// The sinks of the attention's heads.
    pub(super) fn sinks(&self, layer: usize, heads: HeadShape) -> Result<Vec<f32>, ModelError> {
        self.vector(&self.name(layer, Part::Sinks), heads.q_heads)
    }

    /// The weights of the convolution of a layer, for each tap the weights of all channels.
    pub(super) fn convolution(
        &self,
        layer: usize,
        channels: usize,
        taps: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let name = self.name(layer, Part::Convolution);
        let tensor = self.tensor(&name)?;
        // Hugging Face checkpoints have a dimension for input channels, of which there is one.
        if tensor.shape != [channels, 1, taps] && tensor.shape != [channels, taps] {
            return Err(ModelError::WrongShape {
                name,
                found: tensor.shape.to_vec(),
                expected: vec![channels, taps],
            });
        }
        let flat = TensorView {
            shape: &[channels * taps],
            ..tensor
        };
        let by_channel = self.numbers(&flat, channels * taps)?;
        let taps = (0..taps).map(|tap| by_channel.iter().skip(tap).step_by(taps));
        Ok(taps.flatten().copied().collect())
    }

    /// The bias of the convolution of a layer.
    pub(super) fn convolution_bias(
        &self,
        layer: usize,
        channels: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let weight = self.name(layer, Part::Convolution);
        self.vector(&names::bias(&weight), channels)
    }

    /// The rates at which the state of each head decays: negative numbers.
    pub(super) fn decay_rates(&self, layer: usize, heads: usize) -> Result<Vec<f32>, ModelError> {
        let mut rates = self.recurrent_vector(layer, Part::DecayRates, heads)?;
        // GGUF converters have computed them already.
        if self.naming != Naming::Gguf {
            rates.iter_mut().for_each(|rate| *rate = -rate.exp());
        }
        Ok(rates)
    }

    /// A vector of a recurrence. GGUF files may have it as a matrix with one row or column, or
    /// with a row for each group of heads.
    pub(super) fn recurrent_vector(
        &self,
        layer: usize,
        part: Part,
        length: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let name = self.name(layer, part);
        let tensor = self.tensor(&name)?;
        let is_flat = self.naming == Naming::Gguf && tensor.elements() == length;
        let shape = [length];
        let flat = TensorView {
            shape: if is_flat { &shape } else { tensor.shape },
            ..tensor
        };
        self.numbers(&flat, length)
    }

    /// The router of a mixture of experts.
    pub(super) fn router(
        &self,
        layer: usize,
        experts: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::Router, experts)], self.config.hidden)
    }

    /// What the names of all tensors of a layer begin with.
    pub(super) fn layer_prefix(&self, layer: usize) -> String {
        match self.naming {
            Naming::Gguf => format!("blk.{layer}."),
            Naming::HuggingFace { prefix } => format!("{prefix}layers.{layer}."),
        }
    }

    /// The name of the weight of a part of a layer.
    pub(super) fn name(&self, layer: usize, part: Part) -> String {
        let storage = self.config.architecture.storage;
        let (name, suffix) = match self.naming {
            Naming::Gguf => ((storage.gguf_name)(part), names::gguf_suffix(part)),
            Naming::HuggingFace { .. } => (
                (storage.huggingface_name)(part),
                names::huggingface_suffix(part),
            ),
        };
        self.layer_prefix(layer) + &name + suffix
    }

    pub(super) fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        self.weights
            .tensor(name)
            .ok_or_else(|| ModelError::MissingTensor {
                name: name.to_owned(),
            })
    }

    /// A linear layer of stacked parts, each of so many rows, with their biases if
    /// the file has any.
    pub(super) fn linear(
        &self,
        layer: usize,
        parts: &[(Part, usize)],
        columns: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear_of(parts, columns, |part| (self.name(layer, part), None))
    }

    /// Like [`ModelSource::linear`]. `locate` returns the name of the tensor of a part and, if the
    /// part is only an entry of the tensor, the entry's index; biases are located in the same way.
    pub(super) fn linear_of(
        &self,
        parts: &[(Part, usize)],
        columns: usize,
        locate: impl Fn(Part) -> (String, Option<usize>),
    ) -> Result<StoredLinear<'_>, ModelError> {
        let mut stored = Vec::with_capacity(parts.len());
        let mut bias = Vec::new();
        let mut biased = false;
        for &(part, rows) in parts {
            let (name, entry) = locate(part);
            let view = |name: &str, shape: &[usize]| match entry {
                Some(index) => self.entry(name, index, shape),
                None => self.tensor(name),
            };
            stored.push(self.rows(&view(&name, &[rows, columns])?, rows, columns)?);
            let bias_name = names::bias(&name);
            if self.has_bias(part, &bias_name) {
                bias.extend(self.numbers(&view(&bias_name, &[rows])?, rows)?);
                biased = true;
            } else {
                bias.resize(bias.len() + rows, 0.0);
            }
        }
        Ok(StoredLinear::new(stored).with_bias(biased.then_some(bias)))
    }

    /// Whether a part has a bias, which is there if so: by the model's settings or, where
    /// they do not say, by the file.
    pub(super) fn has_bias(&self, part: Part, name: &str) -> bool {
        let biases = self.config.biases;
        let said = match part {
            Part::Query | Part::Key | Part::Value | Part::FusedQkv => biases.qkv,
            Part::AttentionOut => biases.attention_out,
            Part::ConvInput | Part::ConvOutput => biases.recurrent,
            Part::RecurrentInput | Part::RecurrentOutput => biases.recurrent,
            _ => biases.feed_forward,
        };
        said.unwrap_or_else(|| self.holds(name))
    }

    pub(super) fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<StoredRows<'_>, ModelError> {
        self.rows(&self.tensor(name)?, rows, columns)
    }

    /// Reads the rows of a matrix.
    pub(super) fn rows(
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

    fn norm_weight(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        let mut values = self.vector(name, length)?;
        let are_offsets = self.config.architecture.storage.norm_weights_are_offsets;
        if self.naming != Naming::Gguf && are_offsets {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(values)
    }

    pub(super) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        self.numbers(&self.tensor(name)?, length)
    }

    /// Reads a vector, as float32.
    pub(super) fn numbers(
        &self,
        tensor: &TensorView<'_>,
        length: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let name = tensor.name;
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
        quant::dequantize(tensor.dtype, &self.weights.read(tensor)?, &mut values);
        Ok(values)
    }
}
