//! The record of one request: its span, its times, and the log event at its end.

use crate::engine::event::Receipt;
use crate::engine::metrics::{EndLabels, EngineMetrics};
use std::time::{Duration, Instant};

/// The times of one request, and the span in which its end is logged.
pub(crate) struct RequestRecord {
    span: tracing::Span,
    prompt_tokens: usize,
    /// Number of those tokens that the cache held.
    cached_tokens: usize,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl RequestRecord {
    pub fn new(span: tracing::Span, submitted: Instant, prompt_tokens: usize) -> Self {
        Self {
            span,
            prompt_tokens,
            cached_tokens: 0,
            submitted,
            started: None,
            first_token: None,
            last_token: None,
        }
    }

    pub fn submitted(&self) -> Instant {
        self.submitted
    }

    /// Records that a step with part of the prompt was launched. The start time is that of the
    /// first.
    pub fn started(&mut self, at: Instant, cached_tokens: usize) {
        self.started.get_or_insert(at);
        self.cached_tokens = cached_tokens;
    }

    /// Records that `count` tokens were sent at the same time.
    pub fn tokens(&mut self, count: usize, at: Instant, metrics: &EngineMetrics) {
        for _ in 0..count {
            let before = self.last_token.replace(at);
            let since = at.saturating_duration_since(before.unwrap_or(self.submitted));
            metrics.token(before.is_none(), since);
            self.first_token.get_or_insert(at);
        }
    }

    /// Logs the end of the request as a single event in its span. `freed` is false if the
    /// engine broke before the request's blocks were free.
    pub fn report(&self, end: EndLabels, ended_at: Instant, receipt: &Receipt, freed: bool) {
        let since = |at: Instant| milliseconds(at.saturating_duration_since(self.submitted));
        let cancelled = freed && end.is_cancelled();
        let waited = receipt
            .freed_at
            .saturating_duration_since(receipt.posted_at);
        let cancel_to_freed = cancelled.then(|| milliseconds(waited));
        self.span.in_scope(|| {
            tracing::info!(
                target: "quell::request",
                outcome = end.outcome(),
                reason = end.reason(),
                prompt_tokens = self.prompt_tokens,
                cached_tokens = self.cached_tokens,
                generated_tokens = receipt.tokens_generated,
                discarded_tokens = receipt.tokens_discarded,
                blocks_freed = if freed { receipt.blocks_freed } else { 0 },
                queued_ms = self.started.map(since),
                first_token_ms = self.first_token.map(since),
                total_ms = since(ended_at),
                cancel_to_freed_ms = cancel_to_freed,
                "request ended"
            );
        });
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
