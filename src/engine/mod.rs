//! The engine: async handles for callers on one side, the scheduler thread on the other.
//!
//! Callers hold an [`Engine`] and [`TokenStream`]s. These post commands and read events, but
//! never clean up. The scheduler thread owns every sequence and every block, and does all
//! clean-up. Its loop is in `thread/mod.rs`, and its record of the open requests in
//! `thread/ledger.rs`; `command.rs` and `event.rs` define the messages between the two sides.

mod caller;
mod command;
mod ending;
mod error;
mod event;
mod handle;
mod metrics;
mod snapshot;
mod stats;
mod stream;
mod sync;
mod thread;
mod waiting;
mod watchdog;

pub use caller::embedding::{EmbedRequest, Embedding, EmbeddingFuture};
#[cfg(feature = "server")]
pub(crate) use caller::permit::Places;
pub use caller::session::{Session, SessionOptions};
pub use caller::turn::Stop;
pub use ending::{Drained, Draining, Shutdown, ShuttingDown};
pub use error::{EngineFault, GenerateError, SubmitError};
pub use event::{CancelReason, Outcome, Receipt, Token};
pub use handle::{Engine, Prompt, Request, Truncation};
pub use snapshot::{
    BlockMap, BlockUse, EngineSnapshot, RequestEnd, RequestPhase, RequestState, SessionState,
};
pub use stats::{EngineStats, Outcomes};
pub use stream::{Cancellation, Chunk, Finish, Generation, Timing, TokenStream};
pub use waiting::Asked;
pub use watchdog::{Health, HealthStatus};
