//! Every field in the request schemas of OpenAI, vLLM and llama.cpp, and how this server treats
//! it. No known field that would change the answer is silently ignored.
//!
//! [`request_fields`] is the only list of them. `JsonBody::check_fields` uses it to refuse
//! requests, `docs/api-fields.md` is generated from it, and `tests/server/fields.rs` goes
//! through it.

use crate::server::error::ApiError;
use crate::server::http::body::JsonBody;
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

mod table;

pub use table::request_fields;

/// A route whose request body has fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/responses`
    Responses,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/rerank`
    Rerank,
    /// `/v1/score`
    Score,
    /// `/tokenize`
    Tokenize,
    /// `/detokenize`
    Detokenize,
}

impl Route {
    /// Every route.
    pub const ALL: [Self; 8] = [
        Self::Completions,
        Self::Chat,
        Self::Responses,
        Self::Embeddings,
        Self::Rerank,
        Self::Score,
        Self::Tokenize,
        Self::Detokenize,
    ];

    /// Returns the route's path.
    #[cfg(any(test, feature = "internals"))]
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
            Self::Responses => "/v1/responses",
            Self::Embeddings => "/v1/embeddings",
            Self::Rerank => "/v1/rerank",
            Self::Score => "/v1/score",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
        }
    }
}

/// How the server treats a field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The field has its documented effect.
    Honoured,
    /// A request with the field is refused with status 400, unless its value is null or one of
    /// these, which ask for nothing.
    Refused(&'static [Neutral]),
    /// The field is accepted with any value and has no effect: it is a hint that this server
    /// has no use for, or it belongs to another field that is refused.
    Accepted,
}

/// A value that asks for nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Neutral {
    /// `false`
    False,
    /// `true`
    True,
    /// This number.
    Number(f64),
    /// This string.
    Text(&'static str),
    /// A list of exactly these strings, which may be empty.
    List(&'static [&'static str]),
    /// `{}`
    EmptyObject,
}

/// A request field on some routes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestField {
    /// Name of the field. A nested field is written as `outer.inner`.
    pub name: &'static str,
    /// The routes that know the field.
    pub routes: &'static [Route],
    /// How these routes treat the field.
    pub verdict: Verdict,
    /// Further explanation; may be empty.
    pub note: &'static str,
}

impl RequestField {
    fn refuse(&self) -> ApiError {
        let (name, note) = (self.name, self.note);
        let problem = match note {
            "" => format!("{name} is not supported"),
            note => format!("{name} is not supported: {note}"),
        };
        ApiError::invalid(problem).param(name)
    }
}

impl fmt::Display for Neutral {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::False => formatter.write_str("false"),
            Self::True => formatter.write_str("true"),
            Self::Number(number) => write!(formatter, "{number}"),
            Self::Text(text) => write!(formatter, "{text:?}"),
            Self::List(texts) => write!(formatter, "{texts:?}"),
            Self::EmptyObject => formatter.write_str("{}"),
        }
    }
}

impl JsonBody {
    /// Refuses a body with a field that asks for something this server does not do. A body that
    /// is not an object passes, because parsing the request refuses it.
    pub fn check_fields(&self, route: Route) -> Result<(), ApiError> {
        let mut refused = None;
        let mut reader = serde_json::Deserializer::from_slice(self.bytes());
        let fields = Fields {
            route,
            within: None,
            refused: &mut refused,
        };
        // Invalid JSON only ends the reading early; parsing the request reports it.
        let _ = fields.deserialize(&mut reader);
        match refused {
            Some(field) => Err(field.refuse()),
            None => Ok(()),
        }
    }
}

/// The list by field name.
static INDEX: LazyLock<HashMap<&str, Vec<&RequestField>>> = LazyLock::new(|| {
    let mut index: HashMap<_, Vec<_>> = HashMap::new();
    for field in request_fields() {
        index.entry(field.name).or_default().push(field);
    }
    index
});

/// Fields that have known nested fields, and the routes on which they do.
static PARENTS: LazyLock<HashMap<&str, Vec<Route>>> = LazyLock::new(|| {
    let mut parents: HashMap<_, Vec<_>> = HashMap::new();
    for field in request_fields() {
        if let Some((outer, _)) = field.name.split_once('.') {
            parents.entry(outer).or_default().extend(field.routes);
        }
    }
    parents
});

/// Visits the fields of an object without keeping their values.
struct Fields<'a> {
    route: Route,
    /// The field whose value the object is, for a nested object.
    within: Option<&'a str>,
    /// The first field that must be refused.
    refused: &'a mut Option<&'static RequestField>,
}

impl Fields<'_> {
    /// Returns the entry for a field of this object.
    fn find(&self, name: &str) -> Option<&'static RequestField> {
        let entries = match self.within {
            // Names with a dot in the list are those of nested fields.
            None if name.contains('.') => None,
            None => INDEX.get(name),
            Some(outer) => INDEX.get(format!("{outer}.{name}").as_str()),
        };
        let mut entries = entries?.iter().copied();
        entries.find(|field| field.routes.contains(&self.route))
    }

    /// Returns whether this field has known nested fields.
    fn is_parent(&self, name: &str) -> bool {
        let routes = PARENTS.get(name).filter(|_| self.within.is_none());
        routes.is_some_and(|routes| routes.contains(&self.route))
    }
}

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if self.is_parent(&name) {
                let inner = Fields {
                    route: self.route,
                    within: Some(&name),
                    refused: self.refused,
                };
                map.next_value_seed(inner)?;
                continue;
            }
            match self.find(&name) {
                Some(field) => {
                    if let Verdict::Refused(neutral) = field.verdict
                        && !map.next_value_seed(IsNeutral(neutral))?
                    {
                        self.refused.get_or_insert(field);
                    } else if !matches!(field.verdict, Verdict::Refused(_)) {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

/// Reads whether a value is null or one of these.
struct IsNeutral(&'static [Neutral]);

impl IsNeutral {
    fn any(&self, is: impl FnMut(&Neutral) -> bool) -> bool {
        self.0.iter().any(is)
    }
}

impl<'de> DeserializeSeed<'de> for IsNeutral {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for IsNeutral {
    type Value = bool;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_none<E>(self) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_bool<E>(self, value: bool) -> Result<bool, E> {
        let wanted = if value { Neutral::True } else { Neutral::False };
        Ok(self.any(|neutral| *neutral == wanted))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<bool, E> {
        self.visit_f64(number as f64)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<bool, E> {
        self.visit_f64(number as f64)
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<bool, E> {
        Ok(self.any(|neutral| *neutral == Neutral::Number(number)))
    }

    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        Ok(self.any(|neutral| matches!(neutral, Neutral::Text(wanted) if *wanted == text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<bool, A::Error> {
        let lists = self.0.iter().filter_map(|neutral| match neutral {
            Neutral::List(texts) => Some(*texts),
            _ => None,
        });
        let mut possible: Vec<&[&str]> = lists.collect();
        let mut count = 0;
        while let Some(item) = items.next_element::<ListItem>()? {
            possible.retain(|texts| texts.get(count).is_some_and(|text| item.is(text)));
            count += 1;
        }
        Ok(possible.iter().any(|texts| texts.len() == count))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut empty = true;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            empty = false;
        }
        Ok(empty && self.any(|neutral| *neutral == Neutral::EmptyObject))
    }
}

/// An item of a list; only strings are kept.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum ListItem {
    Text(String),
    Other(IgnoredAny),
}

impl ListItem {
    fn is(&self, wanted: &str) -> bool {
        matches!(self, Self::Text(text) if text == wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fmt::Write;

    fn refused(route: Route, body: Value) -> Option<String> {
        let body = JsonBody::of(body.to_string());
        let refused = body.check_fields(route).err()?;
        refused.body.param
    }

    #[test]
    fn a_field_is_refused_unless_it_asks_for_nothing() {
        for (body, expected) in [
            (json!({}), None),
            (json!({"mirostat": 0, "unknown": {"mirostat": 2}}), None),
            (json!({"mirostat": 2}), Some("mirostat")),
            (json!({"mirostat": null, "mirostat_tau": 5.0}), None),
            (json!({"use_beam_search": false}), None),
            (json!({"use_beam_search": true}), Some("use_beam_search")),
            (json!({"use_beam_search": "no"}), Some("use_beam_search")),
            (json!({"modalities": ["text"]}), None),
            (json!({"modalities": ["text", "audio"]}), Some("modalities")),
            (json!({"modalities": [["text"]]}), Some("modalities")),
            (json!({"kv_transfer_params": {}}), None),
            (
                json!({"kv_transfer_params": {"a": 1}}),
                Some("kv_transfer_params"),
            ),
            (
                json!({"stream_options": {"include_obfuscation": false}}),
                None,
            ),
            (
                json!({"stream_options": {"include_obfuscation": true}}),
                Some("stream_options.include_obfuscation"),
            ),
            (
                json!({"stream_options": [1], "mirostat": 1}),
                Some("mirostat"),
            ),
            (json!([]), None),
            (json!("x"), None),
        ] {
            assert_eq!(
                refused(Route::Chat, body.clone()).as_deref(),
                expected,
                "{body}"
            );
        }
        // The field is not known on this route.
        assert_eq!(refused(Route::Detokenize, json!({"mirostat": 2})), None);
    }

    #[test]
    fn each_field_is_listed_once_for_a_route() {
        for route in Route::ALL {
            let of_route = request_fields()
                .iter()
                .filter(|field| field.routes.contains(&route));
            let mut names: Vec<_> = of_route.map(|field| field.name).collect();
            names.sort_unstable();
            let count = names.len();
            names.dedup();
            assert_eq!(names.len(), count, "{route:?}: {names:?}");
        }
    }

    fn document() -> String {
        let mut text = String::from(
            "# Request fields\n\n\
             Every field that the request schemas of OpenAI, vLLM and llama.cpp have, on the routes that know it.\n\n\
             - **honoured**: it has its documented effect.\n\
             - **refused**: a request with it is answered with status 400 and its name in `error.param`, unless its value is null \
             or one of the values given, which ask for nothing.\n\
             - **accepted**: it is a hint that this server has no use for, or belongs to another field that is refused.\n\n\
             Fields with other names are ignored.\n\n\
             This file is written from the list in `src/server/openai/fields/table.rs`: run \
             `QUELL_WRITE_DOCS=1 cargo test -p quell --lib fields` after changing it.\n",
        );
        for route in Route::ALL {
            let _ = write!(
                text,
                "\n## `{}`\n\n| Field | | Note |\n|---|---|---|\n",
                route.path()
            );
            for field in request_fields()
                .iter()
                .filter(|field| field.routes.contains(&route))
            {
                let verdict = match field.verdict {
                    Verdict::Honoured => "honoured".to_owned(),
                    Verdict::Accepted => "accepted".to_owned(),
                    Verdict::Refused([]) => "refused".to_owned(),
                    Verdict::Refused(neutral) => {
                        let values = neutral.iter().map(|value| format!("`{value}`"));
                        format!("refused unless {}", values.collect::<Vec<_>>().join(", "))
                    }
                };
                let _ = writeln!(text, "| `{}` | {verdict} | {} |", field.name, field.note);
            }
        }
        text
    }

    #[test]
    fn the_document_says_what_the_list_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api-fields.md");
        if std::env::var_os("QUELL_WRITE_DOCS").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap();
        assert!(
            written == document(),
            "docs/api-fields.md is out of date; run this test with QUELL_WRITE_DOCS=1 to rewrite it"
        );
    }
}
