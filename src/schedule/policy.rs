//! The limits of the scheduler, and how preemption is decided.

use crate::config::Preemption;

/// Limits of the scheduler, and how it preempts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Maximum number of tokens per step, for decodes and prompt chunks together.
    pub max_batch_tokens: usize,
    /// Maximum number of sequences that run at the same time.
    pub max_sequences: usize,
    /// Whether all tokens of a prompt must be in the same step. No prompt may then be longer than a
    /// step.
    pub whole_prompts: bool,
    /// Maximum number of blocks that sessions may pin.
    pub max_pinned_blocks: usize,
    /// What happens to the keys and values of a preempted sequence.
    pub preemption: Preemption,
    /// Number of blocks of host memory for swapped-out sequences.
    pub swap_blocks: usize,
    /// Time in seconds to copy one block to or from the host.
    pub swap_seconds_per_block: f64,
}

impl Policy {
    /// Returns the maximum number of samples per step.
    pub fn max_samples(&self) -> usize {
        self.max_sequences.min(self.max_batch_tokens)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_sequences: 256,
            whole_prompts: false,
            max_pinned_blocks: 0,
            preemption: Preemption::Auto,
            swap_blocks: 0,
            swap_seconds_per_block: 0.0,
        }
    }
}

/// Estimated costs of the two kinds of preemption.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreemptionCost {
    /// Seconds to recompute the tokens; `None` until the speed of a step has been measured.
    pub recompute: Option<f64>,
    /// Seconds to copy the blocks out and back in; `None` if there is no room for them.
    pub swap: Option<f64>,
}

impl PreemptionCost {
    /// Returns whether to swap instead of recomputing.
    pub fn prefers_swap(&self, preemption: Preemption) -> bool {
        match (preemption, self.swap, self.recompute) {
            (Preemption::Recompute, _, _) | (_, None, _) => false,
            (Preemption::Swap, Some(_), _) => true,
            (Preemption::Auto, Some(swap), Some(recompute)) => swap < recompute,
            (Preemption::Auto, Some(_), None) => false,
        }
    }
}

/// Running estimate of the compute time per token.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ComputeSpeed {
    seconds_per_token: Option<f64>,
}

/// Minimum number of tokens of a step that counts as a measurement. Smaller steps say little
/// about how fast a whole prompt is computed.
const MIN_TOKENS: usize = 16;
/// Weight of a new measurement in the running average.
const NEW_SAMPLE_WEIGHT: f64 = 0.2;

impl ComputeSpeed {
    pub fn observe(&mut self, tokens: usize, seconds: f64) {
        if tokens >= MIN_TOKENS {
            let now = seconds / tokens as f64;
            let before = self.seconds_per_token.unwrap_or(now);
            self.seconds_per_token = Some(before + NEW_SAMPLE_WEIGHT * (now - before));
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
    fn the_cheaper_kind_of_preemption_is_chosen_if_both_costs_are_known() {
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
    fn the_speed_estimate_follows_large_steps_and_ignores_small_ones() {
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
