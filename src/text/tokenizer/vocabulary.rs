//! Table of tokens: the text, the bytes and the kind of each id.

use crate::text::TextError;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

/// Maximum number of tokens in a vocabulary: eight times the largest known one.
pub(super) const MAX_TOKENS: usize = 1 << 21;

/// Maximum length of a token, in bytes. It bounds the work per byte of text.
pub(super) const MAX_TOKEN_BYTES: usize = 4096;

/// Kind of a token: those of `tokenizer.ggml.token_type`, and [`Absent`](Self::Absent).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::text) enum TokenKind {
    /// An ordinary piece of text.
    Normal,
    /// Stands for text that the vocabulary cannot represent.
    Unknown,
    /// Controls the model, for example by ending a turn; never made from plain text.
    Control,
    /// Added by the model's makers; found in text before anything else, and visible.
    UserDefined,
    /// In the vocabulary, but no longer used.
    Unused,
    /// One raw byte.
    Byte,
    /// An id without a token.
    Absent,
}

impl TokenKind {
    /// Returns whether the token is left out of text that is meant for people.
    pub(super) fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

#[derive(Clone, Debug)]
struct Token {
    text: Arc<str>,
    kind: TokenKind,
    /// Range of its bytes in the arena.
    start: u32,
    end: u32,
}

/// What a model of merges needs to know of a vocabulary.
pub(super) trait TokenIds {
    /// Returns the token with this text.
    fn id(&self, text: &str) -> Option<u32>;
    /// Iterates over all tokens that can be found by their text.
    fn all(&self) -> impl Iterator<Item = (u32, &str)>;
}

impl TokenIds for Vocabulary {
    fn id(&self, text: &str) -> Option<u32> {
        self.id(text)
    }

    fn all(&self) -> impl Iterator<Item = (u32, &str)> {
        let named = self.iter().filter(|(_, text, _)| !text.is_empty());
        named.map(|(id, text, _)| (id, text))
    }
}

/// The vocabulary of a `tokenizer.json`, without the added tokens.
impl TokenIds for HashMap<String, u32> {
    fn id(&self, text: &str) -> Option<u32> {
        self.get(text).copied()
    }

    fn all(&self) -> impl Iterator<Item = (u32, &str)> {
        self.iter().map(|(text, id)| (*id, text.as_str()))
    }
}

/// All tokens of a model, by id and by text.
#[derive(Debug, Default)]
pub(in crate::text) struct Vocabulary {
    tokens: Vec<Token>,
    ids: HashMap<Arc<str>, u32>,
    bytes: Vec<u8>,
    /// Length of the longest token, in bytes.
    longest: usize,
}

impl Vocabulary {
    /// Appends a token that represents `bytes`. A token that is absent or has an empty text
    /// gets an id, but cannot be found by its text.
    ///
    /// # Errors
    /// Returns an error if the text already exists or is too long, or if there are too many
    /// tokens.
    pub(super) fn push(
        &mut self,
        text: &str,
        kind: TokenKind,
        bytes: &[u8],
    ) -> Result<u32, TextError> {
        let id = self.next_id()?;
        let too_long = |bytes| TextError::TokenTooLong {
            id,
            bytes,
            limit: MAX_TOKEN_BYTES,
        };
        if text.len().max(bytes.len()) > MAX_TOKEN_BYTES {
            return Err(too_long(text.len().max(bytes.len())));
        }
        let start = self.arena_offset(id)?;
        let text: Arc<str> = Arc::from(text);
        if !text.is_empty() && kind != TokenKind::Absent {
            match self.ids.entry(text.clone()) {
                Entry::Vacant(place) => place.insert(id),
                Entry::Occupied(first) => {
                    return Err(TextError::DuplicateToken {
                        text: text.to_string(),
                        first: *first.get(),
                        second: id,
                    });
                }
            };
        }
        // The text of a token that is matched literally may be longer than its bytes.
        self.longest = self.longest.max(match kind {
            TokenKind::Normal | TokenKind::Byte => bytes.len(),
            _ => bytes.len().max(text.len()),
        });
        self.bytes.extend_from_slice(bytes);
        let end = self.arena_offset(id)?;
        self.tokens.push(Token {
            text,
            kind,
            start,
            end,
        });
        Ok(id)
    }

    fn next_id(&self) -> Result<u32, TextError> {
        let tokens = self.tokens.len() + 1;
        if tokens > MAX_TOKENS {
            return Err(TextError::VocabularyTooLarge {
                tokens,
                limit: MAX_TOKENS,
            });
        }
        u32::try_from(self.tokens.len()).map_err(|_| TextError::VocabularyTooLarge {
            tokens,
            limit: MAX_TOKENS,
        })
    }

    fn arena_offset(&self, id: u32) -> Result<u32, TextError> {
        u32::try_from(self.bytes.len()).map_err(|_| TextError::TokenTooLong {
            id,
            bytes: self.bytes.len(),
            limit: u32::MAX as usize,
        })
    }

    /// Returns the number of bytes of text that the longest token represents, at least 1.
    pub(super) fn longest(&self) -> usize {
        self.longest.max(1)
    }

    /// Returns the number of ids, including absent ones.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.known(id).map(|token| &*token.text)
    }

    pub(in crate::text) fn kind(&self, id: u32) -> TokenKind {
        self.known(id).map_or(TokenKind::Absent, |token| token.kind)
    }

    /// Returns the bytes that a token represents, or `None` for an id without a token.
    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.known(id)
            .and_then(|token| self.bytes.get(token.start as usize..token.end as usize))
    }

    pub(super) fn set_kind(&mut self, id: u32, kind: TokenKind) {
        if let Some(token) = self.tokens.get_mut(id as usize) {
            token.kind = kind;
        }
    }

    /// Iterates over all tokens that are not absent, as id, text and kind.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &str, TokenKind)> {
        (0u32..)
            .zip(&self.tokens)
            .filter(|(_, token)| token.kind != TokenKind::Absent)
            .map(|(id, token)| (id, &*token.text, token.kind))
    }

    fn known(&self, id: u32) -> Option<&Token> {
        self.tokens
            .get(id as usize)
            .filter(|token| token.kind != TokenKind::Absent)
    }
}
