//! The kernels of attention: each processes some spans of an item, or merges them.

use super::operands::{Attend, Item, SPAN};
use super::softmax::{Softmax, SoftmaxShape};
use super::tile::{Block, Tile};
use crate::device::cpu::cache::{HalfBits, KvElement};
use crate::device::cpu::memory::Disjoint;
use crate::device::cpu::simd::{Isa, Kernel, LANES, Simd};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// What happens to a softmax once its spans are processed.
pub(super) enum Target<'a> {
    /// It is complete, and its means are written as results.
    Finish(&'a Disjoint<'a, f32>),
    /// It is kept to be merged later.
    Keep(&'a mut [f32]),
}

impl Attend<'_> {
    /// Processes some spans of an item for one head.
    pub(super) fn gather(
        &self,
        isa: Isa,
        item: &Item,
        head: usize,
        spans: Range<usize>,
        target: Target<'_>,
    ) {
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

    /// Merges the softmaxes of an item's spans for one head, and writes its results.
    pub(super) fn merge<'p>(
        &self,
        isa: Isa,
        item: &Item,
        head: usize,
        parts: impl Iterator<Item = &'p [f32]>,
        out: &Disjoint<'_, f32>,
    ) {
        STATES.with_borrow_mut(|state| {
            isa.dispatch(Merge {
                attend: self,
                item,
                head,
                parts,
                out,
                state,
            });
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
            let to = row * heads.out_columns() + head * group * heads.value_dim();
            // SAFETY: the outputs of this row and these heads belong to this item.
            let out = unsafe { out.range(to, group * heads.value_dim()) };
            for (g, out) in out.chunks_exact_mut(heads.value_dim()).enumerate() {
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
    /// Values of the current tile, if they are in the keys.
    values: Vec<f32>,
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
        self.attend.start(self.head, &mut total);
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
            values,
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
        match out {
            Some(_) => attend.start(head, &mut total),
            // The sinks come in when the spans are merged.
            None => total.reset(),
        }
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
                let tile = Tile::<E>::of(attend, item, head, tile, values);
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
    /// Resets the softmax of an item's queries to that before the first key.
    #[inline(always)]
    fn start(&self, head: usize, total: &mut Softmax<'_>) {
        total.reset();
        let Some(sinks) = self.sinks else { return };
        let group = self.group();
        for query in 0..total.largest.len() {
            total.sink(query, sinks[head * group + query % group]);
        }
    }

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
        let end = self.batch.sequences[item.sequence].rows.end;
        let visible = |row| self.visible(row, end);
        for (index, row) in item.rows.clone().enumerate() {
            let from = row * self.columns + head * group * heads.head_dim;
            let rows = self.qkv[from..].chunks_exact(heads.head_dim);
            for (g, query) in rows.take(group).enumerate() {
                let column = queries[index * group + g..].iter_mut();
                for (to, &from) in column.step_by(shape.queries).zip(query) {
                    *to = from;
                }
            }
            sees.extend(std::iter::repeat_n(visible(row), group));
        }
        // Padding attends to the same positions as the last row.
        sees.resize(shape.queries, visible(item.rows.end - 1));
    }
}
