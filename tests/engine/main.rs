//! The engine over the simulated device, and over the null runner: one module per behaviour.

#[path = "../common/constraint.rs"]
mod constraint;
#[path = "../common/golden.rs"]
mod golden;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/requests.rs"]
mod requests;
#[path = "../common/sim.rs"]
mod sim;

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
mod storm;
mod watchdog;
