//! Encoders on the CUDA device: embeddings and scores agree with those of sentence-transformers, and
//! are the same in any batch.

use common::cuda::load_options;
use common::embedding::{TINY, expected, fixture, largest_difference};
use common::gpu;
use quell::{CudaActivations, CudaOptions, EmbedRequest, Engine, EngineConfig};

fn load(name: &str, activations: CudaActivations) -> Engine {
    let options = load_options(CudaOptions {
        activations,
        ..CudaOptions::default()
    });
    let config = EngineConfig {
        max_batch_tokens: Some(128),
        kv_cache_bytes: Some(1 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    Engine::load_with(fixture(name), config, options).unwrap()
}

#[test]
fn encoders_agree_with_sentence_transformers_in_any_batch() {
    let _gpu = gpu::lock();
    // The limits are for values of length 1, and for those of a model without a norm.
    for (activations, limit) in [(CudaActivations::F16, 4e-3), (CudaActivations::Bf16, 3e-2)] {
        for name in TINY {
            let engine = load(name, activations);
            let all = expected(&fixture(name).join("expected.json"));
            let embed = |ids: &[u32]| engine.embed(EmbedRequest::new(ids.to_vec())).unwrap();
            let alone: Vec<Vec<f32>> = (all.iter())
                .map(|one| embed(&one.ids).wait().unwrap().values)
                .collect();
            for (found, one) in alone.iter().zip(&all) {
                let difference = largest_difference(found, &one.values);
                assert!(difference < limit, "{name} {:?}: {difference}", one.ids);
            }
            let futures: Vec<_> = all.iter().rev().map(|one| embed(&one.ids)).collect();
            for (future, alone) in futures.into_iter().zip(alone.iter().rev()) {
                assert_eq!(future.wait().unwrap().values, *alone, "{name}");
            }
        }
    }
}
