//! Builds requests to a simulated engine, and waits until the engine is idle.

use quell::{Engine, EngineStats, Generation, Request};

/// A request for at most `tokens` new tokens.
pub fn request(prompt: Vec<u32>, tokens: usize) -> Request {
    Request::new(prompt).max_tokens(tokens)
}

/// A prompt of this length, different for each index.
pub fn prompt(index: usize, length: usize) -> Vec<u32> {
    (0..length)
        .map(|position| ((index * 131 + position * 7 + 3) % 1000) as u32)
        .collect()
}

pub fn ids(generation: &Generation) -> Vec<u32> {
    let tokens = generation.tokens.iter();
    tokens.map(|token| token.id).collect()
}

/// Polls the scheduler thread until no request is open (I12).
pub fn idle(engine: &Engine) -> EngineStats {
    loop {
        let stats = engine.stats().unwrap();
        if stats.open == 0 && stats.closing == 0 {
            assert!(stats.is_idle(), "{stats:?}");
            return stats;
        }
    }
}
