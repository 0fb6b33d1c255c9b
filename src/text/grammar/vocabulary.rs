//! Presents a tokenizer's vocabulary to llguidance, as a trie over the bytes of every token.

use crate::text::Tokenizer;
use crate::text::tokenizer::vocabulary::TokenKind;
use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use std::sync::{Arc, Weak};

/// Maximum length of a token in the trie, in bytes.
const LONGEST_TOKEN: usize = 1000;

/// Tokens of a tokenizer.
pub(super) struct Tokens {
    trie: TokTrie,
    /// Weak, because the tokenizer owns what is compiled for it.
    tokenizer: Weak<Tokenizer>,
    /// Whether it can tokenize the middle of a text exactly as the tokenizer's `encode` does.
    canonical: bool,
}

impl Tokens {
    /// Builds the trie of a tokenizer's tokens.
    ///
    /// # Panics
    /// Panics if the vocabulary has more than two million tokens, which do not fit in a trie.
    pub(super) fn new(tokenizer: &Arc<Tokenizer>) -> Self {
        let ids = 0..tokenizer.vocabulary_size() as u32;
        let words: Vec<Vec<u8>> = ids.map(|id| word(tokenizer, id)).collect();
        let ends = tokenizer.end_tokens();
        let first = ends.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(ends);
        }
        let probes = ["a", " b", "1", "\n", "{\"name\": \"x y\"}"];
        let canonical = probes
            .iter()
            .all(|text| exact(tokenizer, text).is_some_and(|tokens| !tokens.is_empty()));
        Self {
            trie,
            tokenizer: Arc::downgrade(tokenizer),
            canonical,
        }
    }
}

/// Returns the bytes of a token in the trie, or nothing for a token that no answer may contain.
///
/// A grammar can name a special token: its bytes begin with a marker that UTF-8 text never
/// contains.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let kind = tokenizer.vocabulary.kind(id);
    let bytes = match kind {
        TokenKind::Control | TokenKind::Unknown => {
            let name = tokenizer.token_text(id).unwrap_or_default();
            [&[MARK], name.as_bytes()].concat()
        }
        TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte => {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            // Text never contains the marker byte.
            match bytes.contains(&MARK) {
                true => Vec::new(),
                false => bytes.to_vec(),
            }
        }
        TokenKind::Unused | TokenKind::Absent => Vec::new(),
    };
    match bytes.len() <= LONGEST_TOKEN {
        true => bytes,
        false => Vec::new(),
    }
}

/// Tokenizes a text within an answer. Returns `None` unless the tokens represent exactly
/// this text.
fn exact(tokenizer: &Tokenizer, text: &str) -> Option<Vec<u32>> {
    let tokens = tokenizer.encode_inside(text).ok()?;
    let mut rest = text.as_bytes();
    for &token in &tokens {
        let plain = !tokenizer.is_special(token);
        let bytes = tokenizer.token_bytes(token).filter(|_| plain)?;
        rest = rest.strip_prefix(bytes)?;
    }
    rest.is_empty().then_some(tokens)
}

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let tokenizer = self.tokenizer.upgrade();
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let exact = tokenizer.as_ref().and_then(|own| exact(own, text));
            exact.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }

    /// Returns whether llguidance may choose the tokens of text that a grammar fully
    /// determines. If not, the model chooses them.
    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}
