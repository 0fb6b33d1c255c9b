//! Tool calls of gpt-oss:
//! `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}<|call|>`.
//!
//! The whole answer is in Harmony, which [`HarmonyParser`](crate::HarmonyParser) reads. This part
//! finds the calls alone.

use super::super::harmony::{CALL, MESSAGE, START};
use super::deepseek::{CallMarks, MarkedCalls};

pub(super) const TAGS: &[&str] = &[
    "<|channel|>commentary to=functions.",
    "<|channel|>analysis to=functions.",
    "<|start|>assistant to=functions.",
];

const MARKS: CallMarks = CallMarks {
    call_begin: START,
    call_ends: &[],
    calls_end: CALL,
    name,
};

pub(super) fn calls() -> MarkedCalls {
    MarkedCalls::in_head(&MARKS)
}

/// Extracts the name from the rest of a header.
fn name(head: &str) -> Option<&str> {
    let head = head.strip_suffix(MESSAGE)?;
    let name = head.split([' ', '<']).next()?;
    (!name.is_empty() && !name.contains(char::is_whitespace)).then_some(name)
}
