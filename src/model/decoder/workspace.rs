//! The intermediates of a step.

use super::StepLimits;
use super::latent::LatentWorkspace;
use crate::device::{Device, DeviceError, Precision};
use crate::model::ModelConfig;

/// Activations of a step, allocated once and shared by all layers. `T` is the device's tensor.
pub(super) struct Workspace<T> {
    /// The residual stream.
    pub(super) residual: T,
    /// Input of a part of a layer.
    pub(super) normed: T,
    pub(super) qkv: T,
    pub(super) attention: T,
    /// What only latent attention needs.
    pub(super) latent: Option<LatentWorkspace<T>>,
    /// Output of a part of a layer.
    pub(super) delta: T,
    pub(super) gate_up: Option<T>,
    pub(super) hidden: Option<T>,
    pub(super) router: Option<T>,
    pub(super) shared_gate_up: Option<T>,
    pub(super) shared_hidden: Option<T>,
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
        let experts = config.experts().map(|experts| experts.count);
        Ok(Self {
            gate_up: optional(dense.map(|width| 2 * width), activation)?,
            hidden: optional(dense, activation)?,
            router: optional(experts, full)?,
            shared_gate_up: optional(shared.map(|width| 2 * width), activation)?,
            shared_hidden: optional(shared, activation)?,
            latent: match config.latent() {
                Some(spec) => {
                    let make = |columns, precision| make(rows, columns, precision);
                    Some(LatentWorkspace::make(spec, make)?)
                }
                None => None,
            },
            residual: make(rows, config.hidden, full)?,
            normed: make(rows.max(samples), config.hidden, activation)?,
            qkv: make(rows, heads.qkv_columns(), activation)?,
            attention: make(rows, heads.out_columns(), activation)?,
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
