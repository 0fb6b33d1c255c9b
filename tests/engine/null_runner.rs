//! The null runner, which has no model and is used to measure the host side.

use quell::internals::runner::{NullOptions, NullRunner, Runner, StepOutput};
use quell::internals::sampling::Samples;
use quell::internals::schedule::{Sequences, StepPlan};
use quell::{DeviceError, Engine, EngineConfig, EngineFault, GenerateError, LoadError, Request};
use std::sync::mpsc::{Receiver, channel};

/// A runner that waits for a signal before each step.
struct Held {
    runner: Box<dyn Runner>,
    begin: Receiver<()>,
}

impl Runner for Held {
    fn depth(&self) -> usize {
        self.runner.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        // Returns an error at once when the sender has been dropped.
        let _ = self.begin.recv();
        self.runner.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        self.runner.collect()
    }
}

#[test]
fn tokens_depend_only_on_the_requests_own_prompt() {
    for depth in [1, 2] {
        let options = NullOptions {
            depth,
            vocabulary: 100,
            cache_blocks: 24,
            block_tokens: 4,
            ..NullOptions::default()
        };
        let config = EngineConfig {
            audit: true,
            max_batch_tokens: Some(16),
            ..EngineConfig::default()
        };
        let (told, begin) = channel();
        let engine = Engine::with_runner(config, None, move || {
            let (runner, info) = NullRunner::start(options)?;
            Ok::<_, LoadError>((Box::new(Held { runner, begin }) as Box<dyn Runner>, info))
        });
        let engine = engine.unwrap();
        let streams: Vec<_> = (0..16)
            .map(|first| {
                let request = Request::new(vec![first; 20]).max_tokens(30);
                engine.generate(request).unwrap()
            })
            .collect();
        drop(told);
        for (first, stream) in (0..).zip(streams) {
            let answer = stream.complete_blocking().unwrap();
            let tokens: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
            let expected: Vec<u32> = (20..50)
                .map(|position| options.token(first, position))
                .collect();
            assert_eq!(tokens, expected, "depth {depth}");
        }
        let stats = engine.stats().unwrap();
        assert!(stats.preemptions > 0, "blocks were not scarce");
    }
}

/// A runner whose logits are NaN from position [`FIRST_NAN`] on, for prompts that begin with
/// [`BROKEN`].
struct Broken {
    runner: Box<dyn Runner>,
    /// For each sample of the steps in flight, whether its logits are NaN.
    samples: std::collections::VecDeque<bool>,
}

const BROKEN: u32 = 13;
const FIRST_NAN: usize = 24;

impl Runner for Broken {
    fn depth(&self) -> usize {
        self.runner.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        let broken = plan.samples().map(|item| {
            let prompt = sequences.get(item.key).map(|sequence| sequence.tokens[0]);
            prompt == Some(BROKEN) && item.start + item.count >= FIRST_NAN
        });
        self.samples.extend(broken);
        self.runner.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        let mut output = self.runner.collect()?;
        let Samples { tokens, not_finite } = &mut output.samples;
        let broken = |_: &usize| self.samples.pop_front().unwrap_or(false);
        not_finite.extend((0..tokens.len()).filter(broken));
        Ok(output)
    }
}

#[test]
fn non_finite_logits_end_only_their_own_request() {
    for depth in [1, 2] {
        let options = NullOptions {
            depth,
            vocabulary: 100,
            block_tokens: 4,
            ..NullOptions::default()
        };
        let config = EngineConfig {
            audit: true,
            ..EngineConfig::default()
        };
        let engine = Engine::with_runner(config, None, move || {
            let (runner, info) = NullRunner::start(options)?;
            let samples = std::collections::VecDeque::new();
            Ok::<_, LoadError>((
                Box::new(Broken { runner, samples }) as Box<dyn Runner>,
                info,
            ))
        });
        let engine = engine.unwrap();
        for round in 0..2 {
            let ask = |first: u32| {
                let request = Request::new(vec![first; 20]).max_tokens(30);
                engine.generate(request).unwrap()
            };
            let streams: Vec<_> = (10..16).map(|first| (first, ask(first))).collect();
            for (first, mut stream) in streams.into_iter().map(|(first, s)| (first, s.blocking())) {
                let mut tokens = 0;
                let end = loop {
                    match stream.next() {
                        Some(Ok(chunk)) => tokens += chunk.tokens.len(),
                        Some(Err(error)) => break Some(error),
                        None => break None,
                    }
                };
                if first != BROKEN {
                    assert!(end.is_none() && tokens == 30, "{first}: {tokens} {end:?}");
                    continue;
                }
                assert_eq!(tokens, FIRST_NAN - 20, "round {round}, depth {depth}");
                let fault = match &end {
                    Some(GenerateError::Failed(fault @ EngineFault::NotFinite { .. })) => fault,
                    other => panic!("not NaN: {other:?}"),
                };
                let said = fault.to_string();
                assert!(
                    said.contains(&format!("after {FIRST_NAN} tokens")),
                    "{said}"
                );
            }
        }
        // What was computed of it before may be the cause, so it is computed again.
        let before = engine.stats().unwrap().prefix_hits;
        let again = Request::new(vec![BROKEN; 20]).max_tokens(30);
        let again = engine.generate(again).unwrap().complete_blocking();
        assert!(again.is_err());
        let stats = engine.stats().unwrap();
        assert_eq!(stats.prefix_hits, before);
        assert_eq!(stats.blocks.referenced, 0);
    }
}
