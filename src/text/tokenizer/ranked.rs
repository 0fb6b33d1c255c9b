//! SentencePiece byte pair encoding by an order of merges, as `tokenizer.json` files describe it
//! for Llama 2, Mistral and Gemma. Characters without a token are written as bytes.

use super::merges::{Merger, Merges};
use super::sentencepiece::SPACE;
use super::vocabulary::{TokenKind, Vocabulary};
use crate::text::TextError;
use std::collections::HashMap;

/// Where a text stands in the whole that is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At the beginning.
    Start,
    /// After a special token.
    AfterSpecial,
    /// It continues a text that was encoded before.
    Inside,
}

/// Where a space is added in front of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpacePrefix {
    /// Nowhere.
    Never,
    /// At the beginning, unless there is a space.
    First,
    /// At the beginning and after special tokens, unless there is a space.
    Each,
    /// At the beginning and after special tokens.
    Always,
}

impl SpacePrefix {
    fn applies_to(self, text: &str, place: Place) -> bool {
        let spaced = text.starts_with(SPACE);
        match self {
            Self::Never => false,
            Self::First => place == Place::Start && !spaced,
            Self::Each => place != Place::Inside && !spaced,
            Self::Always => place != Place::Inside,
        }
    }
}

/// The BPE model, and how it treats spaces.
#[derive(Debug)]
pub(super) struct RankedBpe {
    merges: Merges,
    /// Tokens of single characters.
    characters: HashMap<char, u32, foldhash::fast::FixedState>,
    /// Token of each byte.
    bytes: Box<[u32; 256]>,
    prefix: SpacePrefix,
    /// Whether every space begins a word, also after another space.
    splits_spaces: bool,
}

impl RankedBpe {
    /// Builds the model. See [`Merges::read`] for `merges`. Returns `None` if a byte has no token,
    /// or if a token contains a space after another character: words could not be merged one by
    /// one then.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        merges: &[impl AsRef<str>],
        prefix: SpacePrefix,
        splits_spaces: bool,
    ) -> Option<Self> {
        let crosses_words = |merge: &str| {
            let joined = merge.replacen(' ', "", 1);
            let words = joined.trim_start_matches(SPACE);
            words.contains(SPACE)
        };
        if merges.iter().any(|merge| crosses_words(merge.as_ref())) {
            return None;
        }
        let mut bytes = Box::new([0; 256]);
        for (byte, id) in bytes.iter_mut().enumerate() {
            *id = vocabulary.id(&format!("<0x{byte:02X}>"))?;
        }
        let characters = vocabulary.iter().filter_map(|(id, text, kind)| {
            let mut characters = text.chars();
            let only = characters.next()?;
            (characters.next().is_none() && kind == TokenKind::Normal).then_some((only, id))
        });
        Some(Self {
            merges: Merges::read(vocabulary, merges).ok()?,
            characters: characters.collect(),
            bytes,
            prefix,
            splits_spaces,
        })
    }

    /// Appends the tokens of `text` to `ids`.
    ///
    /// # Errors
    /// Returns an error if a word exceeds the length limit for merging.
    pub(super) fn encode(
        &self,
        text: &str,
        place: Place,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let mut spaced = text.replace(' ', SPACE);
        if self.prefix.applies_to(&spaced, place) && !text.is_empty() {
            spaced.insert_str(0, SPACE);
        }
        let mut merger = Merger::default();
        let mut tokens = Vec::new();
        let mut rest = spaced.as_str();
        while !rest.is_empty() {
            let word;
            (word, rest) = rest.split_at(self.word_length(rest));
            tokens.clear();
            for character in word.chars() {
                match self.characters.get(&character) {
                    Some(&id) => tokens.push(id),
                    None => {
                        let mut bytes = [0; 4];
                        let bytes = character.encode_utf8(&mut bytes).bytes();
                        tokens.extend(bytes.map(|byte| self.bytes[usize::from(byte)]));
                    }
                }
            }
            merger.merge(&self.merges, tokens.iter().copied(), word.len(), ids)?;
        }
        Ok(())
    }

    /// Returns the length of the first word in bytes: up to a space that follows another
    /// character, or up to any other space than the first character.
    fn word_length(&self, text: &str) -> usize {
        let spaces = match self.splits_spaces {
            true => text.strip_prefix(SPACE).unwrap_or(text),
            false => text.trim_start_matches(SPACE),
        };
        let before = text.len() - spaces.len();
        before + spaces.find(SPACE).unwrap_or(spaces.len())
    }
}
