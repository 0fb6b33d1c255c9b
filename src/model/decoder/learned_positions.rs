//! The input of encoders of the BERT family on a device.

use super::norm::Norm;
use super::workspace::Workspace;
use crate::device::{Device, DeviceError};
use crate::model::{ModelError, ModelSource};

/// The embeddings of positions and segments, and the norm of their sum with those of tokens.
pub(super) struct PositionWeights<D: Device> {
    /// What is added to token embeddings, by segment and position.
    added: D::Vector,
    segments: usize,
    /// Weight and bias.
    norm: [D::Vector; 2],
}

impl<D: Device> PositionWeights<D> {
    /// Loads the weights, if the model has them.
    pub(super) fn load(source: &ModelSource, device: &mut D) -> Result<Option<Self>, ModelError> {
        let Some(positions) = source.config().learned_positions else {
            return Ok(None);
        };
        let [weight, bias] = source.position_norm()?;
        Ok(Some(Self {
            added: device.load_vector(&source.position_sums(positions)?)?,
            segments: positions.segments,
            norm: [device.load_vector(&weight)?, device.load_vector(&bias)?],
        }))
    }

    /// Computes the input of the first layer in `residual` and in `normed`.
    pub(super) fn embed(
        &self,
        device: &mut D,
        table: &D::Linear,
        norm: Norm,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual, normed, ..
        } = workspace;
        device.embed_positions(table, &self.added, self.segments, residual)?;
        let [weight, bias] = &self.norm;
        device.add_layer_norm(residual, None, [weight, bias], norm.epsilon, rows, normed)
    }
}
