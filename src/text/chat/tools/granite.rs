//! Tool calls as a list after a tag: `<|tool_call|>[{"name": …, "arguments": {…}}]`.
//! Granite 3 writes no closing mark, Phi 4 mini does.

use super::json::JsonCalls;

pub(super) const TAGS: &[&str] = &["<|tool_call|>", "<tool_call>"];

pub(super) fn calls() -> JsonCalls {
    JsonCalls::new(&["<|/tool_call|>", "</tool_call>"], None)
}
