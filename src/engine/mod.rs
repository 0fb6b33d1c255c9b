//! The engine: async handles on one side, the scheduler thread on the other.
//!
//! [`Engine`] and [`TokenStream`] belong to callers: they post commands and read
//! events, and never clean up. The scheduler thread owns every sequence, every
//! block and all clean-up; its loop is in `thread.rs`, its accounts with callers
//! in `ledger.rs`, the wire between the two in `command.rs` and `event.rs`.

mod command;
mod deadlines;
mod embedding;
mod ending;
mod error;
mod event;
mod handle;
mod ledger;
mod metrics;
mod permit;
mod record;
mod session;
mod snapshot;
mod stats;
mod stream;
mod sync;
mod thread;
mod turn;
mod waiting;
mod watchdog;

pub use embedding::{EmbedRequest, Embedding, EmbeddingFuture};
pub use ending::{Drained, Draining, Shutdown, ShuttingDown};
pub use error::{EngineFault, GenerateError, SubmitError};
pub use event::{CancelReason, Outcome, Receipt, Token};
pub use handle::{Engine, Prompt, Request, Truncation};
#[cfg(feature = "server")]
pub(crate) use permit::Places;
pub use session::{Session, SessionOptions};
pub use snapshot::{
    BlockMap, BlockUse, EngineSnapshot, RequestEnd, RequestPhase, RequestState, SessionState,
};
pub use stats::{EngineStats, Outcomes};
pub use stream::{Cancellation, Chunk, Finish, Generation, Timing, TokenStream};
pub use turn::Stop;
pub use waiting::Asked;
pub use watchdog::{Health, HealthStatus};
