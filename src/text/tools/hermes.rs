//! `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen2.5, Qwen3.

use super::json::JsonCalls;

pub(super) const TAGS: &[&str] = &["<tool_call>"];

pub(super) fn calls() -> JsonCalls {
    JsonCalls::new(&["</tool_call>"], None)
}
