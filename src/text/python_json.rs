//! JSON as Python's `json.dumps` writes it, which models saw when they were trained.

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io::{self, Write};

/// `json.dumps` without `indent`: a space after every comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        separate(writer, first)
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

fn separate<W: ?Sized + Write>(writer: &mut W, first: bool) -> io::Result<()> {
    if first {
        Ok(())
    } else {
        writer.write_all(b", ")
    }
}

/// Writes `value` on one line, or with `indent` spaces a level.
pub(super) fn dumps(value: &Value, indent: Option<usize>) -> Result<String, serde_json::Error> {
    let mut bytes = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, OneLine))?,
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
        }
    }
    String::from_utf8(bytes).map_err(serde::ser::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn spacing_and_order_are_pythons() {
        let value = json!({"z": [1, 2.5, null, true], "a": {"é<": "\"\n"}, "e": [], "o": {}});
        assert_eq!(
            dumps(&value, None).unwrap(),
            r#"{"z": [1, 2.5, null, true], "a": {"é<": "\"\n"}, "e": [], "o": {}}"#
        );
        assert_eq!(
            dumps(&json!({"a": [1, {}], "b": []}), Some(4)).unwrap(),
            "{\n    \"a\": [\n        1,\n        {}\n    ],\n    \"b\": []\n}"
        );
    }
}
