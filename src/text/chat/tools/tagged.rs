//! Tool calls whose arguments stand one by one between tags, as in XML.
//!
//! The values of arguments are plain text, not JSON, so their types come from the schema of the
//! tool. A value of a tool that declares no type is JSON if it parses as such, and text otherwise.

use super::pythonic::literal;
use super::scan::{Found, Marks};
use super::{Calls, Events, Step, ToolDeclaration};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Maximum length of the name of a tool or of an argument, in bytes.
const MAX_NAME_BYTES: usize = 512;

/// Tags of a format, in the order in which a call has them. White space between them is ignored.
#[derive(Debug)]
pub(super) struct Tags {
    /// Before and after the name of the tool. If there is none after it, the name ends before
    /// white space or the next tag.
    pub name: [&'static str; 2],
    /// Before and after the name of an argument.
    pub key: [&'static str; 2],
    /// Before and after the value of an argument. The first may be empty.
    pub value: [&'static str; 2],
    /// Whether a line break next to a value belongs to its tag.
    pub own_lines: bool,
    /// After the arguments of one call. Empty if it is the same as `close`.
    pub call_close: &'static str,
    /// After all calls.
    pub close: &'static str,
}

/// `<tool_call><function=f><parameter=key>value</parameter></function></tool_call>`: Qwen 3 Coder,
/// Qwen 3.5, Nemotron 3. Models often leave the outer tags out.
pub(super) const QWEN_CODER: Tags = Tags {
    name: ["<function=", ">"],
    key: ["<parameter=", ">"],
    value: ["", "</parameter>"],
    own_lines: true,
    call_close: "</function>",
    close: "</tool_call>",
};
pub(super) const QWEN_CODER_TAGS: &[&str] = &["<tool_call>", "<function="];

/// The same tags within `<seed:tool_call>`: Seed-OSS.
pub(super) const SEED: Tags = Tags {
    own_lines: false,
    close: "</seed:tool_call>",
    ..QWEN_CODER
};
pub(super) const SEED_TAGS: &[&str] = &["<seed:tool_call>"];

/// `<minimax:tool_call><invoke name="f"><parameter name="key">value</parameter></invoke>…`:
/// MiniMax M2.
pub(super) const MINIMAX: Tags = Tags {
    name: ["<invoke name=\"", "\">"],
    key: ["<parameter name=\"", "\">"],
    value: ["", "</parameter>"],
    own_lines: false,
    call_close: "</invoke>",
    close: "</minimax:tool_call>",
};
pub(super) const MINIMAX_TAGS: &[&str] = &["<minimax:tool_call>"];

/// `<tool_call>f<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`: GLM 4.5 and later,
/// Ling 3.
pub(super) const GLM: Tags = Tags {
    name: ["", ""],
    key: ["<arg_key>", "</arg_key>"],
    value: ["<arg_value>", "</arg_value>"],
    own_lines: false,
    call_close: "",
    close: "</tool_call>",
};
pub(super) const GLM_TAGS: &[&str] = &["<tool_call>"];

/// Reads the calls after one tag.
#[derive(Debug)]
pub(super) struct TaggedCalls {
    tags: &'static Tags,
    tools: Arc<[ToolDeclaration]>,
    state: State,
    /// Name of the tool, once it is known.
    name: String,
    /// Number of arguments that have begun.
    arguments: usize,
}

#[derive(Debug)]
enum State {
    BeforeName(Marks),
    Name(String),
    /// Before an argument, or after the last one.
    BeforeKey(Marks),
    Key(String),
    BeforeValue(String, Marks),
    Value(ArgumentValue),
    /// After a call.
    Between(Marks),
}

impl TaggedCalls {
    /// Begins after `tag`, which may be part of the first call already.
    pub(super) fn after(tag: &str, tags: &'static Tags, tools: &Arc<[ToolDeclaration]>) -> Self {
        let named = tags.name[0].is_empty() || tag == tags.name[0];
        Self {
            tags,
            tools: Arc::clone(tools),
            state: match named {
                true => State::Name(String::new()),
                false => State::BeforeName(Marks::default()),
            },
            name: String::new(),
            arguments: 0,
        }
    }

    /// Announces the call, and returns what is expected after its name.
    fn named(&mut self, name: &str, events: &mut Events) -> Option<State> {
        let name = name.trim();
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return None;
        }
        events.begin(name);
        events.arguments("{");
        name.clone_into(&mut self.name);
        self.arguments = 0;
        Some(State::BeforeKey(Marks::default()))
    }

    fn begin_value(&mut self, key: &str, events: &mut Events) -> State {
        let tool = self.tools.iter().find(|tool| tool.name == self.name);
        let parameters = tool.and_then(|tool| tool.parameters.as_ref());
        let schema = parameters.and_then(|schema| schema.get("properties")?.get(key));
        let value = ArgumentValue::new(schema);
        let comma = if self.arguments > 0 { ", " } else { "" };
        self.arguments += 1;
        events.arguments(&format!("{comma}{}: ", Value::from(key)));
        if value.is_text() {
            events.arguments("\"");
        }
        State::Value(value)
    }

    /// Processes a character. Returns `None` if it is not allowed there.
    fn follow(&mut self, c: char, events: &mut Events) -> Option<Step> {
        let tags = self.tags;
        match &mut self.state {
            State::BeforeName(marks) => match marks.push(c, &[tags.name[0]]) {
                Found::Part => {}
                Found::Mark(_) => self.state = State::Name(String::new()),
                Found::Wrong => return None,
            },
            State::Name(name) if tags.name[1].is_empty() => {
                if name.trim_start().is_empty() || !(c.is_whitespace() || c == '<') {
                    name.push(c);
                    return (name.len() <= MAX_NAME_BYTES && c != '<').then_some(Step::More);
                }
                let name = std::mem::take(name);
                self.state = self.named(&name, events)?;
                return self.follow(c, events);
            }
            State::Name(name) => {
                name.push(c);
                if let Some(whole) = name.strip_suffix(tags.name[1]) {
                    let name = whole.to_owned();
                    self.state = self.named(&name, events)?;
                } else if name.len() > MAX_NAME_BYTES || c == '\n' {
                    return None;
                }
            }
            State::BeforeKey(marks) => {
                let mut expected = vec![tags.key[0], tags.close];
                if !tags.call_close.is_empty() {
                    expected.push(tags.call_close);
                }
                match marks.push(c, &expected) {
                    Found::Part => {}
                    Found::Mark(mark) if mark == tags.key[0] => {
                        self.state = State::Key(String::new());
                    }
                    Found::Mark(mark) => {
                        events.arguments("}");
                        events.end();
                        if mark == tags.close {
                            return Some(Step::End);
                        }
                        self.state = State::Between(Marks::default());
                    }
                    Found::Wrong => return broken(events),
                }
            }
            State::Key(key) => {
                key.push(c);
                if let Some(key) = key.strip_suffix(tags.key[1]) {
                    let key = key.trim().to_owned();
                    self.state = match tags.value[0].is_empty() {
                        true => self.begin_value(&key, events),
                        false => State::BeforeValue(key, Marks::default()),
                    };
                } else if key.len() > MAX_NAME_BYTES {
                    return broken(events);
                }
            }
            State::BeforeValue(key, marks) => match marks.push(c, &[tags.value[0]]) {
                Found::Part => {}
                Found::Mark(_) => {
                    let key = std::mem::take(key);
                    self.state = self.begin_value(&key, events);
                }
                Found::Wrong => return broken(events),
            },
            State::Value(value) => {
                events.committed = true;
                if value.push(c, tags, events) {
                    self.state = State::BeforeKey(Marks::default());
                }
            }
            State::Between(marks) => match marks.push(c, &[tags.close, tags.name[0]]) {
                Found::Part => {}
                Found::Mark(mark) if mark == tags.close => {
                    events.committed = true;
                    return Some(Step::End);
                }
                Found::Mark(_) => self.state = State::Name(String::new()),
                Found::Wrong => return None,
            },
        }
        Some(Step::More)
    }
}

/// Ends a call after which something else comes than a tag. That becomes text.
fn broken(events: &mut Events) -> Option<Step> {
    events.arguments("}");
    events.end();
    events.committed = false;
    None
}

impl Calls for TaggedCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        self.follow(c, events).unwrap_or(Step::NotCalls)
    }

    fn framing(&self) -> bool {
        !matches!(self.state, State::BeforeName(_) | State::Name(_))
    }
}

/// Types that a schema names, as in JSON Schema.
pub(super) type Types = BTreeSet<String>;

/// Returns the types that a schema allows, or `None` if it does not say.
pub(super) fn types(schema: &Value) -> Option<Types> {
    let list = |values: &[Value]| values.iter().map(json_type).map(str::to_owned).collect();
    if let Some(value) = schema.get("const") {
        return Some(list(std::slice::from_ref(value)));
    }
    if let Some(Value::Array(values)) = schema.get("enum") {
        return Some(list(values));
    }
    match schema.get("type") {
        Some(Value::String(name)) => return Some([name.clone()].into()),
        Some(Value::Array(names)) => {
            let names = names.iter().map(|name| name.as_str().map(str::to_owned));
            return names.collect();
        }
        _ => {}
    }
    let any = schema.get("anyOf").or_else(|| schema.get("oneOf"))?;
    let each = any.as_array()?.iter().map(types);
    Some(
        each.collect::<Option<Vec<Types>>>()?
            .into_iter()
            .flatten()
            .collect(),
    )
}

/// Returns the name of a value's type in JSON schemas.
pub fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The value of one argument.
#[derive(Debug)]
struct ArgumentValue {
    /// The types that it may have; `None` if they are not declared.
    types: Option<Types>,
    /// Text read so far, unless it is passed on at once.
    text: String,
    /// What may be the closing tag.
    held: String,
    begun: bool,
}

impl ArgumentValue {
    fn new(schema: Option<&Value>) -> Self {
        Self {
            types: schema.and_then(types),
            text: String::new(),
            held: String::new(),
            begun: false,
        }
    }

    /// Returns whether it can only be text, which is passed on as it arrives.
    fn is_text(&self) -> bool {
        let types = self.types.as_ref();
        types.is_some_and(|types| types.len() == 1 && types.contains("string"))
    }

    /// Processes a character. Returns whether it was the last one.
    fn push(&mut self, c: char, tags: &Tags, events: &mut Events) -> bool {
        let close = tags.value[1];
        if !std::mem::replace(&mut self.begun, true) && c == '\n' && tags.own_lines {
            return false;
        }
        self.held.push(c);
        loop {
            let line = self.held.strip_prefix('\n').filter(|_| tags.own_lines);
            if self.held == close || line == Some(close) {
                break;
            }
            let may_close = |text: &str| close.starts_with(text);
            if may_close(&self.held) || line.is_some_and(may_close) {
                return false;
            }
            let first = self.held.remove(0);
            match self.is_text() {
                true => events.arguments(&escaped(first)),
                false => self.text.push(first),
            }
        }
        match self.is_text() {
            true => events.arguments("\""),
            false => events.arguments(&self.json()),
        }
        true
    }

    /// Returns the value as JSON.
    fn json(&self) -> String {
        let text = self.text.trim();
        let parsed = match serde_json::from_str::<Value>(text) {
            Ok(value) => Some((text.to_owned(), value)),
            // Templates write the values of earlier calls as Python does.
            Err(_) if is_python(text) => literal(text).and_then(|json| {
                let value = serde_json::from_str(&json).ok()?;
                Some((json, value))
            }),
            Err(_) => None,
        };
        let allowed = |value: &Value| {
            let Some(types) = self.types.as_ref().filter(|types| types.contains("string")) else {
                return true;
            };
            let name = json_type(value);
            // Text in quotes is text with quotes.
            name != "string"
                && (types.contains(name) || name == "number" && types.contains("integer"))
        };
        match parsed {
            Some((json, value)) if allowed(&value) => json,
            _ => Value::from(&*self.text).to_string(),
        }
    }
}

/// Returns whether text may be a value of Python that JSON writes in another way.
fn is_python(text: &str) -> bool {
    matches!(text, "True" | "False" | "None") || text.starts_with(['[', '{', '('])
}

/// Returns a character as it stands in a JSON string.
fn escaped(c: char) -> String {
    let quoted = Value::from(String::from(c)).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}
