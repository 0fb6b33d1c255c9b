//! Parses arbitrary bytes as the weights of a Hugging Face folder: opening it succeeds or
//! returns an error, and what opens can be read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quell::internals::weights::{ModelFolder, WeightSource};
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
    let Ok(model) = ModelFolder::open(&FOLDER) else {
        return;
    };
    for name in model.names() {
        let tensor = model.tensor(name).expect("a listed tensor is there");
        assert_eq!(
            tensor.dtype.bytes_for(tensor.elements()),
            Some(tensor.bytes.len())
        );
        for index in 0..tensor.shape.first().map_or(0, |&count| count.min(4)) {
            assert!(tensor.slice(index).is_some());
        }
        let _ = model.read(&tensor);
    }
    let _ = (
        model.count().total,
        model.count().main_format(),
        model.file_bytes(),
    );
});
