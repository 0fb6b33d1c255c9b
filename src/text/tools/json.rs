//! Calls that are written in JSON, read a character at a time.
//!
//! Brackets and strings are followed exactly, for they say where a call ends;
//! numbers and words are taken as they come.

use super::scan::{Found, Marks};
use super::{Calls, Events, Step};
use std::sync::Arc;

/// What a character was to a JSON value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follow {
    /// Part of the value.
    Inside,
    /// The last of the value.
    Last,
    /// The first after the value, which was a number or a word.
    Past,
    /// It cannot stand in JSON.
    Wrong,
}

/// Finds the end of one JSON value.
#[derive(Debug, Default)]
pub(super) struct Value {
    /// The closing brackets that are awaited.
    brackets: Vec<char>,
    string: bool,
    escaped: bool,
    scalar: bool,
}

impl Value {
    /// Begins with the value's first character; `None` if no value begins with it.
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

    /// Whether it is an object or a list.
    pub(super) fn nests(&self) -> bool {
        !self.brackets.is_empty()
    }

    fn open(&mut self, c: char) {
        self.brackets.push(if c == '{' { '}' } else { ']' });
    }

    fn ended(&self) -> Follow {
        if self.brackets.is_empty() {
            Follow::Last
        } else {
            Follow::Inside
        }
    }

    /// Takes a character after the first.
    pub(super) fn push(&mut self, c: char) -> Follow {
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
            return Follow::Inside;
        }
        let word = c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        if self.scalar {
            return if word { Follow::Inside } else { Follow::Past };
        }
        match c {
            '"' => self.string = true,
            '{' | '[' => self.open(c),
            '}' | ']' if self.brackets.pop() == Some(c) => return self.ended(),
            ',' | ':' => {}
            c if word || c.is_whitespace() => {}
            _ => return Follow::Wrong,
        }
        Follow::Inside
    }
}

/// The arguments of a call whose name is known: one JSON object.
#[derive(Debug, Default)]
pub(super) struct RawArguments {
    value: Option<Value>,
}

impl RawArguments {
    /// Takes a character. [`Step::End`] is the object's last.
    pub(super) fn push(&mut self, c: char, events: &mut Events) -> Step {
        let follow = match &mut self.value {
            Some(value) => value.push(c),
            None if c == '{' => {
                self.value = Value::begin(c);
                Follow::Inside
            }
            None => Follow::Wrong,
        };
        match follow {
            Follow::Inside => {
                events.arguments(c.encode_utf8(&mut [0; 4]));
                Step::More
            }
            Follow::Last => {
                events.arguments(c.encode_utf8(&mut [0; 4]));
                events.end();
                Step::End
            }
            Follow::Past | Follow::Wrong => {
                events.end();
                Step::Over
            }
        }
    }
}

/// One call: `{"name": …, "arguments": {…}}`, in whatever order, with whatever else.
#[derive(Debug)]
struct CallObject {
    /// The tools that there are, if a call without a mark is only one when it names one.
    bare: Option<Arc<[String]>>,
    state: ObjectState,
    key: String,
    /// What was read of a key, a name, or arguments that are not streamed.
    text: String,
    name: Option<String>,
    arguments: Arguments,
    /// Arguments that could not be streamed.
    held: String,
    /// The call was announced.
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

/// What a value of the object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Name,
    Arguments,
    Other,
}

/// How far the arguments are.
#[derive(Debug, PartialEq, Eq)]
enum Arguments {
    Missing,
    Reading,
    Read,
}

impl CallObject {
    fn new(bare: Option<Arc<[String]>>) -> Self {
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

    /// Takes a character. [`Step::End`] is the object's last.
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        let step = self.follow(c, events).unwrap_or(Step::Over);
        if self.begun {
            // What frames a call that was announced will not become text.
            events.committed = true;
            if step == Step::Over {
                events.end();
            }
        }
        step
    }

    /// `None` for a character that cannot stand there.
    fn follow(&mut self, c: char, events: &mut Events) -> Option<Step> {
        match &mut self.state {
            ObjectState::Start if c == '{' => self.state = ObjectState::BeforeKey,
            ObjectState::Key(value) => match value.push(c) {
                Follow::Inside => self.text.push(c),
                Follow::Last => {
                    self.text.push(c);
                    self.key = string(&self.text)?;
                    self.state = ObjectState::Colon;
                    if self.bare.is_some() && self.name.is_none() && !belongs(&self.key) {
                        return None;
                    }
                }
                Follow::Past | Follow::Wrong => return None,
            },
            ObjectState::Value(value, role) => {
                let role = *role;
                match value.push(c) {
                    Follow::Inside => self.value(c, role, events),
                    Follow::Last => {
                        self.value(c, role, events);
                        self.value_ends(role, events)?;
                    }
                    Follow::Past => {
                        self.value_ends(role, events)?;
                        return self.follow(c, events);
                    }
                    Follow::Wrong => return None,
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
            "name" if self.name.is_none() => Role::Name,
            "arguments" | "parameters" if self.arguments == Arguments::Missing => Role::Arguments,
            _ => Role::Other,
        }
    }

    fn value_begins(&mut self, c: char, role: Role, nests: bool, events: &mut Events) {
        self.text.clear();
        if role == Role::Arguments {
            // Only an object is streamed: a string may hold one, and null means none.
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
                if !tools.is_empty() && !tools.contains(&name) {
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

/// Whether a key may stand before a call's name.
fn belongs(key: &str) -> bool {
    matches!(key, "name" | "arguments" | "parameters" | "type" | "id")
}

/// The string that a JSON text is.
fn string(text: &str) -> Option<String> {
    serde_json::from_str(text).ok()
}

/// Arguments that are no object, as one: some models write the object's text in a
/// string, or null for none.
fn written_arguments(text: String) -> String {
    if text == "null" {
        return "{}".to_owned();
    }
    string(&text).unwrap_or(text)
}

/// Calls in JSON: one object, a list of them, or several one after the other.
#[derive(Debug)]
pub(super) struct JsonCalls {
    /// What may close the calls.
    closes: &'static [&'static str],
    bare: Option<Arc<[String]>>,
    list: bool,
    state: JsonState,
}

#[derive(Debug)]
enum JsonState {
    /// Before the first object.
    Start,
    /// Before a later one of a list.
    Before,
    Object(CallObject),
    /// Between the objects of a list.
    Between,
    /// After all objects.
    After(Marks),
}

impl JsonCalls {
    pub(super) fn new(closes: &'static [&'static str], bare: Option<Arc<[String]>>) -> Self {
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
                Found::Wrong => return Step::Over,
            },
            _ => return Step::Over,
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
