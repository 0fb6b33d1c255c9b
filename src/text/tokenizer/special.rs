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
    /// What is searched for in plain text instead: user-defined tokens only. If this is `None`,
    /// all are searched for, and what is no user-defined token is plain text then.
    plain: Option<Stages>,
}

/// A token to search for.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpecialToken<'a> {
    pub(super) id: u32,
    pub(super) text: &'a str,
    pub(super) search: Search,
}

/// Tokens that are found first, and tokens that are found in the text between those.
#[derive(Debug)]
struct Stages {
    first: Finder,
    second: Finder,
}

impl Stages {
    fn new(tokens: &[SpecialToken<'_>]) -> Result<Self, TextError> {
        let (second, first): (Vec<_>, Vec<_>) = tokens.iter().partition(|token| token.search.late);
        Ok(Self {
            first: Finder::new(&first)?,
            second: Finder::new(&second)?,
        })
    }

    fn split<'a>(&self, text: &'a str, parse_special: bool) -> Vec<Fragment<'a>> {
        let fragments = self.first.split(text, parse_special);
        if self.second.automaton.is_none() {
            return fragments;
        }
        let finer = fragments.into_iter().flat_map(|fragment| match fragment {
            Fragment::Text(text) => self.second.split(text, parse_special),
            token => vec![token],
        });
        finer.collect()
    }
}

/// How a token is searched for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Search {
    /// Only if special tokens are parsed; the token is plain text otherwise.
    pub(super) special: bool,
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
    fn new(tokens: &[SpecialToken<'_>]) -> Result<Self, TextError> {
        let texts = tokens.iter().map(|token| token.text);
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
                .map(|token| (token.id, token.search))
                .collect(),
        })
    }

    fn split<'a>(&self, text: &'a str, parse_special: bool) -> Vec<Fragment<'a>> {
        let mut fragments = Vec::new();
        let mut done = 0;
        for found in self
            .automaton
            .iter()
            .flat_map(|automaton| automaton.find_iter(text))
        {
            let (id, search) = self.tokens[found.pattern().as_usize()];
            if search.special && !parse_special {
                continue;
            }
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
    /// Prepares the special tokens of the vocabulary of a GGUF file. In plain text, only
    /// user-defined tokens are searched for, as in llama.cpp.
    pub(super) fn of(vocabulary: &Vocabulary) -> Result<Self, TextError> {
        let select = |wanted: fn(TokenKind) -> bool| -> Vec<SpecialToken<'_>> {
            let wanted = vocabulary
                .iter()
                .filter(|(_, text, kind)| !text.is_empty() && wanted(*kind));
            let token = |(id, text, kind): (u32, _, TokenKind)| SpecialToken {
                id,
                text,
                search: Search {
                    special: kind.is_special(),
                    ..Search::default()
                },
            };
            wanted.map(token).collect()
        };
        Ok(Self {
            all: Stages::new(&select(|kind| {
                kind.is_special() || kind == TokenKind::UserDefined
            }))?,
            plain: Some(Stages::new(&select(|kind| kind == TokenKind::UserDefined))?),
        })
    }

    /// Prepares the added tokens of a `tokenizer.json`. All of them are searched for in plain
    /// text, too, as the tokenizers library does: a special token hides the ones that it overlaps.
    pub(super) fn added(tokens: &[SpecialToken<'_>]) -> Result<Self, TextError> {
        Ok(Self {
            all: Stages::new(tokens)?,
            plain: None,
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
        match &self.plain {
            Some(plain) if !parse_special => plain.split(text, parse_special),
            _ => self.all.split(text, parse_special),
        }
    }
}
