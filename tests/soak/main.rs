//! The soak test: runs a great many requests and cancels most of them, at every point of their
//! lives. Afterwards the engine's statistics are as before, to the block, and neither memory
//! nor file descriptors have grown.
//!
//! `QUELL_SOAK_REQUESTS` sets the number of requests, `QUELL_SOAK_SEED` the random seed, and
//! `QUELL_SOAK_OUTPUT` a file for the summary. `make soak` runs a million requests.

mod at_once;
mod in_step;
mod resources;
mod tally;

use common::random::Random;
use common::requests::{idle, prompt, request};
use quell::internals::runner::StateInfo;
use quell::{Engine, EngineConfig, SubmitError};
use resources::Resources;
use sim::SimOptions;
use std::time::Instant;
use tally::Tally;

/// Maximum number of open requests.
const OPEN: usize = 64;
/// Longest prompt: several chunks of a step's token budget.
const PROMPT: usize = 60;
/// Longest answer.
const ANSWER: usize = 16;
/// Rounds per engine. The resources of the process are sampled after each round.
const ROUNDS: usize = 10;

/// Checks I2, I3, I8, I12 and the bounds on memory and file descriptors.
#[test]
fn accounting_and_memory_return_to_their_initial_state_after_the_soak() {
    let requests = number("QUELL_SOAK_REQUESTS", 50_000);
    let seed = number("QUELL_SOAK_SEED", 1);
    println!("{requests} requests, seed {seed}");
    let begin = Instant::now();
    let mut tally = Tally::default();
    let mut resources = Vec::new();
    let part = requests.div_ceil(2 * ROUNDS);
    for depth in [1, 2] {
        let (in_step, gate) = in_step::engine(depth);
        let at_once = at_once::engine(depth);
        for round in 0..ROUNDS {
            let mut random = Random((seed * 1000 + depth * 100 + round) as u64);
            in_step::run(&in_step, &gate, part / 4, &mut random, &mut tally);
            at_once::run(&at_once, part - part / 4, &mut random, &mut tally);
            idle(&at_once);
            resources.push(Resources::now());
        }
        drop(gate);
        for engine in [in_step, at_once] {
            tally.outcomes(&idle(&engine));
            every_place_is_free(&engine);
        }
    }
    tally.check();
    resources::check(&resources);
    if let Some(path) = std::env::var_os("QUELL_SOAK_OUTPUT") {
        let mut summary = tally.json();
        summary["seed"] = seed.into();
        summary["seconds"] = begin.elapsed().as_secs_f64().into();
        summary["resources"] = resources.iter().map(Resources::json).collect();
        std::fs::write(common::root().join(path), format!("{summary:#}\n")).unwrap();
    }
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Creates an engine that is short of places and of blocks, and whose sequences have two block
/// tables.
fn engine(options: SimOptions) -> Engine {
    let options = SimOptions {
        blocks: 180,
        layout: sim::layout_with_window(10),
        states: Some(StateInfo {
            slots: 40,
            interval: 8,
        }),
        ..options
    };
    let config = EngineConfig {
        max_batch_tokens: Some(20),
        max_sequences: 16,
        max_open_requests: OPEN,
        stream_buffer: 8,
        ..EngineConfig::default()
    };
    sim::engine(options, config)
}

/// Checks that no ended request still counts as open.
fn every_place_is_free(engine: &Engine) {
    let streams: Vec<_> = (0..OPEN)
        .map(|index| engine.generate(request(prompt(index, 4), 4)).unwrap())
        .collect();
    let refused = engine.generate(request(prompt(0, 4), 4));
    // It is accepted if one of the others has ended meanwhile.
    if let Err(refused) = refused {
        assert!(
            matches!(refused, SubmitError::Overloaded { open: OPEN, .. }),
            "{refused}"
        );
    }
    drop(streams);
    idle(engine);
}
