//! Token ids into text one at a time, never splitting a character.

use super::Tokenizer;
use std::fmt;
use std::str;
use std::sync::Arc;

/// Turns an answer's tokens into text as they come.
///
/// All it gives, put together, is what [`Tokenizer::decode`] gives for all the
/// tokens at once. Bytes that could still become a character are held back;
/// each token costs the same, however long the answer is.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    assembler: Utf8Assembler,
    skip_special: bool,
}

impl fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detokenizer")
            .field("assembler", &self.assembler)
            .field("skip_special", &self.skip_special)
            .finish_non_exhaustive()
    }
}

impl Detokenizer {
    /// Begins a text; without special tokens if `skip_special`.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self::after(&[], tokenizer, skip_special)
    }

    /// Goes on where the text of `prompt` ends: a space that a SentencePiece model
    /// writes there is part of the text. After nothing, or a special token, a text
    /// begins, as with [`new`](Self::new).
    pub fn after(prompt: &[u32], tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let begins = prompt.last().is_none_or(|&id| tokenizer.is_special(id));
        let assembler = match begins {
            true => tokenizer.assembler(),
            false => Utf8Assembler::new(false),
        };
        Self {
            tokenizer,
            assembler,
            skip_special,
        }
    }

    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.tokenizer
            .decode_step(&mut self.assembler, id, self.skip_special, &mut text);
        text
    }

    /// What is still held back, an incomplete character being U+FFFD. The next
    /// [`push`](Self::push) begins a new text.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.assembler.finish(&mut text);
        self.assembler = self.tokenizer.assembler();
        text
    }
}

/// Bytes into text, whatever their chunks: as `String::from_utf8_lossy` on all.
#[derive(Clone, Debug)]
pub(super) struct Utf8Assembler {
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
    /// Whether a space that comes now is the tokenizer's own.
    strip_space: bool,
}

impl Utf8Assembler {
    pub(super) fn new(strip_space: bool) -> Self {
        Self {
            pending: Vec::new(),
            strip_space,
        }
    }

    /// Appends to `text` all characters that `bytes` completes.
    pub(super) fn push(&mut self, bytes: &[u8], text: &mut String) {
        let mut bytes = bytes;
        if self.strip_space && !bytes.is_empty() {
            self.strip_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        if self.pending.is_empty() {
            let held = append(bytes, text).len();
            self.pending.extend_from_slice(&bytes[bytes.len() - held..]);
        } else {
            self.pending.extend_from_slice(bytes);
            let held = append(&self.pending, text).len();
            self.pending.drain(..self.pending.len() - held);
        }
    }

    /// Appends what is left: one U+FFFD for an incomplete character.
    pub(super) fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Appends to `text` all of `bytes` but an incomplete character at their end,
/// which is returned.
fn append<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        let error = match str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        text.push_str(str::from_utf8(valid).unwrap_or_default());
        let Some(invalid) = error.error_len() else {
            return rest;
        };
        text.push(char::REPLACEMENT_CHARACTER);
        bytes = &rest[invalid..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_become_the_same_text_whatever_the_chunks(
            chunks in proptest::collection::vec(
                proptest::collection::vec(
                    prop_oneof![any::<u8>(), Just(0xE2), Just(0x82), Just(0xAC), Just(0xF0)],
                    0..5,
                ),
                0..20,
            ),
        ) {
            let mut assembler = Utf8Assembler::new(false);
            let mut text = String::new();
            for chunk in &chunks {
                assembler.push(chunk, &mut text);
                prop_assert!(assembler.pending.len() < 4);
            }
            assembler.finish(&mut text);
            let whole = chunks.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }
    }

    #[test]
    fn only_the_first_space_is_the_tokenizers_own() {
        let mut assembler = Utf8Assembler::new(true);
        let mut text = String::new();
        for chunk in [&b""[..], b"  a", b" b"] {
            assembler.push(chunk, &mut text);
        }
        assert_eq!(text, " a b");
    }
}
