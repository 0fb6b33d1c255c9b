//! A view into an engine at one moment: its open requests, the owner of each block, and the
//! requests that ended last.

use super::EngineStats;
use super::sync::Arc;
use crate::id::{RequestId, SessionId, StepId};
use crate::schedule::RetainedCache;
use serde::{Serialize, Serializer};
use std::time::Duration;

/// An engine at one moment between two steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EngineSnapshot {
    /// The engine's state in numbers at the same moment.
    pub stats: EngineStats,
    /// Number of steps that are launched and not yet completed.
    pub steps_in_flight: u64,
    /// The open requests, in ascending order of their ids.
    pub requests: Vec<RequestState>,
    /// The sessions that keep keys and values between their turns, in ascending order of their
    /// ids.
    pub sessions: Vec<SessionState>,
    /// The owner of each KV cache block.
    pub blocks: BlockMap,
    /// The owner of each slot for the states of recurrent layers. Empty if no layer is recurrent.
    pub states: BlockMap,
    /// The requests whose blocks became free last, at most 64, latest first.
    pub recent_ends: Vec<RequestEnd>,
}

/// What an open request is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum RequestPhase {
    /// It has not been started yet.
    Waiting,
    /// It holds blocks and takes part in steps.
    Running,
    /// It is not computed because its reader lags behind. It may hold blocks.
    Paused,
    /// It has lost its blocks to other requests and waits to be started again.
    Preempted,
}

/// One open request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RequestState {
    /// Id of the request, for [`Engine::cancel_request`](crate::Engine::cancel_request).
    pub id: RequestId,
    /// What the request is doing.
    pub phase: RequestPhase,
    /// The session whose turn the request is, if it is one.
    pub session: Option<SessionId>,
    /// Label that the caller chose.
    pub label: Option<Arc<str>>,
    /// Owner that the caller named.
    pub owner: Option<u64>,
    /// Tenant that the request belongs to.
    pub tenant: Option<Arc<str>>,
    /// Priority; lower numbers are served first.
    pub priority: i32,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Number of those tokens that the cache held when the request was started.
    pub cached_tokens: usize,
    /// Number of tokens, prompt and answer, whose keys and values have been computed. Less than
    /// the prompt while the prompt is being computed.
    pub computed_tokens: usize,
    /// Tokens generated so far.
    pub generated_tokens: usize,
    /// Block table of the request, in the order of its tokens. Other requests may share some of
    /// the blocks. Serialised as runs of consecutive blocks: `first, count, first, count, …`.
    #[serde(serialize_with = "as_runs")]
    pub blocks: Vec<u32>,
    /// Slots of the states that the request holds: the one after its last step, and snapshots.
    /// Serialised as runs, like the blocks.
    #[serde(serialize_with = "as_runs")]
    pub states: Vec<u32>,
    /// Time since the submission; serialised as `age_ms`, in milliseconds.
    #[serde(rename = "age_ms", serialize_with = "as_milliseconds")]
    pub age: Duration,
}

/// Which of the open requests [`Engine::find`](crate::Engine::find) looks for. The default fits
/// all of them; each further setting excludes those that differ from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestQuery {
    /// The request's id.
    pub id: Option<RequestId>,
    /// The request's label.
    pub label: Option<Arc<str>>,
    /// The request's owner.
    pub owner: Option<u64>,
}

impl RequestQuery {
    /// Excludes all requests but the one with this id.
    pub fn id(mut self, id: RequestId) -> Self {
        self.id = Some(id);
        self
    }

    /// Excludes requests that do not have this label.
    pub fn label(mut self, label: impl Into<Arc<str>>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// Excludes requests that do not have this owner.
    pub fn owner(mut self, owner: u64) -> Self {
        self.owner = Some(owner);
        self
    }
}

/// What a session retains between its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SessionState {
    /// Id of the session.
    pub id: SessionId,
    /// Size of what it retains.
    #[serde(flatten)]
    pub retained: RetainedCache,
}

/// A request that has ended and whose blocks are free.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RequestEnd {
    /// Id of the request.
    pub id: RequestId,
    /// `stop`, `length`, `cancelled` or `failed`.
    pub outcome: &'static str,
    /// Reason of a cancel or a failure, under its name in metrics, such as `engine_fault`;
    /// otherwise the same as `outcome`.
    pub reason: &'static str,
    /// Tokens that had been generated.
    pub generated_tokens: usize,
    /// Blocks that became free.
    pub blocks_freed: usize,
    /// States of recurrent layers that became free.
    pub states_freed: usize,
    /// The step after whose completion the blocks were free.
    pub step: StepId,
    /// Time from the cancel, or from the end of a request that was not cancelled, until the
    /// blocks were free; serialised as `posted_to_freed_ms`, in milliseconds.
    #[serde(rename = "posted_to_freed_ms", serialize_with = "as_milliseconds")]
    pub posted_to_freed: Duration,
    /// Time since the blocks were free; serialised as `age_ms`, in milliseconds.
    #[serde(rename = "age_ms", serialize_with = "as_milliseconds")]
    pub age: Duration,
}

/// Owner of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockUse {
    /// No owner, and the contents are of no use.
    Free,
    /// No owner, but the prefix cache can reuse the contents.
    Cached,
    /// No owner, but a step in flight may still touch the block.
    Deferred,
    /// Several requests or sessions.
    Shared,
    /// The request at this index of [`EngineSnapshot::requests`].
    Request(u32),
    /// The session at this index of [`EngineSnapshot::sessions`].
    Session(u32),
}

impl BlockUse {
    /// Returns the number that represents the owner when serialised: 0 free, 1 cached, 2
    /// deferred, 3 shared, 4 + index for a request, −1 − index for a session.
    pub fn code(self) -> i64 {
        match self {
            Self::Free => 0,
            Self::Cached => 1,
            Self::Deferred => 2,
            Self::Shared => 3,
            Self::Request(place) => 4 + i64::from(place),
            Self::Session(place) => -1 - i64::from(place),
        }
    }
}

/// Owner of each block, by block index, or of each slot for states, by slot index.
///
/// Serialised as runs of blocks with the same owner, `code, count, code, count, …`, with the
/// codes of [`BlockUse::code`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockMap(pub(super) Vec<BlockUse>);

impl BlockMap {
    /// Returns the owners, by block index.
    pub fn as_slice(&self) -> &[BlockUse] {
        &self.0
    }
}

impl Serialize for BlockMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let runs = self.0.chunk_by(|one, next| one == next);
        let numbers = runs.flat_map(|run| {
            let code = run.first().map_or(0, |first| first.code());
            [code, run.len() as i64]
        });
        serializer.collect_seq(numbers)
    }
}

fn as_runs<S: Serializer>(blocks: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    let runs = blocks.chunk_by(|one, next| one.checked_add(1) == Some(*next));
    let numbers = runs.flat_map(|run| {
        let first = run.first().copied().unwrap_or_default();
        [u64::from(first), run.len() as u64]
    });
    serializer.collect_seq(numbers)
}

fn as_milliseconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64() * 1e3)
}
