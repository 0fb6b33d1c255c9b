//! JSON as Python writes it, with `NaN`, `Infinity` and `-Infinity`, which standard JSON
//! does not have.

use serde::de::DeserializeOwned;

/// Python's number literals that are not valid JSON, longest first.
const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Parses JSON that may contain Python's non-finite numbers. They become strings, so that
/// code that needs a number there can name the value in its error, and unused ones do no
/// harm.
///
/// # Errors
/// Returns the error of the strict JSON parser, which says what is wrong and where.
pub fn from_python_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let strict = serde_json::from_slice(text);
    let (Err(error), Ok(text)) = (&strict, std::str::from_utf8(text)) else {
        return strict;
    };
    if error.is_io() || !NUMBERS.iter().any(|number| text.contains(number)) {
        return strict;
    }
    serde_json::from_str(&quoted(text)).or(strict)
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
    use serde_json::{Value, json};

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
