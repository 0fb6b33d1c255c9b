//! Several residual streams, of which each layer computes only the active one (AltUp), and low-rank
//! paths beside the attention (LAuReL). All streams are predicted before a layer, and corrected
//! after it by what the layer did to the active stream.
//!
//! Baykal et al., *Alternating Updates for Efficient Transformers*, 2023.

use super::per_layer::gated_input;
use super::weights::LayerInputWeights;
use super::workspace::{StreamSpace, Workspace};
use crate::device::{Device, DeviceError};
use crate::model::layer::Streams;
use crate::model::names::Part;
use crate::model::{ModelConfig, ModelError, ModelSource};

/// Lower bound of a projected stream's mean square where the stream is scaled.
const FLOOR: f32 = 1e-5;

/// The weights of the streams that all layers share.
pub(super) struct StreamWeights<D: Device> {
    /// Projections of the token embeddings, one for each stream but the first.
    begin: Vec<D::Linear>,
    /// Projections of the streams after the last layer, one for each stream but the first.
    end: Vec<D::Linear>,
}

impl<D: Device> StreamWeights<D> {
    pub(super) fn load(source: &ModelSource, device: &mut D) -> Result<Option<Self>, ModelError> {
        let Some(streams) = source.config().streams else {
            return Ok(None);
        };
        let mut load = |is_begin: bool| {
            let projections = (1..streams.count).map(|stream| {
                let stored = source.stream_projection(stream, is_begin)?;
                Ok(device.load_linear(&stored.spec())?)
            });
            projections.collect::<Result<Vec<_>, ModelError>>()
        };
        Ok(Some(Self {
            begin: load(true)?,
            end: load(false)?,
        }))
    }

    /// Computes the initial streams from the token embeddings, which the residual stream holds.
    pub(super) fn begin(
        &self,
        device: &mut D,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual, streams, ..
        } = workspace;
        let Some((first, others)) = streams
            .as_mut()
            .and_then(|all| all.current.split_first_mut())
        else {
            return Ok(());
        };
        device.copy(residual, rows, first)?;
        for (projection, stream) in self.begin.iter().zip(others) {
            device.linear(residual, projection, rows, stream)?;
            device.match_magnitude(stream, residual, FLOOR, rows)?;
        }
        Ok(())
    }

    /// Projects the streams, and writes their mean to the residual stream.
    pub(super) fn end(
        &self,
        device: &mut D,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            delta,
            streams,
            ..
        } = workspace;
        let Some((first, others)) = streams.as_ref().and_then(|all| all.current.split_first())
        else {
            return Ok(());
        };
        device.copy(first, rows, residual)?;
        for (projection, stream) in self.end.iter().zip(others) {
            device.linear(stream, projection, rows, delta)?;
            device.match_magnitude(delta, first, FLOOR, rows)?;
            device.add(residual, delta, rows)?;
        }
        device.scale(residual, 1.0 / (1 + others.len()) as f32, rows)
    }
}

/// Loads the matrix of one part of a layer.
fn load_linear<D: Device>(
    source: &ModelSource,
    device: &mut D,
    layer: usize,
    part: (Part, usize),
    columns: usize,
) -> Result<D::Linear, ModelError> {
    let stored = source.linear(layer, &[part], columns)?;
    Ok(device.load_linear(&stored.spec())?)
}

/// The weights with which a layer predicts and corrects the streams.
pub(super) struct LayerStreams<D: Device> {
    spec: Streams,
    router: D::Linear,
    /// Weight of the norm on the router's input, divided by the hidden size.
    router_norm: D::Vector,
    /// Weights from the router's outputs to the factors of the prediction,
    /// `[count · count, count]`, where `count` is the number of streams.
    prediction: D::Vector,
    /// Weights from the router's outputs to the factors of the correction, `[count, count]`.
    correction: D::Vector,
    /// Factors on the active stream, one per column, where it gates the layer's own input; `None`
    /// if there are none.
    scale: Option<D::Vector>,
    /// Value added to the mean square in norms.
    epsilon: f32,
}

impl<D: Device> LayerStreams<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
    ) -> Result<Option<Self>, ModelError> {
        let config = source.config();
        let Some(spec) = config.streams else {
            return Ok(None);
        };
        let (count, hidden) = (spec.count, config.hidden);
        let router = load_linear(source, device, layer, (Part::StreamRouter, count), hidden)?;
        let mut factors = |part: Part, rows: usize| {
            let weights = source.stream_factors(layer, part, [rows, count])?;
            Ok::<_, ModelError>(device.load_vector(&weights)?)
        };
        let prediction = factors(Part::StreamPrediction, count * count)?;
        let correction = factors(Part::StreamCorrection, count)?;
        let mut router_norm = source.norm(layer, Part::StreamRouterNorm, hidden)?;
        let divisor = hidden as f32;
        router_norm.iter_mut().for_each(|weight| *weight /= divisor);
        let scale = match spec.scales_output {
            true => {
                let name = source.name(layer, Part::StreamScale);
                Some(device.load_vector(&source.vector(&name, hidden)?)?)
            }
            false => None,
        };
        Ok(Some(Self {
            spec,
            router,
            router_norm: device.load_vector(&router_norm)?,
            prediction,
            correction,
            scale,
            epsilon: config.norm_epsilon,
        }))
    }

    /// Computes the router's outputs for `from`, through a hyperbolic tangent, in `routed`.
    fn route(
        &self,
        device: &mut D,
        rows: usize,
        from: &D::Tensor,
        (normed, routed): (&mut D::Tensor, &mut D::Tensor),
    ) -> Result<(), DeviceError> {
        device.rms_norm(from, &self.router_norm, self.epsilon, rows, normed)?;
        device.linear(normed, &self.router, rows, routed)?;
        device.softcap(routed, 1.0, rows)
    }

    /// Predicts the streams, and copies the prediction of the active one to the residual stream.
    pub(super) fn predict(
        &self,
        device: &mut D,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            streams,
            ..
        } = workspace;
        let Some(space) = streams else { return Ok(()) };
        let StreamSpace {
            current,
            predicted,
            routed,
        } = space;
        let active = self.spec.active;
        self.route(device, rows, &current[active], (normed, routed))?;
        device.mix_streams(current, routed, &self.prediction, rows, predicted)?;
        device.copy(&predicted[active], rows, residual)
    }

    /// Corrects the predicted streams by the layer's result for the active one, which the residual
    /// stream holds, and adds the layer's own input to all streams but the first.
    pub(super) fn correct(
        &self,
        device: &mut D,
        config: &ModelConfig,
        (index, input): (usize, Option<&LayerInputWeights<D>>),
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            delta,
            inputs,
            streams,
            ..
        } = workspace;
        let Some(space) = streams else { return Ok(()) };
        let StreamSpace {
            current,
            predicted,
            routed,
        } = space;
        let active = self.spec.active;
        self.route(device, rows, residual, (normed, routed))?;
        let factors = (&*routed, &self.correction);
        device.correct_streams(residual, factors, active, rows, predicted)?;
        if let (Some(input), Some(inputs)) = (input, inputs) {
            match &self.scale {
                Some(scale) => device.multiply(&predicted[active], scale, rows, normed)?,
                None => device.copy(&predicted[active], rows, normed)?,
            }
            let to = (inputs, &mut *delta);
            gated_input(device, config, (index, input), rows, normed, to)?;
            for stream in &mut predicted[1..] {
                device.rms_norm_add(delta, &input.norm, self.epsilon, rows, stream)?;
            }
        }
        std::mem::swap(current, predicted);
        Ok(())
    }
}

/// A learned low-rank path beside the attention (LAuReL): the product of two matrices and the
/// attention's input, which is then normalised.
pub(super) struct SidePath<D: Device> {
    left: D::Linear,
    right: D::Linear,
    norm: D::Vector,
}

impl<D: Device> SidePath<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
    ) -> Result<Option<Self>, ModelError> {
        let config = source.config();
        let Some(rank) = config.layers[layer].side_rank else {
            return Ok(None);
        };
        let hidden = config.hidden;
        let mut linear =
            |part, rows, columns| load_linear(source, device, layer, (part, rows), columns);
        let left = linear(Part::SideLeft, rank, hidden)?;
        let right = linear(Part::SideRight, hidden, rank)?;
        let norm = source.norm(layer, Part::SideNorm, hidden)?;
        Ok(Some(Self {
            left,
            right,
            norm: device.load_vector(&norm)?,
        }))
    }

    /// Adds the path and its input to the residual stream after the attention, and divides the
    /// stream by the root of 2. `normed` must hold the attention's input.
    pub(super) fn add(
        &self,
        device: &mut D,
        epsilon: f32,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            delta,
            side,
            ..
        } = workspace;
        let Some(side) = side else { return Ok(()) };
        device.linear(normed, &self.left, rows, side)?;
        device.linear(side, &self.right, rows, delta)?;
        device.add(residual, normed, rows)?;
        device.rms_norm_add(delta, &self.norm, epsilon, rows, residual)?;
        device.scale(residual, std::f32::consts::FRAC_1_SQRT_2, rows)
    }
}
