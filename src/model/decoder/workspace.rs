//! The intermediates of a step.

use super::StepLimits;
use super::gated_delta::GatedDeltaSpace;
use super::short_conv::ShortConvSpace;
use crate::device::{DeltaHeads, Device, DeviceError, Precision};
use crate::model::ModelConfig;
use crate::model::layer::Mixer;

/// Activations of a step, allocated once and shared by all layers. `T` is the device's tensor.
pub(super) struct Workspace<T> {
    /// The residual stream.
    pub(super) residual: T,
    /// Input of a part of a layer.
    pub(super) normed: T,
    pub(super) qkv: T,
    pub(super) attention: T,
    /// What the gate of the attention's output comes from, if a layer has one.
    pub(super) attention_gate: Option<T>,
    /// Activations of layers with a gated convolution, if there are some.
    pub(super) short_conv: Option<ShortConvSpace<T>>,
    /// Activations of layers with a gated delta net, if there are some.
    pub(super) gated_delta: Option<GatedDeltaSpace<T>>,
    /// Output of a part of a layer.
    pub(super) delta: T,
    pub(super) gate_up: Option<T>,
    pub(super) hidden: Option<T>,
    pub(super) router: Option<T>,
    pub(super) shared_gate_up: Option<T>,
    pub(super) shared_hidden: Option<T>,
    /// One column.
    pub(super) shared_gate: Option<T>,
    /// The rows that are sampled.
    pub(super) gathered: T,
    pub(super) logits: T,
}

impl<T> Workspace<T> {
    pub(super) fn allocate<D: Device<Tensor = T>>(
        config: &ModelConfig,
        device: &mut D,
        limits: StepLimits,
    ) -> Result<Self, DeviceError> {
        Self::make(config, limits, |rows, columns, precision| {
            device.allocate(rows, columns, precision)
        })
    }

    /// Makes each matrix with `make`, from its rows, its columns and its precision.
    fn make(
        config: &ModelConfig,
        limits: StepLimits,
        mut make: impl FnMut(usize, usize, Precision) -> Result<T, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let StepLimits { rows, samples, .. } = limits;
        let (activation, full) = (Precision::Activation, Precision::Full);
        let (heads, dense) = (config.heads(), config.dense_width());
        let shared = config.shared_width();
        let mut optional = |columns: Option<usize>, precision: Precision| {
            columns
                .map(|columns| make(rows, columns, precision))
                .transpose()
        };
        let gated = config.experts().filter(|experts| experts.has_shared_gate);
        let experts = config.experts().map(|experts| experts.count);
        let is_gated = config.attentions().any(|attention| attention.has_gate);
        let mut mixers = config.layers.iter().map(|layer| layer.mixer);
        let convolves = mixers.any(|mixer| matches!(mixer, Mixer::ShortConv(_)));
        let convolved = convolves.then_some(config.hidden);
        let conv_input = optional(convolved.map(|channels| 3 * channels), activation)?;
        let conv_output = optional(convolved, activation)?;
        let short_conv = conv_input.zip(conv_output);
        let delta = config.gated_delta().map(|delta| delta.heads);
        let delta_columns = |columns: fn(DeltaHeads) -> usize| delta.map(columns);
        let fused = delta_columns(|heads| heads.qkv_columns() + heads.value_columns());
        let delta_input = optional(fused, activation)?;
        let delta_qkv = optional(delta_columns(|heads| heads.qkv_columns()), activation)?;
        let delta_gates = optional(delta_columns(|heads| 2 * heads.value_heads), full)?;
        let delta_output = optional(delta_columns(|heads| heads.value_columns()), activation)?;
        let gated_delta = delta_input.zip(delta_qkv);
        let gated_delta = gated_delta.zip(delta_gates.zip(delta_output));
        Ok(Self {
            attention_gate: optional(is_gated.then(|| heads.q_columns()), activation)?,
            shared_gate: optional(gated.map(|_| 1), full)?,
            gated_delta: gated_delta.map(|((input, qkv), (gates, output))| GatedDeltaSpace {
                input,
                qkv,
                gates,
                output,
            }),
            gate_up: optional(dense.map(|width| 2 * width), activation)?,
            hidden: optional(dense, activation)?,
            router: optional(experts, full)?,
            shared_gate_up: optional(shared.map(|width| 2 * width), activation)?,
            shared_hidden: optional(shared, activation)?,
            short_conv: short_conv.map(|(input, output)| ShortConvSpace { input, output }),
            residual: make(rows, config.hidden, full)?,
            normed: make(rows.max(samples), config.hidden, activation)?,
            qkv: make(rows, heads.qkv_columns(), activation)?,
            attention: make(rows, heads.q_columns(), activation)?,
            delta: make(rows, config.hidden, activation)?,
            gathered: make(samples, config.hidden, full)?,
            logits: make(samples, config.vocabulary, full)?,
        })
    }
}

/// Returns the bytes that the activations of steps within `limits` take on a device.
pub(super) fn bytes<D: Device>(config: &ModelConfig, device: &D, limits: StepLimits) -> usize {
    let mut bytes = 0usize;
    let add = |rows, columns, precision| {
        bytes = bytes.saturating_add(device.tensor_bytes(rows, columns, precision));
        Ok(())
    };
    // Adding fails for no matrix.
    let _ = Workspace::make(config, limits, add);
    bytes
}
