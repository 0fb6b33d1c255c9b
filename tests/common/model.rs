//! Locates the demo model.

use std::path::PathBuf;

/// Returns the path of the demo model. Panics if the file is missing.
pub fn smollm2() -> PathBuf {
    let chosen = std::env::var_os("QUELL_TEST_MODEL");
    let path = chosen.unwrap_or("models/SmolLM2-135M-Instruct.Q4_1.gguf".into());
    let path = crate::root().join(path);
    assert!(
        path.exists(),
        "{} is missing: run `make model`",
        path.display()
    );
    path
}
