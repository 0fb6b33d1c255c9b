//! The limits that the scheduler keeps, and how it makes room.

use crate::config::Preemption;

/// Limits on one step, and what may be done to make room.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Tokens (rows) of a step, decodes and prompt chunks together.
    pub max_batch_tokens: usize,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
    /// Blocks that sessions may pin.
    pub max_pinned_blocks: usize,
    /// How a sequence gives way.
    pub preemption: Preemption,
    /// Host memory for swapped-out blocks.
    pub swap_blocks: usize,
    /// Seconds that copying one block to the host, or back, takes.
    pub swap_seconds_per_block: f64,
}

impl Policy {
    /// Samples of a step.
    pub fn max_samples(&self) -> usize {
        self.max_sequences.min(self.max_batch_tokens)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_sequences: 256,
            max_pinned_blocks: 0,
            preemption: Preemption::Auto,
            swap_blocks: 0,
            swap_seconds_per_block: 0.0,
        }
    }
}

/// What the two ways of a preemption are estimated to cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreemptionCost {
    /// Seconds to compute its tokens anew; `None` before the first step was timed.
    pub recompute: Option<f64>,
    /// Seconds to copy its blocks out and in; `None` without room for them.
    pub swap: Option<f64>,
}

impl PreemptionCost {
    /// Whether to swap.
    pub fn prefers_swap(&self, preemption: Preemption) -> bool {
        match (preemption, self.swap, self.recompute) {
            (Preemption::Recompute, _, _) | (_, None, _) => false,
            (Preemption::Swap, Some(_), _) => true,
            (Preemption::Auto, Some(swap), Some(recompute)) => swap < recompute,
            (Preemption::Auto, Some(_), None) => false,
        }
    }
}

/// Seconds a computed token, learnt from steps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ComputeSpeed {
    seconds_per_token: Option<f64>,
}

/// Steps of fewer rows say little about the speed of computing a whole prompt.
const FEWEST_ROWS: usize = 16;
/// Weight of a new observation.
const NEWEST: f64 = 0.2;

impl ComputeSpeed {
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        if rows >= FEWEST_ROWS {
            let now = seconds / rows as f64;
            let before = self.seconds_per_token.unwrap_or(now);
            self.seconds_per_token = Some(before + NEWEST * (now - before));
        }
    }

    pub fn seconds(&self, tokens: usize) -> Option<f64> {
        Some(self.seconds_per_token? * tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheaper_way_to_give_way_is_taken_if_both_are_known() {
        let cost = |recompute, swap| PreemptionCost { recompute, swap };
        for (cost, preemption, swaps) in [
            (cost(Some(2.0), Some(1.0)), Preemption::Auto, true),
            (cost(Some(1.0), Some(2.0)), Preemption::Auto, false),
            (cost(None, Some(1.0)), Preemption::Auto, false),
            (cost(Some(2.0), None), Preemption::Swap, false),
            (cost(Some(1.0), Some(2.0)), Preemption::Swap, true),
            (cost(Some(2.0), Some(1.0)), Preemption::Recompute, false),
        ] {
            assert_eq!(
                cost.prefers_swap(preemption),
                swaps,
                "{cost:?} {preemption:?}"
            );
        }
    }

    #[test]
    fn the_speed_follows_the_steps_and_ignores_small_ones() {
        let mut speed = ComputeSpeed::default();
        assert_eq!(speed.seconds(10), None);
        speed.observe(1, 5.0);
        assert_eq!(speed.seconds(10), None);
        speed.observe(100, 1.0);
        assert_eq!(speed.seconds(10), Some(0.1));
        for _ in 0..100 {
            speed.observe(100, 2.0);
        }
        assert!((speed.seconds(10).unwrap() - 0.2).abs() < 1e-6);
    }
}
