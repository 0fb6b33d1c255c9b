//! Choosing the next token from logits.
//!
//! [`SamplingParams`] is what a caller asks for; [`sample`] is the reference
//! sampler that every device agrees with, token for token. A [`Constraint`] says which
//! tokens may come at all.

mod constraint;
mod defaults;
mod history;
mod limits;
mod params;
mod sampler;

pub(crate) use history::HistoryCounts;

pub use constraint::{Constraint, ConstraintError, ConstraintState};
pub use defaults::SamplingDefaults;
pub use limits::TokenLimits;
pub use params::{ParamError, SamplingParams};
pub use sampler::{SampleRow, Sampled, sample};

/// The parts of the reference sampler that a device on the host shares with it.
pub(crate) mod reference {
    pub(crate) use super::sampler::{MAX_GUMBEL, forbid, gumbel_of, penalise, philox, strongest};
}
