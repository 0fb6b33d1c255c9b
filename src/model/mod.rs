//! The models: what a checkpoint's architecture is, and how it is computed.
//!
//! Every family that quell runs is a decoder of the same plan; what sets one apart
//! is said in [`Family`]. [`ModelConfig`] holds a checkpoint's numbers, read from
//! `config.json` (`huggingface.rs`) or GGUF metadata (`gguf.rs`); `tensors.rs`
//! finds its tensors; `decoder.rs` computes it over any [`crate::device::Device`].

mod config;
mod decoder;
mod error;
mod family;
mod gguf;
mod huggingface;
mod inventory;
mod random;
mod rope;
mod tensors;

pub use config::{Biases, ExpertConfig, ModelConfig};
pub use decoder::{Decoder, StepLimits};
pub use error::ModelError;
pub use family::{Family, NormPlacement, QkNormKind};
pub use rope::{RopeConfig, RopeScaling};
pub use tensors::ModelSource;
