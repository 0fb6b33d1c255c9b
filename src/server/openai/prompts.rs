//! Reads one or more prompts, as text or token ids, without intermediate copies.

use crate::engine::Prompt;
use crate::server::error::ApiError;
use crate::server::http::body::integer;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use std::fmt;

/// Maximum number of prompts of one request.
const MAX_PROMPTS: usize = 2048;

const EXPECTED: &str = "a string, a list of strings, a list of token ids, or a list of such lists";

/// The prompts of a request. Token ids are read directly, never as JSON values, which take many
/// times as much memory.
#[derive(Debug)]
pub(crate) struct Prompts(Vec<Prompt>);

impl Prompts {
    /// Returns the prompts, of which there must be at least one. `field` names them in the
    /// error.
    pub fn into_vec(self, field: &'static str) -> Result<Vec<Prompt>, ApiError> {
        if self.0.is_empty() {
            return Err(ApiError::invalid(format!("{field} is an empty list")).param(field));
        }
        Ok(self.0)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        let mut prompts = Vec::new();
        match list.next_element::<Entry>()? {
            None => return Ok(Prompts(prompts)),
            Some(Entry::Token(first)) => {
                let mut tokens = vec![first];
                while let Some(Token(token)) = list.next_element()? {
                    tokens.push(token);
                }
                return Ok(Prompts(vec![tokens.into()]));
            }
            Some(Entry::Prompt(first)) => prompts.push(*first),
        }
        while let Some(entry) = list.next_element::<Entry>()? {
            let Entry::Prompt(prompt) = entry else {
                return Err(A::Error::custom(format!("expected {EXPECTED}")));
            };
            if prompts.len() == MAX_PROMPTS {
                let problem =
                    format!("there are more than {MAX_PROMPTS} entries, the accepted maximum");
                return Err(A::Error::custom(problem));
            }
            prompts.push(*prompt);
        }
        Ok(Prompts(prompts))
    }
}

/// One entry of a list.
enum Entry {
    Token(u32),
    Prompt(Box<Prompt>),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Entry, E> {
        Ok(Entry::Prompt(Box::new(Prompt::Text(text.to_owned()))))
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Entry, E> {
        token_id(id).map(Entry::Token)
    }

    fn visit_f64<E: Error>(self, id: f64) -> Result<Entry, E> {
        self.visit_u64(whole(id)?)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entry, A::Error> {
        let mut tokens = Vec::new();
        while let Some(Token(token)) = list.next_element()? {
            tokens.push(token);
        }
        Ok(Entry::Prompt(Box::new(tokens.into())))
    }
}

fn whole<E: Error>(number: f64) -> Result<u64, E> {
    let id = integer::of_float(number).and_then(|id| u64::try_from(id).ok());
    id.ok_or_else(|| E::custom(format!("{number} is not a token id, expected {EXPECTED}")))
}

/// One id in a list of token ids.
struct Token(u32);

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TokenVisitor)
    }
}

struct TokenVisitor;

impl Visitor<'_> for TokenVisitor {
    type Value = Token;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(EXPECTED)
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Token, E> {
        token_id(id).map(Token)
    }

    fn visit_f64<E: Error>(self, id: f64) -> Result<Token, E> {
        self.visit_u64(whole(id)?)
    }
}

fn token_id<E: Error>(id: u64) -> Result<u32, E> {
    u32::try_from(id).map_err(|_| E::custom(format!("{id} is not a token id, expected {EXPECTED}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(prompts: Value) -> Result<Vec<String>, String> {
        let text = json!({ "prompt": prompts }).to_string();
        #[derive(serde::Deserialize)]
        struct Body {
            prompt: Prompts,
        }
        let body: Body = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let prompts = body.prompt.into_vec("prompt");
        let prompts = prompts.map_err(|error| error.body.message)?;
        let each = prompts.into_iter().map(|prompt| match prompt {
            Prompt::Text(text) => text,
            Prompt::Tokens(tokens) => format!("{tokens:?}"),
            prompt => panic!("{prompt:?}"),
        });
        Ok(each.collect())
    }

    #[test]
    fn all_four_forms_are_read() {
        assert_eq!(read(json!("a\n")).unwrap(), ["a\n"]);
        assert_eq!(read(json!(["a", ""])).unwrap(), ["a", ""]);
        assert_eq!(read(json!([1, 2])).unwrap(), ["[1, 2]"]);
        assert_eq!(read(json!([1.0, 2.0])).unwrap(), ["[1, 2]"]);
        assert_eq!(
            read(json!([[1, 2], [], [3]])).unwrap(),
            ["[1, 2]", "[]", "[3]"]
        );
        assert_eq!(read(json!(["a", [3]])).unwrap(), ["a", "[3]"]);
        assert_eq!(
            read(json!(vec![[5]; MAX_PROMPTS])).unwrap().len(),
            MAX_PROMPTS
        );
    }

    #[test]
    fn invalid_prompts_are_refused_with_a_reason() {
        for (prompts, problem) in [
            (json!([]), "prompt is an empty list"),
            (json!(5), "a list of strings"),
            (json!(null), "a list of strings"),
            (json!({}), "a list of strings"),
            (json!([1, "a"]), "a list of strings"),
            (json!(["a", 1]), "a list of strings"),
            (json!([-1]), "a list of strings"),
            (json!([[1, 1.5]]), "a list of strings"),
            (json!([[[1]]]), "a list of strings"),
            (json!([1_u64 << 32]), "4294967296 is not a token id"),
            (json!(vec!["a"; MAX_PROMPTS + 1]), "more than 2048 entries"),
        ] {
            let error = read(prompts.clone()).unwrap_err();
            assert!(error.contains(problem), "{prompts}: {error}");
        }
    }
}
