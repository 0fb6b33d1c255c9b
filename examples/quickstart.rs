//! Loads a model, streams an answer, and cancels another one half-way.
//!
//! `cargo run --release --example quickstart -- models/SmolLM2-135M-Instruct.Q4_1.gguf`

use futures_util::StreamExt;
use quell::{Engine, Message, Request};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: quickstart MODEL")?;
    let engine = Engine::load(path)?;

    let question = vec![Message::new("user", "Why is the sky blue?")];
    let mut answer = engine.generate(Request::new(question).greedy().max_tokens(32))?;
    while let Some(chunk) = answer.next().await {
        print!("{}", chunk?.text);
    }
    println!();

    let mut story = engine.generate(Request::new("Once upon a time").max_tokens(1000))?;
    for _ in 0..10 {
        if let Some(chunk) = story.next().await {
            print!("{}", chunk?.text);
        }
    }
    let receipt = story.cancel().await?;
    println!(
        " … (cancelled: {} blocks are free again)",
        receipt.blocks_freed
    );
    Ok(())
}
