//! The runner without a model: what the host side is measured on.

use quell::runner::{NullOptions, NullRunner};
use quell::{Engine, EngineConfig, Request};

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
        let engine = Engine::with_runner(config, None, move || NullRunner::start(options)).unwrap();
        let streams: Vec<_> = (0..16)
            .map(|first| {
                let request = Request::new(vec![first; 20]).max_tokens(30);
                engine.generate(request).unwrap()
            })
            .collect();
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
