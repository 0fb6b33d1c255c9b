//! Tool calls of Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>`.
//!
//! Keys have no quotes, and the quote is a token of its own, so that text needs no escapes. A call
//! is read as a whole.

use super::scan::{Found, Marks};
use super::{Calls, Events, Step};
use serde_json::Value;

pub(super) const TAGS: &[&str] = &["<|tool_call>"];

const CALL: &str = "call:";
const QUOTE: &str = "<|\"|>";
const CLOSE: &str = "<tool_call|>";

/// Maximum nesting depth of lists and objects.
const MAX_DEPTH: usize = 64;

/// Maximum length of the name of a tool, in bytes.
const MAX_NAME_BYTES: usize = 512;

/// Reads the call after the tag.
#[derive(Debug)]
pub(super) enum GemmaCalls {
    Before(Marks),
    Name(String),
    Arguments(RawObject),
    After(Marks),
}

impl Default for GemmaCalls {
    fn default() -> Self {
        Self::Before(Marks::default())
    }
}

/// Finds the end of an object.
#[derive(Debug, Default)]
pub(super) struct RawObject {
    name: String,
    text: String,
    /// Closing brackets that are expected.
    brackets: Vec<char>,
    quoted: bool,
}

impl RawObject {
    /// Processes a character. Returns whether it is the last one, and `None` if it is not allowed
    /// there.
    fn push(&mut self, c: char) -> Option<bool> {
        self.text.push(c);
        if self.text.ends_with(QUOTE) {
            self.quoted = !self.quoted;
        }
        if self.quoted {
            return Some(false);
        }
        match c {
            '{' => self.brackets.push('}'),
            '[' => self.brackets.push(']'),
            '}' | ']' if self.brackets.pop() != Some(c) => return None,
            _ => {}
        }
        Some(self.brackets.is_empty())
    }
}

impl Calls for GemmaCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        match self {
            Self::Before(marks) => match marks.push(c, &[CALL]) {
                Found::Part => {}
                Found::Mark(_) => *self = Self::Name(String::new()),
                Found::Wrong => return Step::NotCalls,
            },
            Self::Name(name) if c == '{' => {
                let mut object = RawObject {
                    name: name.trim().to_owned(),
                    ..RawObject::default()
                };
                if object.name.is_empty() || object.push(c).is_none() {
                    return Step::NotCalls;
                }
                *self = Self::Arguments(object);
            }
            Self::Name(name) => {
                name.push(c);
                let plain = c.is_ascii_alphanumeric() || "_-.:/ ".contains(c);
                if !plain || name.len() > MAX_NAME_BYTES {
                    return Step::NotCalls;
                }
            }
            Self::Arguments(object) => match object.push(c) {
                Some(false) => {}
                Some(true) => {
                    let mut json = String::new();
                    let Some("") = value(&object.text, 0, &mut json) else {
                        return Step::NotCalls;
                    };
                    events.begin(&object.name);
                    events.arguments(&json);
                    events.end();
                    *self = Self::After(Marks::default());
                }
                None => return Step::NotCalls,
            },
            Self::After(marks) => match marks.push(c, &[CLOSE]) {
                Found::Part => {}
                Found::Mark(_) => {
                    events.committed = true;
                    return Step::End;
                }
                Found::Wrong => return Step::NotCalls,
            },
        }
        Step::More
    }

    fn framing(&self) -> bool {
        matches!(self, Self::After(_))
    }
}

/// Reads the value at the beginning of `text`, appends it to `json`, and returns the text after
/// it.
fn value<'a>(text: &'a str, depth: usize, json: &mut String) -> Option<&'a str> {
    if depth > MAX_DEPTH {
        return None;
    }
    let text = text.trim_start();
    if let Some(text) = text.strip_prefix(QUOTE) {
        let (text, rest) = text.split_once(QUOTE)?;
        json.push_str(&Value::from(text).to_string());
        return Some(rest.trim_start());
    }
    if let Some(rest) = text.strip_prefix('{') {
        return items(rest, '}', json, |text, json| {
            let (key, rest) = key(text)?;
            json.push_str(&Value::from(key).to_string());
            json.push_str(": ");
            value(rest, depth + 1, json)
        });
    }
    if let Some(rest) = text.strip_prefix('[') {
        return items(rest, ']', json, |text, json| value(text, depth + 1, json));
    }
    let end = text.find([',', '}', ']']).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    let word = word.trim_end();
    match serde_json::from_str::<Value>(word) {
        Ok(_) => json.push_str(word),
        // The model may have left the quotes out.
        Err(_) if !word.is_empty() => json.push_str(&Value::from(word).to_string()),
        Err(_) => return None,
    }
    Some(rest)
}

/// Reads what is separated by commas up to `close`.
fn items<'a>(
    text: &'a str,
    close: char,
    json: &mut String,
    mut item: impl FnMut(&'a str, &mut String) -> Option<&'a str>,
) -> Option<&'a str> {
    json.push(if close == '}' { '{' } else { '[' });
    let mut rest = text.trim_start();
    let mut first = true;
    while !rest.starts_with(close) {
        if !first {
            rest = rest.strip_prefix(',')?.trim_start();
            json.push_str(", ");
        }
        first = false;
        rest = item(rest, json)?.trim_start();
    }
    json.push(close);
    Some(rest[1..].trim_start())
}

/// Reads a key with its colon, and returns the text after it.
fn key(text: &str) -> Option<(&str, &str)> {
    match text.strip_prefix(QUOTE) {
        Some(text) => {
            let (key, rest) = text.split_once(QUOTE)?;
            Some((key, rest.trim_start().strip_prefix(':')?))
        }
        None => {
            let (key, rest) = text.split_once(':')?;
            let key = key.trim();
            let plain = !key.is_empty() && !key.contains(['{', '}', '[', ']', ',']);
            plain.then_some((key, rest))
        }
    }
}
