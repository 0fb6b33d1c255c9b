//! The engine over the simulated device, and over the null runner: one module per behaviour.

mod batching;
mod cached_prefixes;
mod cancel_contexts;
mod constraints;
mod deadlines;
mod drain;
mod embeddings;
mod generation;
mod metrics;
mod null_runner;
mod prompt_logprobs;
mod runs;
mod sessions;
mod snapshot;
mod states;
mod storm;
mod watchdog;
