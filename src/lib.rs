//! quell: an inference engine for large language models.
//!
//! One dedicated *scheduler thread* owns the device and the key-value cache and
//! batches decode steps. Callers hold cheap handles: [`Engine`] to submit through
//! and [`TokenStream`] to read from. Cancellation is a command, posted from `Drop`:
//! the scheduler thread frees the cache even when the caller, its task or its whole
//! runtime is already gone.
//!
//! ```
//! use quell::{Engine, EngineConfig, LoadOptions, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/tiny/llama");
//! // `model`: a .gguf file or a Hugging Face folder.
//! let engine = Engine::load(model, EngineConfig::default(), LoadOptions::default())?;
//! // A prompt is text, a conversation, or token ids.
//! let request = Request::new(vec![126, 36, 304]).greedy().max_tokens(8);
//! let mut tokens = Vec::new();
//! for chunk in engine.generate(request)?.blocking() {
//!     let chunk = chunk?;
//!     print!("{}", chunk.text);
//!     tokens.extend(chunk.token.map(|token| token.id));
//! }
//! assert_eq!(tokens.len(), 8);
//!
//! let endless = engine.generate(Request::new(vec![1, 2, 3]))?;
//! let receipt = endless.cancel().wait()?;
//! assert_eq!(engine.stats()?.blocks.referenced, 0);
//! # let _ = receipt;
//! # Ok(())
//! # }
//! ```
//!
//! [`TokenStream`] is a [`futures_core::Stream`] as well. Dropping it at any moment
//! cancels the request; [`TokenStream::cancel`] does the same and gives a
//! [`Receipt`]: how many blocks were freed, after which step, and when.

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

// The simulated device of `tests/common` serves tests in here as well.
#[cfg(test)]
extern crate self as quell;

pub mod cache;
pub mod config;
pub mod device;
pub mod engine;
mod id;
pub mod model;
pub mod runner;
pub mod sampling;
pub mod schedule;
#[cfg(feature = "server")]
pub mod server;
pub mod text;
pub mod weights;

pub use config::{EngineConfig, Preemption};
pub use device::cpu::{Activations, CpuOptions, KvType, SimdLevel};
#[cfg(feature = "cuda")]
pub use device::cuda::{CudaActivations, CudaOptions};
pub use engine::{
    Asked, CancelReason, Cancellation, Chunk, Drained, Draining, EmbedRequest, Embedding,
    EmbeddingFuture, Engine, EngineFault, EngineSnapshot, EngineStats, Finish, GenerateError,
    Generation, Health, HealthStatus, Outcome, Prompt, Receipt, Request, Session, SessionOptions,
    Shutdown, ShuttingDown, Stop, SubmitError, Timing, Token, TokenStream, Truncation,
};
pub use id::{SessionId, StepId};
pub use runner::{DeviceChoice, GenerationConfig, LoadError, LoadOptions, RunnerInfo};
pub use sampling::{Constraint, ConstraintError, SamplingDefaults, SamplingParams, TokenLimits};
pub use schedule::Kept;
pub use text::Message;
#[cfg(feature = "grammar")]
pub use text::{Grammar, GrammarError};
