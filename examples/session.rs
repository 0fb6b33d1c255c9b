//! Holds a conversation in a session, which keeps the KV cache between its turns.
//!
//! `cargo run --release --example session -- models/SmolLM2-135M-Instruct.Q4_1.gguf`

use quell::{Engine, Message, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: session MODEL")?;
    let engine = Engine::load(path)?;
    let session = engine.session();

    let mut conversation = Vec::new();
    for question in ["Name a fruit.", "Which colour is it?", "Name another one."] {
        conversation.push(Message::new("user", question));
        // A conversation is the whole context. Only what is new in it is computed.
        let request = Request::new(conversation.clone()).greedy().max_tokens(24);
        let answer = session.generate(request)?.complete_blocking()?;
        let text = answer.text.unwrap_or_default();
        println!(
            "{question} {text} ({} of {} prompt tokens were cached)",
            answer.finish.cached_tokens,
            answer.prompt_ids.len()
        );
        conversation.push(Message::new("assistant", text));
    }

    let retained = session.retained()?;
    println!(
        "kept: {} tokens in {} blocks",
        retained.tokens, retained.blocks
    );
    let receipt = session.end().wait()?;
    println!("freed: {} blocks", receipt.blocks_freed);
    Ok(())
}
