//! Parses arbitrary bytes as the weights of a quantised Hugging Face folder, with a configuration
//! that the first byte chooses: opening it succeeds or returns an error, and what opens can be read.
#![no_main]

mod folder;

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::LazyLock;

const CONFIGS: [&str; 12] = [
    r#"{"quant_method": "gptq", "bits": 4, "group_size": 32}"#,
    r#"{"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}"#,
    r#"{"quant_method": "gptq", "bits": 2, "group_size": 3}"#,
    r#"{"quant_method": "awq", "bits": 4, "group_size": 32}"#,
    r#"{"quant_method": "fp8", "weight_block_size": [2, 3]}"#,
    r#"{"quant_method": "fp8"}"#,
    r#"{"quant_method": "mxfp4"}"#,
    r#"{"quant_method": "modelopt", "quant_algo": "NVFP4"}"#,
    r#"{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
        {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group",
        "group_size": 8}}}}"#,
    r#"{"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups":
        {"g": {"targets": ["re:a.*"], "weights": {"num_bits": 8, "strategy": "channel"}}}}"#,
    r#"{"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups":
        {"g": {"targets": ["a"], "weights": {"num_bits": 4}}}}"#,
    r#"{"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups":
        {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}"#,
];

/// Folders that contain everything but the weights.
static FOLDERS: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
    let folder = |config| {
        let folder = tempfile::tempdir().expect("a temporary folder").keep();
        let config = format!(r#"{{"quantization_config": {config}}}"#);
        std::fs::write(folder.join("config.json"), config).expect("a temporary file");
        folder
    };
    CONFIGS.into_iter().map(folder).collect()
});

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, bytes) = input;
    let folder = &FOLDERS[usize::from(choice) % FOLDERS.len()];
    std::fs::write(folder.join("model.safetensors"), bytes).expect("a temporary file");
    folder::check(folder);
});
