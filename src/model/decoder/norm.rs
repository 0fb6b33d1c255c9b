//! The norms of the residual stream.

use crate::device::{Device, DeviceError};
use crate::model::ModelConfig;
use crate::model::layer::NormKind;

/// What the norms of the residual stream compute.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub(super) kind: NormKind,
    /// Added to the mean square, or the variance.
    pub(super) epsilon: f32,
}

impl Norm {
    pub(super) fn of(config: &ModelConfig) -> Self {
        Self {
            kind: config.norm,
            epsilon: config.norm_epsilon,
        }
    }

    /// Normalises `x`. A layer norm also subtracts the mean of each row of `x` itself: nothing
    /// that reads `x` later depends on it.
    pub(super) fn compute<D: Device>(
        self,
        device: &mut D,
        x: &mut D::Tensor,
        weight: &D::Vector,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), DeviceError> {
        if self.kind == NormKind::Layer {
            device.centre(x, rows)?;
        }
        device.rms_norm(x, weight, self.epsilon, rows, out)
    }
}
