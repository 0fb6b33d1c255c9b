//! The intermediates of a step.

use super::StepLimits;
use super::gated_delta::GatedDeltaSpace;
use super::mamba2::Mamba2Space;
use super::short_conv::ShortConvSpace;
use crate::device::{Device, DeviceError, Precision};
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
    /// Activations of Mamba-2 layers, if there are some.
    pub(super) mamba2: Option<Mamba2Space<T>>,
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
        let mut mixers = config.layers.iter().map(|layer| layer.mixer);
        let mamba2 = mixers.find_map(|mixer| match mixer {
            Mixer::Mamba2(spec) => Some(spec),
            _ => None,
        });
        let of_columns = |columns, precision| make(rows, columns, precision);
        let mamba2 = mamba2.map(|spec| Mamba2Space::make(&spec, of_columns));
        let mamba2 = mamba2.transpose()?;
        let of_columns = |columns, precision| make(rows, columns, precision);
        let gated_delta = config.gated_delta();
        let gated_delta = gated_delta.map(|spec| GatedDeltaSpace::make(spec.heads, of_columns));
        let gated_delta = gated_delta.transpose()?;
        let mut optional = |columns: Option<usize>, precision: Precision| {
            columns
                .map(|columns| make(rows, columns, precision))
                .transpose()
        };
        let gated = config.experts().filter(|experts| experts.has_shared_gate);
        let of_dense = config.dense_activation().zip(dense);
        let gate_up = of_dense.map(|(activation, width)| activation.gate_up_columns(width));
        let of_shared = config.experts().zip(shared);
        let shared_gate_up =
            of_shared.map(|(experts, width)| experts.routing.activation.gate_up_columns(width));
        let experts = config.experts().map(|experts| experts.count);
        let is_gated = config.attentions().any(|attention| attention.has_gate);
        let mut mixers = config.layers.iter().map(|layer| layer.mixer);
        let convolves = mixers.any(|mixer| matches!(mixer, Mixer::ShortConv(_)));
        let convolved = convolves.then_some(config.hidden);
        let conv_input = optional(convolved.map(|channels| 3 * channels), activation)?;
        let conv_output = optional(convolved, activation)?;
        let short_conv = conv_input.zip(conv_output);
        Ok(Self {
            attention_gate: optional(is_gated.then(|| heads.q_columns()), activation)?,
            shared_gate: optional(gated.map(|_| 1), full)?,
            gated_delta,
            gate_up: optional(gate_up, activation)?,
            hidden: optional(dense, activation)?,
            router: optional(experts, full)?,
            shared_gate_up: optional(shared_gate_up, activation)?,
            shared_hidden: optional(shared, activation)?,
            short_conv: short_conv.map(|(input, output)| ShortConvSpace { input, output }),
            mamba2,
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
