//! Latent attention: the products with the weights of each head, and attention whose values are in
//! the keys. The same kernel attends for prompts and for decoding.

use super::CudaDevice;
use super::cache::{CudaCache, LARGEST_KEY, require_heads};
use super::error::{failed, require, require_ok, unsupported};
use super::launch::{Grid, kernels, row_grid};
use super::load;
use super::memory::Ptr;
use super::norm::CudaVector;
use super::rope::RopeParameters;
use super::step::Bounds;
use super::tensor::{CudaTensor, require_shape};
use super::weights::CudaLinear;
use crate::device::{
    AttentionSpec, CacheLayer, DeviceError, HeadShape, LatentOps, Latents, LinearSpec, Precision,
    WeightRows,
};
use crate::weights::{DType, quant};

kernels! {
    /// Kernels of `kernels/latent.cu`.
    pub(super) struct LatentKernels in "latent" {
        multiply_heads(
            out: Ptr, x: Ptr, weights: Ptr, inputs: u32, outputs: u32, x_row: u32, x_first: u32,
            x_stride: u32, out_row: u32, out_first: u32, out_stride: u32
        );
        copy_rotated(
            qkv: Ptr, queries: Ptr, keys: Ptr, norm: Ptr, epsilon: f32, heads: u32, rotated: u32,
            plain: u32, latent: u32
        );
        store_latent(
            qkv: Ptr, cache: Ptr, positions: Ptr, slots: Ptr, angles: Ptr, heads: u32,
            head_dim: u32, rotary_dim: u32, block_tokens: u32
        );
        attend_latent(
            out: Ptr, qkv: Ptr, cache: Ptr, tables: Ptr, sequences: Ptr, count: u32, heads: u32,
            head_dim: u32, value_dim: u32, block_tokens: u32, scale: f32
        );
    }
}

/// The weights of linear layers, one for each head, in the activation type.
pub struct CudaHeads(CudaLinear);

/// Where the part of each head is in a row.
#[derive(Clone, Copy)]
struct Places {
    /// Number of elements of a row.
    row: usize,
    /// Index of the part of the first head.
    first: usize,
    /// Distance between the parts of two heads.
    stride: usize,
}

/// A block format's weights as float32: the kernel takes floating-point weights only.
fn expanded(spec: &LinearSpec<'_>) -> Vec<Option<Vec<u8>>> {
    let parts = spec.parts.iter().map(|part| {
        if part.dtype.is_float() {
            return None;
        }
        let mut values = vec![0.0; part.rows * part.columns];
        quant::dequantize(part.dtype, part.data, &mut values);
        Some(
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        )
    });
    parts.collect()
}

impl LatentOps for CudaDevice {
    type HeadLinear = CudaHeads;

    /// Loads the weights in the activation type, whatever they are stored as.
    fn load_heads(&mut self, heads: &[LinearSpec<'_>]) -> Result<CudaHeads, DeviceError> {
        const NAME: &str = "load_heads";
        for spec in heads {
            for part in &spec.parts {
                let checked = part.check(part.columns);
                checked.map_err(|reason| failed(NAME, reason))?;
            }
        }
        let bytes: Vec<Vec<Option<Vec<u8>>>> = heads.iter().map(expanded).collect();
        let specs = heads.iter().zip(&bytes).map(|(spec, bytes)| LinearSpec {
            parts: spec
                .parts
                .iter()
                .zip(bytes)
                .map(|(part, bytes)| match bytes {
                    Some(data) => WeightRows {
                        dtype: DType::F32,
                        data,
                        ..*part
                    },
                    None => *part,
                })
                .collect(),
            bias: spec.bias.clone(),
        });
        let specs: Vec<LinearSpec<'_>> = specs.collect();
        let activations = self.options.activations;
        let loaded = self.weights(|context| load::load(context, activations, &specs))?;
        let fits = loaded.dense().is_some() && loaded.bias.is_none();
        require(fits, NAME, || {
            "the weights of a head must be one matrix without a bias".to_owned()
        })?;
        Ok(CudaHeads(loaded))
    }

    fn latent_qkv(
        &mut self,
        latents: &Latents<'_, Self>,
        rows: usize,
        qkv: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "latent_qkv";
        let rows = self.step.padded(rows);
        let Latents {
            shape,
            queries,
            keys,
            norm,
            epsilon,
            absorbed,
        } = *latents;
        let (query, key) = (shape.query_columns(), shape.key_columns());
        let activation = Precision::Activation;
        require_shape(NAME, "the queries", queries, (rows, query), activation)?;
        require_shape(NAME, "the keys", keys, (rows, key), activation)?;
        let columns = shape.heads().qkv_columns();
        require_shape(NAME, "the result", qkv, (rows, columns), activation)?;
        let weights = &absorbed.0;
        let size = (weights.inputs, weights.outputs);
        let checked = shape.check_weights(weights.matrices, size, norm.length());
        require_ok(NAME, checked)?;
        let sizes = [shape.rotated, shape.plain, shape.latent];
        let are_even = sizes.iter().all(|size| size.is_multiple_of(2));
        require(are_even, NAME, || {
            format!("the sizes of {shape:?} must be even")
        })?;
        let from = Places {
            row: query,
            first: shape.rotated,
            stride: shape.rotated + shape.plain,
        };
        let to = Places {
            row: columns,
            first: shape.rotated,
            stride: key,
        };
        self.each_head((queries.ptr(), from), weights, rows, (qkv.ptr(), to))?;
        self.latent.copy_rotated(
            &self.context,
            row_grid(rows),
            qkv.ptr(),
            queries.ptr(),
            keys.ptr(),
            norm.ptr(),
            epsilon,
            shape.heads as u32,
            shape.rotated as u32,
            shape.plain as u32,
            shape.latent as u32,
        )
    }

    fn multiply_heads(
        &mut self,
        x: &CudaTensor,
        weights: &CudaHeads,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "multiply_heads";
        let rows = self.step.padded(rows);
        let weights = &weights.0;
        let columns = |size: usize| weights.matrices * size;
        let (inputs, outputs) = (columns(weights.inputs), columns(weights.outputs));
        let activation = Precision::Activation;
        require_shape(NAME, "x", x, (rows, inputs), activation)?;
        require_shape(NAME, "the result", out, (rows, outputs), activation)?;
        let places = |row, stride| Places {
            row,
            first: 0,
            stride,
        };
        let (from, to) = (
            places(inputs, weights.inputs),
            places(outputs, weights.outputs),
        );
        self.each_head((x.ptr(), from), weights, rows, (out.ptr(), to))
    }
}

impl CudaDevice {
    /// Enqueues the product of each head's part of the rows and the head's weights. The caller has
    /// checked that the parts exist.
    fn each_head(
        &mut self,
        (x, from): (Ptr, Places),
        weights: &CudaLinear,
        rows: usize,
        (out, to): (Ptr, Places),
    ) -> Result<(), DeviceError> {
        let matrix = weights
            .dense()
            .ok_or_else(|| failed("multiply_heads", "the weights are not one matrix per head"))?;
        let (heads, outputs) = (weights.matrices as u32, weights.outputs.div_ceil(64) as u32);
        self.latent.multiply_heads(
            &self.context,
            Grid::new([rows as u32, heads, outputs], [256, 1, 1]),
            out,
            x,
            matrix,
            weights.inputs as u32,
            weights.outputs as u32,
            from.row as u32,
            from.first as u32,
            from.stride as u32,
            to.row as u32,
            to.first as u32,
            to.stride as u32,
        )
    }

    /// Enqueues the rotation of the queries and the key of each row, and the writing of the key to
    /// the cache. The caller has checked `qkv`.
    pub(super) fn store_latents(
        &mut self,
        qkv: &mut CudaTensor,
        heads: HeadShape,
        parameters: &RopeParameters,
        cache: &CudaCache,
        layer: CacheLayer,
    ) -> Result<(), DeviceError> {
        const WARPS: usize = 8;
        let rows = self.step.padded(self.step.rows());
        let blocks = (heads.q_heads + 1).div_ceil(WARPS);
        self.latent.store_latent(
            &self.context,
            Grid::new([rows as u32, blocks as u32, 1], [32 * WARPS as u32, 1, 1]),
            qkv.ptr(),
            cache.keys(layer.index),
            self.step.positions(),
            self.step.slots(layer.group),
            parameters.angles,
            heads.q_heads as u32,
            heads.head_dim as u32,
            parameters.rotary_dim,
            cache.shape().block_tokens as u32,
        )
    }

    /// Enqueues attention whose values are in the keys, for all rows.
    pub(super) fn attend_latents(
        &mut self,
        qkv: &CudaTensor,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        (cache, layer): (&CudaCache, CacheLayer),
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "attend";
        let (heads, shape) = (spec.heads, *cache.shape());
        require_heads(NAME, heads, cache, layer)?;
        let is_plain = spec.window.is_none() && spec.softcap.is_none() && sinks.is_none();
        if !is_plain || heads.kv_heads != 1 || heads.head_dim > LARGEST_KEY {
            return Err(unsupported(
                format!("latent attention of {spec:?}"),
                format!(
                    "there must be one key-value head of at most {LARGEST_KEY} elements, and \
                     neither a window, a soft-cap nor sinks"
                ),
            ));
        }
        let known = self.limits.map(|limits| limits.block_tokens);
        require(known == Some(shape.block_tokens), NAME, || {
            format!(
                "the cache is {shape:?}, but the device was reserved for blocks of {known:?} tokens"
            )
        })?;
        let rows = self.step.padded(self.step.rows());
        let activation = Precision::Activation;
        require_shape(NAME, "qkv", qkv, (rows, heads.qkv_columns()), activation)?;
        let columns = heads.out_columns();
        require_shape(NAME, "the result", out, (rows, columns), activation)?;
        let bounds = Bounds {
            blocks: shape.blocks,
            ..Bounds::UNLIMITED
        };
        self.step.require_within(bounds, NAME)?;
        self.graphs.limit(bounds);
        self.step.require_window(layer.group, usize::MAX, NAME)?;
        self.graphs.limit_window(layer.group, usize::MAX);
        self.latent.attend_latent(
            &self.context,
            Grid::new([rows as u32, heads.q_heads as u32, 1], [128, 1, 1]),
            out.ptr(),
            qkv.ptr(),
            cache.keys(layer.index),
            self.step.tables(),
            self.step.sequences(layer.group),
            self.step.sequence_count() as u32,
            heads.q_heads as u32,
            heads.head_dim as u32,
            heads.value_dim() as u32,
            shape.block_tokens as u32,
            spec.scale,
        )
    }
}
