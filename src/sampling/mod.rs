//! Chooses the next token from logits.
//!
//! [`SamplingParams`] is what a caller asks for. [`sample`] is the reference sampler, which
//! every device matches token for token. A [`Constraint`] restricts which tokens may come.

mod constraint;
mod defaults;
mod history;
mod limits;
mod params;
mod sampler;
mod token;

pub(crate) use history::HistoryCounts;

pub use constraint::{Constraint, ConstraintError, ConstraintState};
pub use defaults::SamplingDefaults;
pub use limits::TokenLimits;
pub use params::{ParamError, SamplingParams};
pub use sampler::{SampleRow, sample};
pub use token::{Samples, Token, TokenRun};

/// Parts of the reference sampler that host devices share.
pub(crate) mod reference {
    pub(crate) use super::sampler::{MAX_GUMBEL, forbid, gumbel_of, penalise, philox, strongest};
}
