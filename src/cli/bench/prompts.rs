//! Random prompts for a server. All differ, and the same seed gives the same ones.

use super::random::Random;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::ops::Range;

/// First token id of prompts. In most vocabularies, special tokens and single bytes come
/// before it, and text from here on.
const FIRST_ID: u64 = 100;

/// Syllables that random words consist of.
const SYLLABLES: [&str; 24] = [
    "ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su",
    "ta", "ve", "wi", "xo", "yu", "za", "bren", "stil", "mor",
];

/// Paths of the random number generators under one seed.
const SHARED: u64 = 1;
const OWN: u64 = 2;

/// The endpoint of the server that receives requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// /v1/completions, with a prompt of exactly --prompt random token ids.
    #[default]
    Completions,
    /// /v1/chat/completions, with a message of --prompt random words, which are more
    /// tokens.
    Chat,
}

impl Endpoint {
    /// Returns the endpoint's path on a server.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// Returns the endpoint's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

/// Generator of request bodies.
#[derive(Clone, Debug)]
pub struct Prompts {
    pub endpoint: Endpoint,
    pub model: String,
    /// Length of a prompt: tokens, or words of a message.
    pub length: usize,
    /// Length of the prefix that all prompts share, in the same unit.
    pub shared: usize,
    /// Number of tokens per answer.
    pub generate: usize,
    /// Upper bound of the token ids in prompts, exclusive.
    pub vocabulary: u64,
    pub seed: u64,
}

impl Prompts {
    /// Returns the body of request `number` of measurement `point`, as JSON.
    pub fn body(&self, point: u64, number: u64) -> Vec<u8> {
        let shared = Random::new(self.seed, &[SHARED]);
        let own = Random::new(self.seed, &[OWN, point, number]);
        let rest = self.length.saturating_sub(self.shared);
        let parts = [(shared, self.length - rest), (own, rest)];
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.generate,
            "temperature": 0,
            // Answers must have exactly the requested length.
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.endpoint {
            Endpoint::Completions => body["prompt"] = self.ids(parts),
            Endpoint::Chat => {
                body["messages"] = json!([{"role": "user", "content": words(parts)}]);
            }
        }
        body.to_string().into_bytes()
    }

    fn ids(&self, parts: [(Random, usize); 2]) -> Value {
        let Range { start, end } = self.id_range();
        let mut ids = Vec::with_capacity(self.length);
        for (mut random, count) in parts {
            ids.extend((0..count).map(|_| Value::from(start + random.below(end - start))));
        }
        Value::Array(ids)
    }

    /// Returns the range of token ids in prompts. For a small vocabulary, it starts at the
    /// middle instead of at `FIRST_ID`.
    fn id_range(&self) -> Range<u64> {
        FIRST_ID.min(self.vocabulary / 2)..self.vocabulary.max(1)
    }
}

fn words(parts: [(Random, usize); 2]) -> String {
    let mut text = String::new();
    for (mut random, count) in parts {
        for _ in 0..count {
            if !text.is_empty() {
                text.push(' ');
            }
            for _ in 0..2 {
                let which = random.below(SYLLABLES.len() as u64) as usize;
                text.push_str(SYLLABLES.get(which).unwrap_or(&"a"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(endpoint: Endpoint) -> Prompts {
        Prompts {
            endpoint,
            model: "m".to_owned(),
            length: 50,
            shared: 20,
            generate: 9,
            vocabulary: 1000,
            seed: 3,
        }
    }

    fn body(prompts: &Prompts, point: u64, number: u64) -> Value {
        serde_json::from_slice(&prompts.body(point, number)).unwrap()
    }

    fn ids(prompts: &Prompts, point: u64, number: u64) -> Vec<u64> {
        let body = body(prompts, point, number);
        let ids = body["prompt"].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap()).collect()
    }

    #[test]
    fn prompts_have_the_length_and_the_shared_beginning_asked_for_and_differ_after_it() {
        let prompts = prompts(Endpoint::Completions);
        let (one, two) = (ids(&prompts, 0, 0), ids(&prompts, 0, 1));
        assert_eq!((one.len(), two.len()), (50, 50));
        assert_eq!(one[..20], two[..20]);
        assert_ne!(one[20..], two[20..]);
        assert_ne!(one[20..], ids(&prompts, 1, 0)[20..]);
        assert_eq!(one, ids(&prompts, 0, 0));
        assert!(one.iter().all(|id| (100..1000).contains(id)), "{one:?}");
        let whole = body(&prompts, 0, 0);
        assert_eq!(whole["model"], "m");
        assert_eq!(whole["max_tokens"], 9);
        assert_eq!(whole["ignore_eos"], true);
        assert_eq!(whole["stream_options"]["include_usage"], true);
    }

    #[test]
    fn ids_stay_in_a_small_vocabulary() {
        let small = Prompts {
            vocabulary: 4,
            ..prompts(Endpoint::Completions)
        };
        assert!(ids(&small, 0, 0).iter().all(|&id| id < 4));
    }

    #[test]
    fn a_message_has_as_many_words_as_asked_for() {
        let prompts = prompts(Endpoint::Chat);
        let text = |number| {
            let body = body(&prompts, 0, number);
            assert_eq!(body["messages"][0]["role"], "user");
            let text = body["messages"][0]["content"].as_str().unwrap();
            text.split(' ').map(str::to_owned).collect::<Vec<_>>()
        };
        let (one, two) = (text(0), text(1));
        assert_eq!((one.len(), two.len()), (50, 50));
        assert_eq!(one[..20], two[..20]);
        assert_ne!(one[20..], two[20..]);
    }
}
