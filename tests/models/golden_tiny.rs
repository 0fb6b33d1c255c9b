//! Compares every supported architecture with transformers, on tiny random checkpoints.

use common::golden;
use common::golden::{Tolerance, tiny, tiny_cases};
use quell::{CpuOptions, Engine, EngineConfig, LoadOptions, SimdLevel};

fn check(name: &str) {
    // The rule for float32 activations must hold on every instruction set of the machine.
    let tolerance = Tolerance {
        max: 0.01,
        margin: 0.01,
    };
    let mut ran = 0;
    for simd in [SimdLevel::Auto, SimdLevel::Avx2, SimdLevel::Portable] {
        let options = LoadOptions {
            cpu: CpuOptions {
                simd,
                threads: Some(2),
                ..CpuOptions::default()
            },
            ..LoadOptions::cpu()
        };
        // Small steps, so that the longest prompt is prefilled in chunks.
        let config = EngineConfig {
            max_batch_tokens: Some(32),
            kv_cache_bytes: Some(8 << 20),
            audit: true,
            ..EngineConfig::default()
        };
        let engine = match Engine::load_with(tiny(name), config, options) {
            Ok(engine) => engine,
            Err(error) if simd == SimdLevel::Avx2 && error.to_string().contains("AVX2") => continue,
            Err(error) => panic!("{name}: {error}"),
        };
        let mut worst = 0.0f32;
        for case in tiny_cases(name) {
            let errors = golden::check(&engine, &case, 512, tolerance);
            assert_eq!(errors.len(), 12 * 5);
            worst = errors.into_iter().fold(worst, f32::max);
        }
        println!("{name} {simd:?}: max error {worst}");
        ran += 1;
    }
    assert!(ran >= 2);
}

macro_rules! golden {
    ($($test:ident: $name:literal,)*) => {$(
        #[test]
        fn $test() {
            check($name);
        }
    )*};
}

golden! {
    gemma2_agrees_with_transformers: "gemma2",
    gemma3_agrees_with_transformers: "gemma3",
    llama_agrees_with_transformers: "llama",
    llama_with_tied_embeddings_agrees_with_transformers: "llama-tied",
    mistral_agrees_with_transformers: "mistral",
    mixtral_agrees_with_transformers: "mixtral",
    olmo2_agrees_with_transformers: "olmo2",
    phi3_agrees_with_transformers: "phi3",
    qwen2_agrees_with_transformers: "qwen2",
    qwen3_agrees_with_transformers: "qwen3",
    qwen3_moe_agrees_with_transformers: "qwen3-moe",
}

#[test]
fn every_checkpoint_of_the_fixtures_has_a_test() {
    let mut found: Vec<String> = std::fs::read_dir(tiny(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let tested = [
        "gemma2",
        "gemma3",
        "llama",
        "llama-tied",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3-moe",
    ];
    assert_eq!(found, tested);
}
