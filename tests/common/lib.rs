//! Code that several test programs share: set-up, clients, reference data and file writers.

use std::path::{Path, PathBuf};

#[cfg(feature = "product")]
pub mod api;
#[cfg(feature = "product")]
pub mod browser;
pub mod clients;
pub mod conditioning;
pub mod cpu;
#[cfg(feature = "product")]
pub mod cuda;
pub mod embedding;
pub mod experts;
pub mod gguf_writer;
pub mod golden;
#[cfg(feature = "product")]
pub mod gpu;
pub mod groups;
pub mod http;
pub mod http2;
pub mod model;
pub mod model_groups;
pub mod parrot;
pub mod process;
pub mod program;
pub mod quantize;
pub mod random;
pub mod record;
pub mod refusals;
pub mod requests;
pub mod serve;
#[cfg(feature = "product")]
pub mod server;
pub mod small_model;
pub mod ways;

/// Path of the repository.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("the tests are in a folder")
        .to_owned()
}
