//! Locates the demo model.

use std::path::{Path, PathBuf};

/// Returns the path of the demo model. Panics if the file is missing.
pub fn smollm2() -> PathBuf {
    let path = std::env::var_os("QUELL_TEST_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is missing: run `make model`",
        path.display()
    );
    path
}
