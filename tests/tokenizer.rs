//! The tokenizer and chat template of SmolLM2 as its GGUF file describes them,
//! against llama.cpp's token ids and transformers' prompts.

#[path = "common/model.rs"]
mod model;

use quell::text::{EncodeOptions, GgufVocabulary, Message, RenderOptions, Tokenizer};
use quell::weights::Gguf;
use serde_json::Value;
use std::path::Path;

const PARSE: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: true,
};
const PLAIN: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: false,
};

fn tokenizer() -> Tokenizer {
    let path = model::smollm2();
    Tokenizer::from_gguf(GgufVocabulary::from_file(&Gguf::open(&path).unwrap()).unwrap()).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root().join("tests/fixtures/text").join(name)).unwrap())
        .unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn every_text_gets_the_references_ids() {
    let tokenizer = tokenizer();
    let file = fixture("smollm2.json");
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 500);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let plain = if case["plain"].is_null() {
            &case["ids"]
        } else {
            &case["plain"]
        };
        assert_eq!(
            tokenizer.encode(text, PARSE).unwrap(),
            ids(&case["ids"]),
            "{text:?}"
        );
        assert_eq!(
            tokenizer.encode(text, PLAIN).unwrap(),
            ids(plain),
            "plain {text:?}"
        );
    }
}

#[test]
fn the_chat_template_writes_the_references_prompts() {
    let tokenizer = tokenizer();
    let template = tokenizer.chat_template().unwrap();
    for case in fixture("smollm2_prompts.json").as_array().unwrap() {
        let prompt = case["text"].as_str().unwrap();
        let encoded = tokenizer.encode(prompt, PARSE).unwrap();
        assert_eq!(encoded, ids(&case["prompt_ids"]), "{prompt:?}");
        if !case["messages"].is_null() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let rendered = template
                .render(&messages, &RenderOptions::default())
                .unwrap();
            assert_eq!(rendered, prompt);
        }
        let generated = ids(&case["generated_ids"]);
        assert_eq!(
            tokenizer.decode(&generated, false),
            case["generated_text"].as_str().unwrap()
        );
    }
}

#[test]
fn the_end_tokens_are_those_of_llama_cpp() {
    assert_eq!(tokenizer().end_tokens(), [0, 2, 4]);
}
