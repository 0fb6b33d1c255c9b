//! Tests of whole tokenizers: small ones compared with llama.cpp's results, and broken ones.

use super::*;
use crate::text::*;
use proptest::prelude::*;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

const PARSE: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: true,
};
const PLAIN: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: false,
};
const FRAMED: EncodeOptions = EncodeOptions {
    add_special: true,
    parse_special: true,
};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text")
}

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

fn vocabulary(name: &str) -> GgufVocabulary {
    let file = fixture(name);
    let read = |key: &str| file["vocabulary"][key].clone();
    let strings = |key: &str| serde_json::from_value(read(key)).unwrap_or_default();
    GgufVocabulary {
        model: serde_json::from_value(read("model")).unwrap(),
        pre: serde_json::from_value(read("pre")).unwrap(),
        tokens: strings("tokens"),
        merges: strings("merges"),
        scores: serde_json::from_value(read("scores")).unwrap_or_default(),
        token_types: serde_json::from_value(read("token_types")).unwrap(),
        bos: serde_json::from_value(read("bos")).unwrap(),
        eos: serde_json::from_value(read("eos")).unwrap(),
        ..GgufVocabulary::default()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

static BYTE_LEVEL: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(vocabulary("byte_level_bpe.json").into_tokenizer().unwrap()));

static SCORED: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(vocabulary("scored_bpe.json").into_tokenizer().unwrap()));

static FOLDER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_folder(&fixtures().join("folder")).unwrap()));

#[test]
fn byte_level_bpe_gives_the_references_ids_from_either_kind_of_file() {
    for case in fixture("byte_level_bpe.json")["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let plain = if case["plain"].is_null() {
            &case["ids"]
        } else {
            &case["plain"]
        };
        for tokenizer in [&*BYTE_LEVEL, &*FOLDER] {
            let parsed = tokenizer.encode(text, PARSE).unwrap();
            assert_eq!(parsed, ids(&case["ids"]), "{text:?}");
            assert_eq!(
                tokenizer.encode(text, PLAIN).unwrap(),
                ids(plain),
                "plain {text:?}"
            );
            assert_eq!(tokenizer.decode(&parsed, false), text);
        }
    }
}

#[test]
fn scored_bpe_gives_the_references_ids() {
    let mut bare = vocabulary("scored_bpe.json");
    bare.add_space_prefix = Some(false);
    let bare = bare.into_tokenizer().unwrap();
    let mut decoded = 0;
    for case in fixture("scored_bpe.json")["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let parsed = bare.encode(text, PARSE).unwrap();
        assert_eq!(parsed, ids(&case["ids"]), "{text:?}");
        assert_eq!(
            SCORED.encode(text, PARSE).unwrap(),
            ids(&case["prefixed"]),
            "{text:?}"
        );
        // In plain text, the reference reads "<0x0A>" as the byte that it names.
        if !text.contains("<0x") {
            assert_eq!(
                bare.encode(text, PLAIN).unwrap(),
                ids(&case["plain"]),
                "plain {text:?}"
            );
            let prefixed = SCORED.encode(text, PLAIN).unwrap();
            assert_eq!(prefixed, ids(&case["prefixed_plain"]), "plain {text:?}");
        }
        if !text.contains('\u{2581}') {
            assert_eq!(bare.decode(&parsed, false), text);
            // The tokenizer adds a space before a word that follows a user-defined token.
            if !text.contains("<tag>") {
                let prefixed = SCORED.encode(text, PLAIN).unwrap();
                assert_eq!(SCORED.decode(&prefixed, false), text);
            }
            decoded += 1;
        }
    }
    assert!(decoded > 200);
}

#[test]
fn bytes_tell_how_many_tokens_a_text_has_at_least() {
    // Byte 1 gets no token, and is dropped.
    let mut lacking = vocabulary("byte_level_bpe.json");
    let token = lacking.tokens.iter_mut().find(|token| *token == "\u{101}");
    *token.unwrap() = "<lacking>".to_owned();
    let lacking = lacking.into_tokenizer().unwrap();
    assert!(lacking.encode("\u{1}", PLAIN).unwrap().is_empty());
    for tokenizer in [&lacking, &BYTE_LEVEL, &FOLDER, &SCORED] {
        for text in ["\u{1}", "word ", "\u{e9}\u{1}\n"].map(|text| text.repeat(500)) {
            let tokens = tokenizer.encode(&text, PARSE).unwrap().len();
            let least = tokenizer.min_tokens([text.as_str()]);
            assert!(least <= tokens, "{text:.8?}: {least} > {tokens}");
            // It makes no difference how the text is divided.
            let (one, other) = text.split_at(100);
            assert_eq!(tokenizer.min_tokens([one, other]), least);
        }
    }
    assert!(BYTE_LEVEL.min_tokens(["word ".repeat(500).as_str()]) > 20);
    assert_eq!(lacking.min_tokens(["\u{1}\u{1}"]), 0);
}

#[test]
fn special_tokens_frame_a_text_as_the_model_wants() {
    let encoded = SCORED.encode("a", FRAMED).unwrap();
    assert_eq!(encoded[0], 1);
    assert_eq!(SCORED.decode(&encoded, true), "a");
    assert_eq!(
        BYTE_LEVEL.encode("a", FRAMED).unwrap(),
        BYTE_LEVEL.encode("a", PARSE).unwrap()
    );
    let mut vocabulary = vocabulary("scored_bpe.json");
    vocabulary.add_bos = Some(false);
    vocabulary.add_eos = Some(true);
    let encoded = vocabulary
        .into_tokenizer()
        .unwrap()
        .encode("", FRAMED)
        .unwrap();
    assert_eq!(encoded, [2]);
}

#[test]
fn control_tokens_come_from_parsed_text_only_and_can_be_skipped() {
    for tokenizer in [&*BYTE_LEVEL, &*FOLDER] {
        let text = "<|im_start|>user<|im_end|>";
        let parsed = tokenizer.encode(text, PARSE).unwrap();
        assert_eq!((parsed[0], parsed.last()), (1, Some(&2)));
        assert_eq!(tokenizer.decode(&parsed, true), "user");
        let plain = tokenizer.encode(text, PLAIN).unwrap();
        assert!(plain.iter().all(|&id| !tokenizer.is_special(id)));
        assert_eq!(tokenizer.decode(&plain, true), text);
        assert_eq!(tokenizer.encode("<tool>", PLAIN).unwrap().len(), 1);
        assert_eq!(tokenizer.end_tokens(), [0, 2, 4]);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    }
}

#[test]
fn a_token_gives_its_bytes_even_where_they_are_half_a_character() {
    let euro = BYTE_LEVEL.encode("€", PLAIN).unwrap();
    assert!(euro.len() > 1);
    for tokenizer in [&*BYTE_LEVEL, &*FOLDER] {
        let bytes: Vec<u8> = euro
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id).unwrap())
            .copied()
            .collect();
        assert_eq!(bytes, "€".as_bytes());
    }
    assert_eq!(SCORED.token_bytes(4 + 0xE2), Some(&[0xE2][..]));
    let size = SCORED.vocabulary_size() as u32;
    assert_eq!(
        (SCORED.token_bytes(size), SCORED.token_text(size)),
        (None, None)
    );
    assert_eq!(SCORED.decode(&[size, u32::MAX], false), "\u{FFFD}\u{FFFD}");
    assert_eq!(SCORED.id_of("<tag>"), Some(3));
}

#[test]
fn a_folder_gives_its_default_chat_template() {
    let template = FOLDER.chat_template().unwrap();
    let prompt = template
        .render(&[Message::new("user", "hi")], &RenderOptions::default())
        .unwrap();
    assert!(
        prompt.ends_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        "{prompt}"
    );
}

#[test]
fn an_answer_keeps_the_space_that_it_begins_with() {
    let prompt = SCORED.encode("the", FRAMED).unwrap();
    let answer = SCORED
        .encode("the cat", FRAMED)
        .unwrap()
        .split_off(prompt.len());
    assert!(
        SCORED.decode(&answer, true).starts_with("cat"),
        "{answer:?}"
    );
    let continued = |prompt: &[u32]| {
        let mut detokenizer = Detokenizer::after(prompt, SCORED.clone(), true);
        let mut text: String = answer.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.finish());
        text
    };
    assert_eq!(continued(&prompt), " cat");
    // After a special token, or without a prompt, a new text begins.
    assert_eq!(continued(&prompt[..1]), "cat");
    assert_eq!(continued(&[]), "cat");
}

#[test]
fn a_prompt_comes_back_as_it_was_sent() {
    for tokenizer in [&*SCORED, &*BYTE_LEVEL, &*FOLDER] {
        for text in ["the", " the cat  ", "", "a é\n漢"] {
            let prompt = tokenizer.encode(text, FRAMED).unwrap();
            assert_eq!(tokenizer.decode_prompt(&prompt), text);
            let bare = tokenizer.encode(text, PLAIN).unwrap();
            assert_eq!(tokenizer.decode_prompt(&bare), text);
        }
    }
    // Special tokens that are part of the text itself are kept.
    let prompt = SCORED.encode("the</s>", FRAMED).unwrap();
    assert_eq!(SCORED.decode_prompt(&prompt), "the</s>");
    let prompt = BYTE_LEVEL
        .encode("<|im_start|>user<|im_end|>", FRAMED)
        .unwrap();
    assert_eq!(
        BYTE_LEVEL.decode_prompt(&prompt),
        "<|im_start|>user<|im_end|>"
    );
}

#[test]
fn the_template_for_tools_is_found_in_every_kind_of_file() {
    let template = FOLDER.chat_template().unwrap();
    assert_eq!(template.variant(true).source(), "unused");
    let mut gguf = vocabulary("byte_level_bpe.json");
    gguf.chat_template = Some("D".to_owned());
    gguf.tool_use_template = Some("U".to_owned());
    let tokenizer = gguf.into_tokenizer().unwrap();
    assert_eq!(
        tokenizer.chat_template().unwrap().variant(true).source(),
        "U"
    );
    assert_eq!(
        tokenizer.chat_template().unwrap().variant(false).source(),
        "D"
    );

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), LLAMA2_JSON).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "D").unwrap();
    let more = folder.path().join("additional_chat_templates");
    std::fs::create_dir(&more).unwrap();
    std::fs::write(more.join("tool_use.jinja"), "U").unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(
        tokenizer.chat_template().unwrap().variant(true).source(),
        "U"
    );
}

#[test]
fn a_unigram_model_puts_its_space_before_words_only() {
    let mut description = vocabulary("scored_bpe.json");
    description.model = "t5".to_owned();
    let encode = |description: &GgufVocabulary, text: &str| {
        let tokenizer = description.clone().into_tokenizer().unwrap();
        let encoded = tokenizer.encode(text, FRAMED).unwrap();
        assert_eq!(encoded.last(), Some(&2));
        let words: Vec<_> = encoded
            .iter()
            .filter_map(|&id| tokenizer.token_bytes(id))
            .collect();
        String::from_utf8_lossy(&words.concat()).replace("</s>", "")
    };
    assert_eq!(encode(&description, "a  b漢\u{1F680}"), " a  b漢\u{1F680}");
    assert_eq!(encode(&description, "  "), "  ");
    description.remove_extra_whitespaces = Some(true);
    assert_eq!(encode(&description, "  a  b "), " a b");
}

#[test]
fn long_texts_take_time_in_proportion() {
    for unit in ["a", " ", "\n", "the cat ", "漢", "A1 "] {
        let text = unit.repeat(100_000 / unit.len());
        for tokenizer in [&*BYTE_LEVEL, &*SCORED] {
            let encoded = tokenizer.encode(&text, PLAIN).unwrap();
            assert_eq!(tokenizer.decode(&encoded, false), text);
        }
    }
}

/// Returns the error for a description that one change made invalid.
fn refusal(fixture: &str, change: impl FnOnce(&mut GgufVocabulary)) -> String {
    let mut vocabulary = vocabulary(fixture);
    change(&mut vocabulary);
    vocabulary.into_tokenizer().unwrap_err().to_string()
}

#[test]
fn a_broken_description_is_refused_with_what_is_wrong() {
    let bpe = "byte_level_bpe.json";
    let scored = "scored_bpe.json";
    let cases = [
        (refusal(bpe, |v| v.tokens.clear()), "vocabulary is empty"),
        (
            refusal(bpe, |v| v.model = "rwkv".into()),
            "tokenizer model is \"rwkv\", expected gpt2",
        ),
        (
            refusal(bpe, |v| v.pre = Some("xyz".into())),
            "pre-tokenizer is \"xyz\", expected one of default",
        ),
        (
            refusal(bpe, |v| v.merges[3] = "ab".into()),
            "merge 3 is \"ab\"",
        ),
        (
            refusal(bpe, |v| v.merges[3] = "a b c".into()),
            "merge 3 is \"a b c\"",
        ),
        (
            refusal(bpe, |v| v.merges[3] = "Q 漢".into()),
            "needs token \"漢\"",
        ),
        (
            refusal(bpe, |v| v.merges[3] = "Q Q".into()),
            "needs token \"QQ\"",
        ),
        (
            refusal(bpe, |v| v.tokens[40] = v.tokens[30].clone()),
            "tokens 30 and 40 are both",
        ),
        (refusal(bpe, |v| v.token_types[5] = 9), "token 5 has type 9"),
        (
            refusal(bpe, |v| v.bos = Some(99_999)),
            "bos is 99999, expected an id below",
        ),
        (
            refusal(bpe, |v| (v.bos, v.add_bos) = (None, Some(true))),
            "defines no such token",
        ),
        (
            refusal(bpe, |v| v.chat_template = Some("\n{% if".into())),
            "chat template, line 2",
        ),
        (
            refusal(bpe, |v| v.tokens[400] = "x".repeat(5000)),
            "5000 bytes long",
        ),
        (
            refusal(scored, |v| v.scores.truncate(9)),
            "list scores has 9 entries",
        ),
        (
            refusal(scored, |v| v.token_types.push(1)),
            "list token_types has",
        ),
        (
            refusal(scored, |v| v.scores[7] = f32::NAN),
            "token 7 has score NaN",
        ),
        (
            refusal(scored, |v| v.tokens[9] = "<0x5>".into()),
            "byte token 9 is \"<0x5>\"",
        ),
    ];
    for (message, part) in cases {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn a_folder_without_a_tokenizer_or_with_a_broken_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err();
    assert!(matches!(error, TextError::Read { .. }), "{error}");
    std::fs::write(folder.path().join("tokenizer.json"), "{\"model\": 1}").unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err();
    assert!(matches!(error, TextError::File { .. }), "{error}");
}

/// SentencePiece-like `tokenizer.json`, in the form that Llama 2 uses.
const LLAMA2_JSON: &str = r#"{"version":"1.0","truncation":{"max_length":2,"strategy":"LongestFirst","stride":0,"direction":"Right"},
"added_tokens":[{"id":0,"content":"<s>","special":true,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false}],
"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
"model":{"type":"BPE","byte_fallback":true,"fuse_unk":true,"unk_token":"<unk>","vocab":{"<s>":0,"<unk>":1,"<0xC3>":2,"<0xA9>":3,"▁":4,"a":5,"b":6,"▁a":9},"merges":["▁ a"]}}"#;

#[test]
fn a_folder_of_llama_2s_kind_falls_back_to_bytes_and_strips_its_space() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), LLAMA2_JSON).unwrap();
    let config = r#"{"tokenizer_class":"LlamaTokenizer","bos_token":"<s>","add_bos_token":true}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let encoded = tokenizer.encode("a éb a", FRAMED).unwrap();
    assert_eq!(encoded, [0, 9, 4, 2, 3, 6, 9]);
    assert_eq!(tokenizer.decode(&encoded, true), "a éb a");
    assert_eq!(tokenizer.decode(&encoded, false), "<s> a éb a");
    assert_eq!(tokenizer.decode(&[2, 9], true), "\u{FFFD} a");
    assert_eq!(
        (tokenizer.vocabulary_size(), tokenizer.token_text(7)),
        (10, None)
    );
}

#[test]
fn a_decoder_that_is_not_understood_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = LLAMA2_JSON.replace(
        r#"{"type":"Fuse"}"#,
        r#"{"type":"BPEDecoder","suffix":"</w>"}"#,
    );
    std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
    let error = Tokenizer::from_folder(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("BPEDecoder") && error.contains("expected ByteLevel"),
        "{error}"
    );
}

pub(in crate::text) fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[ab ▁é<>|s0x\n]{0,40}",
        "(<s>|<\\|end\\|>|<tag>|<\\|im_end\\|>|the| |€)*"
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_text_comes_back_from_a_byte_level_tokenizer(text in any_text(), parse_special: bool) {
        for tokenizer in [&*BYTE_LEVEL, &*FOLDER] {
            let encoded = tokenizer.encode(&text, EncodeOptions { add_special: false, parse_special }).unwrap();
            prop_assert_eq!(tokenizer.decode(&encoded, false), &*text);
        }
    }

    #[test]
    fn pieces_of_any_ids_are_the_decoding_of_the_whole(
        ids in proptest::collection::vec(0..1700u32, 0..40),
        skip_special: bool,
    ) {
        for tokenizer in [&*BYTE_LEVEL, &*SCORED] {
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special);
            for _ in 0..2 {
                let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
                text.push_str(&detokenizer.finish());
                prop_assert_eq!(text, tokenizer.decode(&ids, skip_special));
            }
        }
    }
}
