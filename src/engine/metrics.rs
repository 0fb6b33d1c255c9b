//! The engine's metrics, through the `metrics` facade. They go to whatever recorder the program
//! has installed; without one they cost next to nothing.
//!
//! Gauges, and the totals that [`EngineStats`] contains, are copied from there once per step,
//! never kept by paired increments. Everything else is counted where it happens. The handles
//! are taken from the recorder that is installed when the engine starts.

use super::event::Ending;
use super::{CancelReason, EngineFault, EngineStats, Outcome};
use metrics::{
    Counter, Gauge, Histogram, Label, Unit, counter, describe_counter, describe_gauge,
    describe_histogram, gauge, histogram,
};
use std::time::{Duration, Instant};

/// The labels of a request's end, `outcome` and `reason`: an outcome, or the name of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndLabels(Result<Outcome, &'static str>);

impl EndLabels {
    /// Names of the failures: a failed step or engine, a failed constraint, and logits that are
    /// NaN or infinite.
    const FAILURES: [&'static str; 3] = ["engine_fault", "constraint", "not_finite"];

    /// Returns `stop`, `length`, `cancelled` or `failed`.
    pub fn outcome(self) -> &'static str {
        self.0.map_or("failed", Outcome::as_str)
    }

    /// Returns the reason of a cancel, the name of a failure (`engine_fault`, `constraint` or
    /// `not_finite`), or otherwise the outcome.
    pub fn reason(self) -> &'static str {
        match self.0 {
            Ok(Outcome::Cancelled(reason)) => reason.as_str(),
            Ok(outcome) => outcome.as_str(),
            Err(failure) => failure,
        }
    }

    pub fn is_cancelled(self) -> bool {
        matches!(self.0, Ok(Outcome::Cancelled(_)))
    }

    fn all() -> impl Iterator<Item = Self> {
        let cancels = CancelReason::ALL.into_iter().map(Outcome::Cancelled);
        [Outcome::Stop, Outcome::Length]
            .into_iter()
            .chain(cancels)
            .map(Ok)
            .chain(Self::FAILURES.map(Err))
            .map(Self)
    }
}

impl From<&Ending> for EndLabels {
    fn from(ending: &Ending) -> Self {
        let [engine_fault, constraint, not_finite] = Self::FAILURES;
        Self(match ending {
            Ok(outcome) => Ok(*outcome),
            Err(fault) => Err(match **fault {
                EngineFault::Constraint(_) => constraint,
                EngineFault::NotFinite { .. } => not_finite,
                _ => engine_fault,
            }),
        })
    }
}

/// Why a cancel had no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoEffect {
    /// The request had ended before the scheduler thread saw the cancel.
    AlreadyEnded,
    /// The request had already been cancelled.
    AlreadyCancelled,
    /// The engine has ended.
    EngineClosed,
}

/// A part of the scheduler thread's loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Plan,
    /// Computing the masks of allowed tokens, in steps with constrained requests.
    Mask,
    Launch,
    Collect,
    Commit,
}

/// Handles of one engine's metrics.
pub(crate) struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    paused: Gauge,
    cache_usage: Gauge,
    blocks_free: Gauge,
    blocks_active: Gauge,
    blocks_cached: Gauge,
    blocks_deferred: Gauge,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    /// Misses of the prefix cache, by reason.
    prefix_misses: [Counter; 4],
    /// Slots of states that are free, active, cached and deferred.
    states: [Gauge; 4],
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: [Counter; 3],
    outcomes: Vec<(EndLabels, Counter)>,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    step: [Histogram; 5],
    cancel_to_terminal: Histogram,
    cancel_to_free: Histogram,
    tokens_after_cancel: Counter,
    no_effects: [Counter; 3],
}

impl EngineMetrics {
    /// Takes the handles from the recorder that is installed now.
    pub fn new(model_name: Option<&str>) -> Self {
        describe();
        // Create the counters, so that they are shown as 0 before the first failure.
        for stage in CLEANUP_STAGES {
            let _ = counter!("quell_cleanup_failures_total", "stage" => stage);
        }
        let base: Vec<Label> = model_name
            .map(|name| Label::new("model_name", name.to_owned()))
            .into_iter()
            .collect();
        let with = |key: &'static str, value: &'static str| {
            let mut labels = base.clone();
            labels.push(Label::new(key, value));
            labels
        };
        let blocks = |state| gauge!("quell_kv_blocks", with("state", state));
        let success = |reason| {
            counter!(
                "quell_request_success_total",
                with("finished_reason", reason)
            )
        };
        let step = |phase| histogram!("quell_step_seconds", with("phase", phase));
        let no_effect = |cause| counter!("quell_cancel_noop_total", with("why", cause));
        let outcome = |end: EndLabels| {
            let mut labels = with("outcome", end.outcome());
            labels.push(Label::new("reason", end.reason()));
            (end, counter!("quell_request_outcomes_total", labels))
        };
        Self {
            running: gauge!("quell_num_requests_running", base.clone()),
            waiting: gauge!("quell_num_requests_waiting", base.clone()),
            paused: gauge!("quell_num_requests_paused", base.clone()),
            cache_usage: gauge!("quell_kv_cache_usage_perc", base.clone()),
            blocks_free: blocks("free"),
            blocks_active: blocks("active"),
            blocks_cached: blocks("cached"),
            blocks_deferred: blocks("deferred"),
            preemptions: counter!("quell_num_preemptions_total", base.clone()),
            prefix_queries: counter!("quell_prefix_cache_queries_total", base.clone()),
            prefix_hits: counter!("quell_prefix_cache_hits_total", base.clone()),
            prefix_misses: ["no_block", "no_snapshot", "evicted", "salt"]
                .map(|reason| counter!("quell_prefix_cache_misses_total", with("reason", reason))),
            states: ["free", "active", "cached", "deferred"]
                .map(|state| gauge!("quell_state_slots", with("state", state))),
            prompt_tokens: counter!("quell_prompt_tokens_total", base.clone()),
            generation_tokens: counter!("quell_generation_tokens_total", base.clone()),
            success: ["stop", "length", "cancelled"].map(success),
            // A stop string ends a request as a stop, so this cancel is never counted.
            outcomes: EndLabels::all()
                .filter(|end| end.reason() != CancelReason::StopString.as_str())
                .map(outcome)
                .collect(),
            time_to_first_token: histogram!("quell_time_to_first_token_seconds", base.clone()),
            inter_token: histogram!("quell_inter_token_latency_seconds", base.clone()),
            end_to_end: histogram!("quell_e2e_request_latency_seconds", base.clone()),
            step: ["plan", "mask", "launch", "collect", "commit"].map(step),
            cancel_to_terminal: histogram!("quell_cancel_to_terminal_seconds", base.clone()),
            cancel_to_free: histogram!("quell_cancel_to_free_seconds", base.clone()),
            tokens_after_cancel: counter!(
                "quell_tokens_generated_after_cancel_total",
                base.clone()
            ),
            no_effects: ["already_ended", "already_cancelled", "engine_closed"].map(no_effect),
        }
    }

    /// Sets the gauges, and increases the totals by the difference from `before`, which was
    /// published last.
    pub fn publish(&self, now: &EngineStats, before: &EngineStats) {
        let counts = &now.blocks;
        self.running.set(now.running as f64);
        self.waiting.set(now.waiting as f64);
        self.paused.set(now.paused as f64);
        self.blocks_free.set(counts.free as f64);
        self.blocks_active.set(counts.referenced as f64);
        self.blocks_cached.set(counts.cached as f64);
        self.blocks_deferred.set(counts.deferred as f64);
        let slots = &now.states;
        let slots = [slots.free, slots.referenced, slots.cached, slots.deferred];
        for (gauge, count) in self.states.iter().zip(slots) {
            gauge.set(count as f64);
        }
        let used = counts.referenced + counts.deferred;
        self.cache_usage
            .set(used as f64 / counts.total.max(1) as f64);
        let catch_up = |counter: &Counter, now: u64, before: u64| {
            if now > before {
                counter.increment(now - before);
            }
        };
        catch_up(&self.preemptions, now.preemptions, before.preemptions);
        catch_up(&self.prompt_tokens, now.prompt_tokens, before.prompt_tokens);
        catch_up(
            &self.generation_tokens,
            now.tokens_generated,
            before.tokens_generated,
        );
        catch_up(
            &self.prefix_queries,
            now.prefix_queries,
            before.prefix_queries,
        );
        catch_up(&self.prefix_hits, now.prefix_hits, before.prefix_hits);
        let misses = |stats: &EngineStats| {
            let misses = stats.prefix_misses;
            [
                misses.no_block,
                misses.no_snapshot,
                misses.evicted,
                misses.salt,
            ]
        };
        let misses = misses(now).into_iter().zip(misses(before));
        for (counter, (now, before)) in self.prefix_misses.iter().zip(misses) {
            catch_up(counter, now, before);
        }
    }

    /// Records that a request has ended, `total` after its submission.
    pub fn ended(&self, end: EndLabels, total: Duration) {
        if let Some((_, counter)) = self.outcomes.iter().find(|(labels, _)| *labels == end) {
            counter.increment(1);
        }
        let success = match end.0 {
            Ok(Outcome::Stop) => Some(0),
            Ok(Outcome::Length) => Some(1),
            Ok(Outcome::Cancelled(_)) => Some(2),
            Err(_) => None,
        };
        if let Some(index) = success {
            self.success[index].increment(1);
        }
        self.end_to_end.record(total);
    }

    /// Records that a cancelled request got its terminal.
    pub fn cancel_ended(&self, waited: Duration) {
        self.cancel_to_terminal.record(waited);
    }

    /// Records that a cancelled request's blocks are free.
    pub fn cancel_freed(&self, waited: Duration, tokens_discarded: usize) {
        self.cancel_to_free.record(waited);
        if tokens_discarded > 0 {
            self.tokens_after_cancel.increment(tokens_discarded as u64);
        }
    }

    /// Records that a token was sent, `since` the submission if it is the first, or else
    /// `since` the previous token.
    pub fn token(&self, first: bool, since: Duration) {
        if first {
            self.time_to_first_token.record(since);
        } else {
            self.inter_token.record(since);
        }
    }

    /// Records that a part of the loop, which began at `from`, has ended.
    pub fn phase(&self, phase: Phase, from: Instant) {
        self.step[phase as usize].record(from.elapsed());
    }

    /// Records that a cancel had no effect.
    pub fn no_effect(&self, cause: NoEffect) {
        self.no_effects[cause as usize].increment(1);
    }
}

/// The stages of clean-up that can fail.
const CLEANUP_STAGES: [&str; 3] = ["events", "fault", "waker"];

/// Counts a failed stage of clean-up. This is rare and may happen on any thread, so no handle
/// is kept.
pub(super) fn cleanup_failed(stage: &'static str) {
    debug_assert!(CLEANUP_STAGES.contains(&stage), "{stage}");
    counter!("quell_cleanup_failures_total", "stage" => stage).increment(1);
}

fn describe() {
    describe_gauge!(
        "quell_num_requests_running",
        Unit::Count,
        "Requests that hold KV cache blocks and take part in steps"
    );
    describe_gauge!(
        "quell_num_requests_waiting",
        Unit::Count,
        "Requests that wait to be started, including preempted ones"
    );
    describe_gauge!(
        "quell_num_requests_paused",
        Unit::Count,
        "Requests, running or waiting, that are paused because their readers lag behind"
    );
    describe_gauge!(
        "quell_kv_cache_usage_perc",
        "Fraction of the KV cache that is in use, from 0 to 1"
    );
    describe_gauge!(
        "quell_kv_blocks",
        Unit::Count,
        "Number of KV cache blocks, by state"
    );
    describe_counter!(
        "quell_num_preemptions_total",
        Unit::Count,
        "Preemptions: running requests whose blocks were given to others"
    );
    describe_counter!(
        "quell_request_success_total",
        Unit::Count,
        "Requests that ended without a failure, by finish reason"
    );
    describe_counter!(
        "quell_request_outcomes_total",
        Unit::Count,
        "Requests that ended, by outcome and reason"
    );
    describe_counter!(
        "quell_prefix_cache_queries_total",
        Unit::Count,
        "Prompt tokens that were looked up in the prefix cache or in a session"
    );
    describe_counter!(
        "quell_prefix_cache_hits_total",
        Unit::Count,
        "Prompt tokens that were found in the prefix cache or in a session"
    );
    describe_counter!(
        "quell_prefix_cache_misses_total",
        Unit::Count,
        "Prompt tokens that were looked up and must be computed, by reason"
    );
    describe_gauge!(
        "quell_state_slots",
        Unit::Count,
        "Number of slots for states of recurrent layers, by state"
    );
    describe_counter!(
        "quell_prompt_tokens_total",
        Unit::Count,
        "Prompt tokens accepted"
    );
    describe_counter!(
        "quell_generation_tokens_total",
        Unit::Count,
        "Tokens generated"
    );
    describe_histogram!(
        "quell_time_to_first_token_seconds",
        Unit::Seconds,
        "From submission to the first token"
    );
    describe_histogram!(
        "quell_inter_token_latency_seconds",
        Unit::Seconds,
        "From one token of a request to its next"
    );
    describe_histogram!(
        "quell_e2e_request_latency_seconds",
        Unit::Seconds,
        "From submission to the end"
    );
    describe_histogram!(
        "quell_step_seconds",
        Unit::Seconds,
        "Duration of each phase of a step on the scheduler thread"
    );
    describe_histogram!(
        "quell_cancel_to_terminal_seconds",
        Unit::Seconds,
        "From a cancel to the request's end"
    );
    describe_histogram!(
        "quell_cancel_to_free_seconds",
        Unit::Seconds,
        "From a cancel until the request's blocks are free"
    );
    describe_counter!(
        "quell_tokens_generated_after_cancel_total",
        Unit::Count,
        "Tokens that were computed for requests already cancelled, and discarded"
    );
    describe_counter!(
        "quell_cleanup_failures_total",
        Unit::Count,
        "Failures of clean-up, by stage"
    );
    describe_counter!(
        "quell_cancel_noop_total",
        Unit::Count,
        "Cancels that had no effect, by cause"
    );
}
