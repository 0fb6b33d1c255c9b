//! The products of latent attention with the weights of each head.

use super::CpuDevice;
use super::error::{require, require_ok};
use super::linear::CpuLinear;
use super::norm::RmsNorm;
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, LatentOps, Latents, LinearOps, LinearSpec};

/// Linear layers of the same size, one for each head.
pub struct CpuHeads {
    heads: Vec<CpuLinear>,
    inputs: usize,
    outputs: usize,
}

/// Buffers that are reused from call to call: the inputs of one head, and its outputs.
#[derive(Default)]
pub(crate) struct Scratch {
    x: Vec<f32>,
    y: Vec<f32>,
}

/// Where the part of each head is in a row: the index of the first one, and the distance between
/// two.
#[derive(Clone, Copy)]
struct Places {
    first: usize,
    stride: usize,
}

impl CpuDevice {
    /// Multiplies each head's part of the rows of `x` with the head's weights. The caller has
    /// checked that the parts exist.
    fn each_head(
        &mut self,
        (x, from): (&CpuTensor, Places),
        weights: &CpuHeads,
        rows: usize,
        (out, to): (&mut CpuTensor, Places),
    ) -> Result<(), DeviceError> {
        let Scratch { x: input, y } = &mut self.latent;
        for (head, weight) in weights.heads.iter().enumerate() {
            input.clear();
            let at = from.first + head * from.stride;
            for row in 0..rows {
                input.extend_from_slice(&x.row(row)[at..][..weights.inputs]);
            }
            y.resize(rows * weights.outputs, 0.0);
            self.multiplier
                .multiply(&mut self.workers, input, weight, rows, y)?;
            let at = to.first + head * to.stride;
            for (row, y) in y.chunks_exact(weights.outputs).enumerate() {
                out.row_mut(row)[at..][..weights.outputs].copy_from_slice(y);
            }
        }
        Ok(())
    }
}

impl LatentOps for CpuDevice {
    type HeadLinear = CpuHeads;

    fn load_heads(&mut self, heads: &[LinearSpec<'_>]) -> Result<CpuHeads, DeviceError> {
        let loaded = heads.iter().map(|spec| self.load_linear(spec));
        let heads = loaded.collect::<Result<Vec<_>, _>>()?;
        let size = |head: &CpuLinear| (head.columns(), head.rows());
        let (inputs, outputs) = heads.first().map(size).unwrap_or_default();
        let fit = inputs > 0 && outputs > 0;
        let alike = heads.iter().all(|head| size(head) == (inputs, outputs));
        require(fit && alike, "load_heads", || {
            format!("the weights of all heads must be {outputs} × {inputs}, and not empty")
        })?;
        Ok(CpuHeads {
            heads,
            inputs,
            outputs,
        })
    }

    fn latent_qkv(
        &mut self,
        latents: &Latents<'_, Self>,
        rows: usize,
        qkv: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "latent_qkv";
        let Latents {
            shape,
            queries,
            keys,
            norm,
            epsilon,
            absorbed,
        } = *latents;
        let (query, key) = (shape.rotated + shape.plain, shape.key_columns());
        require_shape(NAME, "the queries", queries, (rows, shape.query_columns()))?;
        require_shape(NAME, "the keys", keys, (rows, key))?;
        let columns = shape.heads().qkv_columns();
        require_shape(NAME, "the result", qkv, (rows, columns))?;
        let size = (absorbed.inputs, absorbed.outputs);
        let heads = absorbed.heads.len();
        require_ok(NAME, shape.check_weights(heads, size, norm.values().len()))?;
        let plain = Places {
            first: shape.rotated,
            stride: query,
        };
        let latent = Places {
            first: shape.rotated,
            stride: key,
        };
        self.each_head((queries, plain), absorbed, rows, (qkv, latent))?;
        for row in 0..rows {
            let (queries, keys) = (queries.row(row), keys.row(row));
            let (q, k) = qkv.row_mut(row).split_at_mut(shape.heads * key);
            for (to, from) in q.chunks_exact_mut(key).zip(queries.chunks_exact(query)) {
                to[..shape.rotated].copy_from_slice(&from[..shape.rotated]);
            }
            k[..shape.rotated].copy_from_slice(&keys[..shape.rotated]);
            self.multiplier.isa.dispatch(RmsNorm {
                x: &keys[shape.rotated..],
                weight: norm.values(),
                epsilon,
                out: &mut k[shape.rotated..],
            });
        }
        Ok(())
    }

    fn multiply_heads(
        &mut self,
        x: &CpuTensor,
        weights: &CpuHeads,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "multiply_heads";
        let heads = weights.heads.len();
        require_shape(NAME, "x", x, (rows, heads * weights.inputs))?;
        require_shape(NAME, "the result", out, (rows, heads * weights.outputs))?;
        let places = |stride| Places { first: 0, stride };
        let (from, to) = (places(weights.inputs), places(weights.outputs));
        self.each_head((x, from), weights, rows, (out, to))
    }
}
