//! The intermediates of a step.

use super::StepLimits;
use crate::device::{Device, DeviceError, Precision};
use crate::model::ModelConfig;

/// Activations of a step, allocated once and shared by all layers.
pub(super) struct Workspace<D: Device> {
    /// The residual stream.
    pub(super) residual: D::Tensor,
    /// Input of a part of a layer.
    pub(super) normed: D::Tensor,
    pub(super) qkv: D::Tensor,
    pub(super) attention: D::Tensor,
    /// Output of a part of a layer.
    pub(super) delta: D::Tensor,
    pub(super) gate_up: Option<D::Tensor>,
    pub(super) hidden: Option<D::Tensor>,
    pub(super) router: Option<D::Tensor>,
    /// The rows that are sampled.
    pub(super) gathered: D::Tensor,
    pub(super) logits: D::Tensor,
}

impl<D: Device> Workspace<D> {
    pub(super) fn allocate(
        config: &ModelConfig,
        device: &mut D,
        limits: StepLimits,
    ) -> Result<Self, DeviceError> {
        let StepLimits { rows, samples, .. } = limits;
        let (activation, full) = (Precision::Activation, Precision::Full);
        let (heads, dense) = (config.heads(), config.dense_width());
        let optional = |device: &mut D, columns: Option<usize>, precision: Precision| {
            columns
                .map(|columns| device.allocate(rows, columns, precision))
                .transpose()
        };
        let experts = config.experts().map(|experts| experts.count);
        Ok(Self {
            gate_up: optional(device, dense.map(|width| 2 * width), activation)?,
            hidden: optional(device, dense, activation)?,
            router: optional(device, experts, full)?,
            residual: device.allocate(rows, config.hidden, full)?,
            normed: device.allocate(rows.max(samples), config.hidden, activation)?,
            qkv: device.allocate(rows, heads.qkv_columns(), activation)?,
            attention: device.allocate(rows, heads.q_columns(), activation)?,
            delta: device.allocate(rows, config.hidden, activation)?,
            gathered: device.allocate(samples, config.hidden, full)?,
            logits: device.allocate(samples, config.vocabulary, full)?,
        })
    }
}
