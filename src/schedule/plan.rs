//! What one step computes.

use super::SequenceKey;
use crate::cache::Transfers;
use crate::id::StepId;
use std::ops::Range;

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

/// What is wanted of the rows of an item beside a sample of the last. Rows are named by
/// the positions of their tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Report {
    /// Nothing.
    #[default]
    Nothing,
    /// The log-probability that each of these rows gives to the token after it, which is
    /// known. They count as samples, and come before that of the last row.
    Scores(Range<usize>),
    /// The sum of the last hidden states of these rows.
    Sum(Range<usize>),
}

impl Report {
    /// The rows that are scored.
    pub fn scored(&self) -> Range<usize> {
        match self {
            Self::Scores(rows) => rows.clone(),
            _ => 0..0,
        }
    }
}

/// The rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Whether the sequence ends with its last row, without a sample.
    pub end: bool,
    /// What else is wanted of its rows.
    pub report: Report,
}

impl PlanItem {
    /// How many samples it takes.
    pub fn sample_count(&self) -> usize {
        self.report.scored().len() + usize::from(self.sample)
    }
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
    /// Leaves an empty plan, whose memory is kept.
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

    /// Rows of all items.
    pub fn rows(&self) -> usize {
        self.items.iter().map(|item| item.count).sum()
    }

    /// The items whose last row is sampled, in order.
    pub fn samples(&self) -> impl Iterator<Item = &PlanItem> {
        self.items.iter().filter(|item| item.sample)
    }

    /// Samples of all items.
    pub fn sample_count(&self) -> usize {
        self.items.iter().map(PlanItem::sample_count).sum()
    }

    /// The items that report a sum of rows, in order, with these rows.
    pub fn sums(&self) -> impl Iterator<Item = (&PlanItem, &Range<usize>)> {
        self.items.iter().filter_map(|item| match &item.report {
            Report::Sum(rows) => Some((item, rows)),
            _ => None,
        })
    }
}
