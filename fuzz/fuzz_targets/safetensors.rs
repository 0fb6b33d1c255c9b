//! Parses arbitrary bytes as the weights of a Hugging Face folder: opening it succeeds or
//! returns an error, and what opens can be read.
#![no_main]

mod folder;

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::LazyLock;

/// A folder that contains everything but the weights.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder").keep();
    std::fs::write(folder.join("config.json"), "{}").expect("a temporary file");
    folder
});

fuzz_target!(|bytes: &[u8]| {
    std::fs::write(FOLDER.join("model.safetensors"), bytes).expect("a temporary file");
    folder::check(&FOLDER);
});
