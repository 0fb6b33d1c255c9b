//! What runs next: pure logic over sequences and the cache's books.
//!
//! [`Scheduler::plan`] chooses the rows of a step: decodes first, then chunks of
//! prompts under the token budget, then new sequences while blocks last.
//! [`Scheduler::commit`] takes the step's samples. Between the two, any sequence
//! may be removed.
//!
//! # Order
//!
//! Urgent sequences first (a lower [`SequenceSpec::priority`]); of equally urgent ones,
//! those of the tenant that was served the least start first; then by arrival.
//!
//! # Where keys and values come from
//!
//! A sequence that starts takes what is there already: host memory, if it was swapped
//! out; what its session kept of the last turn; the blocks of the sequence with the
//! same prompt; or the prefix cache. A sequence of which every row of the prompt is
//! wanted ([`Task`]) takes only what it has computed itself before.
//!
//! # Never a deadlock
//!
//! When blocks run out, they are taken from: the prefix cache; sessions between their
//! turns, unless pinned; a paused sequence; the last running sequence (*preemption*),
//! which is computed anew later or swapped to host memory, whichever is estimated to
//! take less time. The first of the running sequences is never anyone's victim, and any
//! single sequence fits in the cache (a pinned session gives way to one that is alone),
//! so the first always progresses. Blocks that a step in flight will free are waited
//! for before a further victim is chosen.

mod plan;
mod policy;
mod queue;
mod retained;
mod scheduler;
mod sequence;
mod tenants;

pub use plan::{PlanItem, Report, StepPlan, TokenInput};
pub use policy::{Policy, PreemptionCost};
pub use scheduler::{Commit, Counts, Fate, Kept, Scheduler};
pub use sequence::{FinishReason, Place, Sequence, SequenceKey, SequenceSpec, Sequences, Task};
