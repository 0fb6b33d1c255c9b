//! Embeddings: the mean of a prompt's last hidden states, whatever else the engine computes.

use common::golden::{tiny, tiny_cases};
use common::requests::{idle, ids, prompt, request};
use half::bf16;
use quell::internals::runner::{NullOptions, NullRunner};
use quell::{
    CancelReason, CpuOptions, EmbedRequest, EmbeddingFuture, Engine, EngineConfig, GenerateError,
    LoadOptions, Preemption, Request, SubmitError,
};
use safetensors::SafeTensors;
use sim::{Fault, SimOptions, expected, expected_embedding};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};

fn embed(engine: &Engine, prompt: Vec<u32>) -> EmbeddingFuture {
    engine.embed(EmbedRequest::new(prompt)).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Embeds a prompt and returns the bits of its vector.
fn vector(engine: &Engine, prompt: Vec<u32>) -> Vec<u32> {
    bits(&embed(engine, prompt).wait().unwrap().values)
}

// On a simulated device.

#[test]
fn prompts_are_embedded_under_load_and_with_few_blocks() {
    for (depth, preemption) in [
        (1, Preemption::Recompute),
        (2, Preemption::Recompute),
        (2, Preemption::Swap),
    ] {
        let (open, gate) = mpsc::channel::<()>();
        let options = SimOptions {
            depth,
            blocks: 24,
            swap_blocks: 24,
            gate: Some(gate),
            ..SimOptions::default()
        };
        let config = EngineConfig {
            max_batch_tokens: Some(16),
            preemption,
            ..EngineConfig::default()
        };
        let engine = sim::engine(options, config);
        // Two prompts of each length, some of them with a priority that preempts others.
        let length = |index: usize| 1 + index / 2 * 5;
        let asked: Vec<_> = (0..24)
            .map(|index| {
                let embedding = EmbedRequest {
                    priority: -(index as i32 % 3),
                    ..EmbedRequest::new(prompt(index / 2, length(index)))
                };
                let tokens = request(prompt(index, 9), 20);
                let embedding = engine.embed(embedding).unwrap();
                (embedding, engine.generate(tokens).unwrap())
            })
            .collect();
        drop(open);
        for (index, (embedding, stream)) in asked.into_iter().enumerate() {
            let embedding = embedding.wait().unwrap();
            let what = format!("{index}, depth {depth}, {preemption:?}");
            assert_eq!(embedding.prompt_tokens, length(index));
            let expected_values = expected_embedding(&prompt(index / 2, length(index)));
            assert_eq!(embedding.values, expected_values, "{what}");
            let tokens = ids(&stream.complete_blocking().unwrap());
            assert_eq!(tokens, expected(&prompt(index, 9), 20), "{what}");
        }
        let stats = idle(&engine);
        assert!(stats.preemptions > 0, "nothing was preempted: {stats:?}");
        assert_eq!(stats.swaps > 0, preemption == Preemption::Swap);
        let outcomes = stats.outcomes;
        assert_eq!(
            (outcomes.accepted, outcomes.stopped, outcomes.length),
            (48, 24, 24)
        );
    }
}

#[test]
fn an_embedding_counts_prompt_tokens_but_no_generated_token() {
    let engine = sim::engine(SimOptions::default(), EngineConfig::default());
    for _ in 0..2 {
        // The second time, the whole prompt is in the prefix cache, but it is computed all the
        // same.
        let embedding = embed(&engine, prompt(1, 40)).wait().unwrap();
        assert_eq!(embedding.values, expected_embedding(&prompt(1, 40)));
        assert_eq!(embedding.timing.first_token, None);
    }
    let stats = idle(&engine);
    assert_eq!((stats.prompt_tokens, stats.tokens_generated), (80, 0));
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (0, 0));
    // Other requests can reuse the blocks that it has computed.
    let answer = engine.generate(request(prompt(1, 40), 4)).unwrap();
    let answer = answer.complete_blocking().unwrap();
    assert_eq!(answer.finish.cached_tokens, 36);
    assert_eq!(ids(&answer), expected(&prompt(1, 40), 4));
}

#[test]
fn an_embedding_that_is_dropped_or_cancelled_frees_its_blocks() {
    for depth in [1, 2] {
        let (permit, gate) = mpsc::channel();
        let options = SimOptions {
            depth,
            gate: Some(gate),
            ..SimOptions::default()
        };
        let config = EngineConfig {
            max_batch_tokens: Some(8),
            ..EngineConfig::default()
        };
        let engine = sim::engine(options, config);
        let mut dropped = embed(&engine, prompt(1, 100));
        let cancelled = embed(&engine, prompt(2, 100));
        let kept = embed(&engine, prompt(3, 30));
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            permit.send(()).unwrap();
            assert!(Pin::new(&mut dropped).poll(&mut context).is_pending());
        }
        drop(dropped.when_dropped(CancelReason::Disconnect));
        let receipt = cancelled.cancel();
        drop(permit);
        assert_eq!(receipt.wait().unwrap().tokens_generated, 0);
        assert_eq!(
            kept.wait().unwrap().values,
            expected_embedding(&prompt(3, 30))
        );
        let stats = idle(&engine);
        let outcomes = stats.outcomes;
        assert_eq!((outcomes.cancelled, outcomes.stopped), (2, 1));
    }
}

#[test]
fn a_failed_step_fails_its_embeddings() {
    let options = SimOptions {
        fault: Some((2, Fault::Step)),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_batch_tokens: Some(8),
        ..EngineConfig::default()
    };
    let engine = sim::engine(options, config);
    let failed = embed(&engine, prompt(1, 30)).wait();
    assert!(
        matches!(failed, Err(GenerateError::Failed(_))),
        "{failed:?}"
    );
    let embedding = embed(&engine, prompt(1, 30)).wait().unwrap();
    assert_eq!(embedding.values, expected_embedding(&prompt(1, 30)));
    idle(&engine);
}

#[test]
fn an_embedding_is_returned_once_and_an_overdue_one_is_cancelled() {
    let engine = sim::engine(SimOptions::default(), EngineConfig::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut future = embed(&engine, prompt(1, 9));
    let embedding = runtime.block_on(&mut future).unwrap();
    assert_eq!(embedding.values, expected_embedding(&prompt(1, 9)));
    let again = Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(again, Poll::Ready(Err(GenerateError::Closed(_)))));
    let overdue = EmbedRequest {
        finish_within: Some(std::time::Duration::ZERO),
        ..EmbedRequest::new(prompt(1, 9))
    };
    let overdue = runtime.block_on(engine.embed(overdue).unwrap());
    assert!(matches!(
        overdue,
        Err(GenerateError::Cancelled(CancelReason::Deadline))
    ));
}

#[test]
fn inputs_that_cannot_be_embedded_are_refused() {
    let options = SimOptions {
        context: 20,
        ..SimOptions::default()
    };
    let engine = sim::engine(options, EngineConfig::default());
    let refused = |prompt: Vec<u32>| engine.embed(EmbedRequest::new(prompt)).unwrap_err();
    assert!(matches!(refused(vec![]), SubmitError::EmptyPrompt));
    assert!(matches!(
        refused(vec![1, 1000]),
        SubmitError::UnknownToken { token: 1000, .. }
    ));
    let error = refused(prompt(1, 21)).to_string();
    assert!(
        error.contains("21 tokens") && error.contains("at most 20"),
        "{error}"
    );
    let whole = embed(&engine, prompt(1, 20)).wait().unwrap();
    assert_eq!(whole.values, expected_embedding(&prompt(1, 20)));
    let text = engine.embed(EmbedRequest::new("a text"));
    assert!(matches!(text, Err(SubmitError::NoTokenizer { .. })));

    let without = NullOptions {
        embedding: 0,
        ..NullOptions::default()
    };
    let config = EngineConfig::default();
    let engine = Engine::with_runner(config, None, move || NullRunner::start(without)).unwrap();
    let error = engine.embed(EmbedRequest::new(vec![1])).unwrap_err();
    assert!(matches!(error, SubmitError::NoEmbeddings));
}

#[test]
fn the_null_runner_embeds_token_counts() {
    let options = NullOptions {
        embedding: 4,
        ..NullOptions::default()
    };
    let config = EngineConfig {
        max_batch_tokens: Some(3),
        ..EngineConfig::default()
    };
    let engine = Engine::with_runner(config, None, move || NullRunner::start(options)).unwrap();
    let embedding = embed(&engine, vec![0, 1, 5, 9, 4, 2, 1, 1]).wait().unwrap();
    assert_eq!(embedding.values, [0.25, 0.625, 0.125, 0.0]);
}

// On the CPU device.

fn cpu(name: &str, config: EngineConfig) -> Engine {
    let options = LoadOptions {
        cpu: CpuOptions {
            threads: Some(2),
            ..CpuOptions::default()
        },
        ..LoadOptions::cpu()
    };
    let config = EngineConfig {
        kv_cache_bytes: Some(8 << 20),
        audit: true,
        ..config
    };
    Engine::load_with(tiny(name), config, options).unwrap()
}

/// Reads the output matrix, which maps hidden states to logits, row by row.
fn output_matrix(name: &str) -> Vec<Vec<f32>> {
    let bytes = std::fs::read(tiny(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let output = tensors.tensor("lm_head.weight");
    let output = output.unwrap_or_else(|_| tensors.tensor("model.embed_tokens.weight").unwrap());
    let columns = output.shape()[1];
    let (pairs, _) = output.data().as_chunks::<2>();
    let values = pairs.iter().map(|&pair| bf16::from_le_bytes(pair).to_f32());
    let values: Vec<f32> = values.collect();
    values.chunks(columns).map(<[f32]>::to_vec).collect()
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    logits
        .iter()
        .map(|logit| logit - largest - sum.ln())
        .collect()
}

/// The sum of hidden states of a prompt, minus the sum for the prompt without its last token,
/// is the last hidden state of the prompt. The output matrix must turn it into the log
/// probabilities of transformers.
#[test]
fn hidden_states_give_the_log_probabilities_of_transformers() {
    for name in ["llama", "llama-tied", "qwen3", "gemma3", "olmo2", "mixtral"] {
        let engine = cpu(name, EngineConfig::default());
        let output = output_matrix(name);
        let sum = |prompt: &[u32]| -> Vec<f64> {
            if prompt.is_empty() {
                return vec![0.0; output[0].len()];
            }
            let embedding = embed(&engine, prompt.to_vec()).wait().unwrap();
            assert_eq!(Some(embedding.values.len()), engine.info().embedding);
            let values = embedding.values.iter();
            let count = prompt.len() as f64;
            values.map(|&value| f64::from(value) * count).collect()
        };
        let cases = tiny_cases(name);
        assert_eq!(cases.len(), 4);
        for case in cases {
            let (_, before) = case.prompt.split_last().unwrap();
            let pairs = sum(&case.prompt).into_iter().zip(sum(before));
            let hidden: Vec<f64> = pairs.map(|(with, without)| with - without).collect();
            let logits: Vec<f64> = output
                .iter()
                .map(|row| {
                    let products = row.iter().zip(&hidden);
                    products
                        .map(|(&weight, value)| f64::from(weight) * value)
                        .sum()
                })
                .collect();
            let found = log_softmax(&logits);
            assert_eq!(case.steps[0].top.len(), 5);
            for &(token, expected) in &case.steps[0].top {
                let error = (found[token as usize] - f64::from(expected)).abs();
                let length = case.prompt.len();
                assert!(error <= 0.01, "{name}, {length} tokens: {error}");
            }
        }
    }
}

#[test]
fn chunking_batching_and_cached_prefixes_change_no_bit() {
    for name in ["llama", "gemma3"] {
        let prompts: Vec<Vec<u32>> = (0..6)
            .map(|index| {
                let common = (0..20).map(|i| i * 17 % 500 + 3);
                let own = (0..index as u32 * 13 % 50).map(|i| (index as u32 * 97 + i * 31) % 500);
                common.chain(own).collect()
            })
            .collect();
        let whole = cpu(name, EngineConfig::default());
        let expected: HashMap<usize, Vec<u32>> = prompts
            .iter()
            .map(|prompt| vector(&whole, prompt.clone()))
            .enumerate()
            .collect();
        let greedy = |index: usize| {
            let mut request = Request::new(prompts[index].clone()).greedy().max_tokens(12);
            request.ignore_eos = true;
            request
        };
        let tokens = ids(&whole
            .generate(greedy(0))
            .unwrap()
            .complete_blocking()
            .unwrap());
        for max_batch_tokens in [1, 7, 16, 33] {
            let config = EngineConfig {
                max_batch_tokens: Some(max_batch_tokens),
                ..EngineConfig::default()
            };
            let engine = cpu(name, config);
            let answer = engine.generate(greedy(0)).unwrap();
            let all: Vec<_> = prompts.iter().map(|p| embed(&engine, p.clone())).collect();
            for (index, embedding) in all.into_iter().enumerate() {
                let values = embedding.wait().unwrap().values;
                assert_eq!(bits(&values), expected[&index], "{name}, {index}");
            }
            let answer = answer.complete_blocking().unwrap();
            assert_eq!(ids(&answer), tokens, "{name}: steps of {max_batch_tokens}");
            idle(&engine);
        }
    }
}
