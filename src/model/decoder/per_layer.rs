//! Inputs of single layers: embeddings of the tokens for each layer, and projections of their
//! usual embeddings, which come into the residual stream through a gate after the layer.

use super::weights::{LayerInputWeights, LayerWeights};
use super::workspace::{InputSpace, Workspace};
use crate::device::{Device, DeviceError};
use crate::model::layer::PerLayerInputs;
use crate::model::{ModelConfig, ModelError, ModelSource};
use std::f32::consts::FRAC_1_SQRT_2;

/// What belongs to no layer.
pub(super) struct InputWeights<D: Device> {
    inputs: PerLayerInputs,
    /// The embeddings, all layers in one row.
    table: D::Linear,
    /// The projection of the usual embeddings.
    projection: D::Linear,
    /// The norm of what the projection gives for one layer, times the factor on the sum.
    norm: D::Vector,
    /// Added to the mean square in that norm.
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
            // The projection is divided by the root of the hidden size before the norm, which is
            // the same as a larger epsilon.
            epsilon: config.norm_epsilon * config.hidden as f32,
        }))
    }

    /// Computes the inputs of all layers. The residual stream holds the usual embeddings.
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
        // Half of the mean square is the table's, and half the projection's.
        let scale = (self.inputs.width as f32).sqrt() * FRAC_1_SQRT_2;
        device.embed_within(&self.table, scale, inputs)?;
        device.linear(residual, &self.projection, rows, projected)?;
        device.rms_norm_add(projected, &self.norm, self.epsilon, rows, inputs)
    }
}

/// Computes what the input of a layer adds to the residual stream, in `delta`, from the residual
/// stream itself or what stands for it.
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

/// Adds a layer's own input to the residual stream, and multiplies that by the layer's factor.
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
