//! Errors of tokenizers, chat templates and their inputs.

use std::path::PathBuf;
use thiserror::Error;

/// Error from building or using a tokenizer or chat template.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TextError {
    /// A tokenizer file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Underlying I/O error.
        source: std::io::Error,
    },
    /// A tokenizer file does not have the expected content.
    #[error("{} is {found}, expected {expected}", path.display())]
    File {
        /// Path of the file or folder.
        path: PathBuf,
        /// What was found.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A value in a GGUF file is missing or has the wrong type.
    #[error("metadata {key} is {found}, expected {expected}")]
    Metadata {
        /// Metadata key.
        key: &'static str,
        /// Type of the value, or `missing`.
        found: String,
        /// Expected type.
        expected: &'static str,
    },
    /// The vocabulary has no tokens.
    #[error("the tokenizer's vocabulary is empty, expected at least one token")]
    EmptyVocabulary,
    /// The vocabulary has more tokens than the limit.
    #[error("the vocabulary has {tokens} tokens, expected at most {limit}")]
    VocabularyTooLarge {
        /// Number of tokens, or the largest id plus one.
        tokens: usize,
        /// Maximum number of tokens.
        limit: usize,
    },
    /// A list that must have one entry per token has another length.
    #[error("tokenizer list {list} has {found} entries, expected {expected}, one per token")]
    LengthMismatch {
        /// Name of the list: `scores` or `token_types`.
        list: &'static str,
        /// Length of the list.
        found: usize,
        /// Number of tokens.
        expected: usize,
    },
    /// Two ids have the same text.
    #[error("tokens {first} and {second} are both {text:?}, expected unique tokens")]
    DuplicateToken {
        /// Text of both tokens.
        text: String,
        /// First id.
        first: u32,
        /// Second id.
        second: u32,
    },
    /// A token is longer than the limit.
    #[error("token {id} is {bytes} bytes long, expected at most {limit}")]
    TokenTooLong {
        /// Id of the token.
        id: u32,
        /// Length of the token, in bytes.
        bytes: usize,
        /// Maximum length, in bytes.
        limit: usize,
    },
    /// A token's type is not a known number.
    #[error("token {id} has type {found}, expected 1 to 6")]
    TokenType {
        /// Id of the token.
        id: u32,
        /// Type of the token.
        found: i32,
    },
    /// A token of type "byte" does not name a byte.
    #[error("byte token {id} is {text:?}, expected <0x00> to <0xFF>")]
    ByteToken {
        /// Id of the token.
        id: u32,
        /// Text of the token.
        text: String,
    },
    /// A score is infinite or not a number.
    #[error("token {id} has score {score}, expected a finite number")]
    Score {
        /// Id of the token.
        id: u32,
        /// Score of the token.
        score: f32,
    },
    /// A merge is not two tokens separated by one space.
    #[error("merge {index} is {merge:?}, expected two tokens separated by one space")]
    MergeShape {
        /// Index in the list of merges.
        index: usize,
        /// Text of the merge.
        merge: String,
    },
    /// A merge needs a token that the vocabulary lacks.
    #[error("merge {index} ({merge:?}) needs token {token:?}, which the vocabulary lacks")]
    MergeToken {
        /// Index in the list of merges.
        index: usize,
        /// Text of the merge.
        merge: String,
        /// Missing token.
        token: String,
    },
    /// A special token's id is outside the vocabulary.
    #[error("{name} is {id}, expected an id below {vocabulary}")]
    SpecialId {
        /// Kind of special token, such as `bos` or `eos`.
        name: &'static str,
        /// Id of the token.
        id: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// The tokenizer must add a special token to every prompt but does not define it.
    #[error("the tokenizer adds {name} to every prompt but defines no such token")]
    MissingSpecial {
        /// Kind of special token: `bos` or `eos`.
        name: &'static str,
    },
    /// The tokenizer model is unknown.
    #[error("tokenizer model is {found:?}, expected gpt2, llama, gemma4, t5 or bert")]
    UnknownModel {
        /// Model that the file names.
        found: String,
    },
    /// The pre-tokenizer is unknown.
    #[error("pre-tokenizer is {found:?}, expected one of {known}")]
    UnknownPreTokenizer {
        /// Pre-tokenizer that the file names.
        found: String,
        /// Names of all known pre-tokenizers.
        known: String,
    },
    /// The tokenizer uses a feature that is not supported.
    #[error("the tokenizer's {part} is {found}, expected {expected}")]
    Unsupported {
        /// Part of the tokenizer, such as `decoder`.
        part: &'static str,
        /// What the file specifies.
        found: String,
        /// What is supported.
        expected: &'static str,
    },
    /// A part of the tokenizer cannot be built.
    #[error("cannot build the tokenizer's {part}: {message}")]
    Build {
        /// Part that cannot be built.
        part: &'static str,
        /// Reason.
        message: String,
    },
    /// A text cannot be encoded.
    #[error("cannot encode a text of {bytes} bytes: {message}")]
    Encode {
        /// Length of the text, or of the word that is too long, in bytes.
        bytes: usize,
        /// Reason.
        message: String,
    },
    /// A chat template does not parse.
    #[error("chat template, line {line}: {message}")]
    TemplateSyntax {
        /// Line number, counted from 1; 0 if it is unknown.
        line: usize,
        /// Description of the error.
        message: String,
    },
    /// A chat template rejected the conversation with `raise_exception`.
    #[error("the chat template refuses the conversation: {message}")]
    TemplateRaised {
        /// Message from the template.
        message: String,
    },
    /// A chat template failed while it was rendered.
    #[error("chat template failed on line {line}: {message}")]
    TemplateFailed {
        /// Line number, counted from 1; 0 if it is unknown.
        line: usize,
        /// Description of the error.
        message: String,
    },
    /// The last message was to be continued, but there is none, or it has no text.
    #[error("the last message cannot be continued: it has no text")]
    NothingToContinue,
    /// The last message was to be continued, but its end does not appear in the prompt.
    #[error("the last message cannot be continued: the chat template does not write its end")]
    NotContinued,
    /// A chat template exceeded its limit on instructions or on output.
    #[error("the chat template exceeds its limit of {limit} {unit}")]
    TemplateTooExpensive {
        /// The limit.
        limit: u64,
        /// Unit of the limit: `instructions` or `bytes`.
        unit: &'static str,
    },
}
