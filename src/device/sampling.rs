//! Sampling: the choice of the next tokens.

use super::{DeviceError, DeviceTypes};
use crate::sampling::{SampleRow, Samples};

/// The part of a [`Device`](super::Device) that samples tokens.
pub trait SamplingOps: DeviceTypes {
    /// Samples on their way to the host.
    type Pending;

    /// Chooses a token for each row of `logits`, as the entries of `rows` prescribe.
    fn sample(
        &mut self,
        logits: &Self::Tensor,
        rows: &[SampleRow],
    ) -> Result<Self::Pending, DeviceError>;

    /// Waits for a step and returns its samples, in the order of its sample rows.
    fn collect(&mut self, pending: Self::Pending) -> Result<Samples, DeviceError>;

    /// Takes back samples that the caller has read, so that a later step can reuse their
    /// memory.
    fn recycle(&mut self, samples: Samples) {
        drop(samples);
    }
}
