//! quell: an inference engine for large language models.
//!
//! One dedicated *scheduler thread* owns the device and the KV cache and batches all requests
//! into steps. Callers hold cheap handles: an [`Engine`] to submit requests through, and a
//! [`TokenStream`] to read the answer to each request from. Cancellation is a command that
//! `Drop` posts: the scheduler thread frees the cache even if the caller, its task or its whole
//! runtime is already gone.
//!
//! ```
//! use quell::{Engine, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/tiny/llama");
//! // `model` is a .gguf file or a Hugging Face folder.
//! let engine = Engine::load(model)?;
//! // A prompt is text, a conversation or token ids.
//! let request = Request::new(vec![126, 36, 304]).greedy().max_tokens(8);
//! let mut tokens = Vec::new();
//! for chunk in engine.generate(request)?.blocking() {
//!     let chunk = chunk?;
//!     print!("{}", chunk.text);
//!     tokens.extend(chunk.tokens.ids());
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
//! # Cancellation
//!
//! Dropping a [`TokenStream`] cancels its request. The drop sets a flag and posts a command; it
//! never blocks and never fails, and it works without a runtime, while a runtime shuts down,
//! and during unwinding. The scheduler thread then ends the request and frees its KV cache
//! blocks as soon as no step in flight can touch them.
//!
//! [`TokenStream::cancel`] does the same and returns a [`Cancellation`]. `cancel().await`, or
//! [`Pending::wait`] on a plain thread, waits until the blocks are free and returns a
//! [`Receipt`], which says how many blocks were freed, after which step, and when. Dropping the
//! [`Cancellation`] does not undo the cancel.
//!
//! # Threading
//!
//! [`Engine::load`] starts the scheduler thread, which owns the device, the sequences and the
//! KV cache. Handles reach it through channels. A device may compute on worker threads of its
//! own, but only the scheduler thread calls it. The engine runs as long as any of its handles
//! or streams exists.
//!
//! Handles can be used from any thread and with any async runtime, or with none: a
//! [`TokenStream`] is a [`futures_core::Stream`] and, through [`TokenStream::blocking`], an
//! iterator, and the futures have a blocking `wait`. Prompts are tokenized, and tokens turned
//! back into text, on the caller's thread.
//!
//! [`Engine`] and [`Session`] are `Send` and `Sync`, and all clones of an [`Engine`] refer to
//! the same engine. [`TokenStream`], [`Cancellation`] and the other futures are `Send`. A
//! device need not be `Send`, because it is created on the scheduler thread and stays there.
//!
//! # Public API
//!
//! The public API is what is listed here and, with the feature `server`, the module `server`,
//! the OpenAI-compatible HTTP server. Settings such as [`EngineConfig`] are constructed with
//! `..EngineConfig::default()`, because fields are added in minor releases. The structs that the
//! engine returns, and the enums of its errors and reasons, are `#[non_exhaustive]`.
//!
//! # Modules
//!
//! Apart from `server`, everything public is re-exported at the root. In the source, a request
//! passes through these modules roughly from top to bottom:
//!
//! | Module | Contents |
//! |---|---|
//! | `cli` | The `quell` program: its subcommands, arguments and model download. |
//! | `server` | The HTTP server: `http` for connections, `openai` for the types of the API, `routes`. |
//! | `text` | Tokenizers, chat templates, tool calls and reasoning. |
//! | `engine` | `caller`, the handles that callers hold, and `thread`, the scheduler thread. |
//! | `sampling` | Sampling parameters, constraints and tokens. |
//! | `schedule` | Which sequences run in a step, which wait, and which are preempted. |
//! | `cache` | The accounting of KV cache blocks and of the states of recurrent layers. |
//! | `runner` | Loads a model onto a device and computes the steps. |
//! | `model` | Architectures, settings and the decoder that all of them share. |
//! | `weights` | Readers of safetensors and GGUF files, and their formats. |
//! | `device` | The operations of a device, and their implementations `cpu` and `cuda`. |
//!
//! # Cargo features
//!
//! `cli`, `cuda`, `grammar`, `hub` and `server` are enabled by default. Without features, the
//! crate is the bare engine on the CPU.
//!
//! - `cli`: the `quell` program.
//! - `cuda`: the CUDA device. It needs no CUDA toolkit to build, and only NVIDIA's driver to
//!   run.
//! - `grammar`: answers constrained to a JSON schema, a regular expression or a grammar.
//! - `hub`: model downloads from the Hugging Face Hub (`--model hf:ORG/NAME`) in the program.
//! - `server`: the HTTP server `quell::server`; with `cli`, the command `quell serve`. Enables
//!   `grammar`.
//! - `otel`: `quell serve` exports its spans to an OpenTelemetry collector. Enables `server`.
//! - `loom`, `shuttle`: for the model checkers in `tests/interleavings` only. Each replaces the
//!   engine's threads, atomics and channels, and they exclude each other.
//! - `internals`: the parts of the engine, for this repository's tests, benches and fuzzing only.
//!   They are not part of the public API and may change in any release.

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
// With `internals`, the tests reach what users do not.
#![cfg_attr(
    not(any(test, feature = "internals")),
    deny(clippy::missing_errors_doc),
    warn(unnameable_types)
)]

// Unit tests share the simulated device in `tests/sim`, which refers to this crate by name.
#[cfg(test)]
extern crate self as quell;

mod cache;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod config;
mod device;
mod engine;
mod id;
#[cfg(any(test, feature = "internals"))]
#[doc(hidden)]
pub mod internals;
mod model;
mod runner;
mod sampling;
mod schedule;
#[cfg(feature = "server")]
pub mod server;
mod text;
mod weights;

pub use cache::{AccountingError, BlockCounts};
pub use config::{EngineConfig, Preemption};
pub use device::cpu::{Activations, CpuOptions, KvType, SimdLevel};
#[cfg(feature = "cuda")]
pub use device::cuda::{CudaActivations, CudaOptions};
pub use device::{DeviceError, DeviceInfo};
pub use engine::{
    BlockMap, BlockUse, Blocking, CancelReason, Cancellation, Chunk, Drained, EmbedRequest,
    Embedding, EmbeddingFuture, Engine, EngineBuilder, EngineFault, EngineInfo, EngineSnapshot,
    EngineStats, Finish, GenerateError, Generation, Health, HealthStatus, Outcome, Outcomes,
    Pending, Prompt, Receipt, Request, RequestEnd, RequestPhase, RequestQuery, RequestState,
    Session, SessionOptions, SessionState, Shutdown, Stop, SubmitError, Timing, TokenStream,
    Truncation,
};
pub use id::{RequestId, SessionId, StepId};
pub use model::ModelError;
pub use runner::{
    Dense, DeviceChoice, GenerationConfig, GroupMemory, LoadError, LoadOptions, MemoryPlan,
    ModelFiles, ModelInfo, Pooling, PoolingStage,
};
pub use sampling::{
    Constraint, ConstraintError, ParamError, SamplingDefaults, SamplingParams, Token, TokenLimits,
    TokenRun,
};
pub use schedule::{PooledTokens, PrefixMisses, RetainedCache};
pub use text::harmony::{HarmonyEvent, HarmonyParser};
pub use text::reasoning::{ReasoningFormat, ReasoningSplit, ReasoningSplitter};
pub use text::tools::{ToolDeclaration, ToolEvent, ToolFormat, ToolParser, UnknownToolFormat};
pub use text::{ChatTemplate, EncodeOptions, Message, RenderOptions, TextError, Tokenizer};
#[cfg(feature = "grammar")]
pub use text::{
    Grammar, GrammarAnswer, GrammarCalls, GrammarError, GrammarForm, GrammarKind, GrammarReasoning,
    SchemaKeywords,
};
pub use weights::WeightsError;
