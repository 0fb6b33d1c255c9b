//! The norms of the residual stream.

use crate::device::{Device, DeviceError};
use crate::model::ModelConfig;
use crate::model::layer::NormKind;

/// Parameters of the norms of the residual stream.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub(super) kind: NormKind,
    /// Value added to the mean square or, in a layer norm, to the variance.
    pub(super) epsilon: f32,
}

impl Norm {
    pub(super) fn of(config: &ModelConfig) -> Self {
        Self {
            kind: config.norm,
            epsilon: config.norm_epsilon,
        }
    }

    /// Computes the norm of `x` in `out`. A layer norm also subtracts the mean of each row from `x`
    /// in place. That is harmless: no later reader of `x` depends on the mean.
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
