//! Tool calls of LFM2, in Python's syntax between marks:
//! `<|tool_call_start|>[name(key="value")]<|tool_call_end|>`.

use super::pythonic::PythonicCalls;

pub(super) const TAGS: &[&str] = &["<|tool_call_start|>"];

pub(super) fn calls() -> PythonicCalls {
    PythonicCalls::new(&["<|tool_call_end|>"], None)
}
