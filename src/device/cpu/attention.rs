//! Causal attention over the paged KV cache.
//!
//! An item of work consists of some consecutive rows of a sequence and one key-value head. All
//! query heads of the group and all rows of the item share each tile of sixteen keys.
//!
//! Keys are processed in spans of [`SPAN`] positions, counted from the start of the sequence.
//! Each span has its own running softmax, and the spans are merged in order. If there are few
//! rows, each span is an item of its own, so that a long sequence keeps all threads busy. In
//! both cases a row goes through the same tiles and merges. A tile or span in which a row
//! attends to nothing leaves the row's state unchanged, bit for bit. The result of a row
//! therefore does not depend on the rows that it is computed with.

use super::cache::{CpuCache, HalfBits, KvElement, TileShape};
use super::memory::Disjoint;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::softmax::{Softmax, SoftmaxShape};
use super::stage::StagedBatch;
use super::tile::{Block, Tile};
use super::workers::Workers;
use crate::device::{AttentionSpec, DeviceError};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Number of positions that share a running softmax; a multiple of 16.
const SPAN: usize = 128;

/// Number of elements of query state that stay in the L1 cache.
const STATE: usize = 3072;

/// Consecutive rows of one sequence that are computed together.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) sequence: usize,
    pub(crate) rows: Range<usize>,
    /// Positions that at least one of the rows attends to.
    pub(crate) sees: Range<usize>,
    /// Index of its first span among the spans of all items.
    first_span: usize,
}

impl Item {
    /// Returns the spans that overlap `sees`.
    fn spans(&self) -> Range<usize> {
        self.sees.start / SPAN..self.sees.end.div_ceil(SPAN)
    }
}

/// Cuts batches into items. Reused from call to call to keep the memory.
#[derive(Default)]
pub(crate) struct Attention {
    items: Vec<Item>,
    /// Softmax state of single spans, until they are merged.
    partial: Vec<f32>,
}

/// Operands of an attention operation. The caller has checked that they fit together.
pub(crate) struct Attend<'a> {
    pub(crate) qkv: &'a [f32],
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) cache: &'a CpuCache,
    pub(crate) layer: usize,
    pub(crate) batch: &'a StagedBatch,
}

impl Attend<'_> {
    /// Returns the first and the last position that a row attends to.
    fn visible(&self, row: usize) -> (usize, usize) {
        let position = self.batch.positions[row] as usize;
        let before = |window| (position + 1).saturating_sub(window);
        (self.spec.window.map_or(0, before), position)
    }

    /// Returns the number of query heads per key-value head.
    fn group(&self) -> usize {
        self.spec.heads.q_heads / self.spec.heads.kv_heads
    }

    fn softmax_shape(&self, rows: usize) -> SoftmaxShape {
        let queries = rows * self.group();
        // Queries are processed in blocks of 8, 4, 2 or 1. The last block is padded with
        // queries whose results are not used.
        let padded = match queries {
            0..=2 => queries,
            _ => queries.next_multiple_of(4),
        };
        SoftmaxShape {
            queries: padded,
            stride: TileShape::new(self.spec.heads.head_dim).value_stride,
        }
    }
}

impl Attention {
    /// Computes attention for all rows of the batch.
    pub(crate) fn all_rows(
        &mut self,
        workers: &mut Workers,
        isa: Isa,
        attend: &Attend<'_>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let heads = attend.spec.heads;
        let spans = self.cut(attend);
        let whole = self.items.len() * heads.kv_heads;
        let out = &Disjoint::new(out);
        let items = &self.items;
        if whole >= 4 * workers.count() || spans == items.len() {
            return workers.run("attend", whole, 1, |range| {
                for index in range {
                    // The last rows of a prompt attend to the most keys. They are computed
                    // first, so that no thread is left with a long item at the end.
                    let item = &items[items.len() - 1 - index / heads.kv_heads];
                    let head = index % heads.kv_heads;
                    attend.gather(isa, item, head, item.spans(), Target::Finish(out));
                }
            });
        }
        // Every item gets the room that the largest one needs.
        let rows = items.iter().map(|item| item.rows.len()).max();
        let room = attend.softmax_shape(rows.unwrap_or(0)).len();
        self.partial.resize(spans * heads.kv_heads * room, 0.0);
        let partial = Disjoint::new(&mut self.partial);
        workers.run("attend", spans * heads.kv_heads, 1, |range| {
            for index in range {
                let (span, head) = (index / heads.kv_heads, index % heads.kv_heads);
                let item = &items[items.partition_point(|item| item.first_span <= span) - 1];
                let span = item.spans().start + span - item.first_span;
                // SAFETY: each pair of a span and a head has its own room.
                let target = Target::Keep(unsafe { partial.range(index * room, room) });
                attend.gather(isa, item, head, span..span + 1, target);
            }
        })?;
        let partial = &self.partial[..];
        workers.run("attend", whole, 4, |range| {
            for index in range {
                let (item, head) = (&items[index / heads.kv_heads], index % heads.kv_heads);
                let first = item.first_span * heads.kv_heads + head;
                let parts = partial
                    .chunks_exact(room)
                    .skip(first)
                    .step_by(heads.kv_heads);
                let parts = parts.take(item.spans().len());
                STATES.with_borrow_mut(|state| {
                    isa.dispatch(Merge {
                        attend,
                        item,
                        head,
                        parts,
                        out,
                        state,
                    });
                });
            }
        })
    }

    /// Cuts the batch into items. Returns the total number of their spans.
    fn cut(&mut self, attend: &Attend<'_>) -> usize {
        let queries = (STATE / attend.spec.heads.head_dim).clamp(4, 48);
        let rows = (queries / attend.group()).max(1);
        let mut spans = 0;
        self.items.clear();
        for (sequence, of) in attend.batch.sequences.iter().enumerate() {
            let mut start = of.rows.start;
            while start < of.rows.end {
                let end = of.rows.end.min(start + rows);
                let item = Item {
                    sequence,
                    rows: start..end,
                    sees: attend.visible(start).0..attend.visible(end - 1).1 + 1,
                    first_span: spans,
                };
                spans += item.spans().len();
                self.items.push(item);
                start = end;
            }
        }
        spans
    }
}

/// What happens to a softmax once its spans are processed.
enum Target<'a> {
    /// It is complete, and its means are written as results.
    Finish(&'a Disjoint<'a, f32>),
    /// It is kept to be merged later.
    Keep(&'a mut [f32]),
}

impl Attend<'_> {
    /// Processes some spans of an item for one head.
    fn gather(&self, isa: Isa, item: &Item, head: usize, spans: Range<usize>, target: Target<'_>) {
        STATES.with_borrow_mut(|state| {
            let gather = Gather {
                attend: self,
                item,
                head,
                spans,
                target,
                state,
            };
            match self.cache.half {
                true => isa.dispatch(GatherFrom::<HalfBits>(gather, PhantomData)),
                false => isa.dispatch(GatherFrom::<f32>(gather, PhantomData)),
            }
        });
    }

    /// Writes the results of an item for one head.
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        s: S,
        item: &Item,
        head: usize,
        total: &Softmax<'_>,
        out: &Disjoint<'_, f32>,
    ) {
        let (heads, group) = (self.spec.heads, self.group());
        for (index, row) in item.rows.clone().enumerate() {
            let to = row * heads.q_columns() + head * group * heads.head_dim;
            // SAFETY: the outputs of this row and these heads belong to this item.
            let out = unsafe { out.range(to, group * heads.head_dim) };
            for (g, out) in out.chunks_exact_mut(heads.head_dim).enumerate() {
                total.finish(s, index * group + g, out);
            }
        }
    }
}

/// Buffers that each thread keeps.
#[derive(Default)]
struct State {
    /// Queries, `[head_dim][query]`.
    queries: Vec<f32>,
    /// Weights of the current tile, `[query][16]`.
    weights: Vec<f32>,
    /// Factor by which each query's softmax is scaled before the current tile is added.
    decay: Vec<f32>,
    /// First and last position that each query attends to.
    sees: Vec<(usize, usize)>,
    /// Softmax of the current span.
    span: Vec<f32>,
    /// Softmax of all spans so far.
    total: Vec<f32>,
}

thread_local! {
    static STATES: RefCell<State> = RefCell::default();
}

/// Merges the softmaxes of an item's spans.
struct Merge<'a, P> {
    attend: &'a Attend<'a>,
    item: &'a Item,
    head: usize,
    parts: P,
    out: &'a Disjoint<'a, f32>,
    state: &'a mut State,
}

impl<'p, P: Iterator<Item = &'p [f32]>> Kernel for Merge<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let shape = self.attend.softmax_shape(self.item.rows.len());
        self.state.total.resize(shape.len(), 0.0);
        let mut total = Softmax::new(&mut self.state.total, shape);
        total.reset();
        for part in self.parts {
            total.merge(s, part);
        }
        self.attend
            .finish(s, self.item, self.head, &total, self.out);
    }
}

/// Processes some spans of an item for one key-value head.
struct Gather<'a> {
    attend: &'a Attend<'a>,
    item: &'a Item,
    head: usize,
    spans: Range<usize>,
    target: Target<'a>,
    state: &'a mut State,
}

/// [`Gather`] over a cache of elements `E`.
struct GatherFrom<'a, E>(Gather<'a>, PhantomData<E>);

impl<E: KvElement> Kernel for GatherFrom<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Gather {
            attend,
            item,
            head,
            spans,
            target,
            state,
        } = self.0;
        let shape = attend.softmax_shape(item.rows.len());
        let State {
            queries,
            weights,
            decay,
            sees,
            span: span_memory,
            total: own,
        } = state;
        attend.copy_queries(item, head, shape, queries, sees);
        weights.resize(shape.queries * LANES, 0.0);
        decay.resize(shape.queries, 1.0);
        span_memory.resize(shape.len(), 0.0);
        own.resize(shape.len(), 0.0);
        let (memory, out) = match target {
            Target::Finish(out) => (&mut own[..], Some(out)),
            Target::Keep(memory) => (memory, None),
        };
        let mut total = Softmax::new(memory, shape);
        total.reset();
        for span in spans {
            let mut softmax = Softmax::new(span_memory, shape);
            softmax.reset();
            let mut block = Block {
                queries,
                weights,
                decay,
                sees,
                softmax,
            };
            let seen = item.sees.start.max(span * SPAN)..item.sees.end.min((span + 1) * SPAN);
            for tile in seen.start / LANES..seen.end.div_ceil(LANES) {
                let tile = Tile::<E>::of(attend, item, head, tile);
                tile.prefetch_next(s);
                tile.add_all(s, attend.spec, &mut block);
            }
            total.merge(s, span_memory);
        }
        if let Some(out) = out {
            attend.finish(s, item, head, &total, out);
        }
    }
}

impl Attend<'_> {
    /// Copies the queries of an item that share a key-value head.
    fn copy_queries(
        &self,
        item: &Item,
        head: usize,
        shape: SoftmaxShape,
        queries: &mut Vec<f32>,
        sees: &mut Vec<(usize, usize)>,
    ) {
        let (heads, group) = (self.spec.heads, self.group());
        queries.clear();
        queries.resize(heads.head_dim * shape.queries, 0.0);
        sees.clear();
        for (index, row) in item.rows.clone().enumerate() {
            let from = row * heads.qkv_columns() + head * group * heads.head_dim;
            let rows = self.qkv[from..].chunks_exact(heads.head_dim);
            for (g, query) in rows.take(group).enumerate() {
                let column = queries[index * group + g..].iter_mut();
                for (to, &from) in column.step_by(shape.queries).zip(query) {
                    *to = from;
                }
            }
            sees.extend(std::iter::repeat_n(self.visible(row), group));
        }
        // Padding attends to the same positions as the last row.
        sees.resize(shape.queries, self.visible(item.rows.end - 1));
    }
}
