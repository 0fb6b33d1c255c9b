//! Compares every supported architecture on the CUDA device with transformers, by the rule in
//! ARCHITECTURE.md for each type of activations.

use common::cuda::load_options;
use common::golden::{Case, Tolerance, gguf, tiny, tiny_cases};
use common::{conditioning, golden, gpu};
use quell::{CudaActivations, CudaOptions, Engine, EngineConfig};
use std::path::Path;

fn check(name: &str, activations: CudaActivations, tolerance: Tolerance) {
    check_file(name, &tiny(name), activations, tolerance);
}

/// Loads a model on the virtual GPU.
fn load(path: &Path, activations: CudaActivations) -> Engine {
    let options = load_options(CudaOptions {
        activations,
        ..CudaOptions::default()
    });
    // Small steps, so that the longest prompt is prefilled in chunks.
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: 16,
        kv_cache_bytes: Some(2 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(path, config, options).unwrap();
    let device = engine.info().model.as_ref().unwrap().device.name.clone();
    assert_eq!(device, "cuda:0");
    engine
}

/// Checks a file against the reference of the checkpoint `name`.
fn check_file(name: &str, path: &Path, activations: CudaActivations, tolerance: Tolerance) {
    check_cases(name, path, activations, tolerance, &tiny_cases(name));
}

fn check_cases(
    name: &str,
    path: &Path,
    activations: CudaActivations,
    tolerance: Tolerance,
    cases: &[Case],
) {
    let _gpu = gpu::lock();
    let engine = load(path, activations);
    let vocabulary = engine.info().vocabulary as u32;
    let mut worst = 0.0f32;
    for case in cases {
        let errors = golden::check(&engine, case, vocabulary, tolerance);
        assert_eq!(errors.len(), 12 * 5);
        worst = errors.into_iter().fold(worst, f32::max);
    }
    println!(
        "{name} {activations:?}: max error {worst} of {}",
        tolerance.max
    );
}

/// What float16 activations may change.
const FLOAT16: Tolerance = Tolerance {
    max: 0.08,
    margin: 0.08,
};

fn float16(name: &str) {
    check(name, CudaActivations::F16, FLOAT16);
}

/// Checks a checkpoint for which 0.08 cannot hold, because rounding decides in some steps: which
/// of two nearly equal experts computes a token, or what the norm makes of a nearly vanishing
/// result. How much the steps depend on such decisions is measured in float32: small changes of
/// the weights, no larger than what rounding to float16 changes of a number, may change each step
/// half as much as float16 does, and all together nearly as much.
fn check_conditioned(name: &str, path: &Path) {
    let conditioning = conditioning::of(name);
    let _gpu = gpu::lock();
    let engine = load(path, CudaActivations::F16);
    let cases = tiny_cases(name);
    let steps = cases
        .iter()
        .flat_map(|case| conditioning::step_errors(&engine, case));
    let steps: Vec<Vec<f32>> = steps.collect();
    assert_eq!(steps.len(), 4 * 12);
    assert_eq!(conditioning.steps.len(), steps.len());

    let mut most = 0.0f32;
    for (index, (errors, change)) in steps.iter().zip(&conditioning.steps).enumerate() {
        let (case, step) = (index / 12, index % 12);
        assert_eq!(errors.len(), 5);
        let worst = errors.iter().copied().fold(0.0, f32::max);
        if worst > 0.08 {
            println!("{name}, case {case}, step {step}: {worst}, small changes make {change}");
        }
        assert!(
            worst <= 2.0 * change,
            "{name}, case {case}, step {step}: error {worst}, but small changes make {change}"
        );
        most = most.max(worst / change);
    }
    let median = conditioning::median(steps.concat());
    let of_changes = conditioning.median;
    println!("{name}: at most {most} of the change of a step, median {median} of {of_changes}");
    assert!(median <= 1.25 * of_changes, "{name}: median error {median}");
    // The others are judged by a tolerance that is narrower than usual.
    let strict = conditioning.steps.iter();
    let strict = strict.filter(|change| 2.0 * *change <= 0.08).count();
    println!("{name}: {strict} of 48 steps may be off by less than 0.08");
    assert!(strict >= 10, "{name}: {strict} steps");
    for (case, changes) in cases.iter().zip(conditioning.steps.chunks(12)) {
        golden::check_tokens(&engine, case, |step| 0.08f32.max(2.0 * changes[step]));
    }
}

fn float16_as_conditioned(name: &str) {
    check_conditioned(name, &tiny(name));
}

fn gguf_as_conditioned(name: &str) {
    check_conditioned(name, &gguf(name));
}

fn quantised_in_float16(name: &str) {
    let path = golden::quantised(name);
    let cases = golden::cases(&path);
    check_cases(name, &path, CudaActivations::F16, FLOAT16, &cases);
}

/// Checks a checkpoint with nearly equal experts, of which rounding decides, by the mean error.
fn quantised_by_mean_in_float16(name: &str) {
    let _gpu = gpu::lock();
    let path = golden::quantised(name);
    let engine = load(&path, CudaActivations::F16);
    let vocabulary = engine.info().vocabulary as u32;
    let cases = golden::cases(&path);
    let errors = cases
        .iter()
        .flat_map(|case| golden::teacher_forced_errors(&engine, case, vocabulary));
    let errors: Vec<f32> = errors.collect();
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    let near = errors.iter().filter(|error| **error <= 0.08).count();
    println!(
        "{name}: mean error {mean}, {near} of {} within 0.08",
        errors.len()
    );
    assert_eq!(errors.len(), 4 * 12 * 5);
    assert!(mean <= 0.08, "{name}: mean error {mean}");
    assert!(near * 4 >= errors.len() * 3, "{name}: {near} are near");
}

fn gguf_in_float16(name: &str) {
    check_file(name, &gguf(name), CudaActivations::F16, FLOAT16);
}

/// Allows twice the error that transformers itself makes in bfloat16.
fn bfloat16(name: &str) {
    let tolerance = Tolerance {
        max: 2.0 * golden::transformers_error(name, "bfloat16"),
        margin: 0.5,
    };
    check(name, CudaActivations::Bf16, tolerance);
}

/// Architectures whose tensors are the same in both formats, so that their folders suffice.
const ALIKE: [&str; 11] = [
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

#[test]
fn every_fixture_is_compared_in_float16() {
    let own = include_str!("golden_models.rs");
    let paths = golden::checkpoints();
    assert!(paths.len() > 40);
    for path in paths {
        let file = path.file_name().unwrap().to_str().unwrap();
        let (name, checks) = match file.strip_suffix(".gguf") {
            Some(name) => (name, ["gguf_in_float16", "gguf_as_conditioned"]),
            None => (file, ["float16", "float16_as_conditioned"]),
        };
        let is_compared = |check| own.contains(&format!("_float16: {check} {name:?},"));
        let is_exempt = file.ends_with(".gguf") && ALIKE.contains(&name);
        assert!(
            is_exempt || checks.into_iter().any(is_compared),
            "{file} has no test"
        );
    }
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
    cohere2_agrees_in_float16: float16 "cohere2",
    ernie4_5_agrees_in_float16: float16 "ernie4.5",
    exaone4_agrees_in_float16: float16 "exaone4",
    glm4_agrees_in_float16: float16 "glm4",
    granite_agrees_in_float16: float16 "granite",
    ministral3_agrees_in_float16: float16 "mistral4",
    olmo3_agrees_in_float16: float16 "olmo3",
    seed_oss_agrees_in_float16: float16 "seed-oss",
    smollm3_agrees_in_float16: float16 "smollm3",
    exaone4_as_gguf_agrees_in_float16: gguf_in_float16 "exaone4",
    cohere2_as_gguf_agrees_in_float16: gguf_in_float16 "cohere2",
    ernie4_5_as_gguf_agrees_in_float16: gguf_in_float16 "ernie4.5",
    glm4_as_gguf_agrees_in_float16: gguf_in_float16 "glm4",
    granite_as_gguf_agrees_in_float16: gguf_in_float16 "granite",
    ministral3_as_gguf_agrees_in_float16: gguf_in_float16 "mistral4",
    olmo3_as_gguf_agrees_in_float16: gguf_in_float16 "olmo3",
    seed_oss_as_gguf_agrees_in_float16: gguf_in_float16 "seed-oss",
    smollm3_as_gguf_agrees_in_float16: gguf_in_float16 "smollm3",
    gpt_oss_agrees_in_float16: float16_as_conditioned "gpt-oss",
    gpt_oss_as_gguf_agrees_in_float16: gguf_as_conditioned "gpt-oss",
    glm4_moe_agrees_in_float16: float16 "glm4-moe",
    minimax_m2_agrees_in_float16: float16 "minimax-m2",
    llama4_agrees_in_float16: float16 "llama4",
    deepseek_v2_agrees_in_float16: float16 "deepseek-v2",
    deepseek_v3_agrees_in_float16: float16 "deepseek-v3",
    glm4_moe_lite_agrees_in_float16: float16 "glm4-moe-lite",
    deepseek_v3_as_gguf_agrees_in_float16: gguf_in_float16 "deepseek-v3",
    glm4_moe_lite_as_gguf_agrees_in_float16: gguf_in_float16 "glm4-moe-lite",
    glm4_moe_as_gguf_agrees_in_float16: gguf_in_float16 "glm4-moe",
    deepseek_v2_as_gguf_agrees_in_float16: gguf_in_float16 "deepseek-v2",
    llama4_as_gguf_agrees_in_float16: gguf_in_float16 "llama4",
    minimax_m2_as_gguf_agrees_in_float16: gguf_in_float16 "minimax-m2",
    qwen3_next_agrees_in_float16: float16_as_conditioned "qwen3-next",
    qwen3_5_agrees_in_float16: float16 "qwen3.5",
    qwen3_5_moe_agrees_in_float16: float16_as_conditioned "qwen3.5-moe",
    qwen3_5_with_vision_agrees_in_float16: float16 "qwen3.5-nested",
    qwen3_5_agrees_in_bfloat16: bfloat16 "qwen3.5",
    lfm2_agrees_in_bfloat16: bfloat16 "lfm2",
    granite_hybrid_agrees_in_bfloat16: bfloat16 "granite-hybrid",
    lfm2_agrees_in_float16: float16 "lfm2",
    lfm2_moe_agrees_in_float16: float16 "lfm2-moe",
    granite_hybrid_agrees_in_float16: float16 "granite-hybrid",
    nemotron_h_agrees_in_float16: float16 "nemotron-h",
    nemotron_h_with_experts_agrees_in_float16: float16 "nemotron-h-moe",
    nemotron_h_as_gguf_agrees_in_float16: gguf_in_float16 "nemotron-h",
    nemotron_h_with_experts_as_gguf_agrees_in_float16: gguf_in_float16 "nemotron-h-moe",
    lfm2_as_gguf_agrees_in_float16: gguf_in_float16 "lfm2",
    lfm2_moe_as_gguf_agrees_in_float16: gguf_in_float16 "lfm2-moe",
    granite_hybrid_as_gguf_agrees_in_float16: gguf_in_float16 "granite-hybrid",
    qwen3_next_as_gguf_agrees_in_float16: gguf_as_conditioned "qwen3-next",
    qwen3_5_as_gguf_agrees_in_float16: gguf_in_float16 "qwen3.5",
    qwen3_5_moe_as_gguf_agrees_in_float16: gguf_as_conditioned "qwen3.5-moe",
    gemma3n_agrees_in_float16: float16 "gemma3n",
    gemma4_agrees_in_float16: float16 "gemma4",
    gemma4_with_vision_agrees_in_float16: float16 "gemma4-nested",
    gemma4_moe_agrees_in_float16: float16_as_conditioned "gemma4-moe",
    gemma4_agrees_in_bfloat16: bfloat16 "gemma4",
    gemma3n_as_gguf_agrees_in_float16: gguf_in_float16 "gemma3n",
    gemma4_as_gguf_agrees_in_float16: gguf_in_float16 "gemma4",
    gemma4_moe_as_gguf_agrees_in_float16: gguf_as_conditioned "gemma4-moe",
    quantised_awq_agrees_in_float16: quantised_in_float16 "awq",
    quantised_awq_moe_agrees_in_float16: quantised_in_float16 "awq-moe",
    quantised_ct_fp8_channel_agrees_in_float16: quantised_in_float16 "ct-fp8-channel",
    quantised_ct_int8_channel_agrees_in_float16: quantised_in_float16 "ct-int8-channel",
    quantised_ct_mxfp4_agrees_in_float16: quantised_in_float16 "ct-mxfp4",
    quantised_ct_nvfp4_agrees_in_float16: quantised_in_float16 "ct-nvfp4",
    quantised_ct_w4a16_agrees_in_float16: quantised_in_float16 "ct-w4a16",
    quantised_ct_w4a16_asym_agrees_in_float16: quantised_in_float16 "ct-w4a16-asym",
    quantised_ct_w4a16_moe_agrees_in_float16: quantised_in_float16 "ct-w4a16-moe",
    quantised_fp8_block_agrees_in_float16: quantised_in_float16 "fp8-block",
    quantised_fp8_block_moe_agrees_in_float16: quantised_in_float16 "fp8-block-moe",
    quantised_fp8_tensor_agrees_in_float16: quantised_in_float16 "fp8-tensor",
    quantised_gpt_oss_mxfp4_agrees_in_float16: quantised_by_mean_in_float16 "gpt-oss-mxfp4",
    quantised_gptq_agrees_in_float16: quantised_in_float16 "gptq",
    quantised_gptq_actorder_agrees_in_float16: quantised_in_float16 "gptq-actorder",
    quantised_gptq_asym_8bit_agrees_in_float16: quantised_in_float16 "gptq-asym-8bit",
}
