//! Vocabularies of tiktoken: a line per token, with its bytes in Base64 and its rank.
//!
//! The merges are not in the file. They follow from the ranks: a token is the merge of the two
//! tokens that remain when its bytes are merged by all lower ranks.

use super::GgufVocabulary;
use super::byte_level::byte_characters;
use crate::text::TextError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::collections::HashMap;
use std::path::Path;

/// Maximum length of a token, in bytes. Its merge takes time in proportion to the square.
const MAX_TOKEN_BYTES: usize = 1024;

/// Returns whether these are the beginnings of a file of tiktoken, and not of another one.
pub(super) fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    std::str::from_utf8(line).is_ok_and(|line| token(line).is_some())
}

/// Returns the bytes and the rank in a line.
fn token(line: &str) -> Option<(Vec<u8>, u32)> {
    let (bytes, rank) = line.trim_end().split_once(' ')?;
    Some((STANDARD.decode(bytes).ok()?, rank.parse().ok()?))
}

/// Describes the tokenizer of a vocabulary of tiktoken, which splits text by the rule `pre`.
///
/// # Errors
/// Returns [`TextError::File`] if a line is not a token and its rank, if the ranks are not those
/// from 0 without gaps, or if a token occurs twice or is too long.
pub(super) fn read(bytes: &[u8], path: &Path, pre: &str) -> Result<GgufVocabulary, TextError> {
    let wrong = |found: String, expected| TextError::File {
        path: path.to_owned(),
        found,
        expected,
    };
    let text = str::from_utf8(bytes)
        .map_err(|error| wrong(format!("not text ({error})"), "a vocabulary of tiktoken"))?;
    let mut tokens: Vec<Vec<u8>> = Vec::new();
    let mut ranks: HashMap<Vec<u8>, u32> = HashMap::new();
    for (place, line) in text.lines().enumerate() {
        let number = place + 1;
        let expected = "a token in Base64, a space and its rank, in the order of the ranks from 0";
        let (bytes, rank) = token(line)
            .filter(|(bytes, rank)| *rank as usize == place && !bytes.is_empty())
            .ok_or_else(|| wrong(format!("{line:?} in line {number}"), expected))?;
        if bytes.len() > MAX_TOKEN_BYTES {
            let found = format!("a token of {} bytes in line {number}", bytes.len());
            return Err(wrong(found, "tokens of at most 1,024 bytes"));
        }
        if ranks.insert(bytes.clone(), rank).is_some() {
            let found = format!("a token that occurs again in line {number}");
            return Err(wrong(found, "each token once"));
        }
        tokens.push(bytes);
    }
    let characters: Vec<char> = byte_characters().collect();
    let written = |bytes: &[u8]| -> String {
        bytes
            .iter()
            .map(|&byte| characters[usize::from(byte)])
            .collect()
    };
    let mut merges = Vec::new();
    for (bytes, rank) in tokens.iter().zip(0..) {
        if bytes.len() == 1 {
            continue;
        }
        // Llama 3 has tokens that no merge makes, which are only found as whole words.
        if let Some(split) = halves(bytes, rank, &ranks) {
            let (left, right) = bytes.split_at(split);
            merges.push(format!("{} {}", written(left), written(right)));
        }
    }
    Ok(GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens: tokens.iter().map(|bytes| written(bytes)).collect(),
        merges,
        ..GgufVocabulary::default()
    })
}

/// Returns where a token is split into the two tokens that it is a merge of, if it is one.
fn halves(bytes: &[u8], rank: u32, ranks: &HashMap<Vec<u8>, u32>) -> Option<usize> {
    // Where each part begins, and where the last one ends.
    let mut bounds: Vec<usize> = (0..=bytes.len()).collect();
    while bounds.len() > 3 {
        let merged = |place: usize| {
            let range = bounds[place]..bounds[place + 2];
            ranks.get(&bytes[range]).filter(|found| **found < rank)
        };
        let pairs = (0..bounds.len() - 2).filter_map(|place| Some((*merged(place)?, place)));
        let (_, best) = pairs.min()?;
        bounds.remove(best + 1);
    }
    let is_earlier = |part: &[u8]| ranks.get(part).is_some_and(|found| *found < rank);
    let (left, right) = bytes.split_at(bounds[1]);
    (is_earlier(left) && is_earlier(right)).then_some(bounds[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tokens: &[&[u8]]) -> String {
        let lines = tokens.iter().zip(0..);
        lines
            .map(|(bytes, rank)| format!("{} {rank}\n", STANDARD.encode(bytes)))
            .collect()
    }

    fn described(text: &str) -> Result<GgufVocabulary, String> {
        let read = read(text.as_bytes(), Path::new("v.tiktoken"), "gpt-2");
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn merges_follow_from_the_ranks() {
        let text = file(&[b"a", b"b", b" ", b"ab", b" a", b" ab", b"abab"]);
        assert!(is_tiktoken(text.as_bytes()));
        let vocabulary = described(&text).unwrap();
        assert_eq!(
            vocabulary.tokens,
            ["a", "b", "Ġ", "ab", "Ġa", "Ġab", "abab"]
        );
        assert_eq!(vocabulary.merges, ["a b", "Ġ a", "Ġ ab", "ab ab"]);
        let unmade = described(&file(&[b"a", b"b", b"abab", b"ac"])).unwrap();
        assert_eq!((unmade.tokens.len(), unmade.merges.len()), (4, 0));
    }

    #[test]
    fn a_broken_file_is_refused_with_the_line() {
        for (text, problem) in [
            ("YQ== 0\n???? 1\n".to_owned(), "in line 2"),
            ("YQ== 0\nYg== 2\n".to_owned(), "in line 2"),
            ("YQ== 0\n 1\n".to_owned(), "in line 2"),
            (file(&[b"a", b"a"]), "occurs again in line 2"),
            (file(&[&[b'a'; 2000]]), "2000 bytes in line 1"),
        ] {
            let error = described(&text).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
        assert!(!is_tiktoken(b"\x0a\x0e\x0a\x05"));
    }
}
