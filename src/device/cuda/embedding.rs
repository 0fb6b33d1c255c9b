//! Token embeddings.

use super::CudaDevice;
use super::launch::{Grid, kernels, row_grid};
use super::memory::Ptr;
use super::tensor::{CudaTensor, require_shape};
use super::weights::CudaLinear;
use crate::device::{DeviceError, EmbeddingOps, Precision};

kernels! {
    /// Kernels of `kernels/embedding.cu`.
    pub(super) struct EmbeddingKernels in "embedding" {
        resolve_tokens(resolved: Ptr, tokens: Ptr, feedback: Ptr, previous: Ptr, rows: u32);
        embed_dense(out: Ptr, table: Ptr, resolved: Ptr, scale: f32, columns: u32, vocabulary: u32);
    }
}

impl EmbeddingOps for CudaDevice {
    fn embed(
        &mut self,
        table: &CudaLinear,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(self.step.rows());
        let (columns, vocabulary) = (table.columns(), table.rows());
        let shape = (rows, columns);
        require_shape("embed", "the result", out, shape, Precision::Full)?;
        let resolved = self.step.resolved();
        self.embedding.resolve_tokens(
            &self.context,
            Grid::new([rows.div_ceil(256) as u32, 1, 1], [256, 1, 1]),
            resolved,
            self.step.tokens(),
            self.step.feedback(),
            self.step.sampled(),
            rows as u32,
        )?;
        let Some(dense) = table.dense() else {
            return self.embed_quant(table, scale, out);
        };
        self.embedding.embed_dense(
            &self.context,
            row_grid(rows),
            out.ptr(),
            dense,
            resolved,
            scale,
            columns as u32,
            vocabulary as u32,
        )
    }
}
