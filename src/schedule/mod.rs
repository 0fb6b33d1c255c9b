//! What runs next: pure logic over sequences and the cache's books.
//!
//! [`Scheduler::plan`] chooses the rows of a step: decodes first, then chunks of
//! prompts under the token budget, then new sequences while blocks last.
//! [`Scheduler::commit`] takes the step's samples. Between the two, any sequence
//! may be removed.
//!
//! # Never a deadlock
//!
//! Sequences are served in the order of their arrival. When blocks run out, the
//! latest running sequence gives its blocks back and is computed anew later
//! (*preemption by recompute*); a paused one goes first. The earliest sequence is
//! never anyone's victim but its own readers', and any single sequence fits in the
//! cache, so the earliest always progresses. Blocks that a step in flight will
//! free are waited for before a further victim is chosen.

mod plan;
mod policy;
mod queue;
mod scheduler;
mod sequence;

pub use plan::{PlanItem, StepPlan, TokenInput};
pub use policy::Policy;
pub use scheduler::{Commit, Counts, Scheduler};
pub use sequence::{FinishReason, Sequence, SequenceKey, SequenceSpec, Sequences};
