//! The models: what a checkpoint's architecture is, and how it is computed.
//!
//! Every model that quell runs is a decoder. Its architecture, one file each in
//! `architectures/`, reads a checkpoint's numbers from `config.json` (`huggingface.rs`) or
//! GGUF metadata (`gguf.rs`) and makes a list of layers of them: a [`ModelConfig`] with a
//! [`LayerSpec`] for each layer. `tensors.rs` finds the checkpoint's tensors; `decoder.rs`
//! computes the layers over any [`crate::device::Device`].

mod architectures;
mod config;
mod decoder;
mod delta;
mod error;
mod experts;
mod gguf;
mod huggingface;
mod hyperparameters;
mod inventory;
mod key_names;
mod layer;
mod names;
#[cfg(any(test, feature = "cli", feature = "internals"))]
mod random;
mod rope;
mod stored;
mod tensors;

pub use config::{Biases, ModelConfig};
pub use decoder::{Decoder, StepLimits};
pub use error::ModelError;
pub use rope::{RopeConfig, RopeScaling};
pub use tensors::ModelSource;
