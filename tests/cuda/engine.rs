//! The whole engine on the CUDA device, with two steps in flight: other requests in the batch,
//! cancellations during graph replays, and preemption change no token.
//!
//! After every step, the engine's invariants are checked and freed blocks are filled with NaN,
//! so that a request that reads a block of another one gets a different answer.

use common::cuda::load_options;
use common::golden::tiny;
use common::gpu;
use common::requests::idle;
use quell::internals::weights::DType;
use quell::{
    CudaActivations, CudaOptions, DeviceChoice, EmbedRequest, Engine, EngineConfig, LoadOptions,
    Preemption, Request, SamplingParams, TokenStream,
};
use sim::constraint::Remainders;

const REQUESTS: usize = 16;

fn engine(model: &str, cuda: CudaOptions, kv_blocks: usize) -> Engine {
    engine_with(model, cuda, kv_blocks, EngineConfig::default())
}

fn engine_with(model: &str, cuda: CudaOptions, kv_blocks: usize, config: EngineConfig) -> Engine {
    let options = load_options(cuda);
    // Two layers of two heads, and keys and values of two bytes.
    let head_dim = if model == "llama" { 16 } else { 32 };
    let block_bytes = 2 * 2 * 2 * 2 * head_dim * 16;
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: REQUESTS,
        kv_cache_bytes: Some(kv_blocks * block_bytes),
        audit: true,
        ..config
    };
    let engine = Engine::load_with(tiny(model), config, options).unwrap();
    assert_eq!(engine.info().cache_blocks, kv_blocks);
    engine
}

/// Builds requests of all kinds: greedy, sampled, with penalties, bias and log probabilities.
fn request(index: usize) -> Request {
    let prompt: Vec<u32> = (0..1 + index * 5 % 23)
        .map(|i| ((index * 97 + i * 31) % 500 + 3) as u32)
        .collect();
    let sampled = SamplingParams {
        seed: index as u64,
        temperature: 0.9,
        ..SamplingParams::default()
    };
    let sampling = match index % 4 {
        0 => SamplingParams::greedy(),
        1 => sampled,
        2 => SamplingParams {
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
    let tokens = 14 + index * 3 % 10;
    let mut request = Request::new(prompt).max_tokens(tokens).sampling(sampling);
    request.ignore_eos = true;
    request
}

type Tokens = Vec<(u32, Vec<(u32, f32)>)>;

fn tokens(stream: TokenStream) -> Tokens {
    let generation = stream.complete_blocking().unwrap();
    let tokens = generation.tokens.into_iter();
    tokens.map(|token| (token.id, token.top)).collect()
}

/// Returns the tokens of each request when it runs alone.
fn alone(engine: &Engine) -> Vec<Tokens> {
    (0..REQUESTS)
        .map(|index| tokens(engine.generate(request(index)).unwrap()))
        .collect()
}

#[test]
fn cancels_between_graph_replays_change_no_other_token() {
    let gpu = gpu::lock();
    for model in ["llama", "mistral"] {
        let engine = engine(model, CudaOptions::default(), 64);
        let expected = alone(&engine);
        let replays = || (!gpu::is_real()).then(|| gpu.statistic("graph_launches"));
        let before = replays();

        let streams: Vec<_> = (0..REQUESTS)
            .map(|index| engine.generate(request(index)).unwrap())
            .collect();
        let mut kept = Vec::new();
        for (index, mut stream) in streams.into_iter().enumerate() {
            if index % 2 == 0 {
                kept.push((index, stream));
                continue;
            }
            // Read a few tokens and drop the stream, each one at a different step.
            for _ in 0..index % 7 {
                stream.next_blocking().unwrap().unwrap();
            }
            drop(stream);
        }
        for (index, stream) in kept {
            assert_eq!(tokens(stream), expected[index], "{model}, request {index}");
        }
        let stats = idle(&engine);
        assert!(stats.outcomes.cancelled > 0, "{stats:?}");
        if let Some((before, after)) = before.zip(replays()) {
            assert!(after > before, "no step was a replayed graph");
        }
    }
}

#[test]
fn constrained_and_free_requests_keep_their_tokens() {
    let _gpu = gpu::lock();
    let held = |index: usize| match index % 3 {
        0 => request(index).constraint(Remainders::default()),
        _ => request(index),
    };
    let engine = engine("llama", CudaOptions::default(), 64);
    let alone: Vec<Tokens> = (0..REQUESTS)
        .map(|index| tokens(engine.generate(held(index)).unwrap()))
        .collect();
    let streams: Vec<_> = (0..REQUESTS)
        .map(|index| engine.generate(held(index)).unwrap())
        .collect();
    for (index, stream) in streams.into_iter().enumerate() {
        let tokens = tokens(stream);
        assert_eq!(tokens, alone[index], "request {index}");
        let ids = tokens.iter().map(|(id, _)| *id);
        assert!(
            index % 3 != 0 || Remainders::allowed(ids),
            "request {index}"
        );
    }
    idle(&engine);
}

#[test]
fn graphs_change_no_token() {
    let _gpu = gpu::lock();
    let without = CudaOptions {
        max_graphs: 0,
        ..CudaOptions::default()
    };
    let expected = alone(&engine("llama", without, 64));
    let with = engine("llama", CudaOptions::default(), 64);
    let streams: Vec<_> = (0..REQUESTS)
        .map(|index| with.generate(request(index)).unwrap())
        .collect();
    for (index, stream) in streams.into_iter().enumerate() {
        assert_eq!(tokens(stream), expected[index], "request {index}");
    }
}

/// The recorded steps read and write the states of whichever requests they compute, and a request
/// continues from a state that another one has left.
#[test]
fn graphs_and_other_requests_change_no_token_of_recurrent_models() {
    let _gpu = gpu::lock();
    let load = |model: &str, cuda: CudaOptions| {
        let options = load_options(cuda);
        let config = EngineConfig {
            max_batch_tokens: Some(64),
            max_sequences: REQUESTS,
            kv_cache_bytes: Some(16 << 20),
            audit: true,
            ..EngineConfig::default()
        };
        Engine::load_with(tiny(model), config, options).unwrap()
    };
    for model in ["qwen3.5", "lfm2", "granite-hybrid"] {
        let without = CudaOptions {
            max_graphs: 0,
            ..CudaOptions::default()
        };
        let expected = alone(&load(model, without));
        let with = load(model, CudaOptions::default());
        let streams: Vec<_> = (0..REQUESTS)
            .map(|index| with.generate(request(index)).unwrap())
            .collect();
        for (index, stream) in streams.into_iter().enumerate() {
            assert_eq!(tokens(stream), expected[index], "{model}, request {index}");
        }
        assert_eq!(alone(&with), expected, "{model}, once more");
    }
}

/// The images for compute capability 8.0 have no instructions for overlapping kernels.
#[test]
fn overlapping_kernels_change_no_token() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return; // its compute capability is not ours to choose
    }
    for model in ["llama", "mistral"] {
        gpu.set("compute_capability", "8.0");
        let expected = alone(&engine(model, CudaOptions::default(), 64));
        assert_eq!(gpu.statistic("overlapping"), 0);
        gpu.reset();
        gpu.set("compute_capability", "9.0");
        let without = CudaOptions {
            overlap: false,
            ..CudaOptions::default()
        };
        assert_eq!(alone(&engine(model, without, 64)), expected, "{model}");
        assert_eq!(gpu.statistic("overlapping"), 0);
        gpu.reset();
        gpu.set("compute_capability", "9.0");
        gpu.set("schedule", "shuffle:5");
        let engine = engine(model, CudaOptions::default(), 64);
        let streams: Vec<_> = (0..REQUESTS)
            .map(|index| engine.generate(request(index)).unwrap())
            .collect();
        for (index, stream) in streams.into_iter().enumerate() {
            assert_eq!(tokens(stream), expected[index], "{model}, request {index}");
        }
        let (launches, overlapping) = (gpu.statistic("launches"), gpu.statistic("overlapping"));
        assert!(overlapping > launches / 2, "{overlapping} of {launches}");
        gpu.reset();
    }
}

/// Counts the kernels of a decode step of models with as many layers as one of 8 billion parameters.
#[test]
fn a_decode_step_of_an_8b_model_has_at_most_230_nodes() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return; // nothing tells the number of nodes
    }
    for architecture in ["LlamaForCausalLM", "Qwen3ForCausalLM"] {
        let settings = serde_json::json!({
            "architectures": [architecture],
            "model_type": if architecture.starts_with("Llama") { "llama" } else { "qwen3" },
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
            "vocab_size": 96,
        });
        let files = quell::internals::runner::random_model(&settings, DType::BF16).unwrap();
        let options = LoadOptions {
            device: DeviceChoice::Cuda(0),
            ..LoadOptions::default()
        };
        let config = EngineConfig {
            max_batch_tokens: Some(2),
            max_sequences: 2,
            max_context: Some(256),
            kv_cache_bytes: Some(1 << 20),
            ..EngineConfig::default()
        };
        let engine = Engine::from_files(files, config, options).unwrap();
        let nodes = gpu.statistic("graph_nodes");
        // Seven per layer; tokens, embedding, last sum, samples, norm and output.
        assert_eq!(nodes, 7 * 32 + 6, "{architecture}");
        drop(engine);
        gpu.reset();
    }
}

#[test]
fn preempted_requests_keep_their_tokens() {
    let _gpu = gpu::lock();
    let expected = alone(&engine("llama", CudaOptions::default(), 64));
    let crowd = engine("llama", CudaOptions::default(), 5);
    let streams: Vec<_> = (0..REQUESTS)
        .map(|index| crowd.generate(request(index)).unwrap())
        .collect();
    for (index, stream) in streams.into_iter().enumerate() {
        assert_eq!(tokens(stream), expected[index], "request {index}");
    }
    let stats = idle(&crowd);
    assert!(
        stats.preemptions > 0,
        "nothing was preempted: the test proves nothing"
    );
}

#[test]
fn swapped_requests_keep_their_tokens() {
    let _gpu = gpu::lock();
    let expected = alone(&engine("llama", CudaOptions::default(), 64));
    let config = EngineConfig {
        preemption: Preemption::Swap,
        prefix_cache: false,
        ..EngineConfig::default()
    };
    let crowd = engine_with("llama", CudaOptions::default(), 5, config);
    let streams: Vec<_> = (0..REQUESTS)
        .map(|index| crowd.generate(request(index)).unwrap())
        .collect();
    for (index, stream) in streams.into_iter().enumerate() {
        assert_eq!(tokens(stream), expected[index], "request {index}");
    }
    let stats = idle(&crowd);
    assert!(stats.swaps > 0, "nothing was swapped out");
}

#[test]
fn sessions_forks_and_samples_answer_like_the_whole_prompt() {
    let _gpu = gpu::lock();
    let config = EngineConfig {
        prefix_cache: false,
        ..EngineConfig::default()
    };
    let engine = engine_with("llama", CudaOptions::default(), 64, config);
    let greedy = |prompt: Vec<u32>| {
        let mut request = Request::new(prompt).greedy().max_tokens(6);
        request.ignore_eos = true;
        request
    };
    let ids = |stream| -> Vec<u32> { tokens(stream).into_iter().map(|(id, _)| id).collect() };
    let prompt = |length: u32, seed: u32| {
        (0..length)
            .map(|i| (seed * 97 + i * 31) % 500 + 3)
            .collect()
    };
    let session = engine.session();
    let mut context: Vec<u32> = Vec::new();
    for turn in 0..3 {
        let new: Vec<u32> = prompt(7 + 5 * turn, turn);
        context.extend(&new);
        let answer = ids(session.generate(greedy(new)).unwrap());
        let expected = ids(engine.generate(greedy(context.clone())).unwrap());
        assert_eq!(answer, expected, "turn {turn}");
        context.extend(answer);
    }
    // Both write to the block that they share.
    let fork = session.fork().unwrap();
    let streams = [&session, &fork].map(|session| {
        let new: Vec<u32> = prompt(3, session.id().as_u64() as u32);
        let whole = [context.clone(), new.clone()].concat();
        (whole, session.generate(greedy(new)).unwrap())
    });
    for (whole, stream) in streams {
        let expected = ids(engine.generate(greedy(whole)).unwrap());
        assert_eq!(ids(stream), expected);
    }
    let streams = engine.generate_samples(greedy(context.clone()), 3).unwrap();
    let expected = ids(engine.generate(greedy(context)).unwrap());
    for stream in streams {
        assert_eq!(ids(stream), expected);
    }
    drop((session, fork));
    idle(&engine);
}

fn vector(engine: &Engine, prompt: &[u32]) -> Vec<f32> {
    let request = EmbedRequest::new(prompt.to_vec());
    engine.embed(request).unwrap().wait().unwrap().values
}

fn text(index: usize) -> Vec<u32> {
    let length = 1 + index * 29 % 90;
    let token = |i| ((index * 97 + i * 31) % 500 + 3) as u32;
    (0..length).map(token).collect()
}

#[test]
fn embeddings_are_within_one_percent_of_those_of_the_cpu() {
    let _gpu = gpu::lock();
    for model in ["llama", "mistral"] {
        let cpu = EngineConfig {
            kv_cache_bytes: Some(8 << 20),
            ..EngineConfig::default()
        };
        let cpu = Engine::load_with(tiny(model), cpu, LoadOptions::cpu()).unwrap();
        let cuda = CudaOptions {
            activations: CudaActivations::F16,
            ..CudaOptions::default()
        };
        let cuda = engine(model, cuda, 64);
        for index in 0..6 {
            let (found, expected) = (vector(&cuda, &text(index)), vector(&cpu, &text(index)));
            assert_eq!(found.len(), expected.len());
            let size = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            for (found, expected) in found.iter().zip(&expected) {
                let error = (found - expected).abs();
                assert!(error <= 0.01 * size, "{model}, {index}: {error} of {size}");
            }
        }
    }
}

/// Steps that only decode are replayed as graphs; steps with an embedding are not.
#[test]
fn embeddings_and_other_requests_do_not_affect_each_other() {
    let gpu = gpu::lock();
    let engine = engine("llama", CudaOptions::default(), 64);
    let expected = alone(&engine);
    let vectors: Vec<Vec<f32>> = (0..8).map(|index| vector(&engine, &text(index))).collect();
    let replays = || (!gpu::is_real()).then(|| gpu.statistic("graph_launches"));
    let before = replays();
    let asked: Vec<_> = (0..REQUESTS)
        .map(|index| {
            let stream = engine.generate(request(index)).unwrap();
            let text = EmbedRequest::new(text(index % 8));
            let dropped = engine.embed(text.clone()).unwrap();
            let embedding = engine.embed(text).unwrap();
            drop(dropped);
            (stream, embedding)
        })
        .collect();
    for (index, (stream, embedding)) in asked.into_iter().enumerate() {
        assert_eq!(tokens(stream), expected[index], "request {index}");
        assert_eq!(embedding.wait().unwrap().values, vectors[index % 8]);
    }
    idle(&engine);
    if let Some((before, after)) = before.zip(replays()) {
        assert!(after > before, "no step was a replayed graph");
    }
}

/// Returns the id of each token and the bits of its log probability.
fn scores(tokens: &[quell::Token]) -> Vec<(u32, u32)> {
    let score = |token: &quell::Token| (token.id, token.logprob.to_bits());
    tokens.iter().map(score).collect()
}

#[test]
fn prompt_scores_equal_the_scores_at_generation() {
    let _gpu = gpu::lock();
    let engine = engine("llama", CudaOptions::default(), 64);
    for index in 0..4 {
        let mut request = Request::new(text(index + 1)).greedy().max_tokens(20);
        request.ignore_eos = true;
        request.sampling.logprobs = Some(0);
        let answer = engine.generate(request).unwrap();
        let answer = answer.complete_blocking().unwrap();
        let ids = answer.tokens.iter().map(|token| token.id);
        let whole = answer.prompt_ids.iter().copied().chain(ids);
        let score = Request::new(whole.collect::<Vec<u32>>())
            .max_tokens(0)
            .prompt_logprobs(3);
        let neighbour = engine.generate(self::request(index)).unwrap();
        let scored = engine.generate(score).unwrap().complete_blocking().unwrap();
        let found = scored.prompt_logprobs.unwrap();
        let (prompt, generated) = found.split_at(answer.prompt_ids.len() - 1);
        assert_eq!(scores(generated), scores(&answer.tokens));
        assert!(prompt.iter().all(|token| token.top.len() == 3));
        drop(neighbour);
    }
    idle(&engine);
}
