//! Sends many prompts to one engine, which decodes them together in batches.
//!
//! `cargo run --release --example batch -- models/SmolLM2-135M-Instruct.Q4_1.gguf`

use quell::{Engine, Request};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: batch MODEL")?;
    let engine = Engine::load(path)?;
    let animals = ["cat", "dog", "owl", "fox", "bear", "whale", "ant", "horse"];

    let start = Instant::now();
    let streams = animals
        .iter()
        .map(|animal| {
            let prompt = format!("The most surprising thing about the {animal} is");
            engine.generate(Request::new(prompt).greedy().max_tokens(24))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut tokens = 0;
    for (animal, stream) in animals.iter().zip(streams) {
        let generation = stream.complete_blocking()?;
        tokens += generation.tokens.len();
        println!(
            "{animal}:{}",
            generation.text.unwrap_or_default().replace('\n', " ")
        );
    }
    println!("{tokens} tokens in {:.2} s", start.elapsed().as_secs_f64());
    Ok(())
}
