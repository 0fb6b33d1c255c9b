//! Latent attention on the CUDA device: a token has the same bits however its prompt is cut, and
//! whoever else is in the batch, and what the kernels cannot compute is refused.

use common::cuda::load_options;
use common::golden::{tiny, tiny_cases};
use common::gpu;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use quell::{CudaOptions, Engine, EngineConfig, Request, SamplingParams};

/// The bits of the log probabilities of some tokens after the longest prompt of a checkpoint, which
/// is computed in chunks of this many tokens, `copies` times at once.
fn logprobs(chunk: usize, copies: usize) -> Vec<Vec<(u32, u32)>> {
    let options = load_options(CudaOptions {
        ..CudaOptions::default()
    });
    let config = EngineConfig {
        max_batch_tokens: Some(chunk),
        max_sequences: 4,
        kv_cache_bytes: Some(1 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(tiny("deepseek-v3"), config, options).unwrap();
    let prompt = tiny_cases("deepseek-v3").pop().unwrap().prompt;
    let request = |salt: usize| {
        let sampling = SamplingParams {
            logprobs: Some(4),
            ..SamplingParams::greedy()
        };
        // Prompts with different salts share no blocks.
        let mut request = Request::new(prompt.clone())
            .max_tokens(4)
            .sampling(sampling);
        request = request.cache_salt(format!("{salt}"));
        request.ignore_eos = true;
        engine.generate(request).unwrap()
    };
    let streams: Vec<_> = (0..copies).map(request).collect();
    let bits = |stream: quell::TokenStream| {
        let tokens = stream.complete_blocking().unwrap().tokens;
        let top = tokens.iter().flat_map(|token| token.top.iter());
        top.map(|(id, logprob)| (*id, logprob.to_bits())).collect()
    };
    streams.into_iter().map(bits).collect()
}

#[test]
fn a_token_has_the_same_bits_in_any_chunk_and_any_batch() {
    let _gpu = gpu::lock();
    let alone = logprobs(128, 1).remove(0);
    assert_eq!(alone.len(), 16);
    for (chunk, copies) in [(7, 1), (64, 3)] {
        for found in logprobs(chunk, copies) {
            assert!(found == alone, "{copies} in chunks of {chunk}");
        }
    }
}

#[test]
fn keys_that_the_kernels_cannot_take_are_refused() {
    let _gpu = gpu::lock();
    let mut device = CudaDevice::new(&CudaOptions::default()).unwrap();
    let good = CacheShape {
        layers: 2,
        kv_heads: 1,
        head_dim: 576,
        blocks: 2,
        block_tokens: 16,
        values: Values::InKeys(512),
    };
    // Only the keys are kept.
    assert_eq!(device.cache_bytes(&good), 2 * 2 * 16 * 576 * 2);
    assert!(device.allocate_cache(&good).is_ok());
    let wide = |head_dim, elements| CacheShape {
        head_dim,
        values: Values::InKeys(elements),
        ..good
    };
    let two = CacheShape {
        kv_heads: 2,
        ..good
    };
    for bad in [
        wide(584, 512),
        wide(100, 64),
        wide(64, 72),
        wide(64, 0),
        two,
    ] {
        let error = device.allocate_cache(&bad).err().unwrap();
        assert!(
            matches!(error, DeviceError::Unsupported { device: "cuda", .. }),
            "{bad:?}"
        );
        assert!(error.to_string().contains("latent attention"), "{error}");
    }
}
