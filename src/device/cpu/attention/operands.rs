//! What the kernels of attention work on: the operands, and the items that they are cut into.

use super::softmax::SoftmaxShape;
use crate::device::cpu::cache::{CpuCache, TileShape};
use crate::device::cpu::step::StagedBatch;
use crate::device::{ATTENTION_SPAN, AttentionSpec, BatchGroup, CacheLayer};
use std::ops::Range;

/// Number of positions that share a running softmax; a multiple of 16.
pub(super) const SPAN: usize = ATTENTION_SPAN;

/// Consecutive rows of one sequence that are computed together.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) sequence: usize,
    pub(super) rows: Range<usize>,
    /// Positions that at least one of the rows attends to.
    pub(super) sees: Range<usize>,
    /// Index of its first span among the spans of all items.
    pub(super) first_span: usize,
}

impl Item {
    /// Returns the spans that overlap `sees`.
    pub(super) fn spans(&self) -> Range<usize> {
        self.sees.start / SPAN..self.sees.end.div_ceil(SPAN)
    }
}

/// Operands of an attention operation. The caller has checked that they fit together.
pub(super) struct Attend<'a> {
    /// Rows that begin with the queries.
    pub(super) qkv: &'a [f32],
    /// Number of columns of `qkv`.
    pub(super) columns: usize,
    pub(super) spec: &'a AttentionSpec,
    /// One score per query head, if there are sinks.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) cache: &'a CpuCache,
    /// Place of the layer in the cache.
    pub(super) layer: CacheLayer,
    pub(super) batch: &'a StagedBatch,
    /// The block tables of the layer's group.
    pub(super) group_tables: &'a BatchGroup,
}

impl Attend<'_> {
    /// Returns the first and the last position that a row of a sequence attends to. The rows of
    /// the sequence end before `end`.
    pub(super) fn visible(&self, row: usize, end: usize) -> (usize, usize) {
        let position = self.batch.positions[row] as usize;
        let after = match self.spec.causal {
            true => 0,
            false => (end - 1 - row).min(self.spec.window.map_or(usize::MAX, |window| window - 1)),
        };
        let before = |window| match self.spec.chunked {
            true => position - position % window,
            false => (position + 1).saturating_sub(window),
        };
        (self.spec.window.map_or(0, before), position + after)
    }

    /// Returns the number of query heads per key-value head.
    pub(super) fn group(&self) -> usize {
        self.spec.heads.q_heads / self.spec.heads.kv_heads
    }

    pub(super) fn softmax_shape(&self, rows: usize) -> SoftmaxShape {
        let queries = rows * self.group();
        // Queries are processed in blocks of 8, 4, 2 or 1. The last block is padded with
        // queries whose results are not used.
        let padded = match queries {
            0..=2 => queries,
            _ => queries.next_multiple_of(4),
        };
        SoftmaxShape {
            queries: padded,
            stride: TileShape::of(self.spec.heads).value_stride,
        }
    }
}
