//! The inner kernel of attention: sixteen cached tokens and the queries that attend to them.

use super::operands::{Attend, Item};
use super::softmax::Softmax;
use crate::device::cpu::cache::{KvElement, TileShape};
use crate::device::cpu::simd::{LANES, Simd, unroll};
use crate::device::{AttentionSpec, Values};
use std::ops::Range;

/// Queries that share tiles, and the state that they have accumulated.
pub(crate) struct Block<'a> {
    /// Queries, `[head_dim][query]`.
    pub(crate) queries: &'a [f32],
    pub(crate) weights: &'a mut [f32],
    pub(crate) decay: &'a mut [f32],
    pub(crate) sees: &'a [(usize, usize)],
    pub(crate) softmax: Softmax<'a>,
}

/// Keys and values of sixteen tokens of one head.
pub(crate) struct Tile<E> {
    /// The keys, and the values if they are beside them: `shape.elements()` elements.
    elements: *const E,
    /// Sixteen values, each `shape.value_stride` elements after the one before it.
    values: *const E,
    /// Address of the next sixteen tokens, or null.
    next: *const u8,
    shape: TileShape,
    /// Positions of the sixteen tokens.
    positions: Range<usize>,
    /// Indices of the tokens that at least one row of the item attends to.
    tokens: Range<usize>,
}

impl<E: KvElement> Tile<E> {
    /// Returns tile `tile` of the item's sequence. Values that are in the keys are copied to
    /// `copied`, which must not change while the tile is in use.
    #[inline(always)]
    pub(crate) fn of(
        attend: &Attend<'_>,
        item: &Item,
        head: usize,
        tile: usize,
        copied: &mut Vec<f32>,
    ) -> Self {
        let cache = attend.cache;
        let shape = TileShape::of(attend.spec.heads);
        let group = attend.group_tables;
        let table = &group.tables[item.sequence];
        let (first, blocks) = (table.first, &group.entries[table.entries.clone()]);
        let layer = cache.layer(attend.layer.index);
        let tiles = cache.tiles(attend.spec.heads, attend.layer.part);
        let in_block = cache.shape().block_tokens / LANES;
        let at = |tile: usize| {
            let block = *blocks.get((tile / in_block).checked_sub(first)?)? as usize;
            let at = tiles.at(block, head, tile % in_block) * size_of::<E>();
            layer.get(at..at + shape.elements() * size_of::<E>())
        };
        // The table covers every position that a row attends to, as `attend` has checked.
        let elements = at(tile).unwrap_or_else(|| panic!("tile {tile} has no block"));
        let start = tile * LANES;
        // Slots outside this range may never have been written for this sequence. They may hold
        // anything, and 0 · NaN would not be 0.
        let tokens = item.sees.start.saturating_sub(start)..(item.sees.end - start).min(LANES);
        let elements = elements.as_ptr().cast::<E>();
        Self {
            elements,
            values: match shape.values {
                // The values follow the keys, in the same tile.
                Values::BesideKeys => elements.wrapping_add(shape.keys()),
                Values::InKeys(count) => {
                    // An element of the cache is at most as large as one of `copied`.
                    copied.resize(LANES * shape.value_stride, 0.0);
                    let to = copied.as_mut_ptr().cast::<E>();
                    let first = shape.head_dim - count;
                    for element in 0..count {
                        for token in 0..LANES {
                            // SAFETY: a tile has `head_dim` rows of sixteen elements, and `copied`
                            // has room for sixteen values of `value_stride` elements, which is at
                            // least `count`.
                            unsafe {
                                let from = elements.add((first + element) * LANES + token);
                                to.add(token * shape.value_stride + element).write(*from);
                            }
                        }
                    }
                    to
                }
            },
            next: at(tile + 1).map_or(std::ptr::null(), <[u8]>::as_ptr),
            shape,
            positions: start..start + LANES,
            tokens,
        }
    }

    /// Prefetches the next tile. Blocks can be anywhere in memory, so the hardware cannot
    /// predict the address.
    #[inline(always)]
    pub(crate) fn prefetch_next<S: Simd>(&self, s: S) {
        if self.next.is_null() {
            return;
        }
        for line in (0..self.shape.elements() * size_of::<E>()).step_by(64) {
            s.prefetch(self.next.wrapping_add(line));
        }
    }

    /// Adds the tile to the state of all queries.
    #[inline(always)]
    pub(crate) fn add_all<S: Simd>(&self, s: S, spec: &AttentionSpec, block: &mut Block<'_>) {
        let (mut q, end) = (0, block.sees.len());
        while S::ROWS >= 8 && end - q >= 8 {
            self.add::<S, 8>(s, spec, block, q);
            q += 8;
        }
        while S::ROWS >= 4 && end - q >= 4 {
            self.add::<S, 4>(s, spec, block, q);
            q += 4;
        }
        while end - q >= 2 {
            self.add::<S, 2>(s, spec, block, q);
            q += 2;
        }
        if q < end {
            self.add::<S, 1>(s, spec, block, q);
        }
    }

    /// Adds the tile to the state of `M` queries from `first`.
    #[inline(always)]
    fn add<S: Simd, const M: usize>(
        &self,
        s: S,
        spec: &AttentionSpec,
        block: &mut Block<'_>,
        first: usize,
    ) {
        let scores = self.scores::<S, M>(s, block.queries, first);
        let mut decays = false;
        unroll!(m < M => {
            let query = first + m;
            let mut score = s.mul(scores[m], s.splat(spec.scale));
            if let Some(cap) = spec.softcap {
                let cap = s.splat(cap);
                score = s.mul(cap, s.tanh(s.div(score, cap)));
            }
            let score = self.masked(s, score, block.sees[query]);
            let before = block.softmax.largest[query];
            let here = s.reduce_max(score);
            let largest = if here > before { here } else { before };
            // The query has not attended to anything yet. Any finite pivot will do, because all
            // weights are 0.
            let pivot = if largest == f32::NEG_INFINITY {
                0.0
            } else {
                largest
            };
            let weights = s.exp(s.sub(score, s.splat(pivot)));
            let sums = &mut block.softmax.sums[query * LANES..][..LANES];
            // SAFETY: there are 16 sums and 16 weights per query.
            unsafe {
                let mut sum = s.load(sums.as_ptr());
                if largest != before {
                    let decay = s.exp(s.splat(before - pivot));
                    sum = s.mul(sum, decay);
                    block.decay[query] = s.reduce_max(decay);
                    decays = true;
                } else {
                    block.decay[query] = 1.0;
                }
                s.store(sums.as_mut_ptr(), s.add(sum, weights));
                s.store(
                    block.weights[query * LANES..][..LANES].as_mut_ptr(),
                    weights,
                );
            }
            block.softmax.largest[query] = largest;
        });
        self.add_values::<S, M>(s, block, first, decays);
    }

    /// Returns the scores `q · k` of `M` queries from `first` with the sixteen tokens.
    #[inline(always)]
    fn scores<S: Simd, const M: usize>(&self, s: S, queries: &[f32], first: usize) -> [S::F; M] {
        let dim = self.shape.head_dim;
        let stride = queries.len() / dim;
        assert!(dim.is_multiple_of(2) && first + M <= stride);
        // Two chains per query hide half of the latency.
        let mut even = [s.splat(0.0); M];
        let mut odd = [s.splat(0.0); M];
        let mut k = self.elements;
        let mut q = queries[first..].as_ptr();
        for _ in 0..dim / 2 {
            // SAFETY: a tile has `dim` rows of keys. `queries` has `dim` rows of `stride`
            // elements, and the `M` elements from `first` exist in each row. The loop reads no
            // further.
            unsafe {
                let keys = E::load(s, k);
                unroll!(m < M => { even[m] = s.fma(s.splat(*q.add(m)), keys, even[m]); });
                let (keys, next) = (E::load(s, k.add(LANES)), q.wrapping_add(stride));
                unroll!(m < M => { odd[m] = s.fma(s.splat(*next.add(m)), keys, odd[m]); });
                k = k.add(2 * LANES);
                q = next.wrapping_add(stride);
            }
        }
        unroll!(m < M => { even[m] = s.add(even[m], odd[m]); });
        even
    }

    /// Sets the scores of tokens that a query does not attend to to −∞.
    #[inline(always)]
    fn masked<S: Simd>(&self, s: S, score: S::F, (first, last): (usize, usize)) -> S::F {
        const LANE: [f32; LANES] = [
            0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
        ];
        let Range { start, end } = self.positions;
        if first <= start && end <= last + 1 {
            return score;
        }
        let limit = |position: usize| position.saturating_sub(start).min(LANES) as f32;
        let nothing = s.splat(f32::NEG_INFINITY);
        // SAFETY: `LANE` has 16 elements.
        let lane = unsafe { s.load(LANE.as_ptr()) };
        let score = s.select_lt(lane, s.splat(limit(last + 1)), score, nothing);
        s.select_lt(lane, s.splat(limit(first)), nothing, score)
    }

    /// Computes `result = result · decay + Σ weight · value` for `M` queries.
    #[inline(always)]
    fn add_values<S: Simd, const M: usize>(
        &self,
        s: S,
        block: &mut Block<'_>,
        first: usize,
        decays: bool,
    ) {
        let TileShape { value_stride, .. } = self.shape;
        let results = &mut block.softmax.results[first * value_stride..][..M * value_stride];
        let weights = &block.weights[first * LANES..][..M * LANES];
        let decay = &block.decay[first..][..M];
        for at in (0..value_stride).step_by(LANES) {
            // SAFETY: `results` holds `M` rows of `value_stride` elements, a multiple of 16.
            // There are sixteen values, and `tokens` is within 0..16.
            unsafe {
                let results = results.as_mut_ptr().add(at);
                let mut sums = [s.splat(0.0); M];
                unroll!(m < M => {
                    sums[m] = s.load(results.add(m * value_stride));
                    if decays {
                        sums[m] = s.mul(sums[m], s.splat(decay[m]));
                    }
                });
                for token in self.tokens.clone() {
                    let v = E::load(s, self.values.add(token * value_stride + at));
                    let weights = weights.as_ptr().add(token);
                    unroll!(m < M => {
                        sums[m] = s.fma(s.splat(*weights.add(m * LANES)), v, sums[m]);
                    });
                }
                unroll!(m < M => { s.store(results.add(m * value_stride), sums[m]); });
            }
        }
    }
}
