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

mod chat;
mod error;
#[cfg(any(test, feature = "internals"))]
pub mod fuzz;
#[cfg(feature = "grammar")]
mod grammar;
mod stop;
mod tokenizer;

pub use chat::{ChatTemplate, Message, RenderOptions, harmony, reasoning, tools};
pub use error::TextError;
#[cfg(feature = "grammar")]
pub use grammar::{
    Grammar, GrammarAnswer, GrammarCalls, GrammarError, GrammarForm, GrammarKind, GrammarReasoning,
    SchemaKeywords,
};
pub use stop::{StopMatcher, StopStep, StopStrings};
pub use tokenizer::{Detokenizer, EncodeOptions, GgufVocabulary, Tokenizer};
