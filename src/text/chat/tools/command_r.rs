//! Tool calls of Command R7B and Command A:
//! `<|START_ACTION|>[{"tool_call_id": "0", "tool_name": …, "parameters": {…}}]<|END_ACTION|>`.
//! Command R and R+ write the list in a code block after `Action:`.

use super::json::JsonCalls;

pub(super) const TAGS: &[&str] = &["<|START_ACTION|>", "Action:\n```json", "Action: ```json"];

pub(super) fn calls() -> JsonCalls {
    JsonCalls::new(&["<|END_ACTION|>", "```"], None)
}
