//! What one step computes.

use super::SequenceKey;
use crate::cache::Transfers;
use crate::id::StepId;

/// Where the tokens of an item come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenInput {
    /// The sequence's own tokens, known to the host.
    Known,
    /// One token: what the previous step samples as its `sample`-th.
    Feedback {
        /// Index among the previous step's samples.
        sample: usize,
    },
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanItem {
    /// Whose rows.
    pub key: SequenceKey,
    /// Position of the first row's token.
    pub start: usize,
    /// Number of rows.
    pub count: usize,
    /// Where the tokens come from.
    pub input: TokenInput,
    /// Whether the last row is sampled.
    pub sample: bool,
}

/// One step: its number and its rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// The step's number.
    pub step: StepId,
    /// What is copied before anything is computed.
    pub transfers: Transfers,
    /// One entry a sequence; may be empty when there is something to copy.
    pub items: Vec<PlanItem>,
}

impl StepPlan {
    /// Rows of all items.
    pub fn rows(&self) -> usize {
        self.items.iter().map(|item| item.count).sum()
    }

    /// The items whose last row is sampled, in order.
    pub fn samples(&self) -> impl Iterator<Item = &PlanItem> {
        self.items.iter().filter(|item| item.sample)
    }
}
