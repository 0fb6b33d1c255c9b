//! What one step computes.

use super::SequenceKey;
use crate::cache::{StepState, Transfers};
use crate::id::StepId;
use std::ops::Range;

/// Where the tokens of an item come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenInput {
    /// The tokens are known to the host, in [`Sequence::tokens`](super::Sequence::tokens).
    Known,
    /// One token, which the previous step samples and the host does not know yet.
    Feedback {
        /// Index among the samples of the previous step.
        sample: usize,
    },
}

/// What the tokens of an item report, in addition to the samples. They are named by their
/// positions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Report {
    /// Nothing.
    #[default]
    Nothing,
    /// The log probability that each of these tokens gives to the one after it, which is known.
    /// Each counts as a sample, and they come before the other samples of the item.
    Scores(Range<usize>),
    /// The sum of the last hidden states of these tokens.
    Sum(Range<usize>),
}

impl Report {
    /// Returns the tokens that are scored.
    pub fn scored(&self) -> Range<usize> {
        match self {
            Self::Scores(tokens) => tokens.clone(),
            _ => 0..0,
        }
    }
}

/// The tokens of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanItem {
    /// The sequence.
    pub key: SequenceKey,
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub count: usize,
    /// Where the tokens come from.
    pub input: TokenInput,
    /// Positions after which the next token is sampled; empty if nothing is sampled. They end with
    /// the last token. If there are several, the tokens after the first are drafts, and the
    /// step's run says how many of them are right.
    pub sampled: Range<usize>,
    /// Whether the sequence ends with the last token, without a sample.
    pub end: bool,
    /// What else the tokens report.
    pub report: Report,
    /// The states that the tokens read and write; `None` if no layer is recurrent.
    pub state: Option<StepState>,
}

impl PlanItem {
    /// Returns the number of the sequence's first tokens whose keys and values exist when the
    /// step has completed, whatever it samples. Rows of drafts do not count.
    pub fn written_tokens(&self) -> usize {
        (self.start + self.count).min(self.sampled.start + 1)
    }

    /// Returns the number of samples, including scores.
    pub fn sample_count(&self) -> usize {
        self.report.scored().len() + self.sampled.len()
    }
}

/// What one step copies and computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Number of the step.
    pub step: StepId,
    /// Copies of blocks, which come before the computation.
    pub transfers: Transfers,
    /// One item per sequence. There may be none if there are blocks to copy.
    pub items: Vec<PlanItem>,
}

impl StepPlan {
    /// Empties the plan and keeps its allocations.
    pub fn clear(&mut self) {
        let Self {
            step,
            transfers,
            items,
        } = self;
        *step = StepId::default();
        transfers.clear();
        items.clear();
    }

    /// Returns the number of tokens of all items.
    pub fn tokens(&self) -> usize {
        self.items.iter().map(|item| item.count).sum()
    }

    /// Returns the items with sampled positions, in order.
    pub fn samples(&self) -> impl Iterator<Item = &PlanItem> {
        self.items.iter().filter(|item| !item.sampled.is_empty())
    }

    /// Returns the number of samples of all items, including scores.
    #[cfg(test)]
    pub fn sample_count(&self) -> usize {
        self.items.iter().map(PlanItem::sample_count).sum()
    }

    /// Returns the items that report a sum, in order, each with the tokens of the sum.
    #[cfg(any(test, feature = "internals"))]
    pub fn sums(&self) -> impl Iterator<Item = (&PlanItem, &Range<usize>)> {
        self.items.iter().filter_map(|item| match &item.report {
            Report::Sum(tokens) => Some((item, tokens)),
            _ => None,
        })
    }
}
