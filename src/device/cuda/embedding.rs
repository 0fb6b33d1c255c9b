//! Token embeddings.

use super::CudaDevice;
use super::launch::{Grid, kernels, row_grid};
use super::memory::Ptr;
use super::norm::CudaVector;
use super::step::Bounds;
use super::tensor::{CudaTensor, require_shape};
use super::weights::CudaLinear;
use crate::device::{DeviceError, EmbeddingOps, Precision};

kernels! {
    /// Kernels of `kernels/embedding.cu`.
    pub(super) struct EmbeddingKernels in "embedding" {
        resolve_tokens(resolved: Ptr, tokens: Ptr, feedback: Ptr, previous: Ptr, rows: u32);
        resolve_words(resolved: Ptr, tokens: Ptr, words: u32, rows: u32);
        add_positions(
            out: Ptr,
            added: Ptr,
            tokens: Ptr,
            positions: Ptr,
            words: u32,
            count: u32,
            segments: u32,
            columns: u32,
        );
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
        self.embed_resolved(table, scale, out)
    }

    fn embed_positions(
        &mut self,
        table: &CudaLinear,
        added: &CudaVector,
        segments: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(self.step.rows());
        let (columns, words) = (table.columns(), table.rows());
        let positions = added.length() / (segments * columns).max(1);
        let bounds = Bounds {
            positions,
            ..Bounds::UNLIMITED
        };
        self.step.require_within(bounds, "embed_positions")?;
        self.graphs.limit(bounds);
        let (tokens, context) = (self.step.tokens(), &self.context);
        self.embedding.resolve_words(
            context,
            Grid::new([rows.div_ceil(256) as u32, 1, 1], [256, 1, 1]),
            self.step.resolved(),
            tokens,
            words as u32,
            rows as u32,
        )?;
        self.embed_resolved(table, 1.0, out)?;
        self.embedding.add_positions(
            &self.context,
            row_grid(rows),
            out.ptr(),
            added.ptr(),
            tokens,
            self.step.positions(),
            words as u32,
            positions as u32,
            segments as u32,
            columns as u32,
        )
    }
}

impl CudaDevice {
    /// Enqueues `out[r] = scale · table[resolved[r]]`.
    fn embed_resolved(
        &mut self,
        table: &CudaLinear,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(self.step.rows());
        let (columns, vocabulary) = (table.columns(), table.rows());
        let shape = (rows, columns);
        require_shape("embed", "the result", out, shape, Precision::Full)?;
        let Some(dense) = table.dense() else {
            return self.embed_quant(table, scale, out);
        };
        self.embedding.embed_dense(
            &self.context,
            row_grid(rows),
            out.ptr(),
            dense,
            self.step.resolved(),
            scale,
            columns as u32,
            vocabulary as u32,
        )
    }
}
