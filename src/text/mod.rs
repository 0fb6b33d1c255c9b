//! Text processing between a client's messages and the model's token ids.
//!
//! [`Tokenizer`] converts text to token ids and back, [`Detokenizer`] converts ids to text
//! one token at a time, [`StopMatcher`] finds stop strings across token boundaries, and
//! [`ChatTemplate`] turns a conversation into a prompt. [`reasoning`] and [`tools`] split
//! an answer into reasoning, content and tool calls.
//!
//! With the feature `grammar`, `Grammar` restricts an answer to a JSON schema, a regular
//! expression or a grammar.
//!
//! Everything that a model file contains is validated. Once a tokenizer has been built, it
//! handles every string and every id without a panic.

mod byte_level;
mod clock;
mod detokenize;
mod end_tokens;
mod error;
mod folder;
pub mod fuzz;
mod gguf_metadata;
mod gguf_vocabulary;
#[cfg(feature = "grammar")]
mod grammar;
mod jinja;
mod merges;
mod message;
mod pre_tokenizer;
mod python_json;
pub mod reasoning;
mod sentencepiece;
mod special;
mod stop;
mod template;
mod tokenizer;
mod tool_support;
pub mod tools;
mod unigram;
mod vocabulary;

#[cfg(test)]
mod tests;

pub use detokenize::Detokenizer;
pub use error::TextError;
pub use gguf_vocabulary::GgufVocabulary;
#[cfg(feature = "grammar")]
pub use grammar::{Calls, Form, Grammar, GrammarError, GrammarKind, Keywords};
pub use message::Message;
pub use stop::{StopMatcher, StopStep, StopStrings};
pub use template::{ChatTemplate, RenderOptions};
pub use tokenizer::{EncodeOptions, Tokenizer};
