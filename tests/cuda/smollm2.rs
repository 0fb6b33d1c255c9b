//! Compares the demo model on the CUDA device with transformers, by the rule in
//! ARCHITECTURE.md. `make test` fetches the model file.
//!
//! A step takes seconds on the virtual GPU, so only the shortest case is used, and only as many
//! of its steps as time allows. Each step continues from the engine's own tokens.

use common::cuda::load_options;
use common::golden::{smollm2_case, smollm2_reference};
use common::{gpu, model};
use quell::{CudaActivations, CudaOptions, Engine, EngineConfig, Request, SamplingParams};

fn check(activations: CudaActivations, steps: usize, mean_allowed: f32, max_allowed: f32) {
    let _gpu = gpu::lock();
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: 1,
        max_context: Some(64),
        kv_cache_bytes: Some(4 << 20),
        ..EngineConfig::default()
    };
    let options = load_options(CudaOptions {
        activations,
        ..CudaOptions::default()
    });
    let engine = Engine::load_with(model::smollm2(), config, options).unwrap();
    let cases = smollm2_reference();
    let cases = cases.iter().map(smollm2_case);
    let case = cases.min_by_key(|case| case.prompt.len()).unwrap();
    let sampling = SamplingParams {
        logprobs: Some(SamplingParams::MAX_LOGPROBS),
        ..SamplingParams::greedy()
    };
    let mut request = Request::new(case.prompt)
        .max_tokens(steps)
        .sampling(sampling);
    request.ignore_eos = true;
    let generation = engine
        .generate(request)
        .unwrap()
        .complete_blocking()
        .unwrap();
    let mut errors = Vec::new();
    for (step, found) in case.steps.iter().zip(&generation.tokens) {
        assert!(!step.top.is_empty(), "the reference has no such step");
        for &(token, expected) in &step.top {
            let found = found.top.iter().find(|(id, _)| *id == token);
            let (_, logprob) = found.expect("the reference's likeliest are among the likeliest");
            errors.push((logprob - expected).abs());
        }
        assert_eq!(found.id, step.token, "the margin is {}", step.margin);
    }
    assert_eq!(errors.len(), steps * 10);
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    let max = errors.iter().copied().fold(0.0, f32::max);
    println!(
        "{activations:?}, {}: mean error {mean:.4}, max {max:.4}",
        case.name
    );
    assert!(
        mean <= mean_allowed,
        "mean error {mean} above {mean_allowed}"
    );
    assert!(max <= max_allowed, "max error {max} above {max_allowed}");
}

#[test]
fn float16_activations_agree_with_transformers() {
    check(CudaActivations::F16, 6, 0.02, 0.1);
}

#[test]
fn bfloat16_activations_agree_with_transformers() {
    check(CudaActivations::Bf16, 3, 0.08, 0.6);
}
