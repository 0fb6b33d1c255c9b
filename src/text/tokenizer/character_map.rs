//! SentencePiece's precompiled map of characters, by which a text is normalized before it is
//! encoded: for example, `nmt_nfkc` replaces `ﬁ` with `fi` and a tab with a space.
//!
//! The map is a trie of replaced texts, as a double array in the layout of the Darts-clone library,
//! followed by the replacements, each of which ends with a zero byte.

use crate::text::TextError;

/// Maximum length in bytes of a replacement, so that a text grows by a bounded factor, and of what
/// is replaced, so that the time is linear. The longest replacement of `nmt_nfkc`, that of U+FDFA,
/// has 33.
const LONGEST: usize = 256;

/// Replaces characters, and sequences of them, by others.
#[derive(Debug)]
pub(super) struct CharacterMap {
    trie: Vec<u32>,
    replacements: String,
}

/// Element of the double array.
#[derive(Clone, Copy)]
struct Node(u32);

impl Node {
    /// Returns the byte that leads to this node. A leaf has none.
    fn label(self) -> u32 {
        self.0 & (1 << 31 | 0xFF)
    }

    /// Returns whether a replaced text ends here.
    fn ends(self) -> bool {
        self.0 >> 8 & 1 == 1
    }

    /// Returns the value to combine with a byte for the place of the next node, or with 0 for that
    /// of the leaf.
    fn offset(self) -> u32 {
        self.0 >> 10 << ((self.0 & 1 << 9) >> 6)
    }

    /// Returns the place of a leaf's replacement.
    fn value(self) -> usize {
        (self.0 & !(1 << 31)) as usize
    }
}

impl CharacterMap {
    /// Reads a map. Returns `None` if it is empty and replaces nothing.
    ///
    /// # Errors
    /// Returns [`TextError::Build`] if the map is cut off, if the replacements are not UTF-8, or
    /// if one has more than 256 bytes.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Self>, TextError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let failed = |message: String| TextError::Build {
            part: "precompiled_charsmap",
            message,
        };
        let length = bytes.len();
        let (size, rest) = bytes
            .split_first_chunk()
            .ok_or_else(|| failed(format!("has {length} bytes, expected at least 4")))?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) = rest
            .split_at_checked(size)
            .filter(|_| size.is_multiple_of(4))
            .ok_or_else(|| {
                failed(format!(
                    "has a trie of {size} bytes in a total of {length}, expected a multiple of 4 \
                     that fits"
                ))
            })?;
        let replacements = std::str::from_utf8(replacements)
            .map_err(|error| failed(format!("has replacements that are not UTF-8 ({error})")))?;
        let longest = replacements.split('\0').map(str::len).max().unwrap_or(0);
        if longest > LONGEST {
            return Err(failed(format!(
                "has a replacement of {longest} bytes, expected at most {LONGEST}"
            )));
        }
        let (nodes, _) = trie.as_chunks();
        Ok(Some(Self {
            trie: nodes.iter().map(|node| u32::from_le_bytes(*node)).collect(),
            replacements: replacements.to_owned(),
        }))
    }

    /// Returns the text with each longest sequence that the map knows replaced, from the left.
    pub(super) fn apply(&self, text: &str) -> String {
        let mut normalized = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let (length, replacement) = self.longest(rest).unwrap_or_else(|| {
                let length = first.len_utf8();
                (length, &rest[..length])
            });
            normalized.push_str(replacement);
            rest = &rest[length..];
        }
        normalized
    }

    /// Returns the length of the longest beginning of `text` that is replaced, and its replacement.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let node = |place: u32| self.trie.get(place as usize).map(|node| Node(*node));
        let mut found = None;
        let mut place = node(0)?.offset();
        // The nodes of a broken map could lead in a circle.
        for (index, byte) in text.bytes().take(LONGEST).enumerate() {
            place ^= u32::from(byte);
            let Some(reached) = node(place).filter(|node| node.label() == u32::from(byte)) else {
                break;
            };
            place ^= reached.offset();
            let length = index + 1;
            if reached.ends() && text.is_char_boundary(length) {
                let replacement = node(place)
                    .and_then(|leaf| self.replacements.get(leaf.value()..))
                    .and_then(|rest| rest.split('\0').next());
                found = replacement
                    .map(|replacement| (length, replacement))
                    .or(found);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Builds a map for texts of one byte each, whose nodes follow the root's block of 256.
    fn of_bytes(replaced: &[(u8, &str)]) -> Vec<u8> {
        // The root's offset is 256. The leaf of byte `b` is at 512 + b.
        let mut trie = vec![0u32; 1024];
        let offset = |value: u32| value << 10;
        trie[0] = offset(256);
        let mut texts = String::new();
        for &(byte, replacement) in replaced {
            let place = 256 ^ u32::from(byte);
            let leaf = 512 + u32::from(byte);
            trie[place as usize] = offset(place ^ leaf) | 1 << 8 | u32::from(byte);
            trie[leaf as usize] = 1 << 31 | u32::try_from(texts.len()).unwrap();
            texts.push_str(replacement);
            texts.push('\0');
        }
        let mut bytes = u32::try_from(trie.len() * 4)
            .unwrap()
            .to_le_bytes()
            .to_vec();
        bytes.extend(trie.iter().flat_map(|node| node.to_le_bytes()));
        bytes.extend(texts.bytes());
        bytes
    }

    #[test]
    fn characters_are_replaced_and_others_stay() {
        let bytes = of_bytes(&[(b'\t', " "), (b'A', "ａ漢"), (b'x', "")]);
        let map = CharacterMap::read(&bytes).unwrap().unwrap();
        assert_eq!(map.apply("A\tbéx A"), "ａ漢 bé ａ漢");
        assert_eq!(map.apply(""), "");
    }

    #[test]
    fn broken_maps_are_refused_with_what_is_wrong() {
        assert!(CharacterMap::read(&[]).unwrap().is_none());
        let refused = |bytes: &[u8], expected: &str| {
            let error = CharacterMap::read(bytes).unwrap_err().to_string();
            assert!(error.contains("precompiled_charsmap"), "{error}");
            assert!(error.contains(expected), "{error}");
        };
        refused(&[1, 0], "has 2 bytes, expected at least 4");
        refused(
            &[8, 0, 0, 0, 1, 2, 3, 4],
            "a trie of 8 bytes in a total of 8",
        );
        refused(&[3, 0, 0, 0, 1, 2, 3, 4], "a trie of 3 bytes");
        refused(&[0, 0, 0, 0, 0xFF], "not UTF-8");
        let long = [&[0; 4], "x".repeat(257).as_bytes()].concat();
        refused(&long, "a replacement of 257 bytes, expected at most 256");
    }

    proptest! {
        #[test]
        fn any_map_is_refused_or_applied(
            words in proptest::collection::vec(any::<u32>(), 0..600),
            places in proptest::collection::vec((0..600usize, any::<u8>(), 0..600u32), 0..40),
            texts in "[a-zé\u{0}]{0,20}",
            text in any::<String>(),
        ) {
            let mut words = words;
            for (place, byte, offset) in places {
                if let Some(node) = words.get_mut(place) {
                    *node = offset << 10 | 1 << 8 | u32::from(byte);
                }
            }
            let mut bytes = u32::try_from(words.len() * 4).unwrap().to_le_bytes().to_vec();
            bytes.extend(words.iter().flat_map(|node| node.to_le_bytes()));
            bytes.extend(texts.bytes());
            let map = CharacterMap::read(&bytes).unwrap().unwrap();
            map.apply(&text);
        }
    }
}
