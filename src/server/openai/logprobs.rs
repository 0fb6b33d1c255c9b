//! The log probabilities of completions: OpenAI's four lists, and vLLM's `prompt_logprobs`.

use super::answer::TokenNames;
use crate::sampling::Token;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::collections::HashSet;

/// Four lists with one entry per token each.
#[derive(Default, Serialize)]
pub(crate) struct LogProbs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Alternatives>>,
    /// Number of characters before each token.
    text_offset: Vec<usize>,
}

/// The likeliest tokens at one position by name, including the chosen token.
///
/// Numbers stay `f32` until they are written. A client that looks up the chosen token's log
/// probability in this map compares digits, and a number that went through a JSON value would
/// have those of an `f64`.
#[derive(Clone, Debug, PartialEq)]
struct Alternatives(Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, logprob) in &self.0 {
            map.serialize_entry(name, logprob)?;
        }
        map.end()
    }
}

impl Alternatives {
    fn new(names: TokenNames<'_>, token: &Token) -> Self {
        let chosen = (token.id, token.logprob);
        let all = token.top.iter().copied().chain([chosen]);
        let mut seen = HashSet::new();
        let mut entries = Vec::with_capacity(token.top.len() + 1);
        for (id, logprob) in all {
            // If several tokens share a name, keep the first, which is the likeliest.
            let name = names.name(id);
            if seen.insert(name.clone()) {
                entries.push((name, logprob));
            }
        }
        Self(entries)
    }
}

impl LogProbs {
    /// Adds the first token of a prompt, which has no log probability because nothing comes
    /// before it. Returns the offset of the next token.
    pub fn push_first(&mut self, names: TokenNames<'_>, id: u32) -> usize {
        let text = names.name(id);
        let next = text.chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.text_offset.push(0);
        next
    }

    /// Adds a token that begins after `offset` characters. Returns the offset of the next
    /// token.
    pub fn push(&mut self, names: TokenNames<'_>, token: &Token, offset: usize) -> usize {
        let text = names.name(token.id);
        let next = offset + text.chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(Some(token.logprob));
        self.top_logprobs
            .push(Some(Alternatives::new(names, token)));
        self.text_offset.push(offset);
        next
    }

    /// Appends the tokens that come after these.
    pub fn append(&mut self, mut later: Self) {
        self.tokens.append(&mut later.tokens);
        self.token_logprobs.append(&mut later.token_logprobs);
        self.top_logprobs.append(&mut later.top_logprobs);
        self.text_offset.append(&mut later.text_offset);
    }
}

/// The log probabilities of a prompt in vLLM's form: null for the first token, then for each
/// token a map by token id that holds the token itself and the likeliest ones.
#[derive(Serialize)]
pub(crate) struct PromptLogProbs(Vec<Option<RankedTokens>>);

struct RankedTokens(Vec<(u32, RankedToken)>);

#[derive(Serialize)]
struct RankedToken {
    logprob: f32,
    /// Rank among all tokens by likelihood, from 1; null if it is below the reported ones.
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for RankedTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in &self.0 {
            map.serialize_entry(id, token)?;
        }
        map.end()
    }
}

impl PromptLogProbs {
    /// Creates the report for a prompt whose tokens after the first are `tokens`.
    pub fn new(names: TokenNames<'_>, tokens: &[Token]) -> Self {
        let each = tokens.iter().map(|token| {
            let ranked = |(place, &(id, logprob)): (usize, &(u32, f32))| {
                let entry = RankedToken {
                    logprob,
                    rank: Some(place + 1),
                    decoded_token: names.name(id),
                };
                (id, entry)
            };
            let mut entries: Vec<_> = token.top.iter().enumerate().map(ranked).collect();
            if !entries.iter().any(|(id, _)| *id == token.id) {
                let entry = RankedToken {
                    logprob: token.logprob,
                    rank: None,
                    decoded_token: names.name(token.id),
                };
                entries.insert(0, (token.id, entry));
            }
            Some(RankedTokens(entries))
        });
        Self(std::iter::once(None).chain(each).collect())
    }
}

/// Converts a log probability to the `f64` of a JSON value, such that it is written with the
/// digits of the `f32`.
pub(crate) fn f64_with_f32_digits(logprob: f32) -> f64 {
    logprob.to_string().parse().unwrap_or(f64::from(logprob))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NAMES: TokenNames<'static> = TokenNames {
        tokenizer: None,
        as_ids: false,
    };

    fn token(id: u32, logprob: f32, top: &[(u32, f32)]) -> Token {
        Token {
            id,
            logprob,
            top: top.to_vec(),
        }
    }

    #[test]
    fn alternatives_have_the_digits_of_the_chosen_token_and_contain_it() {
        let mut lists = LogProbs::default();
        // Numbers such as 0.1 have other digits once they are widened to f64.
        lists.push(NAMES, &token(5, -0.1, &[(5, -0.1), (6, -2.3)]), 0);
        lists.push(NAMES, &token(7, -3.7, &[(5, -0.3)]), 0);
        lists.push(NAMES, &token(8, -0.7, &[]), 0);
        let text = serde_json::to_string(&lists).unwrap();
        assert!(
            text.contains(r#""token_logprobs":[-0.1,-3.7,-0.7]"#),
            "{text}"
        );
        let expected = r#""top_logprobs":[{"token_id:5":-0.1,"token_id:6":-2.3},{"token_id:5":-0.3,"token_id:7":-3.7},{"token_id:8":-0.7}]"#;
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn a_scored_prompt_is_reported_as_vllm_reports_it() {
        let tokens = [
            token(5, -0.1, &[(5, -0.1), (6, -2.3)]),
            token(9, -9.1, &[(5, -0.3)]),
        ];
        let reported = serde_json::to_value(PromptLogProbs::new(NAMES, &tokens)).unwrap();
        assert_eq!(reported[0], json!(null));
        assert_eq!(reported[1]["5"]["rank"], 1);
        assert_eq!(reported[1]["6"]["decoded_token"], "token_id:6");
        assert_eq!(reported[2]["9"]["rank"], json!(null));
        assert_eq!(reported[2]["5"]["rank"], 1);
        assert_eq!(reported.as_array().unwrap().len(), 3);
    }

    #[test]
    fn a_number_of_a_json_value_keeps_its_digits() {
        for logprob in [-0.1f32, -3.7, 0.0, -1e-7, -123.456] {
            let number = json!(f64_with_f32_digits(logprob)).to_string();
            assert_eq!(number.parse::<f32>().unwrap(), logprob);
            assert!(number.len() <= 12, "{number}");
        }
    }
}
