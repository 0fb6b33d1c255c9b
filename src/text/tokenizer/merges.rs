//! Byte pair encoding of one word.
//!
//! Of all adjacent pairs that can be merged, the pair that is listed first is merged first,
//! and the leftmost of equal ones, until no pair is left.

use super::vocabulary::TokenIds;
use crate::text::TextError;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Maximum length of a word, in the tokens that it begins as: bytes or characters. Merging takes
/// about thirty bytes for each.
const MAX_WORD_TOKENS: usize = 3 << 19;

/// Words of up to this many tokens are searched in full for each merge. For longer words,
/// the candidate pairs are kept in a heap.
const SHORT: usize = 48;

/// Merge table, which maps each pair of tokens to its rank and to the token that it becomes.
#[derive(Debug)]
pub(super) struct Merges(HashMap<(u32, u32), (u32, u32), foldhash::fast::FixedState>);

impl Merges {
    /// Builds the table. Pairs with a lower rank are merged first.
    pub(super) fn new(pairs: HashMap<(u32, u32), (u32, u32)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    /// Reads a list of `"left right"` entries, with the highest priority first.
    ///
    /// # Errors
    /// Returns an error if an entry is not two tokens separated by one space, or if it
    /// needs a token that the vocabulary lacks.
    pub(super) fn read(
        vocabulary: &impl TokenIds,
        merges: &[impl AsRef<str>],
    ) -> Result<Self, TextError> {
        let mut pairs = HashMap::with_capacity(merges.len());
        for (index, merge) in merges.iter().enumerate() {
            let (left, right, joined) = split_merge(vocabulary, index, merge.as_ref())?;
            let rank = u32::try_from(index).map_err(|_| TextError::Build {
                part: "merges",
                message: format!("{} merges are too many to rank", merges.len()),
            })?;
            // If a merge is listed twice, the later position counts.
            pairs.insert((left, right), (rank, joined));
        }
        Ok(Self::new(pairs))
    }

    fn get(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        self.0.get(&(left, right)).copied()
    }
}

fn split_merge(
    vocabulary: &impl TokenIds,
    index: usize,
    merge: &str,
) -> Result<(u32, u32, u32), TextError> {
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
    let id = |text: &str| {
        vocabulary.id(text).ok_or_else(|| TextError::MergeToken {
            index,
            merge: merge.to_owned(),
            token: text.to_owned(),
        })
    };
    Ok((id(left)?, id(right)?, id(&format!("{left}{right}"))?))
}

/// Merges one word after another and reuses its buffer.
#[derive(Debug, Default)]
pub(super) struct Merger {
    short: Vec<u32>,
}

/// Token of a long word, as a node of a doubly linked list.
struct Symbol {
    id: u32,
    previous: u32,
    next: u32,
}

/// Sentinel: no neighbour. Also the id of a symbol that was merged into its left neighbour.
const NONE: u32 = u32::MAX;

impl Merger {
    /// Merges a word of at most `length` tokens and appends the resulting tokens to `ids`.
    /// `tokens` are the tokens of the single bytes or characters.
    ///
    /// # Errors
    /// Returns an error if the word is longer than [`MAX_WORD_TOKENS`].
    pub(super) fn merge(
        &mut self,
        merges: &Merges,
        tokens: impl Iterator<Item = u32>,
        length: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        if length > MAX_WORD_TOKENS {
            return Err(TextError::Encode {
                bytes: length,
                message: format!("a single word may have at most {MAX_WORD_TOKENS} bytes"),
            });
        }
        if length > SHORT {
            merge_long(merges, tokens, length, ids);
            return Ok(());
        }
        self.short.clear();
        self.short.extend(tokens);
        merge_short(merges, &mut self.short);
        ids.extend_from_slice(&self.short);
        Ok(())
    }
}

fn merge_short(merges: &Merges, word: &mut Vec<u32>) {
    loop {
        let mut first: Option<(u32, usize, u32)> = None;
        for (at, pair) in word.windows(2).enumerate() {
            if let Some((rank, id)) = merges.get(pair[0], pair[1])
                && first.is_none_or(|(least, ..)| rank < least)
            {
                first = Some((rank, at, id));
            }
        }
        let Some((_, at, id)) = first else { return };
        word[at] = id;
        word.remove(at + 1);
    }
}

fn merge_long(
    merges: &Merges,
    tokens: impl Iterator<Item = u32>,
    length: usize,
    ids: &mut Vec<u32>,
) {
    let mut symbols = Vec::with_capacity(length);
    for (at, id) in (0..).zip(tokens) {
        symbols.push(Symbol {
            id,
            previous: if at == 0 { NONE } else { at - 1 },
            next: at + 1,
        });
    }
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
    // The heap identifies a pair by its left symbol. The rank shows whether an entry is stale.
    let pairs = (0..).zip(symbols.windows(2));
    let pairs = pairs.filter_map(|(at, pair)| {
        let (rank, _) = merges.get(pair[0].id, pair[1].id)?;
        Some(Reverse((rank, at)))
    });
    let mut queue: BinaryHeap<Reverse<(u32, u32)>> = pairs.collect();
    while let Some(Reverse((rank, at))) = queue.pop() {
        let left = &symbols[at as usize];
        if left.id == NONE || left.next == NONE {
            continue;
        }
        let (previous, right_at) = (left.previous, left.next);
        let right = &symbols[right_at as usize];
        let Some((now, id)) = merges.get(left.id, right.id) else {
            continue;
        };
        if now != rank {
            continue;
        }
        let next = right.next;
        symbols[right_at as usize].id = NONE;
        symbols[at as usize].id = id;
        symbols[at as usize].next = next;
        if next != NONE {
            symbols[next as usize].previous = at;
            if let Some((rank, _)) = merges.get(id, symbols[next as usize].id) {
                queue.push(Reverse((rank, at)));
            }
        }
        if previous != NONE
            && let Some((rank, _)) = merges.get(symbols[previous as usize].id, id)
        {
            queue.push(Reverse((rank, previous)));
        }
    }
    let left = symbols.iter().filter(|symbol| symbol.id != NONE);
    ids.extend(left.map(|symbol| symbol.id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::Model;
    use tokenizers::models::bpe::{BPE, Vocab};

    /// Builds the same merges for both implementations, out of letters and of tokens from
    /// earlier merges.
    fn both(picks: &[(usize, usize)]) -> (Merges, BPE) {
        let mut texts: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let mut pairs = HashMap::new();
        let mut named = Vec::new();
        for &(left, right) in picks {
            let (left, right) = (left % texts.len(), right % texts.len());
            let joined = format!("{}{}", texts[left], texts[right]);
            let known = texts.iter().position(|text| *text == joined);
            let id = known.unwrap_or(texts.len());
            let pair = (left as u32, right as u32);
            if joined.len() > 40 || pairs.contains_key(&pair) {
                continue;
            }
            pairs.insert(pair, (named.len() as u32, id as u32));
            named.push((texts[left].clone(), texts[right].clone()));
            if known.is_none() {
                texts.push(joined);
            }
        }
        let vocabulary: Vocab = texts.into_iter().zip(0..).collect();
        let model = BPE::builder().vocab_and_merges(vocabulary, named);
        (Merges::new(pairs), model.build().unwrap())
    }

    fn plain(model: &BPE, word: &str) -> Vec<u32> {
        let tokens = model.tokenize(word).unwrap();
        tokens.iter().map(|token| token.id).collect()
    }

    fn letters(word: &str) -> impl Iterator<Item = u32> {
        word.bytes().map(|byte| u32::from(byte - b'a'))
    }

    fn long(merges: &Merges, word: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        merge_long(merges, letters(word), word.len(), &mut ids);
        ids
    }

    proptest! {
        #[test]
        fn words_are_merged_as_the_tokenizers_library_does(
            picks in proptest::collection::vec((0..60_usize, 0..60_usize), 0..60),
            words in proptest::collection::vec("[abc]{1,120}|a{1,200}|(ab){1,90}", 1..6),
        ) {
            let (merges, model) = both(&picks);
            let mut merger = Merger::default();
            for word in &words {
                let expected = plain(&model, word);
                prop_assert_eq!(&long(&merges, word), &expected, "{} in a heap", word);
                let mut short: Vec<u32> = letters(word).collect();
                merge_short(&merges, &mut short);
                prop_assert_eq!(&short, &expected, "{} searched through", word);
                let mut ids = vec![7];
                merger.merge(&merges, letters(word), word.len(), &mut ids).unwrap();
                prop_assert_eq!(&ids[1..], &expected[..]);
            }
        }
    }

    #[test]
    fn a_run_of_a_million_equal_letters_is_merged() {
        // Doubled five times: up to 32 letters per token.
        let (merges, _) = both(&[(0, 0), (3, 3), (4, 4), (5, 5), (6, 6)]);
        let ids = long(&merges, &"a".repeat(1_000_000));
        assert_eq!(ids, vec![7; 1_000_000 / 32]);
        let mut ids = Vec::new();
        let word = std::iter::repeat_n(0, MAX_WORD_TOKENS + 1);
        let refused = Merger::default().merge(&merges, word, MAX_WORD_TOKENS + 1, &mut ids);
        assert!(matches!(refused, Err(TextError::Encode { .. })));
    }
}
