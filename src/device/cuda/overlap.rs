//! Instructions of newer GPUs in the portable images. `build.rs` uses this file as well.
//!
//! The images are for compute capability 8.0. What only GPUs of 9.0 or more have stands in them
//! as comments: the instructions with which a kernel begins while the one before it still runs
//! (`kernels/common.cuh`), and prefetches.

/// What precedes such an instruction in an image.
const NEWER: &str = "// sm_90: ";

/// The lowest compute capability that has these instructions, times ten.
pub(super) const CAPABILITY: u32 = 90;

/// Returns the text of an image with the instructions of compute capability 9.0.
pub(super) fn with_newer_instructions(image: &str) -> String {
    let image = image.replacen(".target sm_80", ".target sm_90", 1);
    image.replace(NEWER, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::images::portable;

    const FILES: [&str; 13] = [
        "activation",
        "attention",
        "cache",
        "embedding",
        "experts",
        "latent",
        "linear",
        "linear_quant",
        "norm",
        "recurrent",
        "residual",
        "rope",
        "sampling",
    ];

    #[test]
    fn every_kernel_waits_and_then_lets_the_next_one_begin() {
        const WAIT: &str = "\ngriddepcontrol.wait; griddepcontrol.launch_dependents;\n";
        for file in FILES {
            for activations in ["bf16", "f16"] {
                let image = portable(file, activations).unwrap();
                let image = std::str::from_utf8(image).unwrap();
                assert!(!image.contains(WAIT), "{file}: older GPUs do not have it");
                let newer = with_newer_instructions(image);
                assert!(newer.contains(".target sm_90\n") && !newer.contains(NEWER));
                let entries: Vec<&str> = newer.split(".visible .entry ").skip(1).collect();
                assert!(!entries.is_empty(), "{file}");
                for entry in entries {
                    let name = entry.split('(').next().unwrap_or_default();
                    // Products also wait before they read the list of tiles of experts.
                    let least = if file.starts_with("linear") && !name.starts_with("embed") {
                        2
                    } else {
                        1
                    };
                    assert!(entry.matches(WAIT).count() >= least, "{name} of {file}");
                }
            }
        }
    }
}
