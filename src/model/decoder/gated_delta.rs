//! Layers whose mixer is a gated delta net.

use super::layer_step::LayerStep;
use super::workspace::Workspace;
use crate::device::{ConvInput, ConvSpec, DeltaHeads, DeltaInput, Device, DeviceError, Precision};
use crate::model::layer::GatedDelta;
use crate::model::names::Part;
use crate::model::{ModelError, ModelSource};

/// The weights of a gated delta net.
pub(super) struct GatedDeltaWeights<D: Device> {
    spec: GatedDelta,
    /// Projection to `[queries | keys | values | gate]`.
    input: D::Linear,
    taps: D::Vector,
    /// Projection to `[b | a]`, from which the strengths of the updates and the decays are
    /// computed.
    gates: D::Linear,
    rates: D::Vector,
    bias: D::Vector,
    norm: D::Vector,
    output: D::Linear,
}

/// Activations of a gated delta net.
pub(super) struct GatedDeltaSpace<T> {
    /// Queries, keys and values before the convolution, and the gate of the output.
    input: T,
    /// Queries, keys and values after the convolution.
    qkv: T,
    /// `[b | a]`, with one column per value head each.
    gates: T,
    output: T,
}

impl<T> GatedDeltaSpace<T> {
    /// Creates each matrix with `make`, which takes its number of columns and its precision.
    pub(super) fn make(
        heads: DeltaHeads,
        mut make: impl FnMut(usize, Precision) -> Result<T, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let (qkv, values) = (heads.qkv_columns(), heads.value_columns());
        Ok(Self {
            input: make(qkv + values, Precision::Activation)?,
            qkv: make(qkv, Precision::Activation)?,
            gates: make(2 * heads.value_heads, Precision::Full)?,
            output: make(values, Precision::Activation)?,
        })
    }
}

impl<D: Device> GatedDeltaWeights<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
        spec: GatedDelta,
    ) -> Result<Self, ModelError> {
        let (heads, hidden) = (spec.heads, source.config().hidden);
        device.check_delta(&heads)?;
        let input = source.delta_projection(layer, heads)?;
        let input = device.load_linear(&input.spec())?;
        let gates = source.delta_gates(layer, heads)?;
        let output = source.linear(
            layer,
            &[(Part::RecurrentOutput, hidden)],
            heads.value_columns(),
        )?;
        let taps = source.convolution(layer, heads.qkv_columns(), spec.taps)?;
        let rates = source.decay_rates(layer, heads.value_heads)?;
        let bias = source.recurrent_vector(layer, Part::StepBiases, heads.value_heads)?;
        let norm = source.recurrent_vector(layer, Part::RecurrentNorm, heads.value_dim)?;
        Ok(Self {
            spec,
            input,
            taps: device.load_vector(&taps)?,
            gates: device.load_linear(&gates.spec())?,
            rates: device.load_vector(&rates)?,
            bias: device.load_vector(&bias)?,
            norm: device.load_vector(&norm)?,
            output: device.load_linear(&output.spec())?,
        })
    }
}

impl LayerStep<'_> {
    pub(super) fn gated_delta<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        weights: &GatedDeltaWeights<D>,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let Workspace {
            normed,
            delta,
            gated_delta: Some(space),
            ..
        } = workspace
        else {
            unreachable!("the workspace is allocated for the layers that there are")
        };
        let GatedDelta { heads, taps } = weights.spec;
        let GatedDeltaSpace {
            input,
            qkv,
            gates,
            output,
        } = space;
        let [conv_state, state] = self.state;
        device.linear(normed, &weights.input, self.rows, input)?;
        device.linear(normed, &weights.gates, self.rows, gates)?;
        let conv = ConvSpec {
            channels: heads.qkv_columns(),
            taps,
            input: ConvInput::Columns(0),
            silu: true,
        };
        device.short_conv(input, &conv, (&weights.taps, None), cache, conv_state, qkv)?;
        let operands = DeltaInput {
            qkv,
            decay: &weights.rates,
            bias: &weights.bias,
        };
        device.gated_delta(&operands, gates, &heads, cache, state, output)?;
        let (gate, epsilon) = ((&*input, heads.qkv_columns()), self.norm.epsilon);
        device.gated_rms_norm(output, gate, &weights.norm, epsilon, self.rows)?;
        device.linear(output, &weights.output, self.rows, delta)
    }
}
