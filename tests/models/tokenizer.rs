//! Compares the tokenizer and chat template in SmolLM2's GGUF file with llama.cpp's token ids
//! and transformers' prompts, and the chat templates of other models with jinja2.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::clients::{installed, script};
use common::{model, root};
use quell::internals::text::GgufVocabulary;
use quell::internals::weights::Gguf;
use quell::{
    ChatTemplate, EncodeOptions, HarmonyEvent, HarmonyParser, Message, RenderOptions, TextError,
    Tokenizer, ToolDeclaration, ToolEvent, ToolFormat, ToolParser,
};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, UNIX_EPOCH};
use tempfile::TempDir;

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

/// Stands between the texts of a vocabulary.
const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

/// Reads the vocabularies that `scripts/fetch-references` has fetched, and their texts.
#[test]
fn every_text_of_llama_cpps_vocabularies_has_its_ids() {
    let folder = root().join("target/references/vocabularies");
    assert!(folder.exists(), "run scripts/fetch-references");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "inp"))
        .collect();
    files.sort();
    let (mut different, mut compared) = (Vec::new(), 0);
    for texts in &files {
        let name = texts.file_stem().unwrap().to_str().unwrap();
        let (vocabulary, texts) = reference(name);
        let tokenizer = match vocabulary.into_tokenizer() {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                different.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (text, expected) in texts {
            let found = tokenizer.encode(&text, PLAIN);
            compared += 1;
            if found.as_ref().ok() != Some(&expected) {
                different.push(format!("{name}: {text:?} is {found:?}, not {expected:?}"));
            }
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    assert_eq!((files.len(), compared), (15, 694));
}

/// Reads a vocabulary that `scripts/fetch-references` has fetched, and its texts with their ids.
fn reference(name: &str) -> (GgufVocabulary, Vec<(String, Vec<u32>)>) {
    let path = root().join("target/references/vocabularies").join(name);
    let file = Gguf::open(&path).expect("run scripts/fetch-references");
    let beside = |end: &str| {
        let path = path.with_file_name(format!("{name}.{end}"));
        std::fs::read_to_string(path).unwrap()
    };
    let (texts, ids) = (beside("inp"), beside("out"));
    // Most files have a separator after the last text as well.
    let texts = texts.strip_suffix(SEPARATOR).unwrap_or(&texts);
    let texts: Vec<_> = texts.split(SEPARATOR).map(str::to_owned).collect();
    assert_eq!(texts.len(), ids.lines().count(), "{name}");
    let ids = ids.lines().map(|line| {
        let ids = line.split_whitespace().map(|id| id.parse().unwrap());
        ids.collect()
    });
    let texts = texts.into_iter().zip(ids).collect();
    (GgufVocabulary::from_file(&file).unwrap(), texts)
}

/// Writes the folder of a model without `tokenizer.json`.
fn original_folder(name: &str, bytes: &[u8], model_type: &str, special: &[(u32, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let added: Map<_, _> = (special.iter())
        .map(|(id, text)| (id.to_string(), json!({"content": text, "special": true})))
        .collect();
    let config = json!({"added_tokens_decoder": added, "bos_token": special[0].1});
    for (name, bytes) in [
        (name, bytes),
        ("tokenizer_config.json", config.to_string().as_bytes()),
        (
            "config.json",
            json!({"model_type": model_type}).to_string().as_bytes(),
        ),
    ] {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn require_ids(tokenizer: &Tokenizer, texts: &[(String, Vec<u32>)]) {
    assert!(texts.len() > 40);
    for (text, ids) in texts {
        assert_eq!(&tokenizer.encode(text, PLAIN).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn a_vocabulary_of_tiktoken_has_the_ids_of_the_same_gguf_file() {
    for (name, file, model_type) in [
        ("ggml-vocab-qwen2.gguf", "qwen.tiktoken", "qwen2"),
        ("ggml-vocab-llama-bpe.gguf", "tokenizer.model", "llama"),
    ] {
        let (vocabulary, texts) = reference(name);
        let tokens = vocabulary.tokens.clone();
        let types = vocabulary.token_types.clone();
        let tokenizer = vocabulary.into_tokenizer().unwrap();
        let ranks = types.iter().take_while(|kind| **kind == 1).count();
        let mut lines = String::new();
        for rank in 0..u32::try_from(ranks).unwrap() {
            let bytes = tokenizer.token_bytes(rank).unwrap();
            lines += &format!("{} {rank}\n", STANDARD.encode(bytes));
        }
        let special: Vec<(u32, &str)> = (0..)
            .zip(&tokens)
            .skip(ranks)
            .map(|(id, text)| (id, text.as_str()))
            .collect();
        let folder = original_folder(file, lines.as_bytes(), model_type, &special);
        let original = Tokenizer::from_folder(folder.path()).unwrap();
        require_ids(&original, &texts);
        assert_eq!(original.vocabulary_size(), tokens.len());
        let parsed = original.encode(special[0].1, PARSE).unwrap();
        assert_eq!(parsed, [special[0].0], "{name}");
    }
    let folder = original_folder("tiktoken.model", b"YQ== 0\n", "other", &[(1, "<s>")]);
    let error = Tokenizer::from_folder(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"other\"") && error.contains("expected that of a Kimi"),
        "{error}"
    );
}

/// Writes a number as protocol buffers do.
fn varint(mut value: usize, to: &mut Vec<u8>) {
    while value >= 128 {
        to.push(value as u8 | 128);
        value >>= 7;
    }
    to.push(value as u8);
}

/// Writes a field with bytes.
fn field(number: u8, bytes: &[u8], to: &mut Vec<u8>) {
    to.push(number << 3 | 2);
    varint(bytes.len(), to);
    to.extend_from_slice(bytes);
}

#[test]
fn a_model_of_sentencepiece_has_the_ids_of_the_same_gguf_file() {
    for name in ["ggml-vocab-llama-spm.gguf", "ggml-vocab-phi-3.gguf"] {
        let (vocabulary, texts) = reference(name);
        let mut model = sentencepiece_model(&vocabulary, 2);
        let folder = original_folder("tokenizer.model", &model, "llama", &[(1, "<s>")]);
        let original = Tokenizer::from_folder(folder.path()).unwrap();
        require_ids(&original, &texts);
        let framed = EncodeOptions {
            add_special: true,
            ..PLAIN
        };
        assert_eq!(original.encode("Hello", framed).unwrap()[0], 1, "{name}");
        model.truncate(model.len() - 1);
        std::fs::write(folder.path().join("tokenizer.model"), &model).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.model"), "{error}");
    }
}

/// Builds the `tokenizer.model` of a vocabulary of kind `model_type` (1: unigram, 2: BPE).
fn sentencepiece_model(vocabulary: &GgufVocabulary, model_type: u8) -> Vec<u8> {
    let mut model = Vec::new();
    for ((text, score), kind) in
        (vocabulary.tokens.iter().zip(&vocabulary.scores)).zip(&vocabulary.token_types)
    {
        let mut piece = Vec::new();
        field(1, text.as_bytes(), &mut piece);
        piece.push(2 << 3 | 5);
        piece.extend(score.to_le_bytes());
        piece.push(3 << 3);
        varint(usize::try_from(*kind).unwrap(), &mut piece);
        field(1, &piece, &mut model);
    }
    let mut trainer = vec![3 << 3, model_type];
    if let Some(unknown) = vocabulary.unk {
        varint(40 << 3, &mut trainer);
        varint(unknown as usize, &mut trainer);
    }
    field(2, &trainer, &mut model);
    let mut normalizer = Vec::new();
    if !vocabulary.character_map.is_empty() {
        field(2, &vocabulary.character_map, &mut normalizer);
    }
    field(3, &normalizer, &mut model);
    model
}

/// XLM-R's vocabulary, which multilingual embedding models have. The ids are those of SentencePiece
/// (`tests/clients/sentencepiece_ids.py`).
#[test]
fn a_unigram_model_with_a_map_of_characters_has_the_ids_of_sentencepiece() {
    let name = "target/references/vocabularies/ggml-vocab-nomic-bert-moe.gguf";
    let file = Gguf::open(&root().join(name)).expect("run scripts/fetch-references");
    let vocabulary = GgufVocabulary::from_file(&file).unwrap();
    let texts: Vec<_> = fixture("sentencepiece_unigram.json")
        .as_array()
        .unwrap()
        .iter()
        .map(|case| (case["text"].as_str().unwrap().to_owned(), ids(&case["ids"])))
        .collect();
    assert_eq!(texts.len(), 70);
    let model = sentencepiece_model(&vocabulary, 1);
    let special = [(0, "<s>"), (2, "</s>"), (3, "<unk>")];
    let folder = original_folder("tokenizer.model", &model, "xlm-roberta", &special);
    require_ids(&Tokenizer::from_folder(folder.path()).unwrap(), &texts);
    let tokenizer = vocabulary.into_tokenizer().unwrap();
    require_ids(&tokenizer, &texts);
    let framed = EncodeOptions {
        add_special: true,
        ..PLAIN
    };
    let framed = tokenizer.encode("ﬁne", framed).unwrap();
    assert_eq!((framed[0], framed.last()), (0, Some(&2)));
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

/// Renders twelve conversations with each template that `scripts/fetch-references` has fetched.
#[test]
fn chat_templates_of_other_models_render_like_jinja2() {
    let folder = root().join("target/references/templates");
    let hint = "run scripts/fetch-references and scripts/setup-clients";
    assert!(folder.exists(), "{hint}");
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
    let folder = root().join("target/references/templates");
    let known = |name: &str| {
        let path = folder.join(format!("{name}.jinja"));
        let source = std::fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("{}: {error}; run scripts/fetch-references", path.display())
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

/// Calls with every kind of value, of the tools of [`tools`].
fn calls() -> Value {
    let first = json!({
        "city": "São Paulo \"SP\", 1 < 2", "days": 3, "detailed": true, "units": ["mm", "°C"],
    });
    let call = |id: &str, name: &str, arguments: &Value| {
        json!({"id": id, "type": "function", "function": {
            "name": name, "arguments": arguments.to_string(),
        }})
    };
    Value::from(vec![
        call("abcdefgh1", "get_weather", &first),
        call("abcdefgh2", "now", &json!({"zone": "UTC"})),
    ])
}

/// Declares the tools of [`calls`].
fn tools() -> Value {
    let tool = |name: &str, properties: Value| {
        json!({"type": "function", "function": {
            "name": name,
            "description": "Returns it.",
            "parameters": {"type": "object", "properties": properties, "required": []},
        }})
    };
    Value::from(vec![
        tool(
            "get_weather",
            json!({
                "city": {"type": "string", "description": "The city."},
                "days": {"type": "integer", "description": "How many."},
                "detailed": {"type": "boolean", "description": "Whether."},
                "units": {"type": "array", "items": {"type": "string"}, "description": "Which."},
            }),
        ),
        tool(
            "now",
            json!({"zone": {"type": "string", "description": "The zone."}}),
        ),
    ])
}

/// Templates that write calls in a format that [`ToolFormat`] does not have.
const OTHER_FORMATS: [&str; 17] = [
    "Apertus-8B-Instruct",
    "Apriel-1.6-15b-Thinker-fixed",
    "GigaChat3-10B-A1.8B",
    "GigaChat3.1-10B-A1.8B",
    "Kimi-K3",
    "MiniMax-M1",
    "MiniMax-M3",
    "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-V4-Flash-0731",
    "deepseek-ai-DeepSeek-V4",
    "meetkai-functionary-medium-v3.1",
    "meetkai-functionary-medium-v3.2",
    "muse-glimmer",
    "openbmb-MiniCPM5-1B",
    "tencent-Hy3",
    "unsloth-Apriel-1.5",
    "upstage-Solar-Open-100B",
];

/// What a template writes for calls, the parser of its format reads from an answer as the same
/// calls.
#[test]
fn calls_as_templates_write_them_are_read_back() {
    let folder = root().join("target/references/templates");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("run scripts/fetch-references")
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jinja")
        })
        .collect();
    files.sort();
    let expected: Vec<(String, Value)> = (calls().as_array().unwrap().iter())
        .map(|call| {
            let function = &call["function"];
            let arguments = function["arguments"].as_str().unwrap();
            let name = function["name"].as_str().unwrap().to_owned();
            (name, serde_json::from_str(arguments).unwrap())
        })
        .collect();
    let (mut different, mut formats, mut others) = (Vec::new(), BTreeSet::new(), Vec::new());
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let source = std::fs::read_to_string(&file).unwrap();
        let template = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap();
        if !template.knows_calls() {
            continue;
        }
        // Some templates refuse several calls.
        let (written, count) = match written_calls(&template, calls()) {
            Ok(written) => (written, 2),
            Err(_) => {
                let first = Value::from(&calls().as_array().unwrap()[..1]);
                (written_calls(&template, first).unwrap(), 1)
            }
        };
        let found = read_calls(template.tool_format(), &written);
        if found == expected[..count] {
            formats.insert(template.tool_format().name());
        } else if OTHER_FORMATS.contains(&name) {
            others.push(name.to_owned());
        } else {
            let format = template.tool_format();
            different.push(format!("{name}, {format:?}: {written:?} is {found:?}"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    assert_eq!(others, OTHER_FORMATS);
    // No template writes Granite's calls, nor those of Pythonic as far as is fetched.
    assert_eq!(formats.len(), ToolFormat::ALL.len() - 2, "{formats:?}");
}

/// Returns what a template writes for an answer of these calls.
fn written_calls(template: &ChatTemplate, calls: Value) -> Result<String, TextError> {
    let user = Message::new("user", "What is the weather?");
    let mut answer = Message::new("assistant", "");
    answer.extra.insert("tool_calls".to_owned(), calls);
    let render = |messages: &[Message], add_generation_prompt| {
        let options = RenderOptions {
            add_generation_prompt,
            tools: Some(tools()),
            now: Some(UNIX_EPOCH),
            ..RenderOptions::default()
        };
        template.render(messages, &options)
    };
    let prompt = render(std::slice::from_ref(&user), true)?;
    let whole = render(&[user, answer], false)?;
    let same = prompt.chars().zip(whole.chars());
    let same = same.take_while(|(one, other)| one == other);
    let mut begin = same.map(|(c, _)| c.len_utf8()).sum();
    // The prompt may end with a mark that begins like that of the calls.
    if let Some(mark) = whole[..begin].rfind('<')
        && !whole[mark..begin].contains('>')
    {
        begin = mark;
    }
    Ok(whole[begin..].to_owned())
}

/// Returns the names and arguments of the calls in an answer.
fn read_calls(format: ToolFormat, answer: &str) -> Vec<(String, Value)> {
    let tools = tools();
    let tools = tools.as_array().unwrap().iter().map(|tool| {
        let function = &tool["function"];
        let name = function["name"].as_str().unwrap();
        ToolDeclaration::new(name, Some(function["parameters"].clone()))
    });
    let events = match format {
        // The first call begins in the prompt.
        ToolFormat::Harmony => {
            let mut parser = HarmonyParser::new(true);
            let events = parser.push(answer).into_iter().chain(parser.finish());
            let of_answer = |event| match event {
                HarmonyEvent::Answer(event) => Some(event),
                _ => None,
            };
            events.filter_map(of_answer).collect()
        }
        _ => {
            let mut parser = ToolParser::new(format, tools);
            let mut events = parser.push(answer);
            events.extend(parser.finish());
            events
        }
    };
    let mut calls: Vec<(String, String)> = Vec::new();
    for event in events {
        match event {
            ToolEvent::CallBegin { name, .. } => calls.push((name, String::new())),
            ToolEvent::CallArguments { index, delta } => calls[index].1.push_str(&delta),
            _ => {}
        }
    }
    let parsed = |text: String| serde_json::from_str(&text).unwrap_or(Value::Null);
    calls
        .into_iter()
        .map(|(name, arguments)| (name, parsed(arguments)))
        .collect()
}
