//! JSON as Python writes it, with `NaN`, `Infinity` and `-Infinity`, which standard JSON
//! does not have, and as transformers 5 writes these numbers.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Python's number literals that are not valid JSON, longest first.
const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Key of the object that transformers 5 writes for a number that is not finite:
/// `{"__float__": "Infinity"}`.
const FLOAT: &str = "__float__";

/// Parses JSON that may contain Python's non-finite numbers. They become strings, so that
/// code that needs a number there can name the value in its error, and unused ones do no
/// harm.
///
/// # Errors
/// Returns the error of the strict JSON parser, which says what is wrong and where.
pub fn from_python_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let strict = serde_json::from_slice(text);
    let Ok(text) = std::str::from_utf8(text) else {
        return strict;
    };
    if !NUMBERS.iter().any(|number| text.contains(number)) {
        return strict;
    }
    if text.contains(FLOAT) {
        let value = serde_json::from_str(text).or_else(|_| serde_json::from_str(&quoted(text)));
        return match value {
            Ok(value) => serde_json::from_value(without_objects(value)),
            Err(_) => strict,
        };
    }
    match strict {
        Ok(value) => Ok(value),
        Err(error) => serde_json::from_str(&quoted(text)).map_err(|_| error),
    }
}

/// Returns the value with the strings in place of the objects with [`FLOAT`].
fn without_objects(value: Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(without_objects).collect(),
        Value::Object(mut fields) => {
            let is_alone = fields.len() == 1;
            match fields.get_mut(FLOAT) {
                Some(number @ Value::String(_)) if is_alone => number.take(),
                _ => {
                    let fields = fields.into_iter();
                    fields
                        .map(|(key, value)| (key, without_objects(value)))
                        .collect()
                }
            }
        }
        other => other,
    }
}

/// Returns the text with quotes around each of the [`NUMBERS`] outside of strings.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    let mut in_string = false;
    while let Some(next) = rest.chars().next() {
        let number = NUMBERS.iter().find(|number| rest.starts_with(**number));
        let taken = match (in_string, next, number) {
            (true, '\\', _) => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (_, '"', _) => {
                in_string = !in_string;
                1
            }
            (false, _, Some(number)) => {
                out.push('"');
                out.push_str(number);
                out.push('"');
                rest = &rest[number.len()..];
                continue;
            }
            _ => next.len_utf8(),
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pythons_numbers_are_read_outside_of_strings_only() {
        let text = r#"{"a": [NaN, -Infinity, Infinity, 1.5], "b\"NaN": "Infinity é\\", "c": -1}"#;
        let value: Value = from_python_json(text.as_bytes()).unwrap();
        let expected = json!({
            "a": ["NaN", "-Infinity", "Infinity", 1.5], "b\"NaN": "Infinity é\\", "c": -1,
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn numbers_of_transformers_are_read_in_any_depth() {
        let text = r#"{"a": [0.0, {"__float__": "Infinity"}], "b": {"c": {"__float__": "-Infinity"}},
            "d": {"__float__": 1, "e": {"__float__": "NaN", "f": 2}}, "g": NaN}"#;
        let value: Value = from_python_json(text.as_bytes()).unwrap();
        let expected = json!({
            "a": [0.0, "Infinity"], "b": {"c": "-Infinity"},
            "d": {"__float__": 1, "e": {"__float__": "NaN", "f": 2}}, "g": "NaN",
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn text_that_is_not_json_gives_the_strict_parsers_error() {
        for text in [
            "{\"a\": NaN",
            "nan",
            "Infinit",
            "{\"a\": Infinity8}",
            "",
            "\"NaN\\",
        ] {
            let found = from_python_json::<Value>(text.as_bytes()).unwrap_err();
            let expected = serde_json::from_str::<Value>(text).unwrap_err();
            assert_eq!(found.to_string(), expected.to_string(), "{text}");
        }
        assert!(from_python_json::<Value>(b"\xff NaN").is_err());
    }
}
