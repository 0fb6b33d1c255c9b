//! Finds special tokens in text, so that the rest can be tokenized as plain text.

use super::vocabulary::{TokenKind, Vocabulary};
use crate::text::TextError;
use aho_corasick::{AhoCorasick, MatchKind};

/// Part of a text: plain text or a special token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fragment<'a> {
    /// Text to tokenize; never empty.
    Text(&'a str),
    /// Special token.
    Token(u32),
}

/// Special tokens of a vocabulary, prepared for searching.
///
/// If two tokens start at the same place, the longer one wins, as in Hugging Face's tokenizers.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// Control, unknown and user-defined tokens.
    all: Stages,
    /// User-defined tokens, which are recognized in plain text as well.
    plain: Stages,
}

/// Tokens that are found first, and tokens that are found in the text between those.
#[derive(Debug)]
struct Stages {
    first: Finder,
    second: Finder,
}

impl Stages {
    fn split<'a>(&self, text: &'a str) -> Vec<Fragment<'a>> {
        let fragments = self.first.split(text);
        if self.second.automaton.is_none() {
            return fragments;
        }
        let finer = fragments.into_iter().flat_map(|fragment| match fragment {
            Fragment::Text(text) => self.second.split(text),
            token => vec![token],
        });
        finer.collect()
    }
}

#[derive(Debug)]
struct Finder {
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Finder {
    fn new(tokens: &[(u32, &str)]) -> Result<Self, TextError> {
        let ids = tokens.iter().map(|(id, _)| *id).collect();
        if tokens.is_empty() {
            return Ok(Self {
                automaton: None,
                ids,
            });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, text)| text))
            .map_err(|error| TextError::Build {
                part: "special tokens",
                message: error.to_string(),
            })?;
        Ok(Self {
            automaton: Some(automaton),
            ids,
        })
    }

    fn split<'a>(&self, text: &'a str) -> Vec<Fragment<'a>> {
        let mut fragments = Vec::new();
        let mut done = 0;
        for found in self
            .automaton
            .iter()
            .flat_map(|automaton| automaton.find_iter(text))
        {
            if done < found.start() {
                fragments.push(Fragment::Text(&text[done..found.start()]));
            }
            fragments.push(Fragment::Token(self.ids[found.pattern().as_usize()]));
            done = found.end();
        }
        if done < text.len() {
            fragments.push(Fragment::Text(&text[done..]));
        }
        fragments
    }
}

impl SpecialTokens {
    /// Prepares the special tokens of `vocabulary`. Those that are `late` are only searched
    /// for between the others.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        late: impl Fn(u32) -> bool,
    ) -> Result<Self, TextError> {
        let stages = |wanted: fn(TokenKind) -> bool| -> Result<Stages, TextError> {
            let (second, first): (Vec<_>, Vec<_>) = vocabulary
                .iter()
                .filter(|(_, text, kind)| !text.is_empty() && wanted(*kind))
                .map(|(id, text, _)| (id, text))
                .partition(|(id, _)| late(*id));
            Ok(Stages {
                first: Finder::new(&first)?,
                second: Finder::new(&second)?,
            })
        };
        Ok(Self {
            all: stages(|kind| kind.is_special() || kind == TokenKind::UserDefined)?,
            plain: stages(|kind| kind == TokenKind::UserDefined)?,
        })
    }

    /// Splits `text` at special tokens. Without `parse_special`, splits at user-defined
    /// tokens only.
    pub(super) fn split<'a>(&self, text: &'a str, parse_special: bool) -> Vec<Fragment<'a>> {
        if parse_special {
            self.all.split(text)
        } else {
            self.plain.split(text)
        }
    }
}
