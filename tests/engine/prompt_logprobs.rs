//! Log probabilities of prompts: they match references, whatever else the engine computes.

use common::golden::{tiny, tiny_cases};
use common::requests::{idle, ids, prompt, request};
use quell::internals::runner::{NullOptions, NullRunner};
use quell::{
    Chunk, Engine, EngineConfig, LoadOptions, Outcome, Preemption, Request, SubmitError, Token,
};
use sim::{SimOptions, expected, logprob};
use std::sync::mpsc;

/// Returns the scores that the simulated model gives to a prompt.
fn expected_scores(prompt: &[u32]) -> Vec<(u32, f32)> {
    let score = |end: usize| {
        let before = prompt[..end].iter().copied();
        (prompt[end], logprob(before, prompt[end]))
    };
    (1..prompt.len()).map(score).collect()
}

fn scores(tokens: &[Token]) -> Vec<(u32, f32)> {
    let tokens = tokens.iter();
    tokens.map(|token| (token.id, token.logprob)).collect()
}

#[test]
fn prompts_are_scored_under_load_and_with_few_blocks() {
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
            max_sequences: 6,
            preemption,
            ..EngineConfig::default()
        };
        let engine = sim::engine(options, config);
        // Each prompt is scored twice. Some requests also generate tokens, some do not.
        let length = |index: usize| 1 + index / 2 * 5;
        let streams: Vec<_> = (0..24)
            .map(|index| {
                let prompt = prompt(index / 2, length(index));
                let mut request = request(prompt, index % 4 * 5).prompt_logprobs(0);
                request.priority = -(index as i32 % 3);
                engine.generate(request).unwrap()
            })
            .collect();
        drop(open);
        for (index, stream) in streams.into_iter().enumerate() {
            let answer = stream.complete_blocking().unwrap();
            let prompt = prompt(index / 2, length(index));
            let what = format!("{index}, depth {depth}, {preemption:?}");
            let found = scores(answer.prompt_logprobs.as_deref().unwrap());
            assert_eq!(found, expected_scores(&prompt), "{what}");
            assert_eq!(ids(&answer), expected(&prompt, index % 4 * 5), "{what}");
            assert_eq!(answer.finish.outcome, Outcome::Length);
        }
        let stats = idle(&engine);
        assert!(stats.preemptions > 0, "nothing was preempted: {stats:?}");
        assert_eq!(stats.swaps > 0, preemption == Preemption::Swap);
    }
}

#[test]
fn the_scores_arrive_with_the_first_token() {
    let config = EngineConfig {
        max_batch_tokens: Some(4),
        ..EngineConfig::default()
    };
    let engine = sim::engine(SimOptions::default(), config);
    let asked = request(prompt(1, 30), 3).prompt_logprobs(0);
    let stream = engine.generate(asked).unwrap();
    let chunks: Vec<_> = stream.blocking().map(Result::unwrap).collect();
    assert_eq!(chunks.len(), 3);
    let found = scores(chunks[0].prompt_logprobs.as_deref().unwrap());
    assert_eq!(found, expected_scores(&prompt(1, 30)));
    let given = |chunk: &Chunk| !chunk.tokens.is_empty() && chunk.prompt_logprobs.is_some();
    assert_eq!(chunks.iter().filter(|chunk| given(chunk)).count(), 1);
    // A request that does not ask for scores gets none.
    let answer = engine.generate(request(prompt(1, 30), 3)).unwrap();
    assert_eq!(answer.complete_blocking().unwrap().prompt_logprobs, None);
}

#[test]
fn a_prompt_that_is_only_scored_generates_nothing() {
    let engine = sim::engine(SimOptions::default(), EngineConfig::default());
    for length in [1, 2, 40] {
        // The second time, the whole prompt is in the prefix cache, but it is computed all the
        // same.
        for _ in 0..2 {
            let asked = request(prompt(2, length), 0).prompt_logprobs(0);
            let chunks: Vec<_> = engine.generate(asked.clone()).unwrap().blocking().collect();
            assert_eq!(chunks.len(), 1, "only the end");
            let answer = engine.generate(asked).unwrap().complete_blocking().unwrap();
            let found = scores(&answer.prompt_logprobs.unwrap());
            assert_eq!(found, expected_scores(&prompt(2, length)));
            let finish = answer.finish;
            assert_eq!((finish.generated_tokens, finish.cached_tokens), (0, 0));
            assert_eq!(finish.timing.first_token, None);
        }
    }
    let stats = idle(&engine);
    assert_eq!((stats.tokens_generated, stats.prefix_queries), (0, 0));
    assert_eq!(stats.outcomes.length, 12);
}

#[test]
fn samples_and_turns_of_sessions_are_scored() {
    let config = EngineConfig {
        max_batch_tokens: Some(8),
        ..EngineConfig::default()
    };
    let engine = sim::engine(SimOptions::default(), config);
    let asked = || request(prompt(3, 21), 4).prompt_logprobs(0);
    for stream in engine.generate_samples(asked(), 3).unwrap() {
        let answer = stream.complete_blocking().unwrap();
        let found = scores(answer.prompt_logprobs.as_deref().unwrap());
        assert_eq!(found, expected_scores(&prompt(3, 21)));
        assert_eq!(ids(&answer), expected(&prompt(3, 21), 4));
    }
    let session = engine.session();
    let mut context = Vec::new();
    for turn in 0..3 {
        let new = prompt(turn, 9);
        context.extend(&new);
        let asked = request(new, 5).prompt_logprobs(0);
        let answer = session.generate(asked).unwrap();
        let answer = answer.complete_blocking().unwrap();
        // The whole context is scored, not only the new turn.
        let found = scores(answer.prompt_logprobs.as_deref().unwrap());
        assert_eq!(found, expected_scores(&context), "turn {turn}");
        assert_eq!(ids(&answer), expected(&context, 5));
        context.extend(ids(&answer));
    }
    drop(session);
    idle(&engine);
}

#[test]
fn a_scored_request_that_is_dropped_or_cancelled_frees_its_blocks() {
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
        let ask = |index| request(prompt(index, 100), 5).prompt_logprobs(0);
        let dropped = engine.generate(ask(1)).unwrap();
        let cancelled = engine.generate(ask(2)).unwrap();
        let kept = engine.generate(ask(3)).unwrap();
        // This is posted before the steps run, and answered between two of them.
        let asked = engine.inspect();
        for _ in 0..3 {
            permit.send(()).unwrap();
        }
        assert_eq!(asked.wait().unwrap().open, 3);
        drop(dropped);
        let receipt = cancelled.cancel();
        drop(permit);
        assert_eq!(receipt.wait().unwrap().tokens_generated, 0);
        let answer = kept.complete_blocking().unwrap();
        let found = scores(&answer.prompt_logprobs.unwrap());
        assert_eq!(found, expected_scores(&prompt(3, 100)));
        assert_eq!(idle(&engine).outcomes.cancelled, 2);
    }
}

#[test]
fn requests_that_cannot_be_scored_are_refused() {
    let options = SimOptions {
        context: 20,
        ..SimOptions::default()
    };
    let engine = sim::engine(options, EngineConfig::default());
    let refused = |request: Request| engine.generate(request).unwrap_err();
    let without = refused(request(prompt(1, 5), 0));
    assert!(matches!(without, SubmitError::NoTokens));
    let too_many = refused(request(prompt(1, 5), 1).prompt_logprobs(1025));
    assert!(
        too_many.to_string().contains("prompt_logprobs is 1025"),
        "{too_many}"
    );
    // If nothing is generated, the prompt may fill the whole context.
    let long = refused(request(prompt(1, 20), 1).prompt_logprobs(0));
    assert!(matches!(
        long,
        SubmitError::PromptTooLong { tokens: 20, .. }
    ));
    let longer = refused(request(prompt(1, 21), 0).prompt_logprobs(0));
    assert!(matches!(
        longer,
        SubmitError::InputTooLong { limit: 20, .. }
    ));
    let whole = request(prompt(1, 20), 0).prompt_logprobs(0);
    let whole = engine.generate(whole).unwrap().complete_blocking().unwrap();
    let found = scores(&whole.prompt_logprobs.unwrap());
    assert_eq!(found, expected_scores(&prompt(1, 20)));
}

#[test]
fn the_null_runner_scores_the_prompt() {
    let options = NullOptions::default();
    let config = EngineConfig::default();
    let engine = Engine::with_runner(config, None, move || NullRunner::start(options)).unwrap();
    let asked = request(vec![7, 3, 31_999], 2).prompt_logprobs(2);
    let answer = engine.generate(asked).unwrap().complete_blocking().unwrap();
    let found = answer.prompt_logprobs.unwrap();
    let tops: Vec<_> = found.iter().map(|token| token.top.as_slice()).collect();
    assert_eq!(scores(&found), [(3, 0.0), (31_999, 0.0)]);
    assert_eq!(tops, [[(3, 0.0), (4, -1.0)], [(31_999, 0.0), (0, -1.0)]]);
}

/// The prompt is a reference's prompt followed by its tokens, whose log probabilities it has.
#[test]
fn prompt_scores_agree_with_transformers() {
    for name in ["llama", "gemma2", "qwen3", "mixtral"] {
        let config = EngineConfig {
            max_batch_tokens: Some(32),
            max_sequences: 9,
            kv_cache_bytes: Some(8 << 20),
            audit: true,
            ..EngineConfig::default()
        };
        let engine = Engine::load_with(tiny(name), config, LoadOptions::cpu()).unwrap();
        let cases = tiny_cases(name);
        assert_eq!(cases.len(), 4);
        for case in cases {
            let (length, steps) = (case.prompt.len(), case.steps.iter());
            let tokens = steps.clone().map(|step| step.token);
            let whole: Vec<u32> = case.prompt.iter().copied().chain(tokens).collect();
            let asked = request(whole.clone(), 0).prompt_logprobs(512);
            let answer = engine.generate(asked).unwrap().complete_blocking().unwrap();
            let found = answer.prompt_logprobs.unwrap();
            assert_eq!(found.len(), whole.len() - 1);
            for (step, found) in steps.zip(&found[length - 1..]) {
                assert_eq!((found.id, step.top.len()), (step.token, 5));
                for &(token, expected) in &step.top {
                    let (_, logprob) = found.top.iter().find(|(id, _)| *id == token).unwrap();
                    let error = (logprob - expected).abs();
                    assert!(error <= 0.01, "{name}, {length} tokens: {error}");
                    assert!(token != found.id || *logprob == found.logprob);
                }
            }
            // Each row must score exactly as it does when its token is generated.
            for end in [1, length / 2, length - 1]
                .into_iter()
                .filter(|end| *end > 0)
            {
                let mut asked = request(whole[..end].to_vec(), 1);
                asked.sampling.logprobs = Some(512);
                let answer = engine.generate(asked).unwrap().complete_blocking().unwrap();
                assert_eq!(answer.tokens[0].top, found[end - 1].top, "{name}: {end}");
            }
        }
        idle(&engine);
    }
}
