//! Decides what runs next: pure logic over sequences and the block accounting of the KV cache.
//!
//! [`Scheduler::plan`] chooses the tokens of a step: first new sequences that are more urgent
//! than a running one, then decodes, then chunks of prompts within the token budget, then new
//! sequences while blocks are left. [`Scheduler::commit`] records the step's samples. Between
//! the two calls, any sequence may be removed.
//!
//! # Order
//!
//! Urgent sequences come first (those with a lower [`SequenceSpec::priority`]). Among equally
//! urgent waiting sequences, those of the tenant that was served the least start first, then
//! the earliest.
//!
//! # Where keys and values come from
//!
//! A sequence that starts reuses keys and values that exist already. They come from host memory
//! if it was swapped out, from the last turn of its session, from the sequence with the same
//! prompt, or from the prefix cache. If every token of the prompt is needed ([`Task`]), the
//! sequence reuses only what it has computed itself.
//!
//! # Deadlock freedom
//!
//! When blocks run out, they are taken in this order: from the prefix cache; from unpinned
//! sessions between their turns; from a paused sequence; from the last running sequence
//! (*preemption*). A preempted sequence is recomputed later or swapped to host memory,
//! whichever is estimated to take less time. A running sequence gives way only to one that is
//! served earlier, unless it is paused. Any single sequence fits in the cache, because even pinned
//! sessions are evicted for a sequence that runs alone. So the first running sequence that is not
//! paused always makes progress. If a step in flight will free enough blocks, the scheduler waits
//! for them and chooses no further victim. Nothing is taken for a sequence that could not start
//! afterwards.

mod plan;
mod policy;
mod queue;
mod retained;
mod scheduler;
mod sequence;
mod tenants;

pub use plan::{PlanItem, Report, StepPlan, TokenInput};
pub use policy::Policy;
pub use retained::RetainedCache;
pub use scheduler::{BlockDisposition, Commit, PrefixMisses, Scheduler};
pub use sequence::{
    FinishReason, PooledTokens, Sequence, SequenceKey, SequenceSpec, SequenceState, Sequences, Task,
};
