//! What can be wrong with a tokenizer, a chat template or a text.

use std::path::PathBuf;
use thiserror::Error;

/// A tokenizer or chat template that cannot be built, or cannot do what was asked.
#[derive(Debug, Error)]
pub enum TextError {
    /// A tokenizer file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A tokenizer file is not what its name promises.
    #[error("{} is {found}, expected {expected}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be there.
        expected: &'static str,
    },
    /// A value in a GGUF file is missing or of the wrong type.
    #[error("metadata {key} is {found}, expected {expected}")]
    Metadata {
        /// The key.
        key: &'static str,
        /// The type that is there.
        found: String,
        /// The type that should be there.
        expected: &'static str,
    },
    /// The vocabulary has no tokens.
    #[error("the tokenizer's vocabulary is empty, expected at least one token")]
    EmptyVocabulary,
    /// The vocabulary is larger than any model's.
    #[error("the vocabulary has {tokens} tokens, expected at most {limit}")]
    VocabularyTooLarge {
        /// How many tokens it has, or the largest id plus one.
        tokens: usize,
        /// The most that are accepted.
        limit: usize,
    },
    /// A list that goes with the vocabulary has another length.
    #[error("tokenizer list {list} has {found} entries, expected {expected}, one a token")]
    LengthMismatch {
        /// The list: `scores` or `token_types`.
        list: &'static str,
        /// Its length.
        found: usize,
        /// The number of tokens.
        expected: usize,
    },
    /// One text stands for two ids.
    #[error("token {second} is {text:?}, as token {first} is, expected every token once")]
    DuplicateToken {
        /// The text.
        text: String,
        /// The first id.
        first: u32,
        /// The second id.
        second: u32,
    },
    /// A token is longer than any model's.
    #[error("token {id} is {bytes} bytes long, expected at most {limit}")]
    TokenTooLong {
        /// The token.
        id: u32,
        /// Its length.
        bytes: usize,
        /// The longest that is accepted.
        limit: usize,
    },
    /// A token's type is no known number.
    #[error("token {id} has type {found}, expected 1 to 6")]
    TokenType {
        /// The token.
        id: u32,
        /// Its type.
        found: i32,
    },
    /// A token of type "byte" names no byte.
    #[error("byte token {id} is {text:?}, expected <0x00> to <0xFF>")]
    ByteToken {
        /// The token.
        id: u32,
        /// Its text.
        text: String,
    },
    /// A score is not a number.
    #[error("token {id} has score {score}, expected a finite number")]
    Score {
        /// The token.
        id: u32,
        /// Its score.
        score: f32,
    },
    /// A merge is not two tokens with a space between them.
    #[error("merge {index} is {merge:?}, expected two tokens with one space between")]
    MergeShape {
        /// Its place in the list.
        index: usize,
        /// The merge.
        merge: String,
    },
    /// A merge takes or makes a token that the vocabulary lacks.
    #[error("merge {index} ({merge:?}) needs token {token:?}, which the vocabulary lacks")]
    MergeToken {
        /// Its place in the list.
        index: usize,
        /// The merge.
        merge: String,
        /// The missing token.
        token: String,
    },
    /// A special token's id is outside the vocabulary.
    #[error("{name} is {id}, expected an id below {vocabulary}")]
    SpecialId {
        /// Which special token: `bos`, `eos` and so on.
        name: &'static str,
        /// Its id.
        id: u32,
        /// The size of the vocabulary.
        vocabulary: usize,
    },
    /// The model wants a special token around every prompt, and names none.
    #[error("the tokenizer adds {name} to every prompt but names no such token")]
    MissingSpecial {
        /// Which special token: `bos` or `eos`.
        name: &'static str,
    },
    /// The kind of tokenizer is unknown.
    #[error("tokenizer model is {found:?}, expected gpt2, llama or t5")]
    UnknownModel {
        /// What the file says.
        found: String,
    },
    /// The pre-tokenizer is unknown.
    #[error("pre-tokenizer is {found:?}, expected one of {known}")]
    UnknownPreTokenizer {
        /// What the file says.
        found: String,
        /// Every known name.
        known: String,
    },
    /// The tokenizer uses something that is not there yet.
    #[error("the tokenizer's {part} is {found}, expected {expected}")]
    Unsupported {
        /// The part: `decoder`, for one.
        part: &'static str,
        /// What the file says.
        found: String,
        /// What is understood.
        expected: &'static str,
    },
    /// Part of the tokenizer cannot be built.
    #[error("cannot build the tokenizer's {part}: {message}")]
    Build {
        /// Which part.
        part: &'static str,
        /// Why not.
        message: String,
    },
    /// A text cannot be encoded.
    #[error("cannot encode a text of {bytes} bytes: {message}")]
    Encode {
        /// The length of the text.
        bytes: usize,
        /// Why not.
        message: String,
    },
    /// A chat template does not parse.
    #[error("chat template, line {line}: {message}")]
    TemplateSyntax {
        /// The line, counted from 1; 0 when it is not known.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A chat template refused the conversation with `raise_exception`.
    #[error("the chat template refuses the conversation: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// A chat template failed while it ran.
    #[error("chat template failed on line {line}: {message}")]
    TemplateFailed {
        /// The line, counted from 1; 0 when it is not known.
        line: usize,
        /// What went wrong.
        message: String,
    },
    /// A conversation's last message is to be continued, and its end is not in the prompt.
    #[error(
        "the chat template does not write the end of the last message, which was to be continued"
    )]
    NotContinued,
    /// A chat template did more work or wrote more than any real one does.
    #[error("the chat template exceeds its limit of {limit} {unit}")]
    TemplateTooExpensive {
        /// The limit.
        limit: u64,
        /// What is limited: `instructions` or `bytes`.
        unit: &'static str,
    },
}
