//! The limits that the scheduler keeps.

/// Limits on one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Tokens (rows) of a step, decodes and prompt chunks together.
    pub max_batch_tokens: usize,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
}
