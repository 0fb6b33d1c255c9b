//! Layers whose mixer is a Mamba-2 recurrence.

use super::layer_step::LayerStep;
use super::workspace::Workspace;
use crate::device::{ConvInput, ConvSpec, Device, DeviceError, Mamba2Weights, Precision};
use crate::model::layer::Mamba2;
use crate::model::names::Part;
use crate::model::{ModelError, ModelSource};

/// The weights of a Mamba-2 layer.
pub(super) struct Mamba2LayerWeights<D: Device> {
    spec: Mamba2,
    /// Projection to `[z | x | b | c | dt]`.
    input: D::Linear,
    taps: D::Vector,
    bias: Option<D::Vector>,
    rates: D::Vector,
    skips: D::Vector,
    step_biases: D::Vector,
    norm: D::Vector,
    output: D::Linear,
}

/// Activations of a Mamba-2 layer.
pub(super) struct Mamba2Space<T> {
    projected: T,
    convolved: T,
    output: T,
}

impl<T> Mamba2Space<T> {
    /// Creates each matrix with `make`, which takes its number of columns and its precision.
    pub(super) fn make(
        spec: &Mamba2,
        mut make: impl FnMut(usize, Precision) -> Result<T, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let recurrence = spec.recurrence;
        let mut activation = |columns| make(columns, Precision::Activation);
        Ok(Self {
            projected: activation(recurrence.projected())?,
            convolved: activation(recurrence.channels())?,
            output: activation(recurrence.columns())?,
        })
    }
}

impl<D: Device> Mamba2LayerWeights<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
        spec: Mamba2,
    ) -> Result<Self, ModelError> {
        let (hidden, recurrence) = (source.config().hidden, spec.recurrence);
        device.check_mamba2(&recurrence)?;
        let (columns, channels) = (recurrence.columns(), recurrence.channels());
        let input = [(Part::RecurrentInput, recurrence.projected())];
        let input = source.linear(layer, &input, hidden)?;
        let output = source.linear(layer, &[(Part::RecurrentOutput, hidden)], columns)?;
        let taps = source.convolution(layer, channels, spec.taps)?;
        let bias = match spec.has_conv_bias {
            true => Some(source.convolution_bias(layer, channels)?),
            false => None,
        };
        let bias = bias.map(|bias| device.load_vector(&bias));
        let heads = recurrence.heads;
        let rates = source.decay_rates(layer, heads)?;
        let skips = source.recurrent_vector(layer, Part::Skips, heads)?;
        let step_biases = source.recurrent_vector(layer, Part::StepBiases, heads)?;
        let norm = source.recurrent_vector(layer, Part::RecurrentNorm, columns)?;
        Ok(Self {
            spec,
            input: device.load_linear(&input.spec())?,
            taps: device.load_vector(&taps)?,
            bias: bias.transpose()?,
            rates: device.load_vector(&rates)?,
            skips: device.load_vector(&skips)?,
            step_biases: device.load_vector(&step_biases)?,
            norm: device.load_vector(&norm)?,
            output: device.load_linear(&output.spec())?,
        })
    }
}

impl LayerStep<'_> {
    pub(super) fn mamba2<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        weights: &Mamba2LayerWeights<D>,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let Workspace {
            normed,
            delta,
            mamba2: Some(space),
            ..
        } = workspace
        else {
            unreachable!("the workspace is allocated for the layers that there are")
        };
        let Mamba2Space {
            projected,
            convolved,
            output,
        } = space;
        let (spec, recurrence) = (&weights.spec, &weights.spec.recurrence);
        let conv = ConvSpec {
            channels: recurrence.channels(),
            taps: spec.taps,
            input: ConvInput::Columns(recurrence.columns()),
            silu: true,
        };
        let of_heads = Mamba2Weights {
            rates: &weights.rates,
            skips: &weights.skips,
            step_biases: &weights.step_biases,
        };
        let [conv_state, state] = self.state;
        device.linear(normed, &weights.input, self.rows, projected)?;
        let taps = (&weights.taps, weights.bias.as_ref());
        device.short_conv(projected, &conv, taps, cache, conv_state, convolved)?;
        let input = (&*projected, &*convolved);
        device.mamba2(input, recurrence, of_heads, cache, state, output)?;
        let (groups, epsilon) = (recurrence.groups, spec.norm_epsilon);
        device.gated_norm(output, projected, &weights.norm, groups, epsilon, self.rows)?;
        device.linear(output, &weights.output, self.rows, delta)
    }
}
