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

/// How a special token is found, as a `tokenizer.json` says.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Search {
    /// Only between the tokens that are found at once.
    pub(super) late: bool,
    /// Absorbs the white space before it.
    pub(super) absorbs_before: bool,
    /// Absorbs the white space after it.
    pub(super) absorbs_after: bool,
}

#[derive(Debug)]
struct Finder {
    automaton: Option<AhoCorasick>,
    /// The tokens, in the order of the automaton's patterns.
    tokens: Vec<(u32, Search)>,
}

impl Finder {
    fn new(tokens: &[(u32, &str, Search)]) -> Result<Self, TextError> {
        let texts = tokens.iter().map(|(_, text, _)| text);
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|error| TextError::Build {
                part: "special tokens",
                message: error.to_string(),
            })?;
        Ok(Self {
            automaton: (!tokens.is_empty()).then_some(automaton),
            tokens: tokens
                .iter()
                .map(|(id, _, search)| (*id, *search))
                .collect(),
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
            let (id, search) = self.tokens[found.pattern().as_usize()];
            // White space that another token has absorbed may contain a token.
            let start = match search.absorbs_before {
                true => text[..found.start()].trim_end().len(),
                false => found.start(),
            };
            let end = match search.absorbs_after {
                true => text.len() - text[found.end()..].trim_start().len(),
                false => found.end(),
            };
            if done < start {
                fragments.push(Fragment::Text(&text[done..start]));
            }
            fragments.push(Fragment::Token(id));
            done = end;
        }
        if done < text.len() {
            fragments.push(Fragment::Text(&text[done..]));
        }
        fragments
    }
}

impl SpecialTokens {
    /// Prepares the special tokens of `vocabulary`. `search` says how each is found.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        search: impl Fn(u32) -> Search,
    ) -> Result<Self, TextError> {
        let stages = |wanted: fn(TokenKind) -> bool| -> Result<Stages, TextError> {
            let (second, first): (Vec<_>, Vec<_>) = vocabulary
                .iter()
                .filter(|(_, text, kind)| !text.is_empty() && wanted(*kind))
                .map(|(id, text, _)| (id, text, search(id)))
                .partition(|(_, _, search)| search.late);
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

    /// Returns whether some tokens absorb the white space next to them.
    pub(super) fn absorb_spaces(&self) -> bool {
        let finders = [&self.all.first, &self.all.second];
        let mut searches = finders.into_iter().flat_map(|finder| &finder.tokens);
        searches.any(|(_, search)| search.absorbs_before || search.absorbs_after)
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
