//! Sampling: chooses the tokens of all rows, one row per item of work.

use super::CpuDevice;
use super::error::require;
use super::memory::Disjoint;
use super::sampler;
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, SamplingOps};
use crate::sampling::{SampleRow, Samples, Token};
use std::sync::atomic::{AtomicBool, Ordering};

/// Samples of a step, already computed.
pub struct CpuPending(Samples);

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
        let mut samples = std::mem::take(&mut self.spare_samples);
        samples.tokens.clear();
        samples.tokens.resize(rows.len(), Token::default());
        samples.not_finite.clear();
        let out = Disjoint::new(&mut samples.tokens);
        let all_finite = AtomicBool::new(true);
        self.workers.begin_step();
        let chosen = self.workers.run("sample", rows.len(), 1, |range| {
            for row in range {
                // SAFETY: each row belongs to one item.
                let out = unsafe { &mut out.range(row, 1)[0] };
                *out = sampler::choose(isa, logits.row(row), &rows[row]);
                if !sampler::is_finite(isa, logits.row(row)) {
                    all_finite.store(false, Ordering::Relaxed);
                }
            }
        });
        self.workers.end_step();
        chosen?;
        if !all_finite.into_inner() {
            let broken = (0..rows.len()).filter(|&row| !sampler::is_finite(isa, logits.row(row)));
            samples.not_finite.extend(broken);
        }
        self.sampled.clear();
        self.sampled
            .extend(samples.tokens.iter().map(|token| token.id));
        Ok(CpuPending(samples))
    }

    fn collect(&mut self, pending: CpuPending) -> Result<Samples, DeviceError> {
        Ok(pending.0)
    }

    fn recycle(&mut self, samples: Samples) {
        if samples.tokens.capacity() > self.spare_samples.tokens.capacity() {
            self.spare_samples = samples;
        }
    }
}
