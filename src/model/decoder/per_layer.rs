//! Per-layer inputs (Gemma 3n): each layer has an input of its own, the sum of a token embedding
//! for that layer and a projection of the usual token embedding. It is gated and added to the
//! residual stream after the layer.

use super::weights::{LayerInputWeights, LayerWeights};
use super::workspace::{InputSpace, Workspace};
use crate::device::{Device, DeviceError};
use crate::model::layer::PerLayerInputs;
use crate::model::{ModelConfig, ModelError, ModelSource};
use std::f32::consts::FRAC_1_SQRT_2;

/// The weights of per-layer inputs that all layers share.
pub(super) struct InputWeights<D: Device> {
    inputs: PerLayerInputs,
    /// The token embeddings; a row holds those of all layers.
    table: D::Linear,
    /// Projection of the usual token embeddings to the inputs of all layers.
    projection: D::Linear,
    /// Weight of the norm of the projection's result for one layer, multiplied by the factor on the
    /// sum of embedding and projection.
    norm: D::Vector,
    /// Value added to the mean square in that norm.
    epsilon: f32,
}

impl<D: Device> InputWeights<D> {
    pub(super) fn load(source: &ModelSource, device: &mut D) -> Result<Option<Self>, ModelError> {
        let config = source.config();
        let Some(inputs) = config.per_layer_inputs else {
            return Ok(None);
        };
        let mut norm = source.per_layer_model_norm(inputs)?;
        norm.iter_mut().for_each(|weight| *weight *= FRAC_1_SQRT_2);
        Ok(Some(Self {
            inputs,
            table: device.load_linear(&source.per_layer_table(inputs)?.spec())?,
            projection: device.load_linear(&source.per_layer_model_projection(inputs)?.spec())?,
            norm: device.load_vector(&norm)?,
            // The model divides the projection by the root of the hidden size before the norm.
            // Multiplying epsilon by the hidden size has the same effect.
            epsilon: config.norm_epsilon * config.hidden as f32,
        }))
    }

    /// Computes the inputs of all layers. The residual stream must hold the usual token embeddings.
    pub(super) fn compute(
        &self,
        device: &mut D,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual, inputs, ..
        } = workspace;
        let Some(InputSpace {
            inputs, projected, ..
        }) = inputs
        else {
            return Ok(());
        };
        // The embeddings are scaled by the root of the width, and their sum with the projection by
        // the root of 1/2.
        let scale = (self.inputs.width as f32).sqrt() * FRAC_1_SQRT_2;
        device.embed_within(&self.table, scale, inputs)?;
        device.linear(residual, &self.projection, rows, projected)?;
        device.rms_norm_add(projected, &self.norm, self.epsilon, rows, inputs)
    }
}

/// Computes the gated and projected input of a layer in `delta`, which the caller normalises and
/// adds to the residual stream. The gate is projected from `from`: the residual stream or, if there
/// are several streams, the active one.
pub(super) fn gated_input<D: Device>(
    device: &mut D,
    config: &ModelConfig,
    (index, weights): (usize, &LayerInputWeights<D>),
    rows: usize,
    from: &D::Tensor,
    (space, delta): (&mut InputSpace<D::Tensor>, &mut D::Tensor),
) -> Result<(), DeviceError> {
    let Some(spec) = config.per_layer_inputs else {
        return Ok(());
    };
    let InputSpace { inputs, gate, .. } = space;
    device.linear(from, &weights.gate, rows, gate)?;
    device.gate_columns(gate, spec.activation, inputs, index * spec.width, rows)?;
    device.linear(gate, &weights.projection, rows, delta)
}

/// Adds a layer's own input to the residual stream and multiplies the stream by the layer's factor,
/// if the layer has them.
pub(super) fn own_input<D: Device>(
    device: &mut D,
    config: &ModelConfig,
    (index, layer): (usize, &LayerWeights<D>),
    rows: usize,
    workspace: &mut Workspace<D::Tensor>,
) -> Result<(), DeviceError> {
    let Workspace {
        residual,
        delta,
        inputs,
        ..
    } = workspace;
    if let (Some(weights), Some(space)) = (&layer.input, inputs) {
        let to = (space, &mut *delta);
        gated_input(device, config, (index, weights), rows, residual, to)?;
        let epsilon = config.norm_epsilon;
        device.rms_norm_add(delta, &weights.norm, epsilon, rows, residual)?;
    }
    match layer.scale {
        Some(scale) => device.scale(residual, scale, rows),
        None => Ok(()),
    }
}
