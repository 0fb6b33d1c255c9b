//! Compares every supported architecture with transformers, on tiny random checkpoints.

use common::golden;
use common::golden::{Tolerance, tiny, tiny_cases};
use quell::{CpuOptions, Engine, LoadOptions, SimdLevel};

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
        let engine = match Engine::load_with(tiny(name), golden::small_steps(), options) {
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
    cohere2_agrees_with_transformers: "cohere2",
    deepseek_v2_agrees_with_transformers: "deepseek-v2",
    deepseek_v3_agrees_with_transformers: "deepseek-v3",
    ernie4_5_agrees_with_transformers: "ernie4.5",
    exaone4_agrees_with_transformers: "exaone4",
    gemma2_agrees_with_transformers: "gemma2",
    gemma3_agrees_with_transformers: "gemma3",
    gemma3n_agrees_with_transformers: "gemma3n",
    gemma4_agrees_with_transformers: "gemma4",
    gemma4_with_experts_agrees_with_transformers: "gemma4-moe",
    gemma4_in_a_model_with_vision_agrees_with_transformers: "gemma4-nested",
    glm4_agrees_with_transformers: "glm4",
    glm4_moe_agrees_with_transformers: "glm4-moe",
    glm4_moe_lite_agrees_with_transformers: "glm4-moe-lite",
    gpt_oss_agrees_with_transformers: "gpt-oss",
    granite_agrees_with_transformers: "granite",
    granite_with_mamba2_agrees_with_transformers: "granite-hybrid",
    lfm2_agrees_with_transformers: "lfm2",
    lfm2_moe_agrees_with_transformers: "lfm2-moe",
    llama_agrees_with_transformers: "llama",
    llama_with_tied_embeddings_agrees_with_transformers: "llama-tied",
    llama4_agrees_with_transformers: "llama4",
    minimax_m2_agrees_with_transformers: "minimax-m2",
    mistral_agrees_with_transformers: "mistral",
    ministral3_agrees_with_transformers: "mistral4",
    mixtral_agrees_with_transformers: "mixtral",
    nemotron_h_agrees_with_transformers: "nemotron-h",
    nemotron_h_with_experts_agrees_with_transformers: "nemotron-h-moe",
    olmo2_agrees_with_transformers: "olmo2",
    olmo3_agrees_with_transformers: "olmo3",
    phi3_agrees_with_transformers: "phi3",
    qwen2_agrees_with_transformers: "qwen2",
    qwen3_agrees_with_transformers: "qwen3",
    qwen3_moe_agrees_with_transformers: "qwen3-moe",
    qwen3_next_agrees_with_transformers: "qwen3-next",
    qwen3_5_agrees_with_transformers: "qwen3.5",
    qwen3_5_moe_agrees_with_transformers: "qwen3.5-moe",
    qwen3_5_with_vision_agrees_with_transformers: "qwen3.5-nested",
    seed_oss_agrees_with_transformers: "seed-oss",
    smollm3_agrees_with_transformers: "smollm3",
}

#[test]
fn every_checkpoint_of_the_fixtures_has_a_test() {
    let mut found: Vec<String> = std::fs::read_dir(tiny(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let tested = [
        "cohere2",
        "deepseek-v2",
        "deepseek-v3",
        "ernie4.5",
        "exaone4",
        "gemma2",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4-moe",
        "gemma4-nested",
        "glm4",
        "glm4-moe",
        "glm4-moe-lite",
        "gpt-oss",
        "granite",
        "granite-hybrid",
        "lfm2",
        "lfm2-moe",
        "llama",
        "llama-tied",
        "llama4",
        "minimax-m2",
        "mistral",
        "mistral4",
        "mixtral",
        "nemotron-h",
        "nemotron-h-moe",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3-moe",
        "qwen3-next",
        "qwen3.5",
        "qwen3.5-moe",
        "qwen3.5-nested",
        "seed-oss",
        "smollm3",
    ];
    assert_eq!(found, tested);
}
