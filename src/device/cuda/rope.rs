//! Rotary position embedding, fused with the norms before it and the write to the KV cache.

use super::CudaDevice;
use super::cache::{CachePlace, CudaCache, require_heads};
use super::context::Context;
use super::error::{require, unsupported};
use super::images::Modules;
use super::launch::{Grid, kernels, row_grid};
use super::memory::{Buffer, Ptr};
use super::norm::CudaVector;
#[cfg(test)]
use super::signature::Signature;
use super::step::Bounds;
use super::tensor::{CudaTensor, require_shape};
use crate::device::{
    CacheLayer, DeviceError, HeadShape, Precision, QkNorm, QueryScale, RopeOps, RopeSpec, Values,
};
use std::rc::{Rc, Weak};

kernels! {
    /// Kernels of `kernels/rope.cu`.
    pub(super) struct Kernels in "rope" {
        rope_store(
            qkv: Ptr,
            k_cache: Ptr,
            v_cache: Ptr,
            positions: Ptr,
            slots: Ptr,
            angles: Ptr,
            q_norm: Ptr,
            k_norm: Ptr,
            epsilon: f32,
            norm_mode: u32,
            q_heads: u32,
            kv_heads: u32,
            head_dim: u32,
            rotary_dim: u32,
            block_tokens: u32,
            block_vectors: u32,
        );
        scale_queries(
            qkv: Ptr,
            positions: Ptr,
            slope: f32,
            interval: u32,
            offset: u32,
            q_columns: u32,
            columns: u32,
        );
    }
}

/// How queries and keys are normalised, as values of the kernel's parameter.
mod norm_mode {
    pub(super) const NONE: u32 = 0;
    pub(super) const HEADS: u32 = 1;
    pub(super) const ROW: u32 = 2;
    /// Added if values are normalised as well.
    pub(super) const VALUES: u32 = 4;
}

/// The kernels, and the loaded tables. Layers with and without a sliding window often share a
/// table.
pub(super) struct RopeKernels {
    kernels: Kernels,
    tables: Vec<(RopeSpec, Weak<Buffer>)>,
}

impl RopeKernels {
    #[cfg(test)]
    pub(super) const FILE: &'static str = Kernels::FILE;
    #[cfg(test)]
    pub(super) const SIGNATURES: &'static [Signature] = Kernels::SIGNATURES;

    pub(super) fn load(modules: &Modules) -> Result<Self, DeviceError> {
        Ok(Self {
            kernels: Kernels::load(modules)?,
            tables: Vec::new(),
        })
    }
}

/// A loaded rotary embedding: the cosine and sine for each position and pair.
pub struct CudaRope {
    angles: Rc<Buffer>,
    rotary_dim: usize,
    max_positions: usize,
}

/// Number of positions whose angles are computed and uploaded at once.
const POSITIONS_AT_ONCE: usize = 4096;

/// Returns the cosine and sine, times the magnitude, of each pair at each of `positions`.
///
/// The angle is the float32 product that models are trained with. Its cosine and sine are
/// computed in float64 and rounded to float32 once.
fn angles(spec: &RopeSpec, positions: std::ops::Range<usize>) -> Vec<[f32; 2]> {
    let magnitude = f64::from(spec.magnitude);
    let frequencies = &spec.inverse_frequencies;
    positions
        .flat_map(|position| {
            frequencies.iter().map(move |frequency| {
                let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
                [(cosine * magnitude) as f32, (sine * magnitude) as f32]
            })
        })
        .collect()
}

/// Returns the bytes per position of the table of angles.
fn row_bytes(spec: &RopeSpec) -> usize {
    spec.inverse_frequencies.len() * size_of::<[f32; 2]>()
}

/// Returns the bytes of the table of angles. There are some even if nothing is rotated, because
/// no table means for the attention kernel that rows are not to be stored.
fn bytes(spec: &RopeSpec) -> usize {
    const LEAST: usize = size_of::<[[f32; 2]; 2]>();
    spec.max_positions
        .saturating_mul(row_bytes(spec))
        .max(LEAST)
}

fn upload_angles(context: &Context, spec: &RopeSpec) -> Result<Buffer, DeviceError> {
    let buffer = context.allocate(bytes(spec), "the angles of positions")?;
    if row_bytes(spec) == 0 {
        return Ok(buffer);
    }
    for first in (0..spec.max_positions).step_by(POSITIONS_AT_ONCE) {
        let end = spec.max_positions.min(first + POSITIONS_AT_ONCE);
        context.write(&buffer, first * row_bytes(spec), &angles(spec, first..end))?;
    }
    Ok(buffer)
}

impl RopeOps for CudaDevice {
    type Rope = CudaRope;

    fn rope_bytes(&self, spec: &RopeSpec) -> usize {
        bytes(spec)
    }

    fn load_rope(&mut self, spec: &RopeSpec) -> Result<CudaRope, DeviceError> {
        let rotary_dim = 2 * spec.inverse_frequencies.len();
        if !rotary_dim.is_multiple_of(4) {
            let what = format!("rotating {rotary_dim} elements of a head");
            return Err(unsupported(what, "the number must be a multiple of 4"));
        }
        let tables = &mut self.rope.tables;
        tables.retain(|(_, table)| table.strong_count() > 0);
        let known = tables.iter().find(|(of, _)| of == spec);
        let angles = match known.and_then(|(_, table)| table.upgrade()) {
            Some(angles) => angles,
            None => {
                let angles = Rc::new(upload_angles(&self.context, spec)?);
                tables.push((spec.clone(), Rc::downgrade(&angles)));
                angles
            }
        };
        Ok(CudaRope {
            angles,
            rotary_dim,
            max_positions: spec.max_positions,
        })
    }

    fn rope_store(
        &mut self,
        qkv: &mut CudaTensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &CudaRope,
        cache: &mut CudaCache,
        layer: CacheLayer,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(self.step.rows());
        let columns = heads.qkv_columns();
        require_shape(NAME, "qkv", qkv, (rows, columns), Precision::Activation)?;
        let parameters = self.rope_parameters(heads, norm, rope, cache, layer)?;
        if heads.values != Values::BesideKeys {
            require(norm.is_none() && heads.kv_heads == 1, NAME, || {
                "values in keys need a single key-value head without a norm".to_owned()
            })?;
            return self.store_latents(qkv, heads, &parameters, cache, layer);
        }
        let slots = self.step.slots(layer.group);
        let to = Some((cache.place(heads, layer), slots, cache.shape().block_tokens));
        self.rotate_rows(qkv, heads, &parameters, to)
    }

    fn rope_queries(
        &mut self,
        q: &mut CudaTensor,
        heads: HeadShape,
        norm: Option<(&CudaVector, f32)>,
        rope: &CudaRope,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rope_queries";
        let rows = self.step.padded(self.step.rows());
        let shape = (rows, heads.q_columns());
        require_shape(NAME, "q", q, shape, Precision::Activation)?;
        self.require_rope(NAME, heads, rope)?;
        let length = norm.map_or(heads.head_dim, |(weight, _)| weight.length());
        require(length == heads.head_dim, NAME, || {
            format!(
                "a norm has {length} weights for heads of {}",
                heads.head_dim
            )
        })?;
        let parameters = RopeParameters {
            angles: rope.angles.ptr(),
            q_norm: norm.map_or(Ptr::NULL, |(weight, _)| weight.ptr()),
            epsilon: norm.map_or(0.0, |(_, epsilon)| epsilon),
            norm_mode: norm.map_or(norm_mode::NONE, |_| norm_mode::HEADS),
            rotary_dim: rope.rotary_dim as u32,
            ..RopeParameters::default()
        };
        self.rotate_rows(q, heads, &parameters, None)
    }

    fn scale_queries(
        &mut self,
        qkv: &mut CudaTensor,
        heads: HeadShape,
        scale: QueryScale,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "scale_queries";
        let rows = self.step.padded(self.step.rows());
        let columns = match qkv.columns() == heads.q_columns() {
            true => heads.q_columns(),
            false => heads.qkv_columns(),
        };
        require_shape(NAME, "qkv", qkv, (rows, columns), Precision::Activation)?;
        require(scale.interval > 0, NAME, || {
            "the interval is 0, but must be at least 1".to_owned()
        })?;
        self.rope.kernels.scale_queries(
            &self.context,
            row_grid(rows),
            qkv.ptr(),
            self.step.positions(),
            scale.slope,
            scale.interval,
            scale.offset,
            heads.q_columns() as u32,
            columns as u32,
        )
    }
}

/// How rows are normalised and rotated, as the kernels take it.
#[derive(Clone, Copy)]
pub(super) struct RopeParameters {
    /// The angles of position 0; null if rows are not to be rotated and stored.
    pub(super) angles: Ptr,
    pub(super) q_norm: Ptr,
    pub(super) k_norm: Ptr,
    pub(super) epsilon: f32,
    pub(super) norm_mode: u32,
    pub(super) rotary_dim: u32,
}

impl Default for RopeParameters {
    fn default() -> Self {
        Self {
            angles: Ptr::NULL,
            q_norm: Ptr::NULL,
            k_norm: Ptr::NULL,
            epsilon: 0.0,
            norm_mode: norm_mode::NONE,
            rotary_dim: 0,
        }
    }
}

/// Name of the operation in errors.
const NAME: &str = "rope_store";

impl CudaDevice {
    /// Checks the operands of a rotation, and returns them as the kernels take them.
    pub(super) fn rope_parameters(
        &mut self,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &CudaRope,
        cache: &CudaCache,
        layer: CacheLayer,
    ) -> Result<RopeParameters, DeviceError> {
        let shape = *cache.shape();
        require_heads(NAME, heads, cache, layer)?;
        self.require_rope(NAME, heads, rope)?;
        let bounds = Bounds {
            slots: shape.blocks * shape.block_tokens,
            ..Bounds::UNLIMITED
        };
        self.step.require_group(layer.group, NAME)?;
        self.step.require_within(bounds, NAME)?;
        self.graphs.limit(bounds);
        let angles = rope.angles.ptr();
        let rotary_dim = rope.rotary_dim as u32;
        let Some(norm) = norm else {
            return Ok(RopeParameters {
                angles,
                rotary_dim,
                ..RopeParameters::default()
            });
        };
        let (norm_mode, q, k) = match norm.per_head {
            true => (norm_mode::HEADS, heads.head_dim, heads.head_dim),
            false => (
                norm_mode::ROW,
                heads.q_columns(),
                heads.kv_heads * heads.head_dim,
            ),
        };
        let lengths = (norm.q.length(), norm.k.length());
        require(lengths == (q, k), NAME, || {
            format!("the norms have {lengths:?} weights, not {:?}", (q, k))
        })?;
        Ok(RopeParameters {
            angles,
            q_norm: norm.q.ptr(),
            k_norm: norm.k.ptr(),
            epsilon: norm.epsilon,
            norm_mode: norm_mode | if norm.values { norm_mode::VALUES } else { 0 },
            rotary_dim,
        })
    }

    /// Checks that a rotation fits the heads, and that the step and its replays have only positions
    /// that it knows.
    fn require_rope(
        &mut self,
        operation: &'static str,
        heads: HeadShape,
        rope: &CudaRope,
    ) -> Result<(), DeviceError> {
        require(rope.rotary_dim <= heads.head_dim, operation, || {
            let (rotary, head) = (rope.rotary_dim, heads.head_dim);
            format!("{rotary} rotated elements exceed the {head} elements of a head")
        })?;
        let bounds = Bounds {
            positions: rope.max_positions,
            ..Bounds::UNLIMITED
        };
        self.step.require_within(bounds, operation)?;
        self.graphs.limit(bounds);
        Ok(())
    }

    /// Enqueues the rotation of rows, and the writing of keys and values to their place in a cache,
    /// given with the slots of the rows and the number of tokens per block. Rows without a place hold
    /// queries only.
    fn rotate_rows(
        &self,
        rows: &mut CudaTensor,
        heads: HeadShape,
        parameters: &RopeParameters,
        to: Option<(CachePlace, Ptr, usize)>,
    ) -> Result<(), DeviceError> {
        // A warp per head. A norm over whole rows needs all of a row in one block.
        const WARPS: usize = 8;
        let kv_heads = if to.is_some() { heads.kv_heads } else { 0 };
        let blocks = match parameters.norm_mode & norm_mode::ROW {
            0 => (heads.q_heads + 2 * kv_heads).div_ceil(WARPS),
            _ => 1,
        };
        let count = self.step.padded(self.step.rows());
        let grid = Grid::new([count as u32, blocks as u32, 1], [32 * WARPS as u32, 1, 1]);
        let nowhere = CachePlace {
            keys: Ptr::NULL,
            values: Ptr::NULL,
            block_vectors: 0,
        };
        // The kernel reads a slot of each row, even if it writes to none.
        let (place, slots, block_tokens) = to.unwrap_or((nowhere, self.step.slots(0), 1));
        self.rope.kernels.rope_store(
            &self.context,
            grid,
            rows.ptr(),
            place.keys,
            place.values,
            self.step.positions(),
            slots,
            parameters.angles,
            parameters.q_norm,
            parameters.k_norm,
            parameters.epsilon,
            parameters.norm_mode,
            heads.q_heads as u32,
            kv_heads as u32,
            heads.head_dim as u32,
            parameters.rotary_dim,
            block_tokens as u32,
            place.block_vectors,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_angles_of_each_pair_at_each_position() {
        let spec = RopeSpec {
            inverse_frequencies: vec![1.0, 0.5],
            magnitude: 2.0,
            max_positions: 4,
        };
        let table = angles(&spec, 2..4);
        assert_eq!(table.len(), 4);
        let expected = [2.0f32, 1.0, 3.0, 1.5].map(|angle| [2.0 * angle.cos(), 2.0 * angle.sin()]);
        for (found, expected) in table.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-6, "{table:?}");
        }
    }
}
