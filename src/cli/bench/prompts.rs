//! What is asked of a server: random prompts, each different, all repeated by a seed.

use super::random::Random;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::ops::Range;

/// Ids from here on are text in most vocabularies; special tokens and single bytes come
/// before.
const FIRST_ID: u64 = 100;

/// Words are made of these.
const SYLLABLES: [&str; 24] = [
    "ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su",
    "ta", "ve", "wi", "xo", "yu", "za", "bren", "stil", "mor",
];

/// What separates the generators of one seed.
const SHARED: u64 = 1;
const OWN: u64 = 2;

/// Which of the server's endpoints is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// /v1/completions, with a prompt of random token ids: exactly as many as asked for.
    #[default]
    Completions,
    /// /v1/chat/completions, with one message of random words: more tokens than words.
    Chat,
}

impl Endpoint {
    /// Where it is on a server.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// Its name among the arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

/// The bodies of requests.
#[derive(Clone, Debug)]
pub struct Prompts {
    pub endpoint: Endpoint,
    pub model: String,
    /// Tokens of a prompt, or words of a message.
    pub length: usize,
    /// Of these, how many all prompts begin with.
    pub shared: usize,
    /// Tokens of an answer.
    pub generate: usize,
    /// Prompts have ids below this one.
    pub vocabulary: u64,
    pub seed: u64,
}

impl Prompts {
    /// The body of request `number` of measurement `point`, as JSON.
    pub fn body(&self, point: u64, number: u64) -> Vec<u8> {
        let shared = Random::new(self.seed, &[SHARED]);
        let own = Random::new(self.seed, &[OWN, point, number]);
        let rest = self.length.saturating_sub(self.shared);
        let parts = [(shared, self.length - rest), (own, rest)];
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.generate,
            "temperature": 0,
            // Answers have the length that was asked for.
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

    /// A small vocabulary is used up to its middle downwards.
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
