//! The runner without a model: what the host side is measured on.

use quell::device::DeviceError;
use quell::runner::{NullOptions, NullRunner, Runner, StepOutput};
use quell::schedule::{Sequences, StepPlan};
use quell::{Engine, EngineConfig, LoadError, Request};
use std::sync::mpsc::{Receiver, channel};

/// A runner that begins when it is told to.
struct Held {
    runner: Box<dyn Runner>,
    begin: Receiver<()>,
}

impl Runner for Held {
    fn depth(&self) -> usize {
        self.runner.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        // An error once it has been told, by the sender's end.
        let _ = self.begin.recv();
        self.runner.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        self.runner.collect()
    }
}

#[test]
fn its_tokens_depend_on_the_own_prompt_only_at_either_depth_and_when_blocks_are_scarce() {
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
            max_batch_tokens: 16,
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
