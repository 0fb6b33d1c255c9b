//! Tool calls of Nemotron Nano 2: `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>`.

use super::json::JsonCalls;

pub(super) const TAGS: &[&str] = &["<TOOLCALL>"];

pub(super) fn calls() -> JsonCalls {
    JsonCalls::new(&["</TOOLCALL>"], None)
}
