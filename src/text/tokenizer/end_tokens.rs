//! Finds the tokens that end an answer.
//!
//! Model metadata names one end token although models use several, so tokens with
//! well-known names count too, as in llama.cpp.

use super::vocabulary::{TokenKind, Vocabulary};

/// Token names that end a turn or a text in every model that has them.
const WELL_KNOWN: [&str; 20] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<reponame>",
    "<|file_sep|>",
];

/// Marks the well-known end tokens of `vocabulary` as control tokens and returns them
/// together with `named`, the ids from the metadata. The result is sorted.
///
/// With `added_only`, ordinary tokens that merely have a well-known name are ignored.
pub(super) fn end_tokens(
    vocabulary: &mut Vocabulary,
    named: impl IntoIterator<Item = u32>,
    added_only: bool,
) -> Vec<u32> {
    let mut ends: Vec<u32> = named.into_iter().collect();
    for name in WELL_KNOWN {
        let Some(id) = vocabulary.id(name) else {
            continue;
        };
        if added_only && vocabulary.kind(id) == TokenKind::Normal {
            continue;
        }
        vocabulary.set_kind(id, TokenKind::Control);
        ends.push(id);
    }
    // In harmony and similar formats, `<|end|>` ends a message, not the answer.
    let has = |name: &str| vocabulary.id(name).is_some_and(|id| ends.contains(&id));
    let calls = has("<|call|>") || has("<|calls|>");
    if calls && (has("<|return|>") || has("<|flush|>")) {
        let end = vocabulary.id("<|end|>");
        ends.retain(|&id| Some(id) != end);
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}
