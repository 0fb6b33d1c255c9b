//! Builds a tokenizer from an arbitrary description: it is rejected, or it encodes and decodes
//! any text.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use quell::internals::text::GgufVocabulary;
use quell::internals::text::fuzz::check_vocabulary;
use std::collections::HashSet;

/// A tokenizer description that is mostly consistent. One made of independent parts would
/// hardly ever pass the first checks.
#[derive(Arbitrary, Debug)]
struct Description {
    model: Model,
    pre: Pre,
    tokens: Vec<Token>,
    /// Merges in addition to those that [`Piece::Join`] creates.
    merges: Vec<String>,
    /// Skip duplicate tokens, and replace values that would contradict each other.
    consistent: bool,
    bos: Option<u16>,
    eos: Option<u16>,
    unk: Option<u16>,
    pad: Option<u16>,
    eot: Option<u16>,
    eom: Option<u16>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    add_space_prefix: Option<bool>,
    remove_extra_whitespaces: Option<bool>,
    chat_template: Option<String>,
    text: Vec<Text>,
    ids: Vec<u16>,
}

#[derive(Arbitrary, Debug)]
enum Model {
    Gpt2,
    Llama,
    T5,
    Other(String),
}

#[derive(Arbitrary, Debug)]
enum Pre {
    None,
    Named(u8),
    Other(String),
}

/// One pre-tokenizer of each kind.
const PRE: [&str; 12] = [
    "default",
    "gpt-2",
    "smollm",
    "llama-bpe",
    "dbrx",
    "qwen2",
    "qwen35",
    "tekken",
    "gpt-4o",
    "deepseek-llm",
    "deepseek-coder",
    "bloom",
];

#[derive(Arbitrary, Debug)]
struct Token {
    piece: Piece,
    kind: i8,
    score: f32,
}

#[derive(Arbitrary, Debug)]
enum Piece {
    /// `<0x00>` to `<0xFF>`.
    Byte(u8),
    /// One of the first 512 characters.
    Letter(u8, bool),
    /// Two earlier tokens, with the merge that joins them.
    Join(u16, u16),
    Special(u8),
    Other(String),
}

const SPECIALS: [&str; 8] = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
    "<|endoftext|>",
    "▁",
    "▁▁",
    " ",
];

/// Part of the text to encode.
#[derive(Arbitrary, Debug)]
enum Text {
    Token(u16),
    Letter(u8),
    Other(String),
}

impl Description {
    fn vocabulary(&self) -> GgufVocabulary {
        let mut vocabulary = GgufVocabulary {
            model: match &self.model {
                Model::Gpt2 => "gpt2".into(),
                Model::Llama => "llama".into(),
                Model::T5 => "t5".into(),
                Model::Other(name) => name.clone(),
            },
            pre: match &self.pre {
                Pre::None => None,
                Pre::Named(index) => Some(PRE[usize::from(*index) % PRE.len()].into()),
                Pre::Other(name) => Some(name.clone()),
            },
            merges: self.merges.clone(),
            add_bos: self.add_bos,
            add_eos: self.add_eos,
            add_space_prefix: self.add_space_prefix,
            remove_extra_whitespaces: self.remove_extra_whitespaces,
            chat_template: self.chat_template.clone(),
            ..GgufVocabulary::default()
        };
        let mut seen = HashSet::new();
        for token in &self.tokens {
            let (text, merge) = token.piece.text(&vocabulary.tokens);
            if self.consistent && !seen.insert(text.clone()) {
                continue;
            }
            vocabulary.merges.extend(merge);
            vocabulary.tokens.push(text);
            vocabulary.token_types.push(self.kind(token));
            vocabulary.scores.push(self.score(token));
        }
        let id = |id: Option<u16>| id.map(|id| self.id(id, vocabulary.tokens.len()));
        let ids = [self.bos, self.eos, self.unk, self.pad, self.eot, self.eom].map(id);
        [
            vocabulary.bos,
            vocabulary.eos,
            vocabulary.unk,
            vocabulary.pad,
            vocabulary.eot,
            vocabulary.eom,
        ] = ids;
        vocabulary
    }

    fn kind(&self, token: &Token) -> i32 {
        match token.piece {
            _ if !self.consistent => token.kind.into(),
            Piece::Byte(_) => 6,
            _ => i32::from(token.kind).rem_euclid(5) + 1,
        }
    }

    fn score(&self, token: &Token) -> f32 {
        if self.consistent && !token.score.is_finite() {
            return 0.0;
        }
        token.score
    }

    fn id(&self, id: u16, tokens: usize) -> u32 {
        if self.consistent {
            return u32::from(id) % tokens.max(1) as u32;
        }
        id.into()
    }

    fn text(&self, tokens: &[String]) -> String {
        let parts = self.text.iter().map(|part| match part {
            Text::Token(id) => pick(tokens, *id).to_owned(),
            Text::Letter(letter) => char::from(*letter).to_string(),
            Text::Other(text) => text.clone(),
        });
        parts.collect()
    }
}

impl Piece {
    /// Returns the token's text, and its merge if it has one.
    fn text(&self, tokens: &[String]) -> (String, Option<String>) {
        match self {
            Self::Byte(byte) => (format!("<0x{byte:02X}>"), None),
            Self::Letter(letter, high) => {
                let code = u32::from(*letter) + 256 * u32::from(*high);
                (
                    char::from_u32(code).map_or_else(String::new, String::from),
                    None,
                )
            }
            Self::Join(left, right) => {
                let (left, right) = (pick(tokens, *left), pick(tokens, *right));
                (format!("{left}{right}"), Some(format!("{left} {right}")))
            }
            Self::Special(index) => (SPECIALS[usize::from(*index) % SPECIALS.len()].into(), None),
            Self::Other(text) => (text.clone(), None),
        }
    }
}

fn pick(tokens: &[String], index: u16) -> &str {
    let index = usize::from(index) % tokens.len().max(1);
    tokens.get(index).map_or("", String::as_str)
}

fuzz_target!(|description: Description| {
    let vocabulary = description.vocabulary();
    let text = description.text(&vocabulary.tokens);
    let ids: Vec<u32> = description.ids.iter().map(|&id| id.into()).collect();
    let _ = check_vocabulary(vocabulary, &text, &ids);
});
