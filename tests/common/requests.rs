//! Requests to a simulated engine, and waiting for it to fall idle.

#![allow(dead_code)] // each test file uses its part

use quell::{Engine, EngineStats, Generation, Request};

/// A request of at most `tokens` new tokens.
pub fn request(prompt: Vec<u32>, tokens: usize) -> Request {
    Request::new(prompt).max_tokens(tokens)
}

/// A prompt of this length, another for each index.
pub fn prompt(index: usize, length: usize) -> Vec<u32> {
    (0..length)
        .map(|position| ((index * 131 + position * 7 + 3) % 1000) as u32)
        .collect()
}

pub fn ids(generation: &Generation) -> Vec<u32> {
    let tokens = generation.tokens.iter();
    tokens.map(|token| token.id).collect()
}

/// Waits, by asking the scheduler thread, until nothing is open (I12).
pub fn idle(engine: &Engine) -> EngineStats {
    loop {
        let stats = engine.stats().unwrap();
        if stats.open == 0 && stats.closing == 0 {
            assert!(stats.is_idle(), "{stats:?}");
            return stats;
        }
    }
}
