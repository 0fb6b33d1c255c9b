//! Byte-level byte pair encoding, as used by GPT-2, Llama 3, Qwen and SmolLM.
//!
//! Every byte is represented by a visible character, so that any text can be written as a
//! sequence of tokens (Radford et al., 2019, "Language Models are Unsupervised Multitask
//! Learners").

use super::merges::{Merger, Merges};
use super::pre_tokenizer::PreTokenizer;
use super::vocabulary::TokenIds;
use crate::text::TextError;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::LazyLock;
use unicode_normalization_alignments::UnicodeNormalization;

/// Character that represents each byte, by byte value: the byte itself if it is visible,
/// otherwise a character from U+0100 upwards.
static ALPHABET: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut hidden = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            return char::from(byte);
        }
        let character = char::from_u32(hidden).unwrap_or(char::REPLACEMENT_CHARACTER);
        hidden += 1;
        character
    })
});

/// Returns the characters that represent the bytes 0 to 255, in order.
pub(super) fn byte_characters() -> impl Iterator<Item = char> {
    ALPHABET.iter().copied()
}

fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => (ALPHABET[usize::from(byte)] == character).then_some(byte),
        Err(_) => match code - 0x100 {
            // Bytes without a visible character, in order: 0 to 32, 127 to 160, and 173.
            offset @ 0..=32 => u8::try_from(offset).ok(),
            offset @ 33..=66 => u8::try_from(offset - 33 + 127).ok(),
            67 => Some(0xAD),
            _ => None,
        },
    }
}

/// Returns the bytes that a byte-level token represents. If the token contains a character
/// outside the alphabet, returns the UTF-8 bytes of its text.
pub(super) fn token_bytes(text: &str) -> Vec<u8> {
    text.chars()
        .map(byte_of)
        .collect::<Option<_>>()
        .unwrap_or_else(|| text.as_bytes().to_vec())
}

/// Byte-level BPE model, which splits text into words and merges the bytes of each into tokens.
pub(super) struct ByteLevelBpe {
    pre_tokenizer: PreTokenizer,
    merges: Merges,
    /// Token of each byte, if the vocabulary has one.
    bytes: Box<[Option<u32>; 256]>,
    /// Words that are tokens themselves and are not merged. Empty unless the pre-tokenizer
    /// rule asks for them.
    whole_words: HashMap<Vec<u8>, u32>,
    /// Whether characters are composed first (Unicode's form C).
    composes: bool,
}

impl ByteLevelBpe {
    /// Builds the model. See [`Merges::read`] for `merges`.
    ///
    /// # Errors
    /// Returns an error if a merge is not one, or needs a token that the vocabulary lacks.
    pub(super) fn new(
        vocabulary: &impl TokenIds,
        merges: &[impl AsRef<str>],
        pre_tokenizer: PreTokenizer,
        composes: bool,
    ) -> Result<Self, TextError> {
        let token = |byte: usize| {
            let mut text = [0; 4];
            vocabulary.id(ALPHABET[byte].encode_utf8(&mut text))
        };
        let whole_words = match pre_tokenizer.whole_words {
            false => HashMap::new(),
            true => {
                let is_word = |text: &str| text.chars().all(|c| byte_of(c).is_some());
                vocabulary
                    .all()
                    .filter(|(_, text)| is_word(text))
                    .map(|(id, text)| (token_bytes(text), id))
                    .collect()
            }
        };
        Ok(Self {
            pre_tokenizer,
            merges: Merges::read(vocabulary, merges)?,
            bytes: Box::new(std::array::from_fn(token)),
            whole_words,
            composes,
        })
    }

    /// Returns a number of bytes of `text` that tokens represent at least. Bytes without a token
    /// are dropped: some vocabularies lack control characters. Composing may shorten any text.
    pub(super) fn represented_bytes(&self, text: &str) -> usize {
        if self.composes {
            return 0;
        }
        let has_token = |byte: &u8| self.bytes[usize::from(*byte)].is_some();
        text.as_bytes()
            .iter()
            .filter(|byte| has_token(byte))
            .count()
    }

    /// Appends the tokens of `text` to `ids`. Bytes without a token are dropped.
    ///
    /// # Errors
    /// Returns an error if a word exceeds the length limit for merging.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let text = match self.composes && !text.is_ascii() {
            true => Cow::Owned(text.nfc().map(|(character, _)| character).collect()),
            false => Cow::Borrowed(text),
        };
        let mut merger = Merger::default();
        self.pre_tokenizer.split(&text, &mut |word| {
            if let Some(&id) = self.whole_words.get(word.as_bytes()) {
                ids.push(id);
                return Ok(());
            }
            let tokens = word
                .bytes()
                .filter_map(|byte| self.bytes[usize::from(byte)]);
            merger.merge(&self.merges, tokens, word.len(), ids)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_visible_character() {
        for byte in 0..=255u8 {
            let character = ALPHABET[usize::from(byte)];
            assert!(!character.is_whitespace() && !character.is_control());
            assert_eq!(byte_of(character), Some(byte));
        }
        assert_eq!(ALPHABET[usize::from(b' ')], 'Ġ');
        assert_eq!(byte_of('漢'), None);
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn a_token_outside_the_alphabet_stands_for_its_text() {
        assert_eq!(token_bytes("Ġthe"), b" the");
        assert_eq!(token_bytes("a b"), b"a b");
    }
}
