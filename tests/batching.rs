//! A real model in a crowd: neighbours, preemption and cancels change no token.

#[path = "common/model.rs"]
mod model;

use model::smollm2;
use quell::{Engine, EngineConfig, LoadOptions, Request, SamplingParams, TokenStream};

const REQUESTS: usize = 64;

fn engine(kv_blocks: usize) -> Engine {
    // A block of 16 tokens is 16 × 23,040 bytes with float16 keys and values.
    let config = EngineConfig {
        kv_cache_bytes: Some(kv_blocks * 16 * 23_040),
        max_batch_tokens: 160,
        audit: true,
        ..EngineConfig::default()
    };
    Engine::load(smollm2(), config, LoadOptions::cpu()).unwrap()
}

fn lengths(index: usize) -> (usize, usize) {
    (1 + index * 13 % 30, 48 + index * 7 % 40)
}

/// Requests of all kinds: greedy, sampled, with penalties, bias and log-probabilities.
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
fn sixty_four_requests_in_a_quarter_of_their_cache_give_the_tokens_of_each_alone() {
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

    // Again, half of them dropped on the way: the others keep their tokens.
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
