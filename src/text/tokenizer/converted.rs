//! Converts the BPE of a `tokenizer.json` to quell's own, [`ByteLevelBpe`] or [`RankedBpe`].
//!
//! The tokens are the same as those of the `tokenizers` library, which keeps about a hundred
//! bytes per byte of text while it encodes. A tokenizer with any part that is not known here is
//! left to the library.

use super::byte_level::{ByteLevelBpe, byte_characters};
use super::pre_tokenizer::PreTokenizer;
use super::ranked::{RankedBpe, SpacePrefix};
use super::sentencepiece::SPACE;
use super::special::{Search, SpecialToken, SpecialTokens};
use super::{Frame, Model, PlainModel};
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;

/// The parts of a `tokenizer.json` that decide how text is encoded, except for the vocabulary
/// and the post-processor.
#[derive(Deserialize)]
pub(super) struct Description {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: Bpe,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    /// Whether characters without a token are written as bytes.
    #[serde(default)]
    byte_fallback: bool,
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
    /// Reads the description of a BPE. Returns `None` if the file describes something else.
    pub(super) fn read(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// Converts the model, which `library` has read from the same file. Returns `None` if it does
    /// something that is not known here.
    pub(super) fn convert(self, library: &tokenizers::Tokenizer) -> Option<Model> {
        let added = library.get_added_tokens_decoder();
        // Late tokens are searched for in the normalized text, and their own text is normalized.
        let known = |token: &tokenizers::AddedToken| {
            !token.single_word && (!token.normalized || does_nothing(&self.normalizer))
        };
        if !added.values().all(known) {
            return None;
        }
        let named = added.iter().filter(|(_, token)| !token.content.is_empty());
        let specials: Vec<SpecialToken<'_>> = named
            .map(|(&id, token)| SpecialToken {
                id,
                text: &token.content,
                search: Search {
                    special: token.special,
                    late: token.normalized,
                    absorbs_before: token.lstrip,
                    absorbs_after: token.rstrip,
                },
            })
            .collect();
        Some(Model::Fragments {
            specials: Box::new(SpecialTokens::added(&specials).ok()?),
            plain: self.plain(&library.get_vocab(false))?,
        })
    }

    /// Converts what becomes of plain text. `vocabulary` is that of the model.
    fn plain(&self, vocabulary: &HashMap<String, u32>) -> Option<PlainModel> {
        let bpe = &self.model;
        let affix = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
        if bpe.kind.as_deref().is_some_and(|kind| kind != "BPE")
            || bpe.dropout.is_some_and(|dropout| dropout > 0.0)
            || affix(&bpe.continuing_subword_prefix)
            || affix(&bpe.end_of_word_suffix)
        {
            return None;
        }
        let merges: Vec<Cow<'_, str>> = bpe.merges.iter().map(Merge::joined).collect();
        if bpe.byte_fallback && !bpe.ignore_merges {
            let (prefix, splits_spaces) = self.spaces()?;
            let model = RankedBpe::new(vocabulary, &merges, prefix, splits_spaces)?;
            return Some(PlainModel::Ranked(Box::new(model)));
        }
        // A byte without a token could become the unknown token.
        let has_token = |byte: char| vocabulary.contains_key(byte.encode_utf8(&mut [0; 4]) as &str);
        if !byte_characters().all(has_token) {
            return None;
        }
        let composes = composes(&self.normalizer)?;
        let pre_tokenizer = PreTokenizer::from_json(&self.pre_tokenizer, bpe.ignore_merges)?;
        let model = ByteLevelBpe::new(vocabulary, &merges, pre_tokenizer, composes).ok()?;
        Some(PlainModel::ByteLevel(Box::new(model)))
    }

    /// Returns where a SentencePiece model adds spaces, and whether each space begins a word.
    fn spaces(&self) -> Option<(SpacePrefix, bool)> {
        let before = &self.pre_tokenizer;
        if does_nothing(&self.normalizer) {
            if before["type"] != "Metaspace" || before["replacement"] != SPACE {
                return None;
            }
            let prefix = match before["prepend_scheme"].as_str() {
                _ if before["add_prefix_space"] == false => SpacePrefix::Never,
                Some("always") | None => SpacePrefix::Each,
                Some("first") => SpacePrefix::First,
                Some("never") => SpacePrefix::Never,
                Some(_) => return None,
            };
            return Some((prefix, before["split"].as_bool().unwrap_or(true)));
        }
        // Gemma's finds nothing, because the spaces have been replaced.
        let finds_nothing = before["type"] == "Split"
            && before["pattern"]["String"] == " "
            && before["invert"] == false;
        if !before.is_null() && !finds_nothing {
            return None;
        }
        let replaces = |step: &Value| {
            step["type"] == "Replace"
                && step["pattern"]["String"] == " "
                && step["content"] == SPACE
        };
        let prefix = match self.normalizer["normalizers"].as_array().map(Vec::as_slice) {
            None if replaces(&self.normalizer) => SpacePrefix::Never,
            Some([step]) if replaces(step) => SpacePrefix::Never,
            Some([first, step])
                if first["type"] == "Prepend" && first["prepend"] == SPACE && replaces(step) =>
            {
                SpacePrefix::Always
            }
            _ => return None,
        };
        Some((prefix, false))
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

/// Returns whether there is no normalizer, or one without steps.
fn does_nothing(normalizer: &Value) -> bool {
    normalizer.is_null()
        || normalizer["normalizers"]
            .as_array()
            .is_some_and(Vec::is_empty)
}

/// Returns whether a normalizer composes characters (Unicode's form C), or `None` if it does
/// anything else.
fn composes(normalizer: &Value) -> Option<bool> {
    if does_nothing(normalizer) {
        return Some(false);
    }
    match normalizer["normalizers"].as_array().map(Vec::as_slice) {
        Some([only]) => composes(only),
        Some(_) => None,
        None => (normalizer["type"] == "NFC").then_some(true),
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
        built(fixture(), change)
    }

    /// Turns the fixture into a SentencePiece model, with the merges of the same words.
    fn sentencepiece(change: impl FnOnce(&mut Value)) -> (Tokenizer, tokenizers::Tokenizer) {
        let mut description = fixture();
        let added = description["added_tokens"].as_array().unwrap();
        let mut tokens: Vec<String> = (added.iter())
            .map(|token| token["content"].as_str().unwrap().to_owned())
            .collect();
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(('a'..='z').chain(['▁', 'é', '漢']).map(String::from));
        let mut merges = vec![json!(["▁", "▁"]), json!(["▁▁", "▁▁"])];
        tokens.extend(["▁▁", "▁▁▁▁"].map(String::from));
        for merge in description["model"]["merges"].as_array().unwrap() {
            let part = |index: usize| merge[index].as_str().unwrap().replace('Ġ', "▁");
            let (left, right) = (part(0), part(1));
            if tokens.contains(&left) && tokens.contains(&right) && !right.starts_with('▁') {
                merges.push(json!([left, right]));
                tokens.push(left + &right);
            }
        }
        assert!(merges.len() > 100);
        let model = &mut description["model"];
        model["byte_fallback"] = true.into();
        model["fuse_unk"] = true.into();
        model["vocab"] = tokens.into_iter().zip(0..).collect::<Value>();
        model["merges"] = merges.into();
        description["decoder"] = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]});
        description["pre_tokenizer"] = Value::Null;
        built(description, change)
    }

    fn metaspace(scheme: &str, split: bool) -> Value {
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split})
    }

    fn built(
        mut description: Value,
        change: impl FnOnce(&mut Value),
    ) -> (Tokenizer, tokenizers::Tokenizer) {
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
            // Tokens that end an answer but are not special, and one that a special one contains.
            both(|j| {
                let added = j["added_tokens"].as_array_mut().unwrap();
                for token in added.iter_mut() {
                    if token["content"] == "<|im_end|>" {
                        token["special"] = false.into();
                    }
                }
                let mut inner = added[0].clone();
                inner["content"] = "im_start".into();
                inner["special"] = false.into();
                inner["id"] = 9000.into();
                added.push(inner);
                j["model"]["ignore_merges"] = true.into();
            }),
            // Tokens that absorb the white space next to them, as Phi 3's do.
            both(|j| {
                for (index, token) in j["added_tokens"]
                    .as_array_mut()
                    .unwrap()
                    .iter_mut()
                    .enumerate()
                {
                    token["rstrip"] = (index % 2 == 1).into();
                    token["lstrip"] = (index % 3 == 1).into();
                }
            }),
            // Llama 2's and Gemma's, and the newer form of the former.
            sentencepiece(|j| {
                j["normalizer"] = json!({"type": "Sequence", "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
            }),
            sentencepiece(|j| {
                j["normalizer"] =
                    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
                j["pre_tokenizer"] = json!({"type": "Split", "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious", "invert": false});
            }),
            sentencepiece(|j| j["pre_tokenizer"] = metaspace("first", false)),
            sentencepiece(|j| j["pre_tokenizer"] = metaspace("always", true)),
            sentencepiece(|j| j["pre_tokenizer"] = metaspace("never", false)),
            // A token of one character that the model has, too.
            sentencepiece(|j| {
                j["pre_tokenizer"] = metaspace("first", false);
                let mut space = j["added_tokens"][0].clone();
                space["content"] = "▁".into();
                space["id"] = j["model"]["vocab"]["▁"].clone();
                j["added_tokens"].as_array_mut().unwrap().push(space);
            }),
        ]
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn a_converted_tokenizer_gives_the_librarys_ids(
            text in "(\\PC{0,4}|[ \t\r\n\u{a0}\u{3000}]{1,4}|[a-z ]{1,12}|( the| and| of){1,3}|▁{1,3}|e\u{301}\u{327}|가|ᄀ\u{1161}\u{11a8}|漢字|[0-9]{1,5}|\\.a|'(s|LL)|<\\|im_(start|end)\\|>|<tool>|<file_sep>|\\|>|<\\|){0,12}",
            add_special: bool,
            parse_special: bool,
        ) {
            for (index, (ours, library)) in KINDS.iter().enumerate() {
                let mut library = library.clone();
                library.set_encode_special_tokens(!parse_special);
                let expected = library.encode_fast(text.as_str(), add_special).unwrap();
                let options = EncodeOptions { add_special, parse_special };
                let found = ours.encode(&text, options).unwrap();
                prop_assert_eq!(&found, expected.get_ids(), "kind {}: {:?}", index, text);
                let least = ours.min_tokens([text.as_str()]);
                prop_assert!(least <= found.len(), "kind {}: {:?}", index, text);
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
        let changes: [fn(&mut Value); 12] = [
            |j| j["normalizer"] = json!({"type": "NFKC"}),
            |j| j["added_tokens"][1]["single_word"] = true.into(),
            |j| {
                j["normalizer"] = json!({"type": "NFC"});
                j["added_tokens"][1]["normalized"] = true.into();
            },
            |j| j["model"]["end_of_word_suffix"] = "</w>".into(),
            |j| j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(),
            |j| j["pre_tokenizer"] = sequence(&[split(r"a(?=b)"), byte_level(true)]),
            |j| j["pre_tokenizer"] = sequence(&[split(r"\b"), byte_level(true)]),
            |j| j["pre_tokenizer"] = sequence(&[split(r" ?+\p{L}"), byte_level(true)]),
            |j| j["pre_tokenizer"] = sequence(&[split(r"\p{N}{1,3}+"), byte_level(true)]),
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
