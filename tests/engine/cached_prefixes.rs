//! A real model whose keys and values are reused: from the prefix cache, an earlier turn of a
//! session, a fork, another sample or host memory. This changes no bit of its answers.

use common::model::smollm2;
use quell::{
    Engine, EngineConfig, LoadOptions, Preemption, Request, SamplingParams, Token, TokenStream,
};

fn engine(config: EngineConfig) -> Engine {
    let config = EngineConfig {
        audit: true,
        ..config
    };
    Engine::load_with(smollm2(), config, LoadOptions::cpu()).unwrap()
}

/// The reference engine, which reuses nothing.
fn without_cache() -> Engine {
    engine(EngineConfig {
        prefix_cache: false,
        ..EngineConfig::default()
    })
}

fn prompt(length: usize, seed: usize) -> Vec<u32> {
    (0..length)
        .map(|i| ((seed * 977 + i * 389) % 49_000 + 100) as u32)
        .collect()
}

fn request(prompt: &[u32]) -> Request {
    let sampling = SamplingParams {
        logprobs: Some(5),
        ..SamplingParams::greedy()
    };
    let mut request = Request::new(prompt.to_vec())
        .max_tokens(12)
        .sampling(sampling);
    request.ignore_eos = true;
    request
}

fn answer(stream: TokenStream) -> Vec<Token> {
    stream.complete_blocking().unwrap().tokens
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

#[test]
fn a_prefix_cache_hit_gives_bit_identical_answers() {
    let (reference, cached) = (without_cache(), engine(EngineConfig::default()));
    let mut hits = 0;
    // Lengths of whole blocks, one token more and one less. The prompts continue each other.
    for length in [15, 16, 17, 33, 48, 100, 300] {
        let prompt = prompt(length, 1);
        let expected = answer(reference.generate(request(&prompt)).unwrap());
        for _ in 0..2 {
            let tokens = answer(cached.generate(request(&prompt)).unwrap());
            assert_eq!(tokens, expected, "{length} tokens");
        }
        let now = cached.stats().unwrap().prefix_hits;
        let known = (length - 1) / 16 * 16;
        assert!(
            now - hits >= known as u64,
            "{length} tokens: {} hits",
            now - hits
        );
        hits = now;
    }
    assert_eq!(reference.stats().unwrap().prefix_hits, 0);
}

#[test]
fn concurrent_prompts_with_a_common_prefix_keep_their_own_answers() {
    let (reference, cached) = (without_cache(), engine(EngineConfig::default()));
    let beginning = prompt(70, 1);
    let prompts: Vec<Vec<u32>> = (0..8)
        .map(|index| [beginning.clone(), prompt(3 + index, index)].concat())
        .collect();
    for round in 0..2 {
        let streams: Vec<_> = prompts
            .iter()
            .map(|prompt| cached.generate(request(prompt)).unwrap())
            .collect();
        for (prompt, stream) in prompts.iter().zip(streams) {
            let expected = answer(reference.generate(request(prompt)).unwrap());
            assert_eq!(answer(stream), expected, "round {round}");
        }
    }
    assert!(cached.stats().unwrap().prefix_hits > 8 * 64);
}

#[test]
fn sessions_forks_and_samples_answer_like_the_whole_prompt() {
    let (reference, engine) = (without_cache(), engine(EngineConfig::default()));
    let session = engine.session();
    let mut context = Vec::new();
    for turn in 0..3 {
        let new = prompt(7 + 9 * turn, turn);
        context.extend(&new);
        let tokens = answer(session.generate(request(&new)).unwrap());
        let expected = answer(reference.generate(request(&context)).unwrap());
        assert_eq!(tokens, expected, "turn {turn}");
        context.extend(ids(&tokens));
    }
    session.rewind(37).unwrap();
    context.truncate(37);
    let fork = session.fork().unwrap();
    let streams = [&session, &fork].map(|session| {
        let new = prompt(5, session.id().as_u64() as usize);
        let whole = [context.clone(), new.clone()].concat();
        (whole, session.generate(request(&new)).unwrap())
    });
    for (whole, stream) in streams {
        let expected = answer(reference.generate(request(&whole)).unwrap());
        assert_eq!(answer(stream), expected);
    }
    let streams = engine.generate_samples(request(&context), 4).unwrap();
    let expected = answer(reference.generate(request(&context)).unwrap());
    for stream in streams {
        assert_eq!(answer(stream), expected);
    }
}

#[test]
fn swapped_out_requests_keep_their_answers() {
    let lengths = |index: usize| 20 + index * 13 % 60;
    let reference = without_cache();
    // A block of 16 tokens takes 16 × 23,040 bytes with float16 keys and values.
    let crowd = engine(EngineConfig {
        kv_cache_bytes: Some(20 * 16 * 23_040),
        preemption: Preemption::Swap,
        prefix_cache: false,
        ..EngineConfig::default()
    });
    let requests: Vec<Request> = (0..12)
        .map(|index| request(&prompt(lengths(index), index)).max_tokens(60))
        .collect();
    let streams: Vec<_> = requests
        .iter()
        .map(|request| crowd.generate(request.clone()).unwrap())
        .collect();
    for (index, stream) in streams.into_iter().enumerate() {
        let expected = answer(reference.generate(requests[index].clone()).unwrap());
        assert_eq!(answer(stream), expected, "request {index}");
    }
    let stats = crowd.stats().unwrap();
    assert!(stats.swaps > 0, "nothing was swapped out");
    assert_eq!(stats.swaps, stats.preemptions);
}
