//! `quell tokenize`: turns text into token ids.

use super::args::{Format, resolve};
use super::error::CliError;
use super::generate::{println_json, read_conversation};
use crate::{EncodeOptions, ModelFiles, RenderOptions, SubmitError, Tokenizer};
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Turn text into token ids.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["text", "messages"]))]
pub struct TokenizeArgs {
    /// Model with the tokenizer to use: a .gguf file, a Hugging Face folder, or
    /// hf:ORG/NAME[/FILE] to download. Only its tokenizer needs to be there.
    #[arg(long, value_name = "PATH")]
    model: String,
    /// Text to tokenize; names of special tokens in it are read as those tokens.
    #[arg(long, allow_hyphen_values = true)]
    text: Option<String>,
    /// File with a conversation to tokenize instead: a JSON list of messages, or a whole
    /// chat request with its tools and the variables of the chat template.
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Runs the subcommand.
pub fn run(args: TokenizeArgs) -> Result<(), CliError> {
    let path = resolve(&args.model)?;
    let tokenizer = ModelFiles::open_tokenizer(&path)?
        .ok_or_else(|| CliError::no_tokenizer(&args.model, &path))?;
    let text = match &args.messages {
        Some(path) => rendered(&tokenizer, path)?,
        None => args.text.unwrap_or_default(),
    };
    let options = EncodeOptions {
        // A chat template writes the surrounding special tokens itself.
        add_special: args.messages.is_none(),
        parse_special: true,
    };
    let ids = tokenizer.encode(&text, options)?;
    // A token may be a part of a character, which is then shown as the replacement
    // character.
    let text_of = |id: u32| match tokenizer.token_bytes(id) {
        Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        None => String::new(),
    };
    if args.format == Format::Json {
        let tokens: Vec<Value> = ids
            .iter()
            .map(|&id| json!({"id": id, "text": text_of(id)}))
            .collect();
        let count = ids.len();
        return println_json(&json!({"text": text, "ids": ids, "tokens": tokens, "count": count}));
    }
    let mut out = std::io::stdout().lock();
    if args.messages.is_some() {
        writeln!(out, "{text}\n")?;
    }
    for &id in &ids {
        writeln!(out, "{id:>8}  {:?}", text_of(id))?;
    }
    Ok(())
}

/// Returns the prompt that the chat template makes from the conversation in a file.
fn rendered(tokenizer: &Tokenizer, path: &Path) -> Result<String, CliError> {
    let (messages, request) = read_conversation(path)?;
    let template = tokenizer
        .chat_template()
        .ok_or(SubmitError::NoChatTemplate)?;
    let defaults = RenderOptions::default();
    let flag = |name: &str| request.get(name).and_then(Value::as_bool);
    let options = RenderOptions {
        add_generation_prompt: flag("add_generation_prompt")
            .unwrap_or(defaults.add_generation_prompt),
        continue_final_message: flag("continue_final_message").unwrap_or_default(),
        tools: request.get("tools").cloned(),
        extra: request
            .get("chat_template_kwargs")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default(),
        ..defaults
    };
    Ok(template.render(&messages, &options)?)
}
