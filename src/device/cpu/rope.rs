//! Rotary position embedding, the norms before it, and the writes to the KV cache.

use super::CpuDevice;
use super::cache::{CpuCache, HalfBits, KvElement, TileShape, require_cache};
use super::error::require;
use super::memory::Disjoint;
use super::norm::{CpuVector, normalize, normalize_unweighted};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::step::StagedBatch;
use super::tensor::{CpuTensor, require_shape};
use super::workers::Workers;
use crate::device::{CacheLayer, DeviceError, HeadShape, QkNorm, QueryScale, RopeOps, RopeSpec};
use std::ops::Range;

/// A loaded [`RopeSpec`].
pub struct CpuRope {
    spec: RopeSpec,
    /// Index of its table in [`RopeTables`].
    index: usize,
}

/// Cosines and sines of the staged batch's positions, computed once for all layers.
#[derive(Default)]
pub(crate) struct RopeTables {
    tables: Vec<Table>,
}

#[derive(Default)]
struct Table {
    generation: u64,
    /// One row per row of the batch: the cosines, then the sines.
    angles: Vec<f32>,
}

impl RopeTables {
    /// Adds a table for one more rotary embedding and returns its index.
    fn add(&mut self) -> usize {
        self.tables.push(Table::default());
        self.tables.len() - 1
    }

    /// Returns the angles of `rope` for the rows of `batch`, and computes them if the batch is
    /// new.
    fn angles(
        &mut self,
        workers: &mut Workers,
        rope: &CpuRope,
        batch: &StagedBatch,
    ) -> Result<&[f32], DeviceError> {
        let wrong = || DeviceError::Failed {
            device: "cpu",
            operation: "rope_store",
            reason: "this rotary embedding was loaded by another device".to_owned(),
        };
        let table = self.tables.get_mut(rope.index).ok_or_else(wrong)?;
        if table.generation != batch.generation {
            let frequencies = &rope.spec.inverse_frequencies;
            let half = frequencies.len();
            table.angles.resize(batch.rows() * 2 * half, 0.0);
            let angles = Disjoint::new(&mut table.angles);
            let grain = (512 / half.max(1)).max(1);
            workers.run("rope_store", batch.rows(), grain, |range| {
                for row in range {
                    // SAFETY: each row belongs to one item.
                    let angles = unsafe { angles.range(row * 2 * half, 2 * half) };
                    let (cosines, sines) = angles.split_at_mut(half);
                    let position = batch.positions[row] as f32;
                    for i in 0..half {
                        let (sine, cosine) = (position * frequencies[i]).sin_cos();
                        cosines[i] = cosine * rope.spec.magnitude;
                        sines[i] = sine * rope.spec.magnitude;
                    }
                }
            })?;
            table.generation = batch.generation;
        }
        Ok(&table.angles)
    }
}

impl RopeOps for CpuDevice {
    type Rope = CpuRope;

    fn load_rope(&mut self, spec: &RopeSpec) -> Result<CpuRope, DeviceError> {
        Ok(CpuRope {
            spec: spec.clone(),
            index: self.ropes.add(),
        })
    }

    fn rope_store(
        &mut self,
        qkv: &mut CpuTensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &CpuRope,
        cache: &mut CpuCache,
        layer: CacheLayer,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rope_store";
        let rows = self.staged.rows();
        require_shape(NAME, "qkv", qkv, (rows, heads.qkv_columns()))?;
        require_cache(NAME, cache, layer, heads)?;
        let group = self.staged.group(NAME, layer)?;
        let slots = cache.shape().blocks * cache.shape().block_tokens;
        require(self.staged.slot_end <= slots, NAME, || {
            format!(
                "slot {} is out of range: the cache has {slots} slots",
                self.staged.slot_end - 1
            )
        })?;
        let half = require_rope(NAME, &self.staged, rope, heads)?;
        if let Some(norm) = norm {
            let size =
                |heads_in_row: usize| heads.head_dim * if norm.per_head { 1 } else { heads_in_row };
            let fits = norm.q.values().len() == size(heads.q_heads)
                && norm.k.values().len() == size(heads.kv_heads);
            require(fits, NAME, || {
                format!(
                    "norms of {} and {} do not fit {heads:?}",
                    norm.q.values().len(),
                    norm.k.values().len()
                )
            })?;
        }
        if rows == 0 {
            return Ok(());
        }
        let norm = norm.map(|norm| NormWeights {
            q: norm.q.values(),
            k: norm.k.values(),
            epsilon: norm.epsilon,
            per_head: norm.per_head,
            values: norm.values,
        });
        let angles = self.ropes.angles(&mut self.workers, rope, &self.staged)?;
        let store = RopeStore {
            heads,
            norm,
            half,
            angles,
            slots: &group.slots,
        };
        let isa = self.multiplier.isa;
        let qkv = qkv.leading_mut(rows);
        store.all_rows(&mut self.workers, isa, qkv, cache, layer)
    }

    fn rope_queries(
        &mut self,
        q: &mut CpuTensor,
        heads: HeadShape,
        norm: Option<(&CpuVector, f32)>,
        rope: &CpuRope,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rope_queries";
        let rows = self.staged.rows();
        let columns = heads.q_columns();
        require_shape(NAME, "q", q, (rows, columns))?;
        let half = require_rope(NAME, &self.staged, rope, heads)?;
        let norm = norm.map(|(weight, epsilon)| (weight.values(), epsilon));
        if let Some((weight, _)) = norm {
            require(weight.len() == heads.head_dim, NAME, || {
                format!("a norm of {} does not fit {heads:?}", weight.len())
            })?;
        }
        if rows == 0 {
            return Ok(());
        }
        let angles = self.ropes.angles(&mut self.workers, rope, &self.staged)?;
        let isa = self.multiplier.isa;
        let q = Disjoint::new(q.leading_mut(rows));
        let grain = (4096 / columns.max(1)).max(1);
        self.workers.run(NAME, rows, grain, |range| {
            for row in range {
                isa.dispatch(Queries {
                    // SAFETY: each row belongs to one item.
                    q: unsafe { q.range(row * columns, columns) },
                    head_dim: heads.head_dim,
                    norm,
                    angles: &angles[row * 2 * half..][..2 * half],
                });
            }
        })
    }

    fn scale_queries(
        &mut self,
        qkv: &mut CpuTensor,
        heads: HeadShape,
        scale: QueryScale,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "scale_queries";
        let rows = self.staged.rows();
        let columns = match qkv.columns() == heads.q_columns() {
            true => heads.q_columns(),
            false => heads.qkv_columns(),
        };
        require_shape(NAME, "qkv", qkv, (rows, columns))?;
        require(scale.interval > 0, NAME, || {
            "the interval is 0, but must be at least 1".to_owned()
        })?;
        for row in 0..rows {
            let factor = scale.factor(self.staged.positions[row]);
            let queries = &mut qkv.row_mut(row)[..heads.q_columns()];
            queries.iter_mut().for_each(|query| *query *= factor);
        }
        Ok(())
    }
}

/// Requires that the batch has no position beyond those of a rotary embedding, and that the heads
/// have the elements that it rotates. Returns the number of rotated pairs.
fn require_rope(
    operation: &'static str,
    staged: &StagedBatch,
    rope: &CpuRope,
    heads: HeadShape,
) -> Result<usize, DeviceError> {
    let positions = rope.spec.max_positions;
    require(staged.position_end <= positions, operation, || {
        format!(
            "position {} is out of range: the model has {positions} positions",
            staged.position_end - 1
        )
    })?;
    let half = rope.spec.inverse_frequencies.len();
    require(2 * half <= heads.head_dim, operation, || {
        format!(
            "{half} rotated pairs do not fit in a head of {} elements",
            heads.head_dim
        )
    })?;
    Ok(half)
}

/// The queries of one row.
struct Queries<'a> {
    q: &'a mut [f32],
    head_dim: usize,
    norm: Option<(&'a [f32], f32)>,
    /// The cosines of the row's position, then the sines.
    angles: &'a [f32],
}

impl Kernel for Queries<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (cosines, sines) = self.angles.split_at(self.angles.len() / 2);
        for head in self.q.chunks_exact_mut(self.head_dim) {
            if let Some((weight, epsilon)) = self.norm {
                normalize(s, head, weight, epsilon);
            }
            rotate(s, head, cosines, sines);
        }
    }
}

/// Weights of the norms on queries and keys, as slices.
#[derive(Clone, Copy)]
struct NormWeights<'a> {
    q: &'a [f32],
    k: &'a [f32],
    epsilon: f32,
    per_head: bool,
    /// Whether values are normalised, without a weight.
    values: bool,
}

/// Operands of `rope_store`. The caller has checked that they fit together.
struct RopeStore<'a> {
    heads: HeadShape,
    norm: Option<NormWeights<'a>>,
    half: usize,
    angles: &'a [f32],
    /// One slot per row.
    slots: &'a [u32],
}

impl RopeStore<'_> {
    /// Rotates all rows of `qkv` and writes their keys and values to `layer`.
    fn all_rows(
        &self,
        workers: &mut Workers,
        isa: Isa,
        qkv: &mut [f32],
        cache: &mut CpuCache,
        layer: CacheLayer,
    ) -> Result<(), DeviceError> {
        let qkv = Disjoint::new(qkv);
        // Where a token's key and value go: the first element of the tile, and the index in the
        // tile. The sizes are read here, before the layer is borrowed mutably.
        let block_tokens = cache.shape().block_tokens;
        let tiles = cache.tiles(self.heads, layer.part);
        let place = |slot: usize, head: usize| {
            let (block, offset) = (slot / block_tokens, slot % block_tokens);
            (tiles.at(block, head, offset / LANES), offset % LANES)
        };
        let (half, bytes) = (cache.half, Disjoint::new(cache.layer_mut(layer.index)));
        let grain = (4096 / self.heads.qkv_columns().max(1)).max(1);
        workers.run("rope_store", self.slots.len(), grain, |rows| {
            if half {
                isa.dispatch(Rows::<HalfBits, _> {
                    store: self,
                    rows,
                    qkv: &qkv,
                    cache: &bytes,
                    place,
                    element: Default::default(),
                });
            } else {
                isa.dispatch(Rows::<f32, _> {
                    store: self,
                    rows,
                    qkv: &qkv,
                    cache: &bytes,
                    place,
                    element: Default::default(),
                });
            }
        })
    }
}

/// Processes some rows of the batch.
struct Rows<'a, E, P> {
    store: &'a RopeStore<'a>,
    rows: Range<usize>,
    qkv: &'a Disjoint<'a, f32>,
    cache: &'a Disjoint<'a, u8>,
    place: P,
    element: std::marker::PhantomData<E>,
}

impl<E: KvElement, P: Fn(usize, usize) -> (usize, usize)> Kernel for Rows<'_, E, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let RopeStore {
            heads,
            norm,
            half,
            angles,
            slots,
        } = *self.store;
        let dim = heads.head_dim;
        let columns = heads.qkv_columns();
        for row in self.rows {
            // SAFETY: each row belongs to one item.
            let qkv = unsafe { self.qkv.range(row * columns, columns) };
            let (q, kv) = qkv.split_at_mut(heads.q_columns());
            let (k, v) = kv.split_at_mut(heads.kv_heads * dim);
            if let Some(norm) = norm {
                let size = |all: usize| if norm.per_head { dim } else { all };
                let (q_size, k_size) = (size(q.len()), size(k.len()));
                q.chunks_exact_mut(q_size)
                    .for_each(|q| normalize(s, q, norm.q, norm.epsilon));
                k.chunks_exact_mut(k_size)
                    .for_each(|k| normalize(s, k, norm.k, norm.epsilon));
                if norm.values {
                    v.chunks_exact_mut(dim)
                        .for_each(|v| normalize_unweighted(s, v, norm.epsilon));
                }
            }
            let (cosines, sines) = angles[row * 2 * half..][..2 * half].split_at(half);
            for head in q.chunks_exact_mut(dim).chain(k.chunks_exact_mut(dim)) {
                rotate(s, head, cosines, sines);
            }
            let slot = slots[row] as usize;
            let shape = TileShape::of(heads);
            for head in 0..heads.kv_heads {
                let (tile, token) = (self.place)(slot, head);
                let bytes = size_of::<E>();
                let to = self
                    .cache
                    .pointer(tile * bytes, shape.elements() * bytes)
                    .cast::<E>();
                let k = &k[head * dim..][..dim];
                // There is none if it is in the key.
                let v = v.get(head * dim..).and_then(|v| v.get(..dim));
                // SAFETY: `to` points to a whole tile, and no other row writes this token of
                // it.
                unsafe { store_token(s, to, shape, token, k, v) };
            }
        }
    }
}

/// Rotates the pairs `(i, i + half)` of a head.
#[inline(always)]
fn rotate<S: Simd>(s: S, head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let half = cosines.len();
    assert!(2 * half <= head.len() && sines.len() == half);
    let mut at = 0;
    while at < half {
        let count = LANES.min(half - at);
        // SAFETY: `at + count` is at most `half`, and `2 * half` is at most the length of the
        // head.
        unsafe {
            let (first, second) = (head.as_mut_ptr().add(at), head.as_mut_ptr().add(half + at));
            let (a, b) = (s.load_part(first, count), s.load_part(second, count));
            let cosine = s.load_part(cosines.as_ptr().add(at), count);
            let sine = s.load_part(sines.as_ptr().add(at), count);
            let rotated = s.sub(s.mul(a, cosine), s.mul(b, sine));
            s.store_part(first, rotated, count);
            let rotated = s.add(s.mul(b, cosine), s.mul(a, sine));
            s.store_part(second, rotated, count);
        }
        at += LANES;
    }
}

/// Writes the key of one token into its tile, and the value if it is not in the key.
///
/// # Safety
/// `tile` must be writable for a whole tile, and nothing else may use this token of it.
#[inline(always)]
unsafe fn store_token<S: Simd, E: KvElement>(
    s: S,
    tile: *mut E,
    shape: TileShape,
    token: usize,
    k: &[f32],
    v: Option<&[f32]>,
) {
    let mut converted = [E::default(); LANES];
    for at in (0..shape.head_dim).step_by(LANES) {
        let count = LANES.min(shape.head_dim - at);
        // SAFETY: at least `count` elements of the key and the value are left. The tile has
        // room for the `head_dim` rows of keys and for whole vectors of values.
        unsafe {
            E::store(
                s,
                converted.as_mut_ptr(),
                s.load_part(k.as_ptr().add(at), count),
            );
            for (i, &element) in converted[..count].iter().enumerate() {
                tile.add((at + i) * LANES + token).write(element);
            }
            if let Some(v) = v {
                let value = s.load_part(v.as_ptr().add(at), count);
                let to = tile.add(shape.keys() + token * shape.value_stride + at);
                E::store(s, to, value);
            }
        }
    }
}
