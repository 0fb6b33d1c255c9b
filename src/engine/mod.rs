//! The engine: async handles for callers on one side, the scheduler thread on the other.
//!
//! Callers hold an [`Engine`] and [`TokenStream`]s. These post commands and read events, but
//! never clean up. The scheduler thread owns every sequence and every block, and does all
//! clean-up. Its loop is in `thread.rs`, and its record of the open requests in `ledger.rs`;
//! `command.rs` and `event.rs` define the messages between the two sides.

mod builder;
mod command;
mod deadlines;
mod embedding;
mod ending;
mod error;
mod event;
mod handle;
mod ledger;
mod metrics;
mod pending;
mod permit;
mod record;
mod request;
mod session;
mod snapshot;
mod stats;
mod stream;
mod sync;
mod thread;
mod turn;
mod waiting;
mod watchdog;

pub use builder::EngineBuilder;
pub use embedding::{EmbedRequest, Embedding, EmbeddingFuture};
pub use ending::{Drained, Shutdown};
pub use error::{EngineFault, GenerateError, SubmitError};
pub use event::{CancelReason, Outcome, Receipt, Token};
pub use handle::Engine;
pub use pending::{Cancellation, Pending};
#[cfg(feature = "server")]
pub(crate) use permit::Places;
pub use request::{Prompt, Request, Truncation};
pub use session::{Session, SessionOptions};
pub use snapshot::{
    BlockMap, BlockUse, EngineSnapshot, RequestEnd, RequestPhase, RequestState, SessionState,
};
pub use stats::{EngineStats, Outcomes};
pub use stream::{Chunk, Finish, Generation, Timing, TokenStream};
pub use turn::Stop;
pub use watchdog::{Health, HealthStatus};
