//! Converts the byte-level BPE of a `tokenizer.json` to quell's own, [`ByteLevelBpe`].
//!
//! The tokens are the same as those of the `tokenizers` library, which keeps about a hundred
//! bytes per byte of text while it encodes. A tokenizer with any part that is not known here is
//! left to the library.

use super::byte_level::{ByteLevelBpe, byte_characters};
use super::pre_tokenizer::PreTokenizer;
use super::special::SpecialTokens;
use super::vocabulary::Vocabulary;
use super::{Frame, Model, PlainModel};
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashSet;

/// The parts of a `tokenizer.json` that decide how text is encoded, except for the vocabulary
/// and the post-processor.
#[derive(Deserialize)]
pub(super) struct Description {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Bpe,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    /// Whether the token is searched for in the normalized text between the other tokens.
    normalized: bool,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    ignore_merges: bool,
    merges: Vec<Merge>,
}

/// The two ways of writing a merge.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

impl Description {
    /// Reads the description of a byte-level BPE. Returns `None` if the file describes something
    /// else.
    pub(super) fn read(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// Converts the model. Returns `None` if it does something that is not known here.
    pub(super) fn convert(self, vocabulary: &Vocabulary) -> Option<Model> {
        let composes = composes(&self.normalizer)?;
        let bpe = self.model;
        let affix = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
        if bpe.kind.is_some_and(|kind| kind != "BPE")
            || bpe.dropout.is_some_and(|dropout| dropout > 0.0)
            || affix(&bpe.continuing_subword_prefix)
            || affix(&bpe.end_of_word_suffix)
        {
            return None;
        }
        // A byte without a token could become the unknown token.
        let has_token = |byte: char| vocabulary.id(byte.encode_utf8(&mut [0; 4])).is_some();
        if !byte_characters().all(has_token) {
            return None;
        }
        let mut late = HashSet::new();
        for token in &self.added_tokens {
            if token.single_word || token.lstrip || token.rstrip || (token.normalized && composes) {
                return None;
            }
            if token.normalized {
                late.insert(token.id);
            }
        }
        let specials = SpecialTokens::new(vocabulary, |id| late.contains(&id)).ok()?;
        let pre_tokenizer = PreTokenizer::from_json(&self.pre_tokenizer, bpe.ignore_merges)?;
        let merges: Vec<Cow<'_, str>> = bpe.merges.iter().map(Merge::joined).collect();
        let model = ByteLevelBpe::new(vocabulary, &merges, pre_tokenizer, composes).ok()?;
        Some(Model::Fragments {
            specials: Box::new(specials),
            plain: PlainModel::ByteLevel(Box::new(model)),
        })
    }
}

impl Merge {
    fn joined(&self) -> Cow<'_, str> {
        match self {
            Self::Joined(text) => Cow::Borrowed(text),
            Self::Pair(left, right) => Cow::Owned(format!("{left} {right}")),
        }
    }
}

/// Returns whether a normalizer composes characters (Unicode's form C), or `None` if it does
/// anything else.
fn composes(normalizer: &Value) -> Option<bool> {
    match normalizer["type"].as_str() {
        None => normalizer.is_null().then_some(false),
        Some("NFC") => Some(true),
        Some("Sequence") => match normalizer["normalizers"].as_array()?.as_slice() {
            [] => Some(false),
            [only] => composes(only),
            _ => None,
        },
        Some(_) => None,
    }
}

/// Finds the tokens that the library puts around a text. Returns `None` if these are more than
/// one on a side, or depend on the text.
pub(super) fn frame(tokenizer: &tokenizers::Tokenizer) -> Option<Frame> {
    let encode = |text, framed| tokenizer.encode_fast(text, framed).ok();
    let (plain, framed) = (encode("a", false)?, encode("a", true)?);
    let (plain, framed) = (plain.get_ids(), framed.get_ids());
    if plain.is_empty() {
        return None;
    }
    let at = framed.windows(plain.len()).position(|ids| ids == plain)?;
    let (before, rest) = framed.split_at(at);
    let after = rest.get(plain.len()..)?;
    let around_nothing = encode("", true)?;
    if around_nothing.get_ids() != [before, after].concat() {
        return None;
    }
    let only = |ids: &[u32]| match ids {
        [] => Some(None),
        &[id] => Some(Some(id)),
        _ => None,
    };
    Some(Frame {
        before: only(before)?,
        after: only(after)?,
    })
}

#[cfg(test)]
mod tests {
    use crate::text::tokenizer::{EncodeOptions, Model, Tokenizer};
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::path::Path;
    use std::sync::LazyLock;

    fn fixture() -> Value {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text/folder");
        serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap()
    }

    /// Builds the tokenizer of the fixture with some changes, in quell and in the library.
    fn both(change: impl FnOnce(&mut Value)) -> (Tokenizer, tokenizers::Tokenizer) {
        let mut description = fixture();
        change(&mut description);
        let json = description.to_string();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), &json).unwrap();
        let ours = Tokenizer::from_folder(folder.path()).unwrap();
        (ours, tokenizers::Tokenizer::from_bytes(json).unwrap())
    }

    fn split(pattern: &str) -> Value {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    fn byte_level(use_regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    fn sequence(steps: &[Value]) -> Value {
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const DEEPSEEK3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";

    /// The kinds of tokenizers that models have.
    static KINDS: LazyLock<Vec<(Tokenizer, tokenizers::Tokenizer)>> = LazyLock::new(|| {
        let frame = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}});
        vec![
            both(|_| {}),
            both(|j| {
                j["pre_tokenizer"] = sequence(&[split(LLAMA3), byte_level(false)]);
                j["model"]["ignore_merges"] = true.into();
                j["post_processor"] = frame;
            }),
            // Qwen's.
            both(|j| {
                j["normalizer"] = json!({"type": "NFC"});
                j["pre_tokenizer"] = sequence(&[split(LLAMA3), byte_level(false)]);
                let merges = j["model"]["merges"].as_array_mut().unwrap();
                for merge in merges {
                    let pair = merge.as_array().unwrap();
                    let (left, right) = (pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
                    *merge = format!("{left} {right}").into();
                }
            }),
            // DeepSeek's, in which some of the added tokens are found before the others.
            both(|j| {
                j["normalizer"] = json!({"type": "Sequence", "normalizers": []});
                j["pre_tokenizer"] = sequence(&[
                    split(r"\p{N}{1,3}"),
                    split("[一-龥\u{3040}-ゟ゠-ヿ]+"),
                    split(DEEPSEEK3),
                    byte_level(false),
                ]);
                for token in j["added_tokens"].as_array_mut().unwrap() {
                    let text = token["content"].as_str().unwrap();
                    token["normalized"] = (text.len() % 2 == 0).into();
                }
            }),
            both(|j| {
                let digits = json!({"type": "Digits", "individual_digits": false});
                let literal = json!({"type": "Split", "pattern": {"String": ".a"}, "behavior": "Isolated", "invert": false});
                j["pre_tokenizer"] = sequence(&[digits, literal, byte_level(true)]);
            }),
            both(|j| j["pre_tokenizer"] = byte_level(true)),
        ]
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn a_converted_tokenizer_gives_the_librarys_ids(
            text in "(\\PC{0,4}|[ \t\r\n\u{a0}\u{3000}]{1,4}|[a-z ]{1,12}|e\u{301}\u{327}|가|ᄀ\u{1161}\u{11a8}|漢字|[0-9]{1,5}|\\.a|'(s|LL)|<\\|im_(start|end)\\|>|<tool>|<file_sep>|\\|>|<\\|){0,12}",
            add_special: bool,
            parse_special: bool,
        ) {
            for (index, (ours, library)) in KINDS.iter().enumerate() {
                let mut library = library.clone();
                library.set_encode_special_tokens(!parse_special);
                let expected = library.encode_fast(text.as_str(), add_special).unwrap();
                let options = EncodeOptions { add_special, parse_special };
                prop_assert_eq!(
                    ours.encode(&text, options).unwrap(), expected.get_ids(),
                    "kind {}: {:?}", index, text
                );
            }
        }
    }

    #[test]
    fn the_usual_kinds_do_not_need_the_library() {
        for (index, (ours, _)) in KINDS.iter().enumerate() {
            assert!(
                matches!(ours.model, Model::Fragments { .. }),
                "kind {index}"
            );
        }
    }

    #[test]
    fn what_is_not_known_is_left_to_the_library() {
        let changes: [fn(&mut Value); 11] = [
            |j| j["normalizer"] = json!({"type": "NFKC"}),
            |j| j["added_tokens"][1]["lstrip"] = true.into(),
            |j| j["added_tokens"][1]["single_word"] = true.into(),
            |j| {
                j["normalizer"] = json!({"type": "NFC"});
                j["added_tokens"][1]["normalized"] = true.into();
            },
            |j| j["model"]["end_of_word_suffix"] = "</w>".into(),
            |j| j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(),
            |j| j["pre_tokenizer"] = sequence(&[split(r"a(?=b)"), byte_level(true)]),
            |j| j["pre_tokenizer"] = sequence(&[split(r"\b"), byte_level(true)]),
            |j| j["pre_tokenizer"] = sequence(&[split(r"\s{2}|\s+(?!\S)|\s+"), byte_level(false)]),
            |j| {
                let mut step = split("a");
                step["behavior"] = "Removed".into();
                j["pre_tokenizer"] = sequence(&[step, byte_level(true)]);
            },
            |j| {
                let letter = j["model"]["vocab"]["ĉ"].take();
                let vocabulary = j["model"]["vocab"].as_object_mut().unwrap();
                vocabulary.remove("ĉ");
                vocabulary.insert("replaced".to_owned(), letter);
            },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let (ours, _) = both(change);
            assert!(
                matches!(ours.model, Model::HuggingFace(_)),
                "change {index}"
            );
        }
    }
}
