//! Compares every supported architecture on the CUDA device with transformers, by the rule in
//! ARCHITECTURE.md for each type of activations.

use common::golden::{Tolerance, tiny, tiny_cases};
use common::{golden, gpu};
use quell::{CudaActivations, CudaOptions, DeviceChoice, Engine, EngineConfig, LoadOptions};

fn check(name: &str, activations: CudaActivations, tolerance: Tolerance) {
    let _gpu = gpu::lock();
    let options = LoadOptions {
        device: DeviceChoice::Cuda(0),
        cuda: CudaOptions {
            activations,
            warm_up: 0,
            ..CudaOptions::default()
        },
        ..LoadOptions::default()
    };
    // Small steps, so that the longest prompt is prefilled in chunks.
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: 16,
        kv_cache_bytes: Some(2 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(tiny(name), config, options).unwrap();
    let device = engine.info().model.as_ref().unwrap().device.name.clone();
    assert_eq!(device, "cuda:0");
    let mut worst = 0.0f32;
    for case in tiny_cases(name) {
        let errors = golden::check(&engine, &case, 512, tolerance);
        assert_eq!(errors.len(), 12 * 5);
        worst = errors.into_iter().fold(worst, f32::max);
    }
    println!(
        "{name} {activations:?}: max error {worst} of {}",
        tolerance.max
    );
}

fn float16(name: &str) {
    let tolerance = Tolerance {
        max: 0.08,
        margin: 0.08,
    };
    check(name, CudaActivations::F16, tolerance);
}

/// Allows twice the error that transformers itself makes in bfloat16.
fn bfloat16(name: &str) {
    let tolerance = Tolerance {
        max: 2.0 * golden::transformers_error(name, "bfloat16"),
        margin: 0.5,
    };
    check(name, CudaActivations::Bf16, tolerance);
}

macro_rules! golden {
    ($($test:ident: $check:ident $name:literal,)*) => {$(
        #[test]
        fn $test() {
            $check($name);
        }
    )*};
}

golden! {
    gemma2_agrees_in_float16: float16 "gemma2",
    gemma3_agrees_in_float16: float16 "gemma3",
    llama_agrees_in_float16: float16 "llama",
    llama_with_tied_embeddings_agrees_in_float16: float16 "llama-tied",
    mistral_agrees_in_float16: float16 "mistral",
    mixtral_agrees_in_float16: float16 "mixtral",
    olmo2_agrees_in_float16: float16 "olmo2",
    phi3_agrees_in_float16: float16 "phi3",
    qwen2_agrees_in_float16: float16 "qwen2",
    qwen3_agrees_in_float16: float16 "qwen3",
    qwen3_moe_agrees_in_float16: float16 "qwen3-moe",
    gemma2_agrees_in_bfloat16: bfloat16 "gemma2",
    gemma3_agrees_in_bfloat16: bfloat16 "gemma3",
    llama_agrees_in_bfloat16: bfloat16 "llama",
    llama_with_tied_embeddings_agrees_in_bfloat16: bfloat16 "llama-tied",
    mistral_agrees_in_bfloat16: bfloat16 "mistral",
    olmo2_agrees_in_bfloat16: bfloat16 "olmo2",
    phi3_agrees_in_bfloat16: bfloat16 "phi3",
    qwen2_agrees_in_bfloat16: bfloat16 "qwen2",
    qwen3_agrees_in_bfloat16: bfloat16 "qwen3",
}
