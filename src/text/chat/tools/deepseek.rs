//! Tool calls of DeepSeek models.
//!
//! One pair of marks encloses all calls, and another pair encloses each call. V3 and R1
//! write `function`, a separator, the name, and the arguments in a code block. V3.1 writes
//! the name, the separator and the arguments.

use super::json::RawArguments;
use super::scan::{Found, Marks};
use super::{Calls, Events, Step};

pub(super) const TAGS: &[&str] = &["<｜tool▁calls▁begin｜>"];

const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const BLOCK_END: &str = "```";

/// Maximum length of the text before the arguments, in bytes.
const MAX_HEAD_BYTES: usize = 512;

/// State of reading the calls after the tag.
#[derive(Debug)]
pub(super) enum DeepSeekCalls {
    /// Before the first call.
    First(Marks),
    /// In the text before a call's arguments.
    Head(String),
    Arguments(RawArguments),
    /// After a call's arguments.
    Between(Marks),
}

impl Default for DeepSeekCalls {
    fn default() -> Self {
        Self::First(Marks::default())
    }
}

impl Calls for DeepSeekCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        match self {
            Self::First(marks) => match marks.push(c, &[CALL_BEGIN]) {
                Found::Part => {}
                Found::Mark(_) => *self = Self::Head(String::new()),
                Found::Wrong => return Step::NotCalls,
            },
            Self::Head(head) if c == '{' => {
                let Some(name) = name(head) else {
                    return Step::NotCalls;
                };
                events.begin(name);
                let mut arguments = RawArguments::default();
                let step = arguments.push(c, events);
                *self = Self::Arguments(arguments);
                return step;
            }
            Self::Head(head) => {
                head.push(c);
                if head.len() > MAX_HEAD_BYTES {
                    return Step::NotCalls;
                }
            }
            Self::Arguments(arguments) => {
                let step = arguments.push(c, events);
                if step != Step::End {
                    return step;
                }
                *self = Self::Between(Marks::default());
            }
            Self::Between(marks) => {
                match marks.push(c, &[BLOCK_END, CALL_END, CALL_BEGIN, CALLS_END]) {
                    Found::Mark(CALL_BEGIN) => *self = Self::Head(String::new()),
                    Found::Mark(CALLS_END) => return Step::End,
                    Found::Mark(_) => events.committed = true,
                    Found::Part => {}
                    Found::Wrong => return Step::NotCalls,
                }
            }
        }
        Step::More
    }

    fn framing(&self) -> bool {
        matches!(self, Self::Between(_))
    }
}

/// Extracts the name from the text before the arguments.
fn name(head: &str) -> Option<&str> {
    let (before, after) = head.split_once(SEPARATOR)?;
    let mut after = after.split_whitespace();
    let name = after.next().unwrap_or(before.trim());
    let block = after
        .next()
        .is_none_or(|block| block.starts_with(BLOCK_END));
    let plain =
        !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || "<{`".contains(c));
    (plain && block && after.next().is_none()).then_some(name)
}
