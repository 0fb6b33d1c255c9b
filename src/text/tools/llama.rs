//! `{"name": …, "parameters": {…}}`, alone or after a tag; several with `;` between
//! them: Llama 3.1 and later.

use super::json::JsonCalls;
use std::sync::Arc;

pub(super) const TAGS: &[&str] = &["<|python_tag|>", "<|python_start|>"];

pub(super) fn calls(bare: Option<Arc<[String]>>) -> JsonCalls {
    JsonCalls::new(&["<|python_end|>"], bare)
}
