//! Token embeddings.

use super::CpuDevice;
use super::error::require;
use super::linear::CpuLinear;
use super::memory::Disjoint;
use super::norm::CpuVector;
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

    fn embed_positions(
        &mut self,
        table: &CpuLinear,
        added: &CpuVector,
        segments: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "embed_positions";
        let (rows, columns, words) = (self.staged.rows(), table.columns(), table.rows());
        require_shape(NAME, "the result", out, (rows, columns))?;
        let added = added.values();
        let positions = added.len() / (segments * columns).max(1);
        let (tokens, at) = (&self.staged.tokens, &self.staged.positions);
        let most = tokens.iter().max().map_or(0, |token| *token as usize);
        let fits = most < words * segments && self.staged.position_end <= positions;
        require(fits, NAME, || {
            let end = self.staged.position_end;
            format!(
                "token {most} and {end} positions do not fit in {segments} segments of {words} \
                 tokens and {positions} positions"
            )
        })?;
        let out = Disjoint::new(out.leading_mut(rows));
        let grain = (4096 / columns.max(1)).max(1);
        self.workers.run(NAME, rows, grain, |range| {
            for row in range {
                // SAFETY: each row belongs to one item.
                let out = unsafe { out.range(row * columns, columns) };
                let token = tokens[row] as usize;
                table.read_row(token % words, out);
                let place = (token / words * positions + at[row] as usize) * columns;
                let place = &added[place..place + columns];
                out.iter_mut().zip(place).for_each(|(out, own)| *out += own);
            }
        })
    }
}
