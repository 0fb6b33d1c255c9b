//! The engine: async handles for callers on one side, the scheduler thread on the other.
//!
//! Callers hold an [`Engine`] and [`TokenStream`]s. These post commands and read events, but
//! never clean up. The scheduler thread owns every sequence and every block, and does all
//! clean-up. Its loop is in `thread/mod.rs`, and its record of the open requests in
//! `thread/ledger.rs`; `command.rs` and `event.rs` define the messages between the two sides.

mod caller;
mod command;
mod error;
mod event;
mod info;
mod metrics;
mod snapshot;
mod stats;
mod sync;
mod thread;
mod watchdog;

#[cfg(feature = "server")]
pub(crate) use crate::runner::normalize;
pub use caller::answer::{Chunk, Finish, Generation, Timing};
pub use caller::builder::EngineBuilder;
pub use caller::embedding::{EmbedRequest, Embedding, EmbeddingFuture};
pub use caller::ending::{Drained, Shutdown};
pub use caller::handle::Engine;
pub use caller::pending::{Cancellation, Pending};
pub use caller::request::{Prompt, Request, Truncation};
pub use caller::session::{Session, SessionOptions};
pub use caller::stream::{Blocking, TokenStream};
pub use caller::turn::Stop;
pub use error::{EngineFault, GenerateError, SubmitError};
pub use event::{CancelReason, Outcome, Receipt};
pub use info::EngineInfo;
pub use snapshot::{
    BlockMap, BlockUse, EngineSnapshot, RequestEnd, RequestPhase, RequestQuery, RequestState,
    SessionState,
};
pub use stats::{EngineStats, Outcomes};
pub use watchdog::{Health, HealthStatus};
