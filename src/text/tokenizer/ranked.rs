//! SentencePiece byte pair encoding by an order of merges, as `tokenizer.json` files describe it
//! for Llama 2, Mistral and Gemma. Characters without a token are written as bytes.

use super::merges::{Merger, Merges};
use super::sentencepiece::SPACE;
use super::vocabulary::TokenIds;
use crate::text::TextError;
use std::collections::{HashMap, HashSet};

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

/// Returns whether a character of a text is a space for the model.
fn is_space(character: char) -> bool {
    character == ' ' || SPACE.contains(character)
}

impl SpacePrefix {
    fn applies_to(self, text: &str, place: Place) -> bool {
        let spaced = text.starts_with(is_space);
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
    /// Characters that a token has before a space, such as `>` in Gemma's `>▁</`. A space after
    /// one of them does not begin a word, because the two may be merged.
    joined: HashSet<char>,
}

impl RankedBpe {
    /// Builds the model. See [`Merges::read`] for `merges`. Returns `None` if a byte has no token
    /// or if the merges cannot be read.
    pub(super) fn new(
        vocabulary: &impl TokenIds,
        merges: &[impl AsRef<str>],
        prefix: SpacePrefix,
        splits_spaces: bool,
    ) -> Option<Self> {
        let mut joined = HashSet::new();
        for merge in merges {
            let token = merge.as_ref().replacen(' ', "", 1);
            let words = token.trim_start_matches(SPACE);
            let parts = words.match_indices(SPACE).map(|(at, _)| &words[..at]);
            let before = parts.filter_map(|part| part.chars().next_back());
            joined.extend(before.filter(|character| !is_space(*character)));
        }
        let mut bytes = Box::new([0; 256]);
        for (byte, id) in bytes.iter_mut().enumerate() {
            *id = vocabulary.id(&format!("<0x{byte:02X}>"))?;
        }
        let characters = vocabulary.all().filter_map(|(id, text)| {
            let mut characters = text.chars();
            let only = characters.next()?;
            characters.next().is_none().then_some((only, id))
        });
        Some(Self {
            merges: Merges::read(vocabulary, merges).ok()?,
            characters: characters.collect(),
            bytes,
            prefix,
            splits_spaces,
            joined,
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
        let mut merger = Merger::default();
        let mut word = Vec::new();
        if !text.is_empty() && self.prefix.applies_to(text, place) {
            self.push_character(' ', &mut word);
        }
        let mut last = if word.is_empty() { None } else { Some(' ') };
        for character in text.chars() {
            let continues = |last: char| is_space(last) || self.joined.contains(&last);
            let begins = self.splits_spaces || !last.is_some_and(continues);
            if is_space(character) && begins && !word.is_empty() {
                let length = word.len();
                merger.merge(&self.merges, word.drain(..), length, ids)?;
            }
            self.push_character(character, &mut word);
            last = Some(character);
        }
        let length = word.len();
        merger.merge(&self.merges, word.into_iter(), length, ids)
    }

    /// Appends the token of a character, or those of its bytes if it has none.
    fn push_character(&self, character: char, word: &mut Vec<u32>) {
        let character = match character {
            ' ' => SPACE.chars().next().unwrap_or(' '),
            other => other,
        };
        match self.characters.get(&character) {
            Some(&id) => word.push(id),
            None => {
                let mut bytes = [0; 4];
                let bytes = character.encode_utf8(&mut bytes).bytes();
                word.extend(bytes.map(|byte| self.bytes[usize::from(byte)]));
            }
        }
    }
}
