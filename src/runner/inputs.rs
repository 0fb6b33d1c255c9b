//! A plan made into the flat arrays that a device takes.

use crate::device::{Batch, BatchSequence, Feedback};
use crate::sampling::SampleRow;
use crate::schedule::{PlanItem, Sequence, Sequences, StepPlan, TokenInput};
use std::sync::Arc;

/// Fills `batch` and `samples` from a plan. Items of sequences that are gone are
/// left out; the scheduler launches a plan before anything can end in it.
pub(super) fn fill(
    plan: &StepPlan,
    sequences: &Sequences,
    block_tokens: usize,
    batch: &mut Batch,
    samples: &mut Vec<SampleRow>,
) {
    batch.clear();
    samples.clear();
    for item in &plan.items {
        if let Some(sequence) = sequences.get(item.key) {
            add_item(item, sequence, block_tokens, batch);
            if item.sample {
                batch.sample_rows.push(batch.rows() - 1);
                samples.push(sample_row(item, sequence));
            }
        }
    }
}

fn add_item(item: &PlanItem, sequence: &Sequence, block_tokens: usize, batch: &mut Batch) {
    let first_row = batch.rows();
    let end = item.start + item.count;
    match item.input {
        TokenInput::Known => batch
            .tokens
            .extend_from_slice(&sequence.tokens[item.start..end]),
        TokenInput::Feedback { sample } => {
            batch.feedback.push(Feedback {
                row: first_row,
                sample,
            });
            batch.tokens.push(0);
        }
    }
    for position in item.start..end {
        batch.positions.push(position as u32);
        // The scheduler has booked the blocks of every position that it plans.
        let slot = sequence.table.slot(position, block_tokens);
        debug_assert!(slot.is_some(), "position {position} has no block");
        batch.slots.push(slot.unwrap_or(u32::MAX));
    }
    let first_block = batch.tables.len();
    let blocks = &sequence.table.blocks()[..end.div_ceil(block_tokens)];
    batch
        .tables
        .extend(blocks.iter().map(|block| block.index() as u32));
    batch.sequences.push(BatchSequence {
        rows: first_row..batch.rows(),
        table: first_block..batch.tables.len(),
    });
}

fn sample_row(item: &PlanItem, sequence: &Sequence) -> SampleRow {
    let params = &sequence.spec.params;
    let history = if params.needs_history() {
        sequence.tokens.clone()
    } else {
        Vec::new()
    };
    SampleRow {
        params: Arc::clone(params),
        position: (item.start + item.count) as u32,
        history,
        prompt_tokens: sequence.prompt_tokens,
        mask: sequence
            .spec
            .constraint
            .as_ref()
            .map(|constraint| Arc::clone(constraint.mask())),
    }
}
