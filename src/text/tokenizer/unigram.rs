//! SentencePiece's unigram model, which splits a text into tokens in the most likely way.
//!
//! This is a Viterbi search over all possible splits (Kudo, 2018, "Subword
//! Regularization").

use super::sentencepiece::{Fallback, byte_ids, mergeable};
use super::vocabulary::{TokenKind, Vocabulary};

/// Amount by which the log probability of a character without a token is below that of the
/// rarest token.
const UNKNOWN_PENALTY: f64 = 10.0;

/// Tokens in byte order, with their log probabilities.
#[derive(Debug)]
pub(super) struct Unigram {
    /// Ids sorted by text, so that tokens with a common prefix are adjacent.
    sorted: Vec<u32>,
    scores: Vec<f32>,
    unknown_score: f64,
    byte_ids: Box<[Option<u32>; 256]>,
    unknown: Option<u32>,
}

/// Best way to reach a position in the text.
#[derive(Clone, Copy)]
struct Cut {
    score: f64,
    start: usize,
    token: Option<u32>,
}

impl Unigram {
    /// Builds the model. `scores` holds one finite number per token.
    pub(super) fn new(vocabulary: &Vocabulary, scores: Vec<f32>, unknown: Option<u32>) -> Self {
        let mut sorted: Vec<u32> = vocabulary
            .iter()
            .filter(|(_, text, _)| mergeable(vocabulary, text).is_some())
            .map(|(id, _, _)| id)
            .collect();
        sorted.sort_unstable_by_key(|&id| vocabulary.text(id));
        let lowest = vocabulary
            .iter()
            .filter(|(_, _, kind)| *kind == TokenKind::Normal)
            .filter_map(|(id, _, _)| scores.get(id as usize).copied())
            .fold(0.0, f32::min);
        Self {
            sorted,
            scores,
            unknown_score: f64::from(lowest) - UNKNOWN_PENALTY,
            byte_ids: byte_ids(vocabulary),
            unknown,
        }
    }

    /// Appends the tokens of `text`, in which spaces are already written as
    /// [`SPACE`](super::sentencepiece::SPACE).
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &str, ids: &mut Vec<u32>) {
        let unreached = Cut {
            score: f64::NEG_INFINITY,
            start: 0,
            token: None,
        };
        let mut best = vec![unreached; text.len() + 1];
        best[0].score = 0.0;
        for (start, character) in text.char_indices() {
            let here = best[start].score;
            let mut offer = |length: usize, score: f64, token: Option<u32>| {
                let end = &mut best[start + length];
                if here + score > end.score {
                    *end = Cut {
                        score: here + score,
                        start,
                        token,
                    };
                }
            };
            let mut character_known = false;
            self.prefixes(vocabulary, &text.as_bytes()[start..], |length, id| {
                character_known |= length == character.len_utf8();
                let score = match vocabulary.kind(id) {
                    TokenKind::UserDefined => 0.0,
                    _ => self.scores.get(id as usize).copied().map_or(0.0, f64::from),
                };
                offer(length, score, Some(id));
            });
            if !character_known {
                offer(character.len_utf8(), self.unknown_score, None);
            }
        }
        let mut cuts = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let cut = best[end];
            cuts.push((cut.start..end, cut.token));
            end = cut.start;
        }
        let mut writer = Fallback::new(&self.byte_ids, self.unknown);
        for (range, token) in cuts.into_iter().rev() {
            writer.write(token, &text[range], ids);
        }
    }

    /// Calls `found` with the length and id of every token that `text` begins with.
    fn prefixes(&self, vocabulary: &Vocabulary, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let mut range = &self.sorted[..];
        for (depth, &wanted) in text.iter().enumerate() {
            let byte = |id: &u32| {
                vocabulary
                    .text(*id)
                    .and_then(|t| t.as_bytes().get(depth))
                    .copied()
            };
            // Tokens that end before this byte sort first.
            let from = range.partition_point(|id| byte(id) < Some(wanted));
            let to = range.partition_point(|id| byte(id) <= Some(wanted));
            range = &range[from..to];
            let Some(&first) = range.first() else { return };
            if vocabulary
                .text(first)
                .is_some_and(|text| text.len() == depth + 1)
            {
                found(depth + 1, first);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(tokens: &[(&str, f32)], text: &str) -> Vec<u32> {
        let mut vocabulary = Vocabulary::default();
        vocabulary.push("<unk>", TokenKind::Unknown, b"").unwrap();
        for (token, _) in tokens {
            vocabulary
                .push(token, TokenKind::Normal, token.as_bytes())
                .unwrap();
        }
        let scores = [0.0]
            .into_iter()
            .chain(tokens.iter().map(|token| token.1))
            .collect();
        let mut ids = Vec::new();
        Unigram::new(&vocabulary, scores, Some(0)).encode(&vocabulary, text, &mut ids);
        ids
    }

    #[test]
    fn the_likeliest_cut_wins_over_the_longest_token() {
        let tokens = [
            ("a", -1.0),
            ("b", -1.0),
            ("ab", -5.0),
            ("bc", -1.0),
            ("c", -9.0),
        ];
        assert_eq!(encode(&tokens, "abc"), [1, 4]);
        assert_eq!(encode(&tokens, "ab"), [1, 2]);
    }

    #[test]
    fn a_run_of_unknown_characters_is_one_unknown_token() {
        let tokens = [("a", -1.0), ("é", -1.0)];
        assert_eq!(encode(&tokens, "a漢字aé?"), [1, 0, 1, 2, 0]);
        assert_eq!(encode(&tokens, ""), [0u32; 0]);
    }
}
