//! Tool calls of Hermes, Qwen2.5 and Qwen3:
//! `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

use super::json::JsonCalls;

pub(super) const TAGS: &[&str] = &["<tool_call>"];

pub(super) fn calls() -> JsonCalls {
    JsonCalls::new(&["</tool_call>"], None)
}
