//! Reads tool calls written in JSON, one character at a time.
//!
//! Brackets and strings are tracked exactly, because they determine where a call ends.
//! Numbers and words are not validated.

use super::scan::{Found, Marks};
use super::{Calls, Events, Step, ToolDeclaration};
use std::sync::Arc;

/// Role of a character in a JSON value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JsonChar {
    /// Part of the value.
    Inside,
    /// Last character of the value.
    Last,
    /// First character after the value, which was a number or a word.
    After,
    /// Not allowed in JSON.
    Invalid,
}

/// Finds the end of one JSON value.
#[derive(Debug, Default)]
pub(super) struct Value {
    /// Closing brackets that are expected.
    brackets: Vec<char>,
    string: bool,
    escaped: bool,
    scalar: bool,
}

impl Value {
    /// Starts with the value's first character. Returns `None` if no value begins with it.
    pub(super) fn begin(c: char) -> Option<Self> {
        let mut value = Self::default();
        match c {
            '{' | '[' => value.open(c),
            '"' => value.string = true,
            '-' => value.scalar = true,
            c if c.is_ascii_alphanumeric() => value.scalar = true,
            _ => return None,
        }
        Some(value)
    }

    /// Returns whether the value is an object or a list.
    pub(super) fn nests(&self) -> bool {
        !self.brackets.is_empty()
    }

    fn open(&mut self, c: char) {
        self.brackets.push(if c == '{' { '}' } else { ']' });
    }

    fn ended(&self) -> JsonChar {
        if self.brackets.is_empty() {
            JsonChar::Last
        } else {
            JsonChar::Inside
        }
    }

    /// Processes a character after the first.
    pub(super) fn push(&mut self, c: char) -> JsonChar {
        if self.string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.string = false;
                    return self.ended();
                }
                _ => {}
            }
            return JsonChar::Inside;
        }
        let word = c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        if self.scalar {
            return if word {
                JsonChar::Inside
            } else {
                JsonChar::After
            };
        }
        match c {
            '"' => self.string = true,
            '{' | '[' => self.open(c),
            '}' | ']' if self.brackets.pop() == Some(c) => return self.ended(),
            ',' | ':' => {}
            c if word || c.is_whitespace() => {}
            _ => return JsonChar::Invalid,
        }
        JsonChar::Inside
    }
}

/// The arguments of a call whose name is known: one JSON object.
#[derive(Debug, Default)]
pub(super) struct RawArguments {
    value: Option<Value>,
}

impl RawArguments {
    /// Processes a character. Returns [`Step::End`] for the last one of the object.
    pub(super) fn push(&mut self, c: char, events: &mut Events) -> Step {
        let follow = match &mut self.value {
            Some(value) => value.push(c),
            None if c == '{' => {
                self.value = Value::begin(c);
                JsonChar::Inside
            }
            None => JsonChar::Invalid,
        };
        match follow {
            JsonChar::Inside => {
                events.arguments(c.encode_utf8(&mut [0; 4]));
                Step::More
            }
            JsonChar::Last => {
                events.arguments(c.encode_utf8(&mut [0; 4]));
                events.end();
                Step::End
            }
            JsonChar::After | JsonChar::Invalid => {
                events.end();
                Step::NotCalls
            }
        }
    }
}

/// One call, `{"name": …, "arguments": {…}}`. The keys may come in any order, along with
/// others.
#[derive(Debug)]
struct CallObject {
    /// Known tools, if the call has no mark. It is then a call only if it names one of them.
    bare: Option<Arc<[ToolDeclaration]>>,
    state: ObjectState,
    key: String,
    /// Text read so far of a key, of a name, or of arguments that are not streamed.
    text: String,
    name: Option<String>,
    arguments: Arguments,
    /// Arguments that could not be streamed.
    held: String,
    /// Whether the call was announced.
    begun: bool,
}

#[derive(Debug)]
enum ObjectState {
    Start,
    BeforeKey,
    Key(Value),
    Colon,
    BeforeValue,
    Value(Value, Role),
    AfterValue,
}

/// Role of a value in the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Name,
    Arguments,
    Other,
}

/// Progress of reading the arguments.
#[derive(Debug, PartialEq, Eq)]
enum Arguments {
    Missing,
    Reading,
    Read,
}

impl CallObject {
    fn new(bare: Option<Arc<[ToolDeclaration]>>) -> Self {
        Self {
            bare,
            state: ObjectState::Start,
            key: String::new(),
            text: String::new(),
            name: None,
            arguments: Arguments::Missing,
            held: String::new(),
            begun: false,
        }
    }

    /// Processes a character. Returns [`Step::End`] for the last one of the object.
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        let step = self.follow(c, events).unwrap_or(Step::NotCalls);
        if self.begun {
            // The frame of a call that was announced never becomes text.
            events.committed = true;
            if step == Step::NotCalls {
                events.end();
            }
        }
        step
    }

    /// Processes a character. Returns `None` if it is not allowed there.
    fn follow(&mut self, c: char, events: &mut Events) -> Option<Step> {
        match &mut self.state {
            ObjectState::Start if c == '{' => self.state = ObjectState::BeforeKey,
            ObjectState::Key(value) => match value.push(c) {
                JsonChar::Inside => self.text.push(c),
                JsonChar::Last => {
                    self.text.push(c);
                    self.key = string(&self.text)?;
                    self.state = ObjectState::Colon;
                    if self.bare.is_some() && self.name.is_none() && !belongs(&self.key) {
                        return None;
                    }
                }
                JsonChar::After | JsonChar::Invalid => return None,
            },
            ObjectState::Value(value, role) => {
                let role = *role;
                match value.push(c) {
                    JsonChar::Inside => self.value(c, role, events),
                    JsonChar::Last => {
                        self.value(c, role, events);
                        self.value_ends(role, events)?;
                    }
                    JsonChar::After => {
                        self.value_ends(role, events)?;
                        return self.follow(c, events);
                    }
                    JsonChar::Invalid => return None,
                }
            }
            _ if c.is_whitespace() => {}
            ObjectState::BeforeKey if c == '"' => {
                self.text = c.into();
                self.state = ObjectState::Key(Value::begin(c)?);
            }
            ObjectState::Colon if c == ':' => self.state = ObjectState::BeforeValue,
            ObjectState::BeforeValue => {
                let value = Value::begin(c)?;
                let role = self.role();
                let nests = value.nests();
                self.state = ObjectState::Value(value, role);
                self.value_begins(c, role, nests, events);
            }
            ObjectState::AfterValue if c == ',' => self.state = ObjectState::BeforeKey,
            ObjectState::BeforeKey | ObjectState::AfterValue if c == '}' => {
                return self.object_ends(events);
            }
            _ => return None,
        }
        Some(Step::More)
    }

    fn role(&self) -> Role {
        match self.key.as_str() {
            "name" | "tool_name" if self.name.is_none() => Role::Name,
            "arguments" | "parameters" if self.arguments == Arguments::Missing => Role::Arguments,
            _ => Role::Other,
        }
    }

    fn value_begins(&mut self, c: char, role: Role, nests: bool, events: &mut Events) {
        self.text.clear();
        if role == Role::Arguments {
            // Only an object is streamed: a string may contain one, and null means no
            // arguments.
            if nests && let Some(name) = &self.name {
                self.begun = true;
                events.begin(name);
            }
            self.arguments = Arguments::Reading;
        }
        self.value(c, role, events);
    }

    fn value(&mut self, c: char, role: Role, events: &mut Events) {
        match role {
            Role::Arguments if self.begun => events.arguments(c.encode_utf8(&mut [0; 4])),
            Role::Arguments | Role::Name => self.text.push(c),
            Role::Other => {}
        }
    }

    fn value_ends(&mut self, role: Role, events: &mut Events) -> Option<()> {
        self.state = ObjectState::AfterValue;
        match role {
            Role::Other => return Some(()),
            Role::Name => {
                let name = string(&self.text).filter(|name| !name.is_empty())?;
                let tools = self.bare.as_deref().unwrap_or_default();
                if !tools.is_empty() && !tools.iter().any(|tool| tool.name == name) {
                    return None;
                }
                self.name = Some(name);
            }
            Role::Arguments => {
                self.arguments = Arguments::Read;
                if !self.begun {
                    self.held = written_arguments(std::mem::take(&mut self.text));
                }
            }
        }
        if let (Some(name), Arguments::Read, false) = (&self.name, &self.arguments, self.begun) {
            self.begun = true;
            events.begin(name);
            events.arguments(&self.held);
        }
        Some(())
    }

    fn object_ends(&mut self, events: &mut Events) -> Option<Step> {
        let name = self.name.as_ref()?;
        if !self.begun {
            if self.bare.is_some() {
                return None;
            }
            self.begun = true;
            events.begin(name);
            events.arguments("{}");
        }
        events.end();
        Some(Step::End)
    }
}

/// Returns whether a key may come before a call's name.
fn belongs(key: &str) -> bool {
    matches!(key, "name" | "arguments" | "parameters" | "type" | "id")
}

/// Parses a JSON string.
fn string(text: &str) -> Option<String> {
    serde_json::from_str(text).ok()
}

/// Converts arguments that are not an object. Some models write the object's text in a
/// string, or null for no arguments.
fn written_arguments(text: String) -> String {
    if text == "null" {
        return "{}".to_owned();
    }
    string(&text).unwrap_or(text)
}

/// Calls in JSON: one object, a list of objects, or several objects in a row.
#[derive(Debug)]
pub(super) struct JsonCalls {
    /// Marks that may close the calls.
    closes: &'static [&'static str],
    bare: Option<Arc<[ToolDeclaration]>>,
    list: bool,
    state: JsonState,
}

#[derive(Debug)]
enum JsonState {
    /// Before the first object.
    Start,
    /// Before a later object of a list.
    Before,
    Object(CallObject),
    /// Between the objects of a list.
    Between,
    /// After all objects.
    After(Marks),
}

impl JsonCalls {
    pub(super) fn new(
        closes: &'static [&'static str],
        bare: Option<Arc<[ToolDeclaration]>>,
    ) -> Self {
        Self {
            closes,
            bare,
            list: false,
            state: JsonState::Start,
        }
    }

    fn object(&mut self, c: char, events: &mut Events) -> Step {
        let mut object = CallObject::new(self.bare.clone());
        let step = object.push(c, events);
        self.state = JsonState::Object(object);
        step
    }
}

impl Calls for JsonCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        match &mut self.state {
            JsonState::Object(object) => {
                let step = object.push(c, events);
                if step != Step::End {
                    return step;
                }
                self.state = if self.list {
                    JsonState::Between
                } else {
                    JsonState::After(Marks::default())
                };
            }
            JsonState::Start | JsonState::Before | JsonState::Between if c.is_whitespace() => {}
            JsonState::Start | JsonState::Before if c == '{' => return self.object(c, events),
            JsonState::Start if c == '[' && self.bare.is_none() && !self.list => self.list = true,
            JsonState::Between if c == ',' => self.state = JsonState::Before,
            JsonState::Between if c == ']' => {
                events.committed = true;
                self.list = false;
                self.state = JsonState::After(Marks::default());
            }
            JsonState::After(marks) if !marks.in_mark() && c == '{' => {
                return self.object(c, events);
            }
            JsonState::After(marks) if !marks.in_mark() && c == ';' => {}
            JsonState::After(marks) => match marks.push(c, self.closes) {
                Found::Part => {}
                Found::Mark(_) => return Step::End,
                Found::Wrong => return Step::NotCalls,
            },
            _ => return Step::NotCalls,
        }
        Step::More
    }

    fn framing(&self) -> bool {
        match self.state {
            JsonState::Start | JsonState::Object(_) => false,
            JsonState::Before | JsonState::Between | JsonState::After(_) => true,
        }
    }
}
