//! Model files: reads their tensors and metadata without trusting the contents.
//!
//! [`gguf`] reads GGUF files and [`folder`] reads Hugging Face folders. Both give the model
//! builder a [`WeightSource`].

mod directory;
mod dtype;
mod file;
pub mod folder;
mod formats;
pub mod gguf;
mod json;
pub mod quant;
#[cfg(any(test, feature = "cli", feature = "internals"))]
mod random;
mod raw;
mod safetensors;
mod source;

pub use dtype::DType;
pub use folder::{ModelFolder, read_json, read_tensor};
pub use gguf::Gguf;
pub use json::from_python_json;
#[cfg(any(test, feature = "cli", feature = "internals"))]
pub use random::{RandomContent, RandomTensor, RandomWeights};
pub(crate) use source::is_lfs_pointer;
pub use source::{ParameterCount, TensorView, WeightSource, WeightsError};
