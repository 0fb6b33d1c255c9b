//! `quell tokenize`: turn text into token ids.

use super::args::{CliError, Format, resolve};
use super::generate::println_json;
use clap::Args;
use quell::runner::ModelFiles;
use quell::text::EncodeOptions;
use serde_json::{Value, json};
use std::io::Write;

/// Turn text into token ids.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// A .gguf file, a Hugging Face folder, or hf:ORG/NAME[/FILE] to download.
    #[arg(long, value_name = "PATH")]
    model: String,
    /// The text; names of special tokens in it mean these tokens.
    #[arg(long, allow_hyphen_values = true)]
    text: String,
    /// How the result is printed.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Runs the subcommand.
pub fn run(args: TokenizeArgs) -> Result<(), CliError> {
    let mut files = ModelFiles::open(&resolve(&args.model)?)?;
    let tokenizer = files
        .take_tokenizer()
        .ok_or_else(|| CliError::NoTokenizer {
            model: args.model.clone(),
        })?;
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    let ids = tokenizer.encode(&args.text, options)?;
    // A token may be half a character: shown with the replacement character then.
    let text_of = |id: u32| match tokenizer.token_bytes(id) {
        Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        None => String::new(),
    };
    if args.format == Format::Json {
        let tokens: Vec<Value> = ids
            .iter()
            .map(|&id| json!({"id": id, "text": text_of(id)}))
            .collect();
        return println_json(&json!({"ids": ids, "tokens": tokens, "count": ids.len()}));
    }
    let mut out = std::io::stdout().lock();
    for &id in &ids {
        writeln!(out, "{id:>8}  {:?}", text_of(id))?;
    }
    Ok(())
}
