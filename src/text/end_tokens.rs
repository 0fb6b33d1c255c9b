//! Which tokens end an answer.
//!
//! Models name one end token in their metadata and use several, so the
//! well-known names count as well, as they do in llama.cpp.

use super::vocabulary::{TokenKind, Vocabulary};

/// Names that end a turn or a text wherever they occur.
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

/// Marks the well-known end tokens of `vocabulary` as control tokens and gives
/// them together with `named`, the ids that the metadata names; sorted.
///
/// With `added_only`, ordinary tokens that merely have such a name don't count.
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
    // In the harmony format and its kin `<|end|>` ends a message, not the answer.
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
