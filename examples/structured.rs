//! Constrains an answer to a JSON schema, so that it always parses.
//!
//! `cargo run --release --example structured -- models/SmolLM2-135M-Instruct.Q4_1.gguf`

use quell::{Engine, Grammar, Message, Request};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: structured MODEL")?;
    let engine = Engine::load(path)?;
    let tokenizer = engine.tokenizer().ok_or("the model has no tokenizer")?;

    let schema = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
            "is_capital": {"type": "boolean"},
        },
        "required": ["city", "population", "is_capital"],
        "additionalProperties": false,
    });
    // Compile a grammar once and use it for any number of requests.
    let grammar = Grammar::json_schema(tokenizer, &schema)?;

    let question = vec![Message::new("user", "Describe Paris as JSON.")];
    let request = Request::new(question)
        .greedy()
        .max_tokens(100)
        .constraint(grammar.constraint());
    let text = engine.generate(request)?.complete_blocking()?.text;
    let answer: Value = serde_json::from_str(&text.unwrap_or_default())?;
    println!("{answer:#}");
    Ok(())
}
