//! Choosing the next token from logits.
//!
//! [`SamplingParams`] is what a caller asks for; [`sample`] is the reference
//! sampler that every device agrees with, token for token.

mod params;
mod sampler;

pub use params::{ParamError, SamplingParams};
pub use sampler::{SampleRow, Sampled, sample};
