//! Tool calls of Kimi K2: `<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{…}`
//! between marks around each call and around all calls.

use super::deepseek::{CallMarks, MarkedCalls};

pub(super) const TAGS: &[&str] = &["<|tool_calls_section_begin|>"];

const MARKS: CallMarks = CallMarks {
    call_begin: "<|tool_call_begin|>",
    call_ends: &["<|tool_call_end|>"],
    calls_end: "<|tool_calls_section_end|>",
    name,
};

pub(super) fn calls() -> MarkedCalls {
    MarkedCalls::new(&MARKS)
}

/// Extracts the name from the text before the arguments. The id of a call is its name with a
/// prefix and a number.
fn name(head: &str) -> Option<&str> {
    let (id, after) = head.split_once("<|tool_call_argument_begin|>")?;
    let id = id.trim();
    let id = id.strip_prefix("functions.").unwrap_or(id);
    let name = match id.rsplit_once(':') {
        Some((name, number)) if number.chars().all(|c| c.is_ascii_digit()) => name,
        _ => id,
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    (after.trim().is_empty() && !name.is_empty() && name.chars().all(plain)).then_some(name)
}
