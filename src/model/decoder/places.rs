//! The input of encoders of the BERT family on a device.

use super::norm::Norm;
use super::workspace::Workspace;
use crate::device::{Device, DeviceError};
use crate::model::{ModelError, ModelSource};

/// The embeddings of positions and segments, and the norm of their sum with those of tokens.
pub(super) struct PlaceWeights<D: Device> {
    places: D::Vector,
    segments: usize,
    /// Weight and bias.
    norm: [D::Vector; 2],
}

impl<D: Device> PlaceWeights<D> {
    /// Loads the weights, if the model has them.
    pub(super) fn load(source: &ModelSource, device: &mut D) -> Result<Option<Self>, ModelError> {
        let Some(places) = source.config().places else {
            return Ok(None);
        };
        let [weight, bias] = source.place_norm()?;
        Ok(Some(Self {
            places: device.load_vector(&source.places(places)?)?,
            segments: places.segments,
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
        device.embed_places(table, &self.places, self.segments, residual)?;
        let [weight, bias] = &self.norm;
        device.add_layer_norm(residual, None, [weight, bias], norm.epsilon, rows, normed)
    }
}
