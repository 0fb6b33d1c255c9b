//! JSON as Python's `json.dumps` writes it, which is the form that models saw in training.

use super::jinja::python::{failed, integer, items, number, pairs, type_name};
use minijinja::Error;
use minijinja::value::{Value, ValueKind};
use std::fmt::Write;

/// Maximum nesting depth of a value.
const MAX_DEPTH: usize = 256;

/// Arguments of `json.dumps`.
pub(super) struct Style {
    /// Text that indents each level. `None` writes everything on one line.
    pub(super) indent: Option<String>,
    /// Separator between items, and separator after a key.
    pub(super) separators: (String, String),
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            indent: None,
            separators: (", ".to_owned(), ": ".to_owned()),
            ensure_ascii: false,
            sort_keys: false,
        }
    }
}

/// Writes a value as JSON.
///
/// # Errors
/// Returns an error if the value is nested too deeply, or if part of it has no JSON form,
/// such as undefined or a function.
pub(super) fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut writer = Writer {
        style,
        out: String::new(),
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    style: &'a Style,
    out: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(failed("a value is nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(truth(value)),
            ValueKind::Number => self.out.push_str(&json_number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = items(value)?;
                self.out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.separate(index > 0, depth + 1);
                    self.value(item, depth + 1)?;
                }
                self.close(']', !items.is_empty(), depth);
            }
            ValueKind::Map => {
                let mut pairs = pairs(value)?;
                if self.style.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.out.push('{');
                for (index, (key, value)) in pairs.iter().enumerate() {
                    self.separate(index > 0, depth + 1);
                    self.key(key)?;
                    self.out.push_str(&self.style.separators.1);
                    self.value(value, depth + 1)?;
                }
                self.close('}', !pairs.is_empty(), depth);
            }
            _ => {
                let name = type_name(value);
                return Err(failed(format!(
                    "Object of type {name} is not JSON serializable"
                )));
            }
        }
        Ok(())
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None => self.string("null"),
            ValueKind::Bool => self.string(truth(key)),
            ValueKind::Number => self.string(&json_number(key)),
            _ => {
                let name = type_name(key);
                return Err(failed(format!("a key is a {name}, expected a string")));
            }
        }
        Ok(())
    }

    /// Writes what precedes an item: a separator if the item `follows` another, and a line
    /// break.
    fn separate(&mut self, follows: bool, depth: usize) {
        if follows {
            self.out.push_str(&self.style.separators.0);
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, filled: bool, depth: usize) {
        if filled {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    /// Starts a new line if the output is indented.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn truth(value: &Value) -> &'static str {
    if value.is_true() { "true" } else { "false" }
}

fn json_number(value: &Value) -> String {
    if integer(value).is_some() {
        return value.to_string();
    }
    match number(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        number => number.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn written(value: serde_json::Value, style: &Style) -> String {
        dumps(&Value::from_serialize(value), style).unwrap()
    }

    #[test]
    fn spacing_and_order_are_pythons() {
        let value = json!({"z": [1, 2.5, null, true], "a": {"é<": "\"\n"}, "e": [], "o": {}});
        assert_eq!(
            written(value, &Style::default()),
            r#"{"z": [1, 2.5, null, true], "a": {"é<": "\"\n"}, "e": [], "o": {}}"#
        );
        let style = Style {
            indent: Some("    ".to_owned()),
            separators: (",".to_owned(), ": ".to_owned()),
            ..Style::default()
        };
        assert_eq!(
            written(json!({"a": [1, {}], "b": []}), &style),
            "{\n    \"a\": [\n        1,\n        {}\n    ],\n    \"b\": []\n}"
        );
    }

    #[test]
    fn numbers_are_pythons() {
        let numbers = json!([
            1e-5,
            1e16,
            1e22,
            -0.0,
            1.0,
            0.1,
            1.5e300,
            123_456_789.0,
            1e15,
            0.0001,
            5e-324,
            u64::MAX,
            i64::MIN
        ]);
        assert_eq!(
            written(numbers, &Style::default()),
            "[1e-05, 1e+16, 1e+22, -0.0, 1.0, 0.1, 1.5e+300, 123456789.0, 1000000000000000.0, \
             0.0001, 5e-324, 18446744073709551615, -9223372036854775808]"
        );
        let odd = Value::from(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
        assert_eq!(
            dumps(&odd, &Style::default()).unwrap(),
            "[NaN, Infinity, -Infinity]"
        );
    }

    #[test]
    fn characters_are_escaped_as_asked() {
        let text = json!("\u{1}\u{7f}é\u{2028}🙂/\u{8}\u{c}");
        assert_eq!(
            written(text.clone(), &Style::default()),
            "\"\\u0001\u{7f}é\u{2028}🙂/\\b\\f\""
        );
        let style = Style {
            ensure_ascii: true,
            ..Style::default()
        };
        assert_eq!(
            written(text, &style),
            r#""\u0001\u007f\u00e9\u2028\ud83d\ude42/\b\f""#
        );
    }

    #[test]
    fn what_json_does_not_know_is_refused() {
        for value in [Value::UNDEFINED, Value::from_function(|| 1)] {
            let error = dumps(&Value::from(vec![value]), &Style::default()).unwrap_err();
            assert!(
                error.to_string().contains("not JSON serializable"),
                "{error}"
            );
        }
        let deep = (0..9999).fold(Value::from(1), |value, _| Value::from(vec![value]));
        assert!(dumps(&deep, &Style::default()).is_err());
        // Dropping it would recurse as deeply as it is nested.
        std::mem::forget(deep);
    }
}
