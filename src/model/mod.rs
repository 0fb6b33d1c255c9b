//! Models: reads a checkpoint's architecture and computes it.
//!
//! Every model that quell runs is a decoder, or an encoder that differs from one in its norms, its
//! input, and in that tokens also attend to those after them. Its architecture, one file each in
//! `architectures/`, reads a checkpoint's hyperparameters from `config.json` (`huggingface.rs`)
//! or GGUF metadata (`gguf.rs`) and turns them into a [`ModelConfig`] with one `LayerSpec` per
//! layer. `tensors.rs` finds the checkpoint's tensors, and `decoder.rs` computes the layers on
//! any [`crate::device::Device`].

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
mod latent;
mod layer;
mod learned_positions;
mod names;
mod per_layer;
#[cfg(any(test, feature = "cli", feature = "internals"))]
mod random;
mod recurrent;
mod rope;
mod stored;
mod tensors;

pub use config::{Biases, ModelConfig};
pub use decoder::{Decoder, StepLimits};
pub use error::ModelError;
pub use learned_positions::LearnedPositions;
pub use rope::{RopeConfig, RopeScaling};
pub use tensors::ModelSource;
