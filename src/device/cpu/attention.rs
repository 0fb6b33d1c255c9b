//! Causal attention over the paged cache, with an online softmax.
//!
//! An item of work is some consecutive rows of a sequence and one key-value head:
//! all query heads of the group and all rows of the item share each tile of
//! sixteen keys. A row goes through the tiles in the order of the keys, and a tile
//! of which it sees nothing leaves its state as it is, to the bit; so its result
//! does not depend on the rows it shares an item with.
//!
//! Milakov & Gimelshein, *Online normalizer calculation for softmax*, 2018.

use super::cache::{CpuCache, HalfBits, KvElement, TileShape};
use super::memory::Disjoint;
use super::simd::{Isa, Kernel, LANES, Simd, unroll};
use super::stage::Staged;
use super::workers::Workers;
use crate::device::{AttentionSpec, DeviceError};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements of query state that stay in the first-level cache.
const STATE: usize = 3072;

/// Consecutive rows of one sequence.
#[derive(Clone, Debug)]
struct Item {
    sequence: usize,
    rows: Range<usize>,
}

/// Cuts batches into items; kept from call to call for its memory.
#[derive(Default)]
pub(crate) struct Attention {
    items: Vec<Item>,
}

/// The operands; they were checked against each other.
pub(crate) struct Attend<'a> {
    pub(crate) qkv: &'a [f32],
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) cache: &'a CpuCache,
    pub(crate) layer: usize,
    pub(crate) batch: &'a Staged,
}

impl Attention {
    /// Attention of all rows of the batch.
    pub(crate) fn all_rows(
        &mut self,
        workers: &mut Workers,
        isa: Isa,
        attend: &Attend<'_>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let heads = attend.spec.heads;
        let group = heads.q_heads / heads.kv_heads;
        let queries = (STATE / heads.head_dim).clamp(4, 48);
        let rows = (queries / group).max(1);
        self.items.clear();
        for (sequence, of) in attend.batch.sequences.iter().enumerate() {
            let mut start = of.rows.start;
            while start < of.rows.end {
                let end = of.rows.end.min(start + rows);
                self.items.push(Item {
                    sequence,
                    rows: start..end,
                });
                start = end;
            }
        }
        let out = Disjoint::new(out);
        let items = &self.items;
        workers.run("attend", items.len() * heads.kv_heads, 1, |range| {
            for index in range {
                // The last rows of a prompt see most keys: they come first, so that
                // no thread is left with a long item at the end.
                let item = &items[items.len() - 1 - index / heads.kv_heads];
                let head = index % heads.kv_heads;
                STATES.with_borrow_mut(|state| {
                    let work = Work {
                        attend,
                        item,
                        head,
                        out: &out,
                        state,
                    };
                    match attend.cache.half {
                        true => isa.dispatch(ItemHead::<HalfBits>(work, PhantomData)),
                        false => isa.dispatch(ItemHead::<f32>(work, PhantomData)),
                    }
                });
            }
        })
    }
}

/// The queries of an item that share a key-value head.
struct Work<'a> {
    attend: &'a Attend<'a>,
    item: &'a Item,
    head: usize,
    out: &'a Disjoint<'a, f32>,
    state: &'a mut State,
}

/// The same, over a cache that holds `E`.
struct ItemHead<'a, E>(Work<'a>, PhantomData<E>);

/// The running softmax of the queries of an item; kept by each thread.
#[derive(Default)]
struct State {
    /// `[query][head_dim]`.
    queries: Vec<f32>,
    /// Unnormalised results, `[query][value_stride]`.
    results: Vec<f32>,
    /// The largest score so far.
    largest: Vec<f32>,
    /// Sums of the weights, `[query][16]`: one for each token of a tile.
    sums: Vec<f32>,
    /// Weights of the tile in progress, `[query][16]`.
    weights: Vec<f32>,
    /// What results and sums are multiplied by before this tile is added.
    decay: Vec<f32>,
    /// First and last position that a query sees.
    sees: Vec<(usize, usize)>,
}

thread_local! {
    static STATES: RefCell<State> = RefCell::default();
}

impl State {
    fn reset(&mut self, queries: usize, shape: TileShape) {
        fn fill<T: Clone>(values: &mut Vec<T>, len: usize, value: T) {
            values.clear();
            values.resize(len, value);
        }
        fill(&mut self.queries, queries * shape.head_dim, 0.0);
        fill(&mut self.results, queries * shape.value_stride, 0.0);
        fill(&mut self.largest, queries, f32::NEG_INFINITY);
        fill(&mut self.sums, queries * LANES, 0.0);
        fill(&mut self.weights, queries * LANES, 0.0);
        fill(&mut self.decay, queries, 1.0);
        fill(&mut self.sees, queries, (0, 0));
    }
}

/// Queries are processed in blocks of 8, 4, 2 or 1; others are filled up with
/// queries that nobody reads.
fn padded<S: Simd>(queries: usize) -> usize {
    if queries <= 2 || S::ROWS < 4 {
        queries.next_multiple_of(S::ROWS.min(queries.max(1)))
    } else {
        queries.next_multiple_of(4)
    }
}

impl<E: KvElement> Kernel for ItemHead<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Work {
            attend,
            item,
            head,
            out,
            state,
        } = self.0;
        let Attend {
            qkv,
            spec,
            cache,
            batch,
            ..
        } = *attend;
        let heads = spec.heads;
        let (dim, group) = (heads.head_dim, heads.q_heads / heads.kv_heads);
        let shape = TileShape::new(dim);
        let queries = item.rows.len() * group;
        let blocks = padded::<S>(queries);
        state.reset(blocks, shape);
        let sees = |row: usize| {
            let position = batch.positions[row] as usize;
            let first = spec
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            (first, position)
        };
        for (index, row) in item.rows.clone().enumerate() {
            let from = row * heads.qkv_columns() + head * group * dim;
            let to = index * group;
            state.queries[to * dim..][..group * dim].copy_from_slice(&qkv[from..][..group * dim]);
            state.sees[to..to + group].fill(sees(row));
        }
        let (first, _) = sees(item.rows.start);
        let (_, last) = sees(item.rows.end - 1);
        // Padding sees what the last row sees.
        state.sees[queries..].fill(sees(item.rows.end - 1));

        let table = &batch.tables[batch.sequences[item.sequence].table.clone()];
        let layer = cache.layer(attend.layer);
        let tiles_per_block = cache.shape().block_tokens / LANES;
        for tile in first / LANES..=last / LANES {
            let block = table[tile / tiles_per_block] as usize;
            let at = cache.tile(block, head, tile % tiles_per_block) * size_of::<E>();
            let bytes = &layer[at..][..shape.elements() * size_of::<E>()];
            let positions = tile * LANES..(tile + 1) * LANES;
            // Slots outside were never written for this sequence: they may hold
            // anything, and 0 · NaN would not be 0.
            let tokens =
                first.saturating_sub(positions.start)..(last + 1 - positions.start).min(LANES);
            let tile = Tile {
                elements: bytes.as_ptr().cast::<E>(),
                shape,
                positions,
                tokens,
            };
            let mut q = 0;
            while S::ROWS >= 8 && blocks - q >= 8 {
                tile.add::<S, 8>(s, spec, state, q);
                q += 8;
            }
            while S::ROWS >= 4 && blocks - q >= 4 {
                tile.add::<S, 4>(s, spec, state, q);
                q += 4;
            }
            while blocks - q >= 2 {
                tile.add::<S, 2>(s, spec, state, q);
                q += 2;
            }
            if q < blocks {
                tile.add::<S, 1>(s, spec, state, q);
            }
        }

        for (index, row) in item.rows.clone().enumerate() {
            let to = row * heads.q_columns() + head * group * dim;
            // SAFETY: the outputs of this row and these heads belong to this item.
            let out = unsafe { out.range(to, group * dim) };
            for (g, out) in out.chunks_exact_mut(dim).enumerate() {
                let query = index * group + g;
                // SAFETY: 16 sums a query.
                let sums = unsafe { s.load(state.sums[query * LANES..][..LANES].as_ptr()) };
                let sum = s.splat(s.reduce_add(sums));
                let result = &state.results[query * shape.value_stride..][..shape.value_stride];
                for at in (0..dim).step_by(LANES) {
                    let count = LANES.min(dim - at);
                    // SAFETY: results are padded to whole vectors; `count` outputs are left.
                    unsafe {
                        let value = s.div(s.load(result.as_ptr().add(at)), sum);
                        s.store_part(out.as_mut_ptr().add(at), value, count);
                    }
                }
            }
        }
    }
}

/// Sixteen tokens of one head.
struct Tile<E> {
    /// `shape.elements()` of them.
    elements: *const E,
    shape: TileShape,
    /// The positions of the sixteen.
    positions: Range<usize>,
    /// Which of the sixteen any row of the item sees.
    tokens: Range<usize>,
}

impl<E: KvElement> Tile<E> {
    /// Adds the tile to `M` queries from `first`.
    #[inline(always)]
    fn add<S: Simd, const M: usize>(
        &self,
        s: S,
        spec: &AttentionSpec,
        state: &mut State,
        first: usize,
    ) {
        let scores = self.scores::<S, M>(s, &state.queries[first * self.shape.head_dim..]);
        let mut decays = false;
        unroll!(m < M => {
            let query = first + m;
            let mut score = s.mul(scores[m], s.splat(spec.scale));
            if let Some(cap) = spec.softcap {
                let cap = s.splat(cap);
                score = s.mul(cap, s.tanh(s.div(score, cap)));
            }
            let score = self.masked(s, score, state.sees[query]);
            let before = state.largest[query];
            let here = s.reduce_max(score);
            let largest = if here > before { here } else { before };
            // Nothing seen so far: any finite number will do, the weights are 0.
            let pivot = if largest == f32::NEG_INFINITY {
                0.0
            } else {
                largest
            };
            let weights = s.exp(s.sub(score, s.splat(pivot)));
            let sums = &mut state.sums[query * LANES..][..LANES];
            // SAFETY: 16 sums and 16 weights a query.
            unsafe {
                let mut sum = s.load(sums.as_ptr());
                if largest != before {
                    let decay = s.exp(s.splat(before - pivot));
                    sum = s.mul(sum, decay);
                    state.decay[query] = s.reduce_max(decay);
                    decays = true;
                } else {
                    state.decay[query] = 1.0;
                }
                s.store(sums.as_mut_ptr(), s.add(sum, weights));
                s.store(
                    state.weights[query * LANES..][..LANES].as_mut_ptr(),
                    weights,
                );
            }
            state.largest[query] = largest;
        });
        self.add_values::<S, M>(s, state, first, decays);
    }

    /// `q · k` of `M` queries with the sixteen tokens.
    #[inline(always)]
    fn scores<S: Simd, const M: usize>(&self, s: S, queries: &[f32]) -> [S::F; M] {
        let dim = self.shape.head_dim;
        let queries = &queries[..M * dim];
        // Two chains a query hide half of the latency.
        let mut even = [s.splat(0.0); M];
        let mut odd = [s.splat(0.0); M];
        for d in (0..dim / 2 * 2).step_by(2) {
            // SAFETY: a tile has `head_dim` rows of keys, `queries` has `M` of them.
            unsafe {
                let q = queries.as_ptr().add(d);
                let k = E::load(s, self.elements.add(d * LANES));
                unroll!(m < M => { even[m] = s.fma(s.splat(*q.add(m * dim)), k, even[m]); });
                let k = E::load(s, self.elements.add((d + 1) * LANES));
                unroll!(m < M => { odd[m] = s.fma(s.splat(*q.add(m * dim + 1)), k, odd[m]); });
            }
        }
        unroll!(m < M => { even[m] = s.add(even[m], odd[m]); });
        even
    }

    /// −∞ for the tokens that a query does not see.
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
        // SAFETY: 16 of them.
        let lane = unsafe { s.load(LANE.as_ptr()) };
        let score = s.select_lt(lane, s.splat(limit(last + 1)), score, nothing);
        s.select_lt(lane, s.splat(limit(first)), nothing, score)
    }

    /// `result = result · decay + Σ weight · value` of `M` queries.
    #[inline(always)]
    fn add_values<S: Simd, const M: usize>(
        &self,
        s: S,
        state: &mut State,
        first: usize,
        decays: bool,
    ) {
        let TileShape { value_stride, .. } = self.shape;
        let results = &mut state.results[first * value_stride..][..M * value_stride];
        let weights = &state.weights[first * LANES..][..M * LANES];
        let decay = &state.decay[first..][..M];
        let values = self.shape.keys();
        for at in (0..value_stride).step_by(LANES) {
            // SAFETY: results hold `M` rows of `value_stride`, a multiple of 16; the
            // tile holds sixteen values after its keys; `tokens` is within 0..16.
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
                    let v = E::load(s, self.elements.add(values + token * value_stride + at));
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
