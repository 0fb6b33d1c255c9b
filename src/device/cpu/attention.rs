//! Attention over the paged KV cache.
//!
//! An item of work consists of some consecutive rows of a sequence and one key-value head. All
//! query heads of the group and all rows of the item share each tile of sixteen keys.
//!
//! Keys are processed in spans of [`ATTENTION_SPAN`](crate::device::ATTENTION_SPAN) positions,
//! counted from the start of the sequence.
//! Each span has its own running softmax, and the spans are merged in order. If there are few
//! rows, each span is an item of its own, so that a long sequence keeps all threads busy. In
//! both cases a row goes through the same tiles and merges. A tile or span in which a row
//! attends to nothing leaves the row's state unchanged, bit for bit. The result of a row
//! therefore does not depend on the rows that it is computed with.

mod gather;
mod operands;
mod softmax;
mod tile;

use super::CpuDevice;
use super::cache::{CpuCache, require_cache};
use super::error::{require, require_ok};
use super::memory::Disjoint;
use super::norm::CpuVector;
use super::simd::Isa;
use super::tensor::{CpuTensor, require_shape};
use super::workers::Workers;
use crate::device::attention::check_window;
use crate::device::{AttentionOps, AttentionSpec, CacheLayer, DeviceError};
use gather::Target;
use operands::{Attend, Item};

/// Number of elements of query state that stay in the L1 cache.
const STATE: usize = 3072;

impl AttentionOps for CpuDevice {
    fn attend(
        &mut self,
        qkv: &CpuTensor,
        spec: &AttentionSpec,
        sinks: Option<&CpuVector>,
        cache: &CpuCache,
        layer: CacheLayer,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "attend";
        let rows = self.staged.rows();
        let columns = match qkv.columns() == spec.heads.q_columns() {
            true => spec.heads.q_columns(),
            false => spec.heads.qkv_columns(),
        };
        require_shape(NAME, "qkv", qkv, (rows, columns))?;
        require_shape(NAME, "the result", out, (rows, spec.heads.out_columns()))?;
        require_cache(NAME, cache, layer, spec.heads)?;
        require(spec.window != Some(0), NAME, || {
            "the attention window must be at least 1 token".to_owned()
        })?;
        let blocks = cache.shape().blocks;
        require(self.staged.block_end <= blocks, NAME, || {
            format!(
                "block {} is out of range: the cache has {blocks} blocks",
                self.staged.block_end - 1
            )
        })?;
        let group = self.staged.group(NAME, layer)?;
        let (sequences, positions) = (&self.staged.sequences, &self.staged.positions);
        let block_tokens = cache.shape().block_tokens;
        let ends = group.check_ends(sequences, positions, block_tokens);
        require_ok(NAME, ends)?;
        let longest = group.longest_window(sequences, positions, block_tokens);
        let window = spec.window.unwrap_or(usize::MAX);
        require_ok(NAME, check_window(layer.group, window, longest))?;
        let sinks = sinks.map(CpuVector::values);
        let count = sinks.map_or(spec.heads.q_heads, <[f32]>::len);
        require(count == spec.heads.q_heads, NAME, || {
            format!("there are {count} sinks for {} heads", spec.heads.q_heads)
        })?;
        let (qkv, out) = (qkv.leading(rows), out.leading_mut(rows));
        let attend = Attend {
            qkv,
            columns,
            spec,
            sinks,
            cache,
            layer,
            batch: &self.staged,
            group_tables: group,
        };
        self.attention
            .all_rows(&mut self.workers, self.multiplier.isa, &attend, out)
    }
}

/// Cuts batches into items. Reused from call to call to keep the memory.
#[derive(Default)]
pub(crate) struct Attention {
    items: Vec<Item>,
    /// Softmax state of single spans, until they are merged.
    partial: Vec<f32>,
}

impl Attention {
    /// Computes attention for all rows of the batch.
    fn all_rows(
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
                attend.merge(isa, item, head, parts, out);
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
                let visible = |row| attend.visible(row, of.rows.end);
                let item = Item {
                    sequence,
                    rows: start..end,
                    sees: visible(start).0..visible(end - 1).1 + 1,
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
