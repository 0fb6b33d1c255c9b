//! Batching with a real model: other requests in the batch, preemption and cancellation change
//! no token of a request, and no bit of a logit.

use common::model::smollm2;
use quell::internals::device::cpu::CpuDevice;
use quell::internals::device::*;
use quell::internals::model::{Decoder, ModelSource, StepLimits};
use quell::internals::weights::Gguf;
use quell::{
    CpuOptions, Engine, EngineConfig, LoadOptions, Request, SamplingParams, SimdLevel, TokenStream,
};

const REQUESTS: usize = 24;

fn engine(kv_blocks: usize) -> Engine {
    // A block of 16 tokens takes 16 × 23,040 bytes with float16 keys and values.
    let config = EngineConfig {
        kv_cache_bytes: Some(kv_blocks * 16 * 23_040),
        max_batch_tokens: Some(160),
        audit: true,
        ..EngineConfig::default()
    };
    Engine::load_with(smollm2(), config, LoadOptions::cpu()).unwrap()
}

fn lengths(index: usize) -> (usize, usize) {
    (1 + index * 13 % 30, 24 + index * 7 % 20)
}

/// Builds requests of all kinds: greedy, sampled, with penalties, bias and log probabilities.
fn request(index: usize) -> Request {
    let (prompt, tokens) = lengths(index);
    let ids: Vec<u32> = (0..prompt)
        .map(|i| ((index * 977 + i * 389) % 49_000 + 100) as u32)
        .collect();
    let sampled = SamplingParams {
        seed: index as u64,
        temperature: 0.9,
        ..SamplingParams::default()
    };
    let sampling = match index % 5 {
        0 | 1 => SamplingParams::greedy(),
        2 => sampled,
        3 => SamplingParams {
            top_k: 40,
            top_p: 0.9,
            min_p: 0.01,
            ..sampled
        },
        _ => SamplingParams {
            repetition_penalty: 1.2,
            frequency_penalty: 0.3,
            logit_bias: vec![(300, 2.0)],
            logprobs: Some(2),
            ..sampled
        },
    };
    let mut request = Request::new(ids).max_tokens(tokens).sampling(sampling);
    request.ignore_eos = true;
    request
}

fn tokens(stream: TokenStream) -> Vec<(u32, Vec<(u32, f32)>)> {
    let generation = stream.complete_blocking().unwrap();
    generation
        .tokens
        .into_iter()
        .map(|token| (token.id, token.top))
        .collect()
}

#[test]
fn requests_preempted_in_a_small_cache_keep_their_tokens() {
    let alone = engine(64);
    let expected: Vec<_> = (0..REQUESTS)
        .map(|index| tokens(alone.generate(request(index)).unwrap()))
        .collect();
    drop(alone);

    let needed: usize = (0..REQUESTS)
        .map(lengths)
        .map(|(p, n)| (p + n).div_ceil(16))
        .sum();
    let crowd = engine(needed / 4);
    let streams: Vec<_> = (0..REQUESTS)
        .map(|index| crowd.generate(request(index)).unwrap())
        .collect();
    for (index, (stream, expected)) in streams.into_iter().zip(&expected).enumerate() {
        assert_eq!(&tokens(stream), expected, "request {index}");
    }
    let stats = crowd.stats().unwrap();
    assert!(
        stats.preemptions > 0,
        "nothing was preempted: the test proves nothing"
    );
    assert_eq!(stats.outcomes.length, REQUESTS as u64);

    // Run them again and drop half of them on the way: the others keep their tokens.
    let streams: Vec<_> = (0..REQUESTS)
        .map(|index| crowd.generate(request(index)).unwrap())
        .collect();
    let mut kept = Vec::new();
    for (index, mut stream) in streams.into_iter().enumerate() {
        if index % 2 == 0 {
            kept.push((index, stream));
            continue;
        }
        for _ in 0..index % 11 {
            if stream.next_blocking().is_none() {
                break;
            }
        }
        drop(stream);
    }
    for (index, stream) in kept {
        assert_eq!(
            tokens(stream),
            expected[index],
            "request {index}, half dropped"
        );
    }
    let stats = loop {
        let stats = crowd.stats().unwrap();
        if stats.open == 0 && stats.closing == 0 {
            break stats;
        }
    };
    assert!(stats.is_idle(), "{stats:?}");
    assert!(stats.outcomes.cancelled > 0);
}

/// Tokens per KV cache block.
const BLOCK: usize = 16;

/// The rows of one sequence in a step: its tokens from position `start` on.
struct Part {
    sequence: usize,
    start: usize,
    tokens: Vec<u32>,
}

/// Builds a step in which each sequence has its own blocks and the last row of each is sampled.
fn batch(parts: &[Part], blocks_each: usize) -> Batch {
    let mut batch = Batch::new(1);
    for part in parts {
        let first = part.sequence * blocks_each;
        let end = part.start + part.tokens.len();
        let blocks = (first..first + end.div_ceil(BLOCK)).map(|block| block as u32);
        batch.push(&part.tokens, part.start, BLOCK, [(0, blocks)]);
        batch.sample_rows.push(batch.rows() - 1);
    }
    batch
}

/// A loaded model, and a cache that every batch begins anew.
struct Loaded {
    device: CpuDevice,
    decoder: Decoder<CpuDevice>,
    cache: <CpuDevice as DeviceTypes>::Cache,
    vocabulary: usize,
}

impl Loaded {
    const BLOCKS_EACH: usize = 8;

    fn new(mut device: CpuDevice) -> Self {
        let source = ModelSource::from_gguf(Gguf::open(&smollm2()).unwrap()).unwrap();
        let limits = StepLimits {
            rows: 32 * 16 + 40,
            samples: 32,
            positions: Self::BLOCKS_EACH * BLOCK,
        };
        let decoder = Decoder::load(
            &source,
            &mut device,
            limits,
            CacheLayer::single_group,
            &mut |_, _| {},
        )
        .unwrap();
        let config = source.config();
        let shape = CacheShape {
            layers: config.layers.len(),
            kv_heads: config.heads().kv_heads,
            head_dim: config.heads().head_dim,
            blocks: 32 * Self::BLOCKS_EACH,
            block_tokens: BLOCK,
            values: Values::BesideKeys,
        };
        let cache = device.allocate_cache(&shape).unwrap();
        Self {
            device,
            decoder,
            cache,
            vocabulary: config.vocabulary,
        }
    }

    /// Returns the bits of one sequence's logits, for its prefill step of `prompt` tokens and a few
    /// decode steps, in a batch with `size - 1` other sequences that prefill or decode.
    fn logits(&mut self, size: usize, prompt: usize) -> Vec<Vec<u32>> {
        const STEPS: usize = 4;
        let watched = size / 2;
        let token = |sequence: usize, position: usize| {
            (100 + 977 * sequence + 389 * position) as u32 % 49_000
        };
        let mut lengths = vec![0; size];
        let mut seen = Vec::new();
        for step in 0..STEPS {
            let parts = (0..size).map(|sequence| {
                // The watched sequence has the same tokens at every batch size. Some of the
                // others start later.
                let (name, count) = match sequence == watched {
                    true => (1000, if step == 0 { prompt } else { 1 }),
                    false if sequence % 3 == step => (sequence, 3 + sequence % 13),
                    false => (sequence, 1),
                };
                let start = lengths[sequence];
                lengths[sequence] += count;
                let tokens = (start..start + count).map(|position| token(name, position));
                Part {
                    sequence,
                    start,
                    tokens: tokens.collect(),
                }
            });
            let parts: Vec<Part> = parts.collect();
            let step = batch(&parts, Self::BLOCKS_EACH);
            let (device, cache) = (&mut self.device, &mut self.cache);
            let logits = self.decoder.forward(device, &step, cache).unwrap();
            let row = logits.row(watched);
            assert_eq!(row.len(), self.vocabulary);
            seen.push(row.iter().map(|logit| logit.to_bits()).collect());
        }
        seen
    }
}

#[test]
fn logits_are_bit_identical_alone_and_in_batches() {
    for simd in [SimdLevel::Avx512, SimdLevel::Avx2, SimdLevel::Portable] {
        let options = CpuOptions {
            simd,
            ..CpuOptions::default()
        };
        let Ok(device) = CpuDevice::new(&options) else {
            println!("this machine has no {simd:?}");
            continue;
        };
        let mut loaded = Loaded::new(device);
        // The portable kernels take a second for a few tokens.
        let (sizes, prompt) = match simd {
            SimdLevel::Portable => (&[7][..], 7),
            _ => (&[7, 32][..], 40),
        };
        let alone = loaded.logits(1, prompt);
        for &size in sizes {
            // Not `assert_eq`, which would print all the logits.
            assert!(
                loaded.logits(size, prompt) == alone,
                "{simd:?}, {size} in a batch"
            );
        }
    }
}
