//! Counts what was done, and at which point of its life each request was cancelled.

use quell::{EngineStats, Receipt};
use serde_json::{Value, json};

/// Counts over the whole soak.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub submitted: u64,
    /// Complete answers with the right tokens.
    pub whole: u64,
    /// Streams that were dropped, whatever their state.
    pub dropped: u64,
    /// Requests that `abort_all` ended, some of which had been cancelled before.
    pub aborted: u64,
    pub cancelled: Cancelled,
    accepted: u64,
    ended: u64,
    outcomes_cancelled: u64,
    preemptions: u64,
}

/// Cancellations with a receipt, by the state of the request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cancelled {
    /// Before the first chunk of the prompt, or preempted before the first token.
    queued: u64,
    /// Between two chunks of the prompt.
    prefill: u64,
    decoding: u64,
    /// One token before the last.
    last_token: u64,
    /// With tokens, but without blocks.
    preempted: u64,
    /// After the end of the request.
    ended: u64,
    /// Receipts that report discarded tokens.
    in_flight: u64,
}

impl Tally {
    /// Counts the cancellation of a request that asked for `wanted` tokens.
    pub fn receipt(&mut self, receipt: &Receipt, wanted: usize) {
        assert!(receipt.freed_at >= receipt.posted_at || receipt.tokens_generated == wanted);
        let cancelled = &mut self.cancelled;
        cancelled.in_flight += u64::from(receipt.tokens_discarded > 0);
        let place = match (receipt.blocks_freed, receipt.tokens_generated) {
            (_, tokens) if tokens == wanted => &mut cancelled.ended,
            (0, 0) => &mut cancelled.queued,
            (0, _) => &mut cancelled.preempted,
            (_, 0) => &mut cancelled.prefill,
            (_, tokens) if tokens + 1 == wanted => &mut cancelled.last_token,
            _ => &mut cancelled.decoding,
        };
        *place += 1;
    }

    /// Adds the counts of another thread.
    pub fn add(&mut self, other: &Self) {
        let (all, more) = (&mut self.cancelled, &other.cancelled);
        for (sum, count) in [
            (&mut self.submitted, other.submitted),
            (&mut self.whole, other.whole),
            (&mut self.dropped, other.dropped),
            (&mut self.aborted, other.aborted),
            (&mut all.queued, more.queued),
            (&mut all.prefill, more.prefill),
            (&mut all.decoding, more.decoding),
            (&mut all.last_token, more.last_token),
            (&mut all.preempted, more.preempted),
            (&mut all.ended, more.ended),
            (&mut all.in_flight, more.in_flight),
        ] {
            *sum += count;
        }
    }

    /// Adds the counts of an idle engine and checks I2.
    pub fn outcomes(&mut self, stats: &EngineStats) {
        let outcomes = &stats.outcomes;
        assert_eq!(outcomes.failed + outcomes.stopped, 0);
        assert_eq!(outcomes.accepted, outcomes.length + outcomes.cancelled);
        self.accepted += outcomes.accepted;
        self.ended += outcomes.length;
        self.outcomes_cancelled += outcomes.cancelled;
        self.preemptions += stats.preemptions;
    }

    /// Checks that the engines counted every request, and that every kind of cancellation
    /// occurred.
    pub fn check(&self) {
        println!("{self:?}");
        let cancelled = &self.cancelled;
        assert_eq!(
            self.accepted, self.submitted,
            "every request was accepted once"
        );
        assert!(
            self.outcomes_cancelled * 5 > self.submitted * 2,
            "fewer than two in five requests were cancelled"
        );
        for (count, what) in [
            (cancelled.queued, "queued"),
            (cancelled.prefill, "between chunks of its prompt"),
            (cancelled.decoding, "decoding"),
            (cancelled.last_token, "before its last token"),
            (cancelled.preempted, "preempted"),
            (cancelled.ended, "at its end"),
            (cancelled.in_flight, "in flight"),
            (self.preemptions, "preempted at all"),
            (self.aborted, "aborted"),
            (self.dropped, "dropped"),
            (self.whole, "left alone"),
        ] {
            assert!(
                count > 0,
                "no request was {what}: the soak proves too little"
            );
        }
    }

    pub fn json(&self) -> Value {
        let cancelled = &self.cancelled;
        json!({
            "requests": self.submitted,
            "whole_answers": self.whole,
            "ended_by_themselves": self.ended,
            "cancelled": self.outcomes_cancelled,
            "streams_dropped": self.dropped,
            "ended_by_abort_all": self.aborted,
            "preemptions": self.preemptions,
            "receipts": {
                "queued": cancelled.queued,
                "between_chunks_of_the_prompt": cancelled.prefill,
                "decoding": cancelled.decoding,
                "before_the_last_token": cancelled.last_token,
                "preempted": cancelled.preempted,
                "ended_before": cancelled.ended,
                "with_tokens_discarded": cancelled.in_flight,
            },
        })
    }
}
