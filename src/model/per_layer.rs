//! The tensors of what layers have beside a mixer and a feed-forward part: inputs of their own, and
//! factors.

use super::layer::PerLayerInputs;
use super::names::Part;
use super::stored::StoredLinear;
use super::tensors::Naming;
use super::{ModelError, ModelSource};
use crate::weights::TensorView;

/// The tensors of per-layer inputs that belong to no layer, each for all layers together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PerLayerPart {
    /// The embeddings.
    Table,
    /// The projection of the tokens' usual embeddings.
    Projection,
    /// The norm of what the projection gives, the same for all layers.
    Norm,
}

impl PerLayerPart {
    pub(super) const ALL: [Self; 3] = [Self::Table, Self::Projection, Self::Norm];

    /// The name in a Hugging Face checkpoint, after its prefix.
    pub(super) fn huggingface(self) -> &'static str {
        match self {
            Self::Table => "embed_tokens_per_layer.weight",
            Self::Projection => "per_layer_model_projection.weight",
            Self::Norm => "per_layer_projection_norm.weight",
        }
    }
}

impl ModelSource {
    /// The name of a tensor of per-layer inputs that belongs to no layer.
    pub(super) fn per_layer_name(&self, part: PerLayerPart) -> String {
        match (self.naming(), part) {
            (Naming::HuggingFace { prefix }, part) => prefix.to_owned() + part.huggingface(),
            (Naming::Gguf, PerLayerPart::Table) => "per_layer_token_embd.weight".to_owned(),
            (Naming::Gguf, PerLayerPart::Projection) => "per_layer_model_proj.weight".to_owned(),
            (Naming::Gguf, PerLayerPart::Norm) => "per_layer_proj_norm.weight".to_owned(),
        }
    }

    /// The embeddings of the inputs, all layers in one row.
    pub(super) fn per_layer_table(
        &self,
        inputs: PerLayerInputs,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let columns = self.config().layers.len() * inputs.width;
        let name = self.per_layer_name(PerLayerPart::Table);
        let rows = self.matrix(&name, inputs.vocabulary, columns)?;
        Ok(StoredLinear::new(vec![rows]))
    }

    /// The projection of a token's usual embedding to the inputs of all layers.
    pub(super) fn per_layer_model_projection(
        &self,
        inputs: PerLayerInputs,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let rows = self.config().layers.len() * inputs.width;
        let name = self.per_layer_name(PerLayerPart::Projection);
        let rows = self.matrix(&name, rows, self.config().hidden)?;
        Ok(StoredLinear::new(vec![rows]))
    }

    /// The norm of what that projection gives for one layer.
    pub(super) fn per_layer_model_norm(
        &self,
        inputs: PerLayerInputs,
    ) -> Result<Vec<f32>, ModelError> {
        self.norm_weight(&self.per_layer_name(PerLayerPart::Norm), inputs.width)
    }

    /// The name of the projection of the embeddings to a residual stream or, at the end, of a
    /// stream to the output. There is none for the first stream. No GGUF file has them.
    pub(super) fn stream_projection_name(&self, stream: usize, is_begin: bool) -> String {
        let prefix = match self.naming() {
            Naming::HuggingFace { prefix } => prefix,
            Naming::Gguf => "",
        };
        let name = match is_begin {
            true => "altup_projections",
            false => "altup_unembed_projections",
        };
        format!("{prefix}{name}.{}.weight", stream - 1)
    }

    /// That projection.
    pub(super) fn stream_projection(
        &self,
        stream: usize,
        is_begin: bool,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let hidden = self.config().hidden;
        let name = self.stream_projection_name(stream, is_begin);
        Ok(StoredLinear::new(vec![self.matrix(&name, hidden, hidden)?]))
    }

    /// The weights that make factors of residual streams of a router's outputs, one for each stream.
    pub(super) fn stream_factors(
        &self,
        layer: usize,
        part: Part,
        [rows, streams]: [usize; 2],
    ) -> Result<Vec<f32>, ModelError> {
        let name = self.name(layer, part);
        let tensor = self.tensor(&name)?;
        if tensor.shape != [rows, streams] {
            return Err(ModelError::WrongShape {
                name,
                found: tensor.shape.to_vec(),
                expected: vec![rows, streams],
            });
        }
        let flat = TensorView {
            shape: &[rows * streams],
            ..tensor
        };
        self.numbers(&flat, rows * streams)
    }

    /// The factor on the residual stream after a layer.
    pub(super) fn layer_scale(&self, layer: usize) -> Result<f32, ModelError> {
        Ok(self.vector(&self.name(layer, Part::LayerScale), 1)?[0])
    }

    /// The gate of a layer's input, and the projection of the gated input.
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
