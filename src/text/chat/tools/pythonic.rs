//! Tool calls in Python's syntax: `[name(key="value"), …]` as the whole answer, or between
//! Llama 4's marks.
//!
//! The arguments are Python literals, so a call is read as a whole and its arguments are
//! converted to JSON.

use super::scan::{Found, Marks};
use super::{Calls, Events, Step, ToolDeclaration};
use std::sync::Arc;

pub(super) const TAGS: &[&str] = &["<|python_start|>"];

pub(super) const CLOSES: &[&str] = &["<|python_end|>"];

/// Maximum nesting depth of lists and dictionaries.
const MAX_DEPTH: usize = 64;

/// Reads one list of calls.
#[derive(Debug)]
pub(super) struct PythonicCalls {
    /// Marks that may close the list.
    closes: &'static [&'static str],
    /// Known tools, if the calls have no mark. They are then calls only if they name one of
    /// them.
    bare: Option<Arc<[ToolDeclaration]>>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before the list.
    Start,
    /// In the list, before its first call.
    First,
    /// After a comma.
    Next,
    Call(Call),
    /// After a call.
    Between,
    /// After the list.
    After(Marks),
}

/// Text of one call.
#[derive(Debug, Default)]
struct Call {
    name: String,
    /// Text between its parentheses.
    arguments: String,
    /// Closing brackets that are expected.
    brackets: Vec<char>,
    quote: Option<char>,
    escaped: bool,
}

impl PythonicCalls {
    pub(super) fn new(
        closes: &'static [&'static str],
        bare: Option<Arc<[ToolDeclaration]>>,
    ) -> Self {
        Self {
            closes,
            bare,
            state: State::Start,
        }
    }
}

impl Calls for PythonicCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        match &mut self.state {
            State::Call(call) if call.named(c) && !known(self.bare.as_deref(), &call.name) => {
                return Step::NotCalls;
            }
            State::Call(call) => match call.push(c) {
                Some(false) => {}
                Some(true) => {
                    let Some(arguments) = arguments(&call.arguments) else {
                        return Step::NotCalls;
                    };
                    events.begin(&call.name);
                    events.arguments(&arguments);
                    events.end();
                    self.state = State::Between;
                }
                None => return Step::NotCalls,
            },
            State::After(marks) => match marks.push(c, self.closes) {
                Found::Part => {}
                Found::Mark(_) => return Step::End,
                Found::Wrong => return Step::NotCalls,
            },
            _ if c.is_whitespace() => {}
            State::Start if c == '[' => self.state = State::First,
            State::First | State::Next if c.is_ascii_alphabetic() || c == '_' => {
                self.state = State::Call(Call {
                    name: c.into(),
                    ..Call::default()
                });
            }
            State::Between if c == ',' => self.state = State::Next,
            State::Between | State::Next if c == ']' => {
                events.committed = true;
                self.state = State::After(Marks::default());
            }
            _ => return Step::NotCalls,
        }
        Step::More
    }

    fn framing(&self) -> bool {
        matches!(self.state, State::Next | State::Between | State::After(_))
    }
}

/// Returns whether `name` is one of `tools`. Every name is accepted if there are none.
fn known(tools: Option<&[ToolDeclaration]>, name: &str) -> bool {
    let tools = tools.unwrap_or_default();
    tools.is_empty() || tools.iter().any(|tool| tool.name == name)
}

impl Call {
    /// Returns whether `c` ends the name.
    fn named(&self, c: char) -> bool {
        self.brackets.is_empty() && c == '('
    }

    /// Processes a character. Returns true for the last one, and `None` if it is not
    /// allowed there.
    fn push(&mut self, c: char) -> Option<bool> {
        if self.brackets.is_empty() {
            match c {
                '(' => self.brackets.push(')'),
                c if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') => self.name.push(c),
                _ => return None,
            }
            return Some(false);
        }
        if let Some(quote) = self.quote {
            if self.escaped {
                self.escaped = false;
            } else if c == '\\' {
                self.escaped = true;
            } else if c == quote {
                self.quote = None;
            }
        } else {
            match c {
                '"' | '\'' => self.quote = Some(c),
                '(' => self.brackets.push(')'),
                '[' => self.brackets.push(']'),
                '{' => self.brackets.push('}'),
                ')' | ']' | '}' => {
                    if self.brackets.pop() != Some(c) {
                        return None;
                    }
                    if self.brackets.is_empty() {
                        return Some(true);
                    }
                }
                _ => {}
            }
        }
        self.arguments.push(c);
        Some(false)
    }
}

/// Converts keyword arguments to a JSON object. Returns `None` unless all are literals.
fn arguments(text: &str) -> Option<String> {
    let mut reader = Reader {
        rest: text,
        json: "{".to_owned(),
    };
    reader.skip_space();
    let mut first = true;
    while !reader.rest.is_empty() {
        reader.separate(&mut first);
        let name = reader.word();
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        reader.write_string(name);
        reader.expect('=')?;
        reader.json.push_str(": ");
        reader.value(0)?;
        if !reader.skip(',') && !reader.rest.is_empty() {
            return None;
        }
    }
    reader.json.push('}');
    Some(reader.json)
}

/// Converts a Python literal to JSON. Returns `None` if it is none.
pub(super) fn literal(text: &str) -> Option<String> {
    let mut reader = Reader {
        rest: text.trim(),
        json: String::new(),
    };
    reader.value(0)?;
    reader.rest.is_empty().then_some(reader.json)
}

/// Reads Python literals and writes them as JSON. Each method that reads also skips the
/// white space that follows.
struct Reader<'a> {
    rest: &'a str,
    json: String,
}

impl<'a> Reader<'a> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Skips `c` and the white space after it, if `c` comes next.
    fn skip(&mut self, c: char) -> bool {
        let Some(rest) = self.rest.strip_prefix(c) else {
            return false;
        };
        self.rest = rest.trim_start();
        true
    }

    fn expect(&mut self, c: char) -> Option<()> {
        self.skip(c).then_some(())
    }

    /// Reads a name, a number or a constant.
    fn word(&mut self) -> &'a str {
        let in_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '+' | '-');
        let end = self.rest.find(|c| !in_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        word
    }

    fn separate(&mut self, first: &mut bool) {
        if !std::mem::replace(first, false) {
            self.json.push_str(", ");
        }
    }

    fn write_string(&mut self, text: &str) {
        self.json
            .push_str(&serde_json::Value::from(text).to_string());
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.rest.chars().next()? {
            '"' | '\'' => {
                let text = self.string()?;
                self.write_string(&text);
                Some(())
            }
            '[' => self.list(']', depth),
            '(' => self.list(')', depth),
            '{' => self.dictionary(depth),
            _ => {
                let json = constant(self.word())?;
                self.json.push_str(&json);
                Some(())
            }
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Option<()> {
        self.skip('[');
        self.skip('(');
        self.json.push('[');
        let mut first = true;
        while !self.skip(close) {
            self.separate(&mut first);
            self.value(depth + 1)?;
            if !self.skip(',') {
                self.expect(close)?;
                break;
            }
        }
        self.json.push(']');
        Some(())
    }

    fn dictionary(&mut self, depth: usize) -> Option<()> {
        self.expect('{')?;
        self.json.push('{');
        let mut first = true;
        while !self.skip('}') {
            self.separate(&mut first);
            let key = self.string()?;
            self.write_string(&key);
            self.expect(':')?;
            self.json.push_str(": ");
            self.value(depth + 1)?;
            if !self.skip(',') {
                self.expect('}')?;
                break;
            }
        }
        self.json.push('}');
        Some(())
    }

    /// Reads one or more adjacent string literals, which Python concatenates.
    fn string(&mut self) -> Option<String> {
        let mut text = String::new();
        let mut any = false;
        while let Some(quote @ ('"' | '\'')) = self.rest.chars().next() {
            any = true;
            let mut chars = self.rest.chars();
            chars.next();
            loop {
                match chars.next()? {
                    c if c == quote => break,
                    '\\' => escape(&mut chars, &mut text)?,
                    c => text.push(c),
                }
            }
            self.rest = chars.as_str().trim_start();
        }
        any.then_some(text)
    }
}

/// Reads an escape sequence after its backslash.
fn escape(chars: &mut std::str::Chars<'_>, text: &mut String) -> Option<()> {
    let c = chars.next()?;
    let digits = match c {
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => 0,
    };
    if digits > 0 {
        let hex: String = chars.take(digits).collect();
        let code = u32::from_str_radix(&hex, 16).ok()?;
        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        return Some(());
    }
    match c {
        '\n' => {}
        'n' => text.push('\n'),
        't' => text.push('\t'),
        'r' => text.push('\r'),
        'a' => text.push('\u{7}'),
        'b' => text.push('\u{8}'),
        'f' => text.push('\u{c}'),
        'v' => text.push('\u{b}'),
        '0' => text.push('\0'),
        '\\' | '\'' | '"' => text.push(c),
        // Python leaves unknown escape sequences as they are.
        _ => text.extend(['\\', c]),
    }
    Some(())
}

/// Converts a number, a truth value or `None` to JSON.
fn constant(word: &str) -> Option<String> {
    let json = match word {
        "True" | "true" => "true".to_owned(),
        "False" | "false" => "false".to_owned(),
        "None" | "null" => "null".to_owned(),
        _ => {
            let digits = word.replace('_', "");
            if serde_json::from_str::<serde_json::Number>(&digits).is_ok() {
                digits
            } else {
                let number: f64 = digits.parse().ok()?;
                serde_json::Number::from_f64(number)?.to_string()
            }
        }
    };
    Some(json)
}
