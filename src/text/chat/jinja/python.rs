//! Values as Python sees them: `str`, `repr`, numbers, iteration and tuples.

use minijinja::value::{Enumerator, Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::fmt::{self, Write};
use std::sync::{Arc, LazyLock};

/// Maximum nesting depth of lists and dicts that are printed.
const MAX_DEPTH: usize = 256;

/// Maximum number of items in a list that an expression may create.
const MAX_ITEMS: usize = 1 << 20;
/// Maximum length of a text that an expression may create, in bytes.
const MAX_TEXT: usize = 64 << 20;

/// Python's tuple, which minijinja lacks.
#[derive(Debug)]
pub(super) struct Tuple(Vec<Value>);

impl Tuple {
    pub(super) fn value(items: impl Into<Vec<Value>>) -> Value {
        Value::from_object(Self(items.into()))
    }

    pub(super) fn is(value: &Value) -> bool {
        value.downcast_object_ref::<Self>().is_some()
    }
}

impl Object for Tuple {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = Value::from_dyn_object(Arc::clone(self));
        f.write_str(&repr(&value).map_err(|_| fmt::Error)?)
    }
}

/// Creates the error for an operation that failed in a template.
pub(in super::super) fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Returns what Python's `str` returns for a value.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => repr(value),
    }
}

/// Returns what Python's `repr` returns for a value.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(value, &mut out, 0)?;
    Ok(out)
}

fn write_repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(failed("a value is nested too deeply to be printed"));
    }
    let list = |out: &mut String, open: char, close: &str| -> Result<(), Error> {
        out.push(open);
        for (index, item) in value.try_iter()?.enumerate() {
            if index > 0 {
                out.push_str(", ");
            }
            write_repr(&item, out, depth + 1)?;
            bounded(out.len())?;
        }
        out.push_str(close);
        Ok(())
    };
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq if Tuple::is(value) => {
            let close = if value.len() == Some(1) { ",)" } else { ")" };
            list(out, '(', close)?;
        }
        ValueKind::Seq | ValueKind::Iterable => list(out, '[', "]")?,
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(&key, out, depth + 1)?;
                out.push_str(": ");
                write_repr(&value.get_item(&key)?, out, depth + 1)?;
                bounded(out.len())?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Writes a string with the quotes and escapes that Python chooses.
fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            // Writing to a string cannot fail.
            c => drop(match u32::from(c) {
                code @ ..0x100 => write!(out, "\\x{code:02x}"),
                code @ ..0x1_0000 => write!(out, "\\u{code:04x}"),
                code => write!(out, "\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// Returns what `str.isprintable` says about a character. Characters of the Unicode
/// categories "other" and "separator" are not printable, except for the space.
pub(super) fn is_printable(c: char) -> bool {
    static HIDDEN: LazyLock<Option<fancy_regex::Regex>> =
        LazyLock::new(|| fancy_regex::Regex::new(r"[\p{C}\p{Z}]").ok());
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let text = c.encode_utf8(&mut [0; 4]).to_owned();
    !HIDDEN
        .as_ref()
        .is_some_and(|hidden| hidden.is_match(&text).unwrap_or(false))
}

/// Returns whether Python treats a character as white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Returns what Python's `repr` returns for a number.
pub(in super::super) fn number(value: &Value) -> String {
    match float(value) {
        Some(float) if !value.is_integer() => float_text(float),
        _ => value.to_string(),
    }
}

/// Returns the shortest digits that parse to `float` again, in Python's notation.
fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "nan".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = float.to_string();
        return match plain.contains('.') {
            true => plain,
            false => plain + ".0",
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Returns the value of an integer or bool as an integer.
pub(in super::super) fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// Returns the value of a number or bool as a float.
pub(super) fn float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone())
            .ok()
            .or_else(|| value.to_string().parse().ok()),
        _ => None,
    }
}

/// Converts an integer to a value, in the smallest type that holds it.
pub(super) fn integer_value(integer: i128) -> Value {
    i64::try_from(integer).map_or_else(|_| Value::from(integer), Value::from)
}

/// Returns what a `for` loop iterates over: the keys of a dict, the characters of a string.
pub(in super::super) fn items(value: &Value) -> Result<Vec<Value>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.chars().map(Value::from).collect());
    }
    match value.kind() {
        ValueKind::Undefined => Ok(Vec::new()),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                if items.len() == MAX_ITEMS {
                    return Err(failed(format!("a list has more than {MAX_ITEMS} items")));
                }
                items.push(item);
            }
            Ok(items)
        }
        _ => Err(failed(format!(
            "'{}' object is not iterable",
            type_name(value)
        ))),
    }
}

/// Returns the key-value pairs of a dict.
pub(in super::super) fn pairs(value: &Value) -> Result<Vec<(Value, Value)>, Error> {
    items(value)?
        .into_iter()
        .map(|key| Ok((key.clone(), value.get_item(&key)?)))
        .collect()
}

/// Returns an error if a text of `bytes` bytes is longer than [`MAX_TEXT`].
pub(super) fn bounded(bytes: usize) -> Result<(), Error> {
    match bytes > MAX_TEXT {
        true => Err(failed(format!("a text has more than {MAX_TEXT} bytes"))),
        false => Ok(()),
    }
}

/// Returns the name of a value's type in Python.
pub(in super::super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Bytes => "bytes",
        ValueKind::Seq if Tuple::is(value) => "tuple",
        ValueKind::Seq | ValueKind::Iterable => "list",
        ValueKind::Map => "dict",
        _ => "object",
    }
}
