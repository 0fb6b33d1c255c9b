//! Tool calls of Mistral models: `[TOOL_CALLS]` and a JSON list of calls. Since Mistral
//! Small 3.2, each call is `[TOOL_CALLS]name[ARGS]{…}`, with an optional `[CALL_ID]id`
//! after the name.

use super::json::{JsonCalls, RawArguments};
use super::{Calls, Events, Step};

pub(super) const TAGS: &[&str] = &["[TOOL_CALLS]"];

#[cfg(feature = "server")]
pub(super) const NEWER_MARKS: &[&str] = &[ARGUMENTS, CALL_ID];

const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

/// Maximum length of a name with its marks, in bytes.
const MAX_HEAD_BYTES: usize = 512;

/// State of reading the calls after one tag.
#[derive(Debug, Default)]
pub(super) enum MistralCalls {
    #[default]
    Start,
    Json(JsonCalls),
    /// In a name or the marks after it.
    Head(String),
    Arguments(RawArguments),
}

impl Calls for MistralCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        match self {
            Self::Start if c.is_whitespace() => Step::More,
            Self::Start if matches!(c, '[' | '{') => {
                let mut calls = JsonCalls::new(&[], None);
                let step = calls.push(c, events);
                *self = Self::Json(calls);
                step
            }
            Self::Start => {
                *self = Self::Head(String::new());
                self.push(c, events)
            }
            Self::Json(calls) => calls.push(c, events),
            Self::Head(head) if c == '{' => {
                let Some(name) = name(head) else {
                    return Step::NotCalls;
                };
                events.begin(name);
                let mut arguments = RawArguments::default();
                let step = arguments.push(c, events);
                *self = Self::Arguments(arguments);
                step
            }
            Self::Head(head) => {
                head.push(c);
                if may_be_head(head) {
                    Step::More
                } else {
                    Step::NotCalls
                }
            }
            Self::Arguments(arguments) => arguments.push(c, events),
        }
    }

    fn framing(&self) -> bool {
        matches!(self, Self::Json(calls) if calls.framing())
    }
}

/// Extracts the name from a complete `name[CALL_ID]id[ARGS]`. The marks may be missing.
fn name(head: &str) -> Option<&str> {
    let head = head.trim_end();
    let head = head.strip_suffix(ARGUMENTS).unwrap_or(head);
    let (name, id) = head.split_once(CALL_ID).unwrap_or((head, ""));
    let plain = |text: &str| text.chars().all(in_name);
    (!name.is_empty() && plain(name) && plain(id)).then_some(name)
}

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

/// Returns whether `head` can still become a name with its marks.
fn may_be_head(head: &str) -> bool {
    let (name, mut marks) = head.split_at(head.find(|c| !in_name(c)).unwrap_or(head.len()));
    if let Some(id) = marks.strip_prefix(CALL_ID) {
        marks = id.trim_start_matches(in_name);
    }
    let marks = marks.strip_prefix(ARGUMENTS).unwrap_or(marks).trim_end();
    let known = ARGUMENTS.starts_with(marks) || CALL_ID.starts_with(marks);
    !name.is_empty() && known && head.len() <= MAX_HEAD_BYTES
}
