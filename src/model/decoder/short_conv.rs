//! Layers whose mixer is a gated convolution.

use super::layer_step::LayerStep;
use super::workspace::Workspace;
use crate::device::{ConvInput, ConvSpec, Device, DeviceError};
use crate::model::layer::ShortConv;
use crate::model::names::Part;
use crate::model::{ModelError, ModelSource};

/// The weights of a gated convolution.
pub(super) struct ShortConvWeights<D: Device> {
    spec: ShortConv,
    /// Projection to `[b | c | x]`; see [`ConvInput::Gated`].
    input: D::Linear,
    taps: D::Vector,
    bias: Option<D::Vector>,
    output: D::Linear,
}

/// Activations of a gated convolution.
pub(super) struct ShortConvSpace<T> {
    /// `[b | c | x]`, with one column per channel each.
    pub(super) input: T,
    pub(super) output: T,
}

impl<D: Device> ShortConvWeights<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
        spec: ShortConv,
    ) -> Result<Self, ModelError> {
        let hidden = source.config().hidden;
        let input = source.linear(layer, &[(Part::ConvInput, 3 * hidden)], hidden)?;
        let output = source.linear(layer, &[(Part::ConvOutput, hidden)], hidden)?;
        let taps = source.convolution(layer, hidden, spec.taps)?;
        let bias = match spec.has_bias {
            true => Some(source.convolution_bias(layer, hidden)?),
            false => None,
        };
        let bias = bias.map(|bias| device.load_vector(&bias));
        Ok(Self {
            spec,
            input: device.load_linear(&input.spec())?,
            taps: device.load_vector(&taps)?,
            bias: bias.transpose()?,
            output: device.load_linear(&output.spec())?,
        })
    }
}

impl LayerStep<'_> {
    pub(super) fn short_conv<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        weights: &ShortConvWeights<D>,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let Workspace {
            normed,
            delta,
            short_conv: Some(space),
            ..
        } = workspace
        else {
            unreachable!("the workspace is allocated for the layers that there are")
        };
        let spec = ConvSpec {
            channels: self.state[0].elements / (weights.spec.taps - 1),
            taps: weights.spec.taps,
            input: ConvInput::Gated,
            silu: false,
        };
        device.linear(normed, &weights.input, self.rows, &mut space.input)?;
        let (input, output) = (&space.input, &mut space.output);
        let taps = (&weights.taps, weights.bias.as_ref());
        device.short_conv(input, &spec, taps, cache, self.state[0], output)?;
        device.linear(output, &weights.output, self.rows, delta)
    }
}
