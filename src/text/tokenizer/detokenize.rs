//! Turns token ids into text one at a time, without splitting a character.

use super::Tokenizer;
use std::fmt;
use std::str;
use std::sync::Arc;

/// Turns the tokens of an answer into text as they are generated.
///
/// The returned pieces, concatenated, equal what [`Tokenizer::decode`] returns for all the
/// tokens at once. Bytes that could still become a character are held back. The cost per
/// token does not depend on the length of the answer.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    assembler: Utf8Assembler,
    skip_special: bool,
    /// Special tokens that are not skipped, in order.
    kept: Vec<u32>,
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
    /// Starts a new text. If `skip_special`, special tokens are left out.
    #[cfg(any(test, feature = "internals", feature = "server"))]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self::after(&[], tokenizer, skip_special)
    }

    /// Starts after the text of `prompt`, so that a space which a SentencePiece model puts
    /// there is kept as part of the text.
    ///
    /// If `prompt` is empty or ends with a special token, this is the same as
    /// [`new`](Self::new).
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
            kept: Vec::new(),
        }
    }

    /// Does not leave out these special tokens.
    pub fn keeping(mut self, tokens: &[u32]) -> Self {
        self.kept = tokens.to_vec();
        self.kept.sort_unstable();
        self
    }

    /// Returns the text that `id` completes. Empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        let skip = self.skip_special && self.kept.binary_search(&id).is_err();
        self.tokenizer
            .decode_step(&mut self.assembler, id, skip, &mut text);
        text
    }

    /// Returns the text that is still held back, with U+FFFD for an incomplete character.
    /// The next [`push`](Self::push) starts a new text.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.assembler.finish(&mut text);
        self.assembler = self.tokenizer.assembler();
        text
    }
}

/// Turns bytes into text chunk by chunk. The result is that of `String::from_utf8_lossy` on
/// all the bytes.
#[derive(Clone, Debug)]
pub(super) struct Utf8Assembler {
    /// Bytes of an incomplete character, at most three.
    pending: Vec<u8>,
    /// Whether a space that comes next was added by the tokenizer and must be removed.
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

    /// Appends one U+FFFD if an incomplete character is left.
    pub(super) fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Appends `bytes` to `text`, except for an incomplete character at the end, and returns
/// the bytes of that character.
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
