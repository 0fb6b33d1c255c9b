//! Compares the tokenizer and chat template in SmolLM2's GGUF file with llama.cpp's token ids
//! and transformers' prompts, and the chat templates of other models with jinja2.

use common::clients::{installed, script};
use common::{model, root};
use quell::internals::text::GgufVocabulary;
use quell::internals::weights::Gguf;
use quell::{ChatTemplate, EncodeOptions, Message, RenderOptions, Tokenizer};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, UNIX_EPOCH};

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
    let vocabulary = GgufVocabulary::from_file(&Gguf::open(&path).unwrap()).unwrap();
    vocabulary.into_tokenizer().unwrap()
}

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root().join("tests/fixtures/text").join(name)).unwrap())
        .unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn every_text_is_tokenized_like_the_reference() {
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
fn the_chat_template_renders_the_references_prompts() {
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
fn end_tokens_equal_those_of_llama_cpp() {
    assert_eq!(tokenizer().end_tokens(), [0, 2, 4]);
}

/// Intended differences from jinja2: the template, or `*` for all of them, the conversation,
/// and the reason.
const MEANT: [(&str, &str, &str); 5] = [
    (
        "*",
        "null",
        "an answer of tool calls only has null content; the template is given an empty text, \
         unless that leaves the calls out, so that it never renders \"None\"",
    ),
    (DISTILLED[0], "call", DISTILLED_WHY),
    (DISTILLED[0], "calls", DISTILLED_WHY),
    (DISTILLED[1], "call", DISTILLED_WHY),
    (DISTILLED[1], "calls", DISTILLED_WHY),
];

const DISTILLED: [&str; 2] = [
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
];
const DISTILLED_WHY: &str = "if the content is empty but not null, jinja2 leaves out the calls \
    or writes one more empty answer";

#[derive(serde::Deserialize)]
struct Case {
    template: String,
    conversation: String,
    messages: Vec<Message>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    variables: Map<String, Value>,
    /// What jinja2 renders. Nothing if it fails.
    expected: Option<String>,
}

/// Renders twelve conversations with each template that `scripts/fetch-templates` has fetched.
#[test]
fn chat_templates_of_other_models_render_like_jinja2() {
    let folder = root().join("target/chat-templates");
    let hint = "run scripts/fetch-templates and scripts/setup-clients";
    assert!(folder.join("package").exists(), "{hint}");
    let output = installed("python")
        .arg(script("chat_templates.py"))
        .arg(&folder)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{hint}: {errors}");
    let cases: Vec<Case> = serde_json::from_slice(&output.stdout).unwrap();
    let mut templates: BTreeMap<String, ChatTemplate> = BTreeMap::new();
    let (mut same, mut different) = (0, Vec::new());
    for case in &cases {
        let template = templates.entry(case.template.clone()).or_insert_with(|| {
            let path = folder.join(format!("{}.jinja", case.template));
            let source = std::fs::read_to_string(path).unwrap();
            ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap()
        });
        let options = RenderOptions {
            add_generation_prompt: case.add_generation_prompt,
            tools: case.tools.clone(),
            extra: case.variables.clone(),
            now: Some(UNIX_EPOCH + Duration::from_secs(86_400)),
            ..RenderOptions::default()
        };
        let Some(expected) = &case.expected else {
            continue;
        };
        match template.apply(&case.messages, &options) {
            Ok(rendered) if rendered == *expected => same += 1,
            rendered => different.push((case, rendered)),
        }
    }
    let meant = |case: &Case| {
        MEANT.iter().any(|(template, conversation, _)| {
            (*template == "*" || *template == case.template) && *conversation == case.conversation
        })
    };
    different.retain(|(case, _)| !meant(case));
    for (case, rendered) in &different {
        let (template, conversation) = (&case.template, &case.conversation);
        println!(
            "{template}, {conversation}:\n{:?}\n{rendered:?}\n",
            case.expected
        );
    }
    let names: BTreeSet<&str> = different.iter().map(|(case, _)| &*case.template).collect();
    assert!(names.is_empty(), "these differ: {names:?}");
    assert_eq!((templates.len(), cases.len()), (70, 840));
    assert!(same > 740, "only {same} were compared");
}

/// Whether a template renders tools and calls is determined by rendering samples.
#[test]
fn tool_support_of_chat_templates_is_detected() {
    let folder = root().join("target/chat-templates");
    let known = |name: &str| {
        let path = folder.join(format!("{name}.jinja"));
        let source = std::fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("{}: {error}; run scripts/fetch-templates", path.display())
        });
        let template = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap();
        (template.knows_tools(), template.knows_calls())
    };
    for name in [
        "Qwen3-Coder",
        "Qwen-Qwen3-0.6B",
        "meta-llama-Llama-3.1-8B-Instruct",
    ] {
        assert_eq!(known(name), (true, true), "{name}");
    }
    for name in ["google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"] {
        assert_eq!(known(name), (false, false), "{name}");
    }
    let distilled = "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B";
    assert_eq!(known(distilled), (false, true), "{distilled}");
}
