//! SentencePiece byte pair encoding by scores, as used by Llama 2, Mistral and Gemma.
//!
//! Of all adjacent pairs that form a token, the pair with the best score is merged first,
//! and the leftmost of equal ones (Kudo and Richardson, 2018, "SentencePiece"). Characters
//! without a token are written as bytes.

use super::vocabulary::{TokenKind, Vocabulary};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Character that SentencePiece writes for a space.
pub(super) const SPACE: &str = "\u{2581}";

/// Scores of all tokens, and the tokens for single bytes.
#[derive(Debug)]
pub(super) struct ScoredBpe {
    scores: Vec<f32>,
    byte_ids: Box<[Option<u32>; 256]>,
    unknown: Option<u32>,
    longest: usize,
}

/// Part of the text that is one token, or one character without a token.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    /// Length in bytes; 0 once the symbol is merged into its left neighbour.
    length: usize,
    previous: usize,
    next: usize,
}

/// Sentinel: no neighbour.
const NONE: usize = usize::MAX;

/// Neighbours that could become one token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Combined length in bytes, which shows whether the entry is stale.
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl ScoredBpe {
    /// Builds the model. `scores` holds one finite number per token.
    pub(super) fn new(vocabulary: &Vocabulary, scores: Vec<f32>, unknown: Option<u32>) -> Self {
        let longest = vocabulary
            .iter()
            .map(|(_, text, _)| text.len())
            .max()
            .unwrap_or(0);
        Self {
            scores,
            byte_ids: byte_ids(vocabulary),
            unknown,
            longest,
        }
    }

    /// Returns whether every byte has a token, so that no run of text becomes one unknown
    /// token.
    pub(super) fn writes_every_byte(&self) -> bool {
        self.byte_ids.iter().all(Option::is_some)
    }

    /// Appends the tokens of `text`, in which spaces are written as [`SPACE`].
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &str, ids: &mut Vec<u32>) {
        let mut symbols = characters(text);
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.offer(vocabulary, text, &symbols, right - 1, right, &mut queue);
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            if left.length == 0 || right.length == 0 || left.length + right.length != pair.length {
                continue;
            }
            symbols[pair.left].length = pair.length;
            symbols[pair.left].next = right.next;
            symbols[pair.right].length = 0;
            if right.next != NONE {
                symbols[right.next].previous = pair.left;
                self.offer(
                    vocabulary, text, &symbols, pair.left, right.next, &mut queue,
                );
            }
            if left.previous != NONE {
                self.offer(
                    vocabulary,
                    text,
                    &symbols,
                    left.previous,
                    pair.left,
                    &mut queue,
                );
            }
        }
        let mut writer = Fallback::new(&self.byte_ids, self.unknown);
        for symbol in symbols.iter().filter(|symbol| symbol.length > 0) {
            let piece = &text[symbol.start..symbol.start + symbol.length];
            writer.write(mergeable(vocabulary, piece), piece, ids);
        }
    }

    /// Queues two neighbours if together they form a token.
    fn offer(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        queue: &mut BinaryHeap<Pair>,
    ) {
        let start = symbols[left].start;
        let length = symbols[left].length + symbols[right].length;
        if length > self.longest {
            return;
        }
        if let Some(id) = mergeable(vocabulary, &text[start..start + length]) {
            let score = self.scores.get(id as usize).copied().unwrap_or(0.0);
            queue.push(Pair {
                score,
                left,
                right,
                length,
            });
        }
    }
}

fn characters(text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = text
        .char_indices()
        .enumerate()
        .map(|(index, (start, character))| Symbol {
            start,
            length: character.len_utf8(),
            previous: index.checked_sub(1).unwrap_or(NONE),
            next: index + 1,
        })
        .collect();
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
    symbols
}

/// Returns the token called `text` if plain text may become it. Control tokens, the unknown
/// token and byte tokens are never made from their names.
pub(super) fn mergeable(vocabulary: &Vocabulary, text: &str) -> Option<u32> {
    let id = vocabulary.id(text)?;
    let plain = matches!(
        vocabulary.kind(id),
        TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused
    );
    plain.then_some(id)
}

/// Returns the token of each byte, if there is one.
pub(super) fn byte_ids(vocabulary: &Vocabulary) -> Box<[Option<u32>; 256]> {
    let mut ids = Box::new([None; 256]);
    for (id, _, kind) in vocabulary.iter() {
        if kind == TokenKind::Byte
            && let Some(&[byte]) = vocabulary.bytes(id)
        {
            ids[usize::from(byte)] = Some(id);
        }
    }
    ids
}

/// Writes tokens. Text without a token is written as bytes or, if a byte has no token, as
/// one unknown token per run.
pub(super) struct Fallback<'a> {
    byte_ids: &'a [Option<u32>; 256],
    unknown: Option<u32>,
    in_unknown: bool,
}

impl<'a> Fallback<'a> {
    pub(super) fn new(byte_ids: &'a [Option<u32>; 256], unknown: Option<u32>) -> Self {
        Self {
            byte_ids,
            unknown,
            in_unknown: false,
        }
    }

    pub(super) fn write(&mut self, token: Option<u32>, piece: &str, ids: &mut Vec<u32>) {
        if let Some(id) = token {
            ids.push(id);
            self.in_unknown = false;
            return;
        }
        let known = |byte: u8| self.byte_ids[usize::from(byte)];
        if piece.bytes().all(|byte| known(byte).is_some()) {
            ids.extend(piece.bytes().filter_map(known));
            self.in_unknown = false;
            return;
        }
        if !self.in_unknown {
            ids.extend(self.unknown);
        }
        self.in_unknown = true;
    }
}
