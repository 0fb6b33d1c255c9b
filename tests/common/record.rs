//! Outputs of kernels that a real GPU computed, kept as fixtures that the virtual GPU must
//! agree with.
//!
//! With `QUELL_RECORD=FOLDER`, outputs are written to that folder, one file per name. Outputs
//! are compared with the recordings in `tests/fixtures/gpu`. `scripts/gpu/first-hour`
//! makes recordings.

use std::path::PathBuf;

/// Maximum number of values kept per output, evenly spaced.
const KEPT: usize = 1024;

/// Folder of the recorded outputs.
fn fixtures() -> PathBuf {
    crate::root().join("tests/fixtures/gpu")
}

/// Whether there are recordings of a real GPU to compare with.
pub fn exists() -> bool {
    fixtures().is_dir()
}

/// Records the output called `name` if `QUELL_RECORD` is set, and compares it with the
/// recording if there are recordings. A value may differ by `tolerance` times the larger of its
/// recorded magnitude and the root mean square of the recording.
pub fn outputs(name: &str, values: &[f32], tolerance: f32) {
    assert!(!values.is_empty(), "{name} has no values");
    assert!(
        values.iter().all(|value| value.is_finite()),
        "{name} is not finite"
    );
    let step = values.len().div_ceil(KEPT);
    let kept: Vec<f32> = values.iter().copied().step_by(step).collect();
    let file = format!("{name}.f32");
    if let Some(folder) = std::env::var_os("QUELL_RECORD") {
        let folder = crate::root().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let bytes: Vec<u8> = kept.iter().flat_map(|value| value.to_le_bytes()).collect();
        std::fs::write(folder.join(&file), bytes).unwrap();
    }
    if !exists() {
        return;
    }
    let path = fixtures().join(&file);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let recorded: Vec<f32> = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    assert_eq!(
        recorded.len(),
        kept.len(),
        "{name}: the recording has a different shape"
    );
    let square: f32 = recorded.iter().map(|x| x * x).sum();
    let scale = (square / recorded.len() as f32).sqrt();
    for (index, (&found, &expected)) in kept.iter().zip(&recorded).enumerate() {
        let allowed = tolerance * scale.max(expected.abs());
        assert!(
            (found - expected).abs() <= allowed,
            "{name}: value {} is {found}, a real GPU gave {expected}",
            index * step
        );
    }
}
