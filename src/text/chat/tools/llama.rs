//! Tool calls of Llama 3.1 and later: `{"name": …, "parameters": {…}}`, alone or after a
//! tag. Several calls are separated by `;`.

use super::ToolDeclaration;
use super::json::JsonCalls;
use std::sync::Arc;

pub(super) const TAGS: &[&str] = &["<|python_tag|>", "<|python_start|>"];

pub(super) fn calls(bare: Option<Arc<[ToolDeclaration]>>) -> JsonCalls {
    JsonCalls::new(&["<|python_end|>"], bare)
}
