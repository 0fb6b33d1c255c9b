//! Byte-level byte pair encoding, the kind of GPT-2, Llama 3, Qwen and SmolLM.
//!
//! Every byte is written as a visible character, so that any text can be a
//! sequence of tokens (Radford et al., 2019, "Language Models are Unsupervised
//! Multitask Learners").

use super::TextError;
use super::pre_tokenizer::PreTokenizer;
use super::vocabulary::Vocabulary;
use std::sync::LazyLock;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab};

/// The character that stands for each byte: itself where it is visible, and
/// one from U+0100 on where it is not.
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

fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => (ALPHABET[usize::from(byte)] == character).then_some(byte),
        Err(_) => match code - 0x100 {
            // The hidden bytes in order: 0 to 32, 127 to 160, and 173.
            offset @ 0..=32 => u8::try_from(offset).ok(),
            offset @ 33..=66 => u8::try_from(offset - 33 + 127).ok(),
            67 => Some(0xAD),
            _ => None,
        },
    }
}

/// The bytes that a byte-level token stands for. A token with a character
/// outside the alphabet stands for its own text.
pub(super) fn token_bytes(text: &str) -> Vec<u8> {
    text.chars()
        .map(byte_of)
        .collect::<Option<_>>()
        .unwrap_or_else(|| text.as_bytes().to_vec())
}

/// Merges bytes into tokens, word by word.
pub(super) struct ByteLevelBpe {
    model: BPE,
    pre_tokenizer: PreTokenizer,
}

impl ByteLevelBpe {
    /// Builds the merges `"left right"`, the first being done first.
    ///
    /// # Errors
    /// When a merge has not that shape, or takes or makes an unknown token.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        merges: &[String],
        pre_tokenizer: PreTokenizer,
    ) -> Result<Self, TextError> {
        let merges = merges
            .iter()
            .enumerate()
            .map(|(index, merge)| split_merge(vocabulary, index, merge))
            .collect::<Result<Vec<_>, _>>()?;
        let tokens: Vocab = vocabulary
            .iter()
            .filter(|(_, text, _)| !text.is_empty())
            .map(|(id, text, _)| (text.to_owned(), id))
            .collect();
        let model = BPE::builder()
            .vocab_and_merges(tokens, merges)
            .ignore_merges(pre_tokenizer.whole_words)
            .build()
            .map_err(|error| TextError::Build {
                part: "merges",
                message: error.to_string(),
            })?;
        Ok(Self {
            model,
            pre_tokenizer,
        })
    }

    /// Appends the tokens of `text`. A byte that no token stands for is left out.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let mut word = String::new();
        for piece in self.pre_tokenizer.split(text)? {
            word.clear();
            word.extend(piece.bytes().map(|byte| ALPHABET[usize::from(byte)]));
            let tokens = self
                .model
                .tokenize(&word)
                .map_err(|error| TextError::Encode {
                    bytes: text.len(),
                    message: error.to_string(),
                })?;
            ids.extend(tokens.iter().map(|token| token.id));
        }
        Ok(())
    }
}

fn split_merge(
    vocabulary: &Vocabulary,
    index: usize,
    merge: &str,
) -> Result<(String, String), TextError> {
    let (left, right) = match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            (left, right)
        }
        _ => {
            return Err(TextError::MergeShape {
                index,
                merge: merge.to_owned(),
            });
        }
    };
    let joined = format!("{left}{right}");
    if let Some(token) = [left, right, &joined]
        .into_iter()
        .find(|text| vocabulary.id(text).is_none())
    {
        return Err(TextError::MergeToken {
            index,
            merge: merge.to_owned(),
            token: token.to_owned(),
        });
    }
    Ok((left.to_owned(), right.to_owned()))
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
