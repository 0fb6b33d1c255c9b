//! Tool calls between marks around each call and around all calls, and those of DeepSeek models.
//!
//! V3 and R1 write `function`, a separator, the name, and the arguments in a code block. V3.1
//! writes the name, the separator and the arguments.

use super::json::RawArguments;
use super::scan::{Found, Marks};
use super::{Calls, Events, Step};

pub(super) const TAGS: &[&str] = &["<｜tool▁calls▁begin｜>"];

const SEPARATOR: &str = "<｜tool▁sep｜>";
const BLOCK_END: &str = "```";

const MARKS: CallMarks = CallMarks {
    call_begin: "<｜tool▁call▁begin｜>",
    call_ends: &[BLOCK_END, "<｜tool▁call▁end｜>"],
    calls_end: "<｜tool▁calls▁end｜>",
    name,
};

pub(super) fn calls() -> MarkedCalls {
    MarkedCalls::new(&MARKS)
}

/// Maximum length of the text before the arguments, in bytes.
const MAX_HEAD_BYTES: usize = 512;

/// Marks of a format.
#[derive(Debug)]
pub(super) struct CallMarks {
    /// Before each call.
    pub call_begin: &'static str,
    /// What may come after the arguments of a call.
    pub call_ends: &'static [&'static str],
    /// After all calls.
    pub calls_end: &'static str,
    /// Extracts the name from the text before the arguments.
    pub name: fn(&str) -> Option<&str>,
}

/// Reads the calls after the tag.
#[derive(Debug)]
pub(super) struct MarkedCalls {
    marks: &'static CallMarks,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before the first call.
    First(Marks),
    /// In the text before a call's arguments.
    Head(String),
    Arguments(RawArguments),
    /// After a call's arguments.
    Between(Marks),
}

impl MarkedCalls {
    pub(super) fn new(marks: &'static CallMarks) -> Self {
        Self {
            marks,
            state: State::First(Marks::default()),
        }
    }

    /// Begins in the text before the arguments of the first call.
    pub(super) fn in_head(marks: &'static CallMarks) -> Self {
        Self {
            marks,
            state: State::Head(String::new()),
        }
    }
}

impl Calls for MarkedCalls {
    fn push(&mut self, c: char, events: &mut Events) -> Step {
        let CallMarks {
            call_begin,
            call_ends,
            calls_end,
            name,
        } = self.marks;
        match &mut self.state {
            State::First(marks) => match marks.push(c, &[call_begin]) {
                Found::Part => {}
                Found::Mark(_) => self.state = State::Head(String::new()),
                Found::Wrong => return Step::NotCalls,
            },
            State::Head(head) if c == '{' => {
                let Some(name) = name(head) else {
                    return Step::NotCalls;
                };
                events.begin(name);
                let mut arguments = RawArguments::default();
                let step = arguments.push(c, events);
                self.state = State::Arguments(arguments);
                return step;
            }
            State::Head(head) => {
                head.push(c);
                if head.len() > MAX_HEAD_BYTES {
                    return Step::NotCalls;
                }
            }
            State::Arguments(arguments) => {
                let step = arguments.push(c, events);
                if step != Step::End {
                    return step;
                }
                self.state = State::Between(Marks::default());
            }
            State::Between(marks) => {
                let mut expected = vec![*call_begin, *calls_end];
                expected.extend(*call_ends);
                match marks.push(c, &expected) {
                    Found::Mark(mark) if mark == *call_begin => {
                        self.state = State::Head(String::new());
                    }
                    Found::Mark(mark) if mark == *calls_end => return Step::End,
                    Found::Mark(_) => events.committed = true,
                    Found::Part => {}
                    Found::Wrong => return Step::NotCalls,
                }
            }
        }
        Step::More
    }

    fn framing(&self) -> bool {
        matches!(self.state, State::Between(_))
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
