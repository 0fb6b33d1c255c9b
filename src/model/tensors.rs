//! Finds and reads a model's tensors under the names that its file format gives them.

use super::architectures::RopeRows;
use super::layer::Attention;
use super::names::{self, GateUp, Part};
use super::stored::{StoredLinear, StoredRows};
use super::{ModelConfig, ModelError, gguf, huggingface, inventory, stored};
use crate::device::{Activation, HeadShape, RowOrder};
use crate::weights::{Gguf, ModelFolder, ParameterCount, TensorView, WeightSource, quant};
use std::borrow::Cow;

/// Naming scheme of the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    Gguf,
    HuggingFace {
        /// What precedes `layers.0` in this checkpoint.
        prefix: &'static str,
    },
}

/// A model's configuration together with its weights.
pub struct ModelSource {
    config: ModelConfig,
    weights: Box<dyn WeightSource>,
    naming: Naming,
    /// Whether the embedding is the output projection if the file holds none.
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
    /// Reads the model of a GGUF file.
    ///
    /// # Errors
    /// Fails if the architecture or a setting is not supported, or if a tensor is missing or is not
    /// part of the model.
    pub fn from_gguf(file: Gguf) -> Result<Self, ModelError> {
        let source = Self {
            config: gguf::read(&file)?,
            weights: Box::new(file),
            naming: Naming::Gguf,
            // Converters leave out a tied output projection, and no setting says that it is tied.
            tied: true,
        };
        inventory::check(&source)?;
        Ok(source)
    }

    /// Reads the model of a Hugging Face folder.
    ///
    /// # Errors
    /// Fails if the architecture, a setting or a quantisation is not supported, or if a tensor is
    /// missing or is not part of the model.
    pub fn from_folder(folder: ModelFolder) -> Result<Self, ModelError> {
        let config = huggingface::read(folder.config())?;
        let tied = huggingface::ties_embeddings(folder.config())?;
        let storage = config.architecture.storage;
        let (embedding, layers) = (storage.embedding, storage.layers);
        let prefixes = storage.prefixes;
        let with_embedding = prefixes.iter().find(|prefix| {
            let name = format!("{prefix}{embedding}.weight");
            folder.tensor(&name).is_some()
        });
        // Without an embedding, which will be missed by the name that it should have.
        let with_layers = || {
            let names = folder.names();
            prefixes.iter().find(|prefix| {
                let layer = format!("{prefix}{layers}.0.");
                names.iter().any(|name| name.starts_with(&layer))
            })
        };
        let prefix = with_embedding.or_else(with_layers).unwrap_or(&prefixes[0]);
        let source = Self {
            config,
            weights: Box::new(folder),
            naming: Naming::HuggingFace { prefix },
            tied,
        };
        inventory::check(&source)?;
        Ok(source)
    }

    /// Creates a model with random weights in `format`, of the size that a Hugging Face
    /// `config.json` describes.
    ///
    /// # Errors
    /// Fails if a setting is not valid, or if the weights cannot be stored in the format.
    #[cfg(any(test, feature = "cli", feature = "internals"))]
    pub fn random(
        settings: &serde_json::Value,
        format: crate::weights::DType,
    ) -> Result<Self, ModelError> {
        use super::random::{tensors, weights};

        let config = huggingface::read(settings)?;
        let tied = huggingface::ties_embeddings(settings)?;
        let prefix = config.architecture.storage.prefixes[0];
        let tensors = tensors(&config, prefix, tied);
        Ok(Self {
            weights: Box::new(weights(tensors, format)?),
            config,
            naming: Naming::HuggingFace { prefix },
            tied,
        })
    }

    /// Returns the model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the number of weights in the file.
    pub fn parameters(&self) -> ParameterCount {
        self.weights.count()
    }

    /// Returns the names of all tensors in the file.
    pub(super) fn names(&self) -> Vec<&str> {
        self.weights.names()
    }

    /// Reads the bytes of a tensor.
    pub(super) fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, ModelError> {
        Ok(self.weights.read(tensor)?)
    }

    /// Returns the shape of a tensor, if the file holds one with this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.weights.tensor(name).map(|tensor| tensor.shape)
    }

    /// Returns whether the file holds a tensor with this name.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.weights.tensor(name).is_some()
    }

    /// Returns the naming scheme of the tensors.
    pub(super) fn naming(&self) -> Naming {
        self.naming
    }

    /// Returns the name prefixes of multi-token prediction layers, which are not computed.
    pub(super) fn prediction_layers(&self) -> Vec<String> {
        let first = self.config.layers.len();
        let layers = first..first + self.config.prediction_layers;
        layers.map(|layer| self.layer_prefix(layer)).collect()
    }

    /// Returns the name of the token embedding.
    pub(super) fn embedding_name(&self) -> String {
        match self.naming {
            Naming::Gguf => "token_embd.weight".to_owned(),
            Naming::HuggingFace { prefix } => {
                let name = self.config.architecture.storage.embedding;
                format!("{prefix}{name}.weight")
            }
        }
    }

    /// Returns the name of the output projection, or `None` if it is the embedding.
    ///
    /// # Errors
    /// [`ModelError::MissingHead`] if the file holds none and the model is not tied.
    pub(super) fn output_name(&self) -> Result<Option<&'static str>, ModelError> {
        let names: &[&str] = match self.naming {
            Naming::Gguf => &["output.weight"],
            Naming::HuggingFace { .. } => &["lm_head.weight", "language_model.lm_head.weight"],
        };
        match names.iter().find(|name| self.holds(name)) {
            Some(name) => Ok(Some(name)),
            None if self.tied || self.is_bare() => Ok(None),
            None => Err(ModelError::MissingHead {
                name: names[0].to_owned(),
            }),
        }
    }

    /// Returns what precedes the names of the tensors of the model itself, without its heads.
    pub fn prefix(&self) -> &'static str {
        match self.naming {
            Naming::Gguf => "",
            Naming::HuggingFace { prefix } => prefix,
        }
    }

    /// Returns whether the file was saved without an output projection.
    fn is_bare(&self) -> bool {
        self.naming == (Naming::HuggingFace { prefix: "" })
    }

    /// Returns whether the model can generate tokens: it is no encoder, and has an output
    /// projection.
    pub fn generates(&self) -> bool {
        let has_head = || self.tied || matches!(self.output_name(), Ok(Some(_)));
        self.config.is_causal() && has_head()
    }

    /// Limits the length of texts to `tokens`.
    pub fn limit_context(&mut self, tokens: usize) {
        self.config.context = self.config.context.min(tokens);
    }

    /// Reads a tensor of floating-point numbers as float32.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::WrongShape`] or [`ModelError::WrongFormat`] if
    /// there is none with this name, this shape and a floating-point format.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        require_shape(&tensor, shape)?;
        self.all_numbers(&tensor)
    }

    /// Returns the name of the norm before the output projection.
    pub(super) fn final_norm_name(&self) -> String {
        let name = self.config.architecture.storage.final_norm;
        match self.naming {
            Naming::Gguf => format!("{}.weight", name.gguf),
            Naming::HuggingFace { prefix } => format!("{prefix}{}.weight", name.huggingface),
        }
    }

    /// Reads the token embedding.
    pub(super) fn embedding(&self) -> Result<StoredLinear<'_>, ModelError> {
        let (rows, columns) = (self.config.vocabulary, self.config.hidden);
        let rows = self.matrix(&self.embedding_name(), rows, columns)?;
        Ok(StoredLinear::new(vec![rows]))
    }

    /// Reads the output projection. `None` if it is the embedding: because the file holds none, or
    /// because a checkpoint whose settings tie it holds a copy of the embedding. A tensor that
    /// differs from the embedding is used even if the settings tie it.
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

    /// Reads the weight of the norm before the output projection, if there is one.
    pub(super) fn final_norm(&self) -> Result<Option<Vec<f32>>, ModelError> {
        match self.config.has_final_norm() {
            true => {
                let weight = self.norm_weight(&self.final_norm_name(), self.config.hidden)?;
                Ok(Some(weight))
            }
            false => Ok(None),
        }
    }

    /// Reads the weight of a norm of a layer.
    pub(super) fn norm(
        &self,
        layer: usize,
        part: Part,
        length: usize,
    ) -> Result<Vec<f32>, ModelError> {
        self.norm_weight(&self.name(layer, part), length)
    }

    /// Reads the query, key and value projections of a layer, stacked; only the query projection if
    /// the layer shares a cache.
    pub(super) fn qkv(
        &self,
        layer: usize,
        attention: &Attention,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let (heads, hidden) = (attention.heads, self.config.hidden);
        let (q, kv) = (heads.q_columns(), heads.kv_heads * heads.head_dim);
        if self.fuses_qkv(layer) {
            return self.linear(layer, &[(Part::FusedQkv, q + 2 * kv)], hidden);
        }
        let value = match attention.keys_are_values {
            true => Part::Key,
            false => Part::Value,
        };
        let parts = [(Part::Query, q), (Part::Key, kv), (value, kv)];
        let own = match attention.shares {
            Some(_) => 1,
            None => 3,
        };
        let mut qkv = self.linear(layer, &parts[..own], hidden)?;
        if let Some(order) = self.rope_order(layer) {
            qkv.order_first(2, order);
        }
        Ok(qkv)
    }

    /// Reads the query, key and value projections, stacked, of a layer whose attention has a gate,
    /// and the projection to that gate. In the query tensor, the gate rows of each head follow its
    /// query rows.
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

    /// Returns the order in which the query and key rows of a layer are stored, or `None` if it is
    /// the order in which they are used. Without rotation, the order does not matter.
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

    /// Returns whether the query, key and value projections of a layer are read from one tensor.
    pub(super) fn fuses_qkv(&self, layer: usize) -> bool {
        // A fused tensor would have to be split to undo the interleaving of its queries and keys.
        self.rope_order(layer).is_none() && self.holds(&self.name(layer, Part::FusedQkv))
    }

    /// Reads the attention output projection, which has `columns` inputs.
    pub(super) fn attention_out(
        &self,
        layer: usize,
        columns: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::AttentionOut, self.config.hidden)], columns)
    }

    /// Reads the gate and up projections of a dense layer, stacked, or only the up projection if
    /// the activation has no gate.
    pub(super) fn gate_up(
        &self,
        layer: usize,
        width: usize,
        activation: Activation,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let parts = self.gate_up_parts(layer, GateUp::DENSE, activation, width);
        self.linear(layer, &parts, self.config.hidden)
    }

    /// Returns the tensors in which the file stores the gate and up projections of a layer, each
    /// with its number of rows.
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

    /// Reads the down projection of a dense layer.
    pub(super) fn down(&self, layer: usize, width: usize) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::Down, self.config.hidden)], width)
    }

    /// Reads the attention sinks, one per query head.
    pub(super) fn sinks(&self, layer: usize, heads: HeadShape) -> Result<Vec<f32>, ModelError> {
        self.vector(&self.name(layer, Part::Sinks), heads.q_heads)
    }

    /// Reads the weights of a layer's convolution, `[taps, channels]`.
    pub(super) fn convolution(
        &self,
        layer: usize,
        channels: usize,
        taps: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let name = self.name(layer, Part::Convolution);
        let tensor = self.tensor(&name)?;
        // Hugging Face checkpoints have a dimension of size 1 for input channels.
        if tensor.shape != [channels, 1, taps] && tensor.shape != [channels, taps] {
            return Err(ModelError::WrongShape {
                name,
                found: tensor.shape.to_vec(),
                expected: vec![channels, taps],
            });
        }
        let by_channel = self.all_numbers(&tensor)?;
        let taps = (0..taps).map(|tap| by_channel.iter().skip(tap).step_by(taps));
        Ok(taps.flatten().copied().collect())
    }

    /// Reads the bias of a layer's convolution, one number per channel.
    pub(super) fn convolution_bias(
        &self,
        layer: usize,
        channels: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let weight = self.name(layer, Part::Convolution);
        self.vector(&names::bias(&weight), channels)
    }

    /// Reads the router of a mixture of experts.
    pub(super) fn router(
        &self,
        layer: usize,
        experts: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::Router, experts)], self.config.hidden)
    }

    /// Returns the prefix of the names of all tensors of a layer.
    pub(super) fn layer_prefix(&self, layer: usize) -> String {
        match self.naming {
            Naming::Gguf => format!("blk.{layer}."),
            Naming::HuggingFace { prefix } => {
                let layers = self.config.architecture.storage.layers;
                format!("{prefix}{layers}.{layer}.")
            }
        }
    }

    /// Returns the name of the weight of a part of a layer.
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

    /// Reads a linear layer from stacked parts, each given with its number of rows, and their
    /// biases. If only some parts have a bias, that of the others is 0.
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

    /// Returns whether a part has a bias: according to the model's settings or, where they do not
    /// say, if the file holds a tensor with this name. A bias that the settings require must be in
    /// the file.
    pub(super) fn has_bias(&self, part: Part, name: &str) -> bool {
        let biases = self.config.biases;
        let said = match part {
            Part::Query | Part::Key | Part::Value | Part::FusedQkv => biases.qkv,
            Part::QueryDown | Part::LatentDown => biases.qkv,
            // No model has biases on projections from a latent, or on these queries.
            Part::QueryUp | Part::LatentQuery | Part::LatentUp => Some(false),
            Part::LatentKeys | Part::LatentValues => Some(false),
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
    ///
    /// # Errors
    /// [`ModelError::WrongShape`] unless its shape is `[rows, columns]`.
    pub(super) fn rows(
        &self,
        tensor: &TensorView<'_>,
        rows: usize,
        columns: usize,
    ) -> Result<StoredRows<'_>, ModelError> {
        require_shape(tensor, &[rows, columns])?;
        Ok(StoredRows {
            dtype: tensor.dtype,
            rows,
            columns,
            data: self.weights.read(tensor)?,
            order: RowOrder::AsStored,
        })
    }

    pub(super) fn norm_weight(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
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

    /// Reads a vector of floating-point numbers as float32.
    ///
    /// # Errors
    /// [`ModelError::WrongShape`] or [`ModelError::WrongFormat`] if it is not such a vector of this
    /// length.
    pub(super) fn numbers(
        &self,
        tensor: &TensorView<'_>,
        length: usize,
    ) -> Result<Vec<f32>, ModelError> {
        require_shape(tensor, &[length])?;
        self.all_numbers(tensor)
    }

    /// Reads a tensor of floating-point numbers of any shape as float32.
    ///
    /// # Errors
    /// [`ModelError::WrongFormat`] if it has another format.
    fn all_numbers(&self, tensor: &TensorView<'_>) -> Result<Vec<f32>, ModelError> {
        if !tensor.dtype.is_float() {
            return Err(ModelError::WrongFormat {
                name: tensor.name.to_owned(),
                found: tensor.dtype.to_string(),
                expected: "F32, F16 or BF16",
            });
        }
        let mut values = vec![0.0; tensor.shape.iter().product()];
        quant::dequantize(tensor.dtype, &self.weights.read(tensor)?, &mut values);
        Ok(values)
    }
}

/// Fails with [`ModelError::WrongShape`] unless a tensor has this shape.
pub(super) fn require_shape(tensor: &TensorView<'_>, shape: &[usize]) -> Result<(), ModelError> {
    match tensor.shape == shape {
        true => Ok(()),
        false => Err(ModelError::WrongShape {
            name: tensor.name.to_owned(),
            found: tensor.shape.to_vec(),
            expected: shape.to_vec(),
        }),
    }
}
