//! Token embeddings.

use super::CpuDevice;
use super::error::require;
use super::linear::CpuLinear;
use super::memory::Disjoint;
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, EmbeddingOps};

impl EmbeddingOps for CpuDevice {
    fn embed(
        &mut self,
        table: &CpuLinear,
        scale: f32,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let (rows, columns) = (self.staged.rows(), table.columns());
        require_shape("embed", "the result", out, (rows, columns))?;
        let vocabulary = table.rows();
        let beyond = self
            .staged
            .tokens
            .iter()
            .find(|&&token| token as usize >= vocabulary);
        require(beyond.is_none(), "embed", || {
            format!(
                "token {} is outside the vocabulary of {vocabulary} tokens",
                beyond.copied().unwrap_or_default()
            )
        })?;
        let tokens = &self.staged.tokens;
        let out = Disjoint::new(out.leading_mut(rows));
        self.workers
            .run("embed", rows, (4096 / columns.max(1)).max(1), |range| {
                for row in range {
                    // SAFETY: each row belongs to one item.
                    let out = unsafe { out.range(row * columns, columns) };
                    table.read_row(tokens[row] as usize, out);
                    if scale != 1.0 {
                        out.iter_mut().for_each(|value| *value *= scale);
                    }
                }
            })
    }
}
