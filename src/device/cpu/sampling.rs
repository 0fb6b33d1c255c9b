//! Sampling: chooses the tokens of all rows, one row per item of work.

use super::CpuDevice;
use super::error::require;
use super::memory::Disjoint;
use super::sampler;
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, SamplingOps};
use crate::sampling::{SampleRow, Sampled};

/// Samples of a step, already computed.
pub struct CpuPending(Vec<Sampled>);

impl SamplingOps for CpuDevice {
    type Pending = CpuPending;

    fn sample(
        &mut self,
        logits: &CpuTensor,
        rows: &[SampleRow],
    ) -> Result<CpuPending, DeviceError> {
        require_shape("sample", "logits", logits, (rows.len(), logits.columns()))?;
        require(logits.columns() > 0, "sample", || {
            "there are no logits".to_owned()
        })?;
        let isa = self.multiplier.isa;
        let nothing = Sampled {
            token: 0,
            logprob: 0.0,
            top: Vec::new(),
            is_finite: true,
        };
        let mut samples = std::mem::take(&mut self.spare_samples);
        samples.clear();
        samples.resize(rows.len(), nothing);
        let out = Disjoint::new(&mut samples);
        self.workers.begin_step();
        let chosen = self.workers.run("sample", rows.len(), 1, |range| {
            for row in range {
                // SAFETY: each row belongs to one item.
                let out = unsafe { &mut out.range(row, 1)[0] };
                *out = sampler::choose(isa, logits.row(row), &rows[row]);
            }
        });
        self.workers.end_step();
        chosen?;
        self.sampled.clear();
        self.sampled
            .extend(samples.iter().map(|sample| sample.token));
        Ok(CpuPending(samples))
    }

    fn collect(&mut self, pending: CpuPending) -> Result<Vec<Sampled>, DeviceError> {
        Ok(pending.0)
    }

    fn recycle(&mut self, samples: Vec<Sampled>) {
        if samples.capacity() > self.spare_samples.capacity() {
            self.spare_samples = samples;
        }
    }
}
