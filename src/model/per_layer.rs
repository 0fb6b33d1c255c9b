//! Reads the tensors that layers have besides a mixer and a feed-forward part: those of per-layer
//! inputs, of residual streams, and of factors on the residual stream.

use super::layer::PerLayerInputs;
use super::names::Part;
use super::stored::StoredLinear;
use super::tensors::Naming;
use super::{ModelError, ModelSource};

/// Tensors of per-layer inputs that belong to no single layer, but serve all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PerLayerPart {
    /// Embeddings of the per-layer inputs.
    Table,
    /// Projection of the token embeddings to the per-layer inputs.
    Projection,
    /// Norm of the projection's output, the same for all layers.
    Norm,
}

impl PerLayerPart {
    pub(super) const ALL: [Self; 3] = [Self::Table, Self::Projection, Self::Norm];

    /// Returns the name in a Hugging Face checkpoint, after its prefix.
    pub(super) fn huggingface(self) -> &'static str {
        match self {
            Self::Table => "embed_tokens_per_layer.weight",
            Self::Projection => "per_layer_model_projection.weight",
            Self::Norm => "per_layer_projection_norm.weight",
        }
    }
}

impl ModelSource {
    /// Returns the name of a tensor of per-layer inputs that belongs to no single layer.
    pub(super) fn per_layer_name(&self, part: PerLayerPart) -> String {
        match (self.naming(), part) {
            (Naming::HuggingFace { prefix }, part) => prefix.to_owned() + part.huggingface(),
            (Naming::Gguf, PerLayerPart::Table) => "per_layer_token_embd.weight".to_owned(),
            (Naming::Gguf, PerLayerPart::Projection) => "per_layer_model_proj.weight".to_owned(),
            (Naming::Gguf, PerLayerPart::Norm) => "per_layer_proj_norm.weight".to_owned(),
        }
    }

    /// Reads the embeddings of the per-layer inputs: one row per token, with the inputs of all
    /// layers one after the other.
    pub(super) fn per_layer_table(
        &self,
        inputs: PerLayerInputs,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let columns = self.config().layers.len() * inputs.width;
        let name = self.per_layer_name(PerLayerPart::Table);
        let rows = self.matrix(&name, inputs.vocabulary, columns)?;
        Ok(StoredLinear::new(vec![rows]))
    }

    /// Reads the projection of a token's embedding to the inputs of all layers.
    pub(super) fn per_layer_model_projection(
        &self,
        inputs: PerLayerInputs,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let rows = self.config().layers.len() * inputs.width;
        let name = self.per_layer_name(PerLayerPart::Projection);
        let rows = self.matrix(&name, rows, self.config().hidden)?;
        Ok(StoredLinear::new(vec![rows]))
    }

    /// Reads the weight of the norm of the projection's output for one layer.
    pub(super) fn per_layer_model_norm(
        &self,
        inputs: PerLayerInputs,
    ) -> Result<Vec<f32>, ModelError> {
        self.norm_weight(&self.per_layer_name(PerLayerPart::Norm), inputs.width)
    }

    /// Returns the name of a projection of residual stream `stream`, which must not be the first,
    /// stream 0. If `is_begin`, it projects the embeddings to the stream before the first layer;
    /// otherwise, it projects the stream after the last layer. GGUF files stack those of all
    /// streams.
    pub(super) fn stream_projection_name(&self, stream: usize, is_begin: bool) -> String {
        let prefix = match self.naming() {
            Naming::HuggingFace { prefix } => prefix,
            Naming::Gguf if is_begin => return "altup_proj.weight".to_owned(),
            Naming::Gguf => return "altup_unembd_proj.weight".to_owned(),
        };
        let name = match is_begin {
            true => "altup_projections",
            false => "altup_unembed_projections",
        };
        format!("{prefix}{name}.{}.weight", stream - 1)
    }

    /// Reads the projection that [`ModelSource::stream_projection_name`] names.
    pub(super) fn stream_projection(
        &self,
        stream: usize,
        is_begin: bool,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let hidden = self.config().hidden;
        let name = self.stream_projection_name(stream, is_begin);
        let rows = match self.naming() {
            Naming::HuggingFace { .. } => self.matrix(&name, hidden, hidden)?,
            // The first stream has no projection.
            Naming::Gguf => {
                let streams = self.config().streams.map_or(1, |streams| streams.count);
                self.stacked_rows(&name, stream - 1, [streams - 1, hidden, hidden])?
            }
        };
        Ok(StoredLinear::new(vec![rows]))
    }

    /// Reads the weights, `[rows, streams]`, that turn a router's outputs, one per stream, into
    /// `rows` factors on residual streams.
    pub(super) fn stream_factors(
        &self,
        layer: usize,
        part: Part,
        [rows, streams]: [usize; 2],
    ) -> Result<Vec<f32>, ModelError> {
        self.floats(&self.name(layer, part), &[rows, streams])
    }

    /// Reads the factor on the residual stream after a layer.
    pub(super) fn layer_scale(&self, layer: usize) -> Result<f32, ModelError> {
        Ok(self.vector(&self.name(layer, Part::LayerScale), 1)?[0])
    }

    /// Reads the projection to the gate of a per-layer input, and the projection of the gated
    /// input.
    pub(super) fn per_layer_input(
        &self,
        layer: usize,
        inputs: PerLayerInputs,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let (hidden, width) = (self.config().hidden, inputs.width);
        let gate = self.linear(layer, &[(Part::PerLayerGate, width)], hidden)?;
        let projection = self.linear(layer, &[(Part::PerLayerProjection, hidden)], width)?;
        Ok((gate, projection))
    }
}
