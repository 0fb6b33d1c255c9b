//! Compares quell's parsers of tool calls and reasoning with those of SMG (`tool-parser`,
//! `reasoning-parser`) and of NVIDIA Dynamo (`dynamo-parsers`) on generated answers.
//!
//! `make oracles` generates 300 answers per format, prints how often each parser returns what
//! was written, and shows the first answers about which a parser differs. It records answers
//! that a peer reads as they were written in `tests/fixtures/text/answers.jsonl`, which the
//! crate's unit tests read.

#[path = "../../../src/text/chat/tools/written.rs"]
mod written;

use dynamo_parsers::{ReasoningParser as _, ReasoningParserType};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use quell::{
    ReasoningFormat, ReasoningSplitter, ToolDeclaration, ToolEvent, ToolFormat, ToolParser,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Debug;
use written::{MARKS, Segment, any_segment, declared, written};

/// Parts of strings that a model may write as arguments.
const PLAIN: &[&str] = &["a", "é", " ", "Straße", "7", ".", "-", "日本", "true"];

/// Answers to record per format and kind.
const RECORDED: usize = 12;

/// What a parser makes of an answer: text without white space, and calls.
#[derive(Clone, Debug, Default, PartialEq)]
struct Parsed {
    text: String,
    calls: Vec<(String, Value)>,
}

impl Parsed {
    fn add_text(&mut self, text: &str) {
        self.text
            .extend(text.chars().filter(|c| !c.is_whitespace()));
    }

    /// Adds a call. Arguments that are no JSON are kept as text.
    fn add_call(&mut self, name: &str, arguments: &str) {
        let value = serde_json::from_str(arguments);
        let value = value.unwrap_or_else(|_| json!({ "not JSON": arguments }));
        self.calls.push((name.to_owned(), value));
    }
}

fn of_quell(format: ToolFormat, tools: &[ToolDeclaration], answer: &str) -> Parsed {
    let mut parser = ToolParser::new(format, tools.iter().cloned());
    let mut events = parser.push(answer);
    events.extend(parser.finish());
    let mut parsed = Parsed::default();
    let (mut open, mut json) = (None, String::new());
    for event in events {
        match event {
            ToolEvent::Text(text) => parsed.add_text(&text),
            ToolEvent::CallBegin { name, .. } => {
                open = Some(name);
                json.clear();
            }
            ToolEvent::CallArguments { delta, .. } => json.push_str(&delta),
            ToolEvent::CallEnd { .. } => parsed.add_call(&open.take().unwrap(), &json),
            _ => unreachable!("all events are known"),
        }
    }
    parsed
}

/// Name of SMG's parser of a format.
fn smg(format: ToolFormat) -> Option<&'static str> {
    Some(match format {
        ToolFormat::Hermes => "qwen",
        ToolFormat::Llama => "llama",
        ToolFormat::Mistral => "mistral",
        ToolFormat::Pythonic => "pythonic",
        ToolFormat::DeepSeek => "deepseek",
        ToolFormat::QwenCoder => "qwen_xml",
        ToolFormat::Glm => "glm45_moe",
        ToolFormat::MiniMax => "minimax_m2",
        ToolFormat::Kimi => "kimik2",
        ToolFormat::Gemma => "gemma4",
        ToolFormat::CommandR => "cohere",
        _ => return None,
    })
}

/// Name of Dynamo's parser of a format. Harmony is compared with OpenAI's own library, see
/// `tests/clients/harmony_prompts.py`.
fn dynamo(format: ToolFormat) -> Option<&'static str> {
    Some(match format {
        ToolFormat::Hermes => "hermes",
        ToolFormat::Llama => "llama3_json",
        ToolFormat::Mistral => "mistral",
        ToolFormat::Pythonic => "pythonic",
        ToolFormat::DeepSeek => "deepseek_v3",
        ToolFormat::Nemotron => "nemotron_deci",
        ToolFormat::QwenCoder => "qwen3_coder",
        ToolFormat::Glm => "glm47",
        ToolFormat::MiniMax => "minimax_m2",
        ToolFormat::Kimi => "kimi_k2",
        ToolFormat::Gemma => "gemma4",
        _ => return None,
    })
}

async fn of_smg(name: &str, tools: &[ToolDeclaration], answer: &str) -> Parsed {
    let tools: Vec<openai_protocol::common::Tool> = tools
        .iter()
        .map(|tool| {
            let function = json!({"name": tool.name, "parameters": tool.parameters});
            serde_json::from_value(json!({"type": "function", "function": function})).unwrap()
        })
        .collect();
    let factory = tool_parser::ParserFactory::new();
    let parser = factory.registry().create_parser(name).unwrap();
    let mut parsed = Parsed::default();
    match parser.parse_complete_with_tools(answer, &tools).await {
        Ok((text, calls)) => {
            parsed.add_text(&text);
            for call in calls {
                parsed.add_call(&call.function.name, &call.function.arguments);
            }
        }
        Err(error) => parsed.add_text(&format!("error: {error}")),
    }
    parsed
}

async fn of_dynamo(name: &str, tools: &[ToolDeclaration], answer: &str) -> Parsed {
    let tools: Vec<_> = tools
        .iter()
        .map(|tool| dynamo_parsers::ToolDefinition {
            name: tool.name.clone(),
            parameters: tool.parameters.clone(),
            strict: None,
        })
        .collect();
    let mut parsed = Parsed::default();
    match dynamo_parsers::parsers::detect_and_parse_tool_call_with_recovery(
        answer,
        Some(name),
        Some(&tools),
    )
    .await
    {
        Ok((calls, text)) => {
            parsed.add_text(&text.unwrap_or_default());
            for call in calls {
                parsed.add_call(&call.function.name, &call.function.arguments);
            }
        }
        Err(error) => parsed.add_text(&format!("error: {error}")),
    }
    parsed
}

/// An answer, the tools that it may call, and what it says.
struct Answer {
    text: String,
    tools: Vec<ToolDeclaration>,
    parsed: Parsed,
}

impl Answer {
    fn new(format: ToolFormat, segments: &[Segment]) -> Self {
        let (mut text, mut tools, mut parsed) = (String::new(), Vec::new(), Parsed::default());
        for segment in segments {
            match segment {
                Segment::Text(words) => {
                    text.push_str(words);
                    parsed.add_text(words);
                }
                Segment::Call(name, arguments) => {
                    text.push_str(&written(format, name, arguments));
                    tools.push(declared(name, arguments));
                    parsed.calls.push((name.clone(), arguments.clone()));
                }
            }
        }
        Self {
            text,
            tools,
            parsed,
        }
    }
}

/// Generates a call, or a text and a call: the peers drop text that follows a call.
fn any_segments(parts: &'static [&'static str]) -> impl Strategy<Value = Vec<Segment>> {
    proptest::collection::vec(any_segment(parts), 1..4).prop_filter_map("no call", |segments| {
        let call = |segment: &Segment| matches!(segment, Segment::Call(..));
        let end = segments.iter().position(call)?;
        Some(segments[end.saturating_sub(1)..=end].to_vec())
    })
}

/// Counts how often parsers return what was written, and keeps the first differences.
#[derive(Default)]
struct Agreement {
    same: BTreeMap<&'static str, usize>,
    differences: Vec<(&'static str, String)>,
}

impl Agreement {
    fn add<T: PartialEq + Debug>(
        &mut self,
        parser: &'static str,
        text: &str,
        found: &T,
        written: &T,
    ) -> bool {
        let same = self.same.entry(parser).or_default();
        if found == written {
            *same += 1;
            return true;
        }
        let shown = self.differences.iter();
        if shown.filter(|(of, _)| *of == parser).count() < 2 {
            let difference =
                format!("{text:?}\n      read    {found:?}\n      written {written:?}");
            self.differences.push((parser, difference));
        }
        false
    }

    fn print(&self, format: &str, kind: &str, count: usize) {
        let counts: Vec<_> = self
            .same
            .iter()
            .map(|(parser, same)| format!("{parser} {same}"))
            .collect();
        println!(
            "{format:11} {kind:6} {count} answers: {}",
            counts.join(", ")
        );
        for (parser, difference) in &self.differences {
            println!("  {parser}: {difference}");
        }
    }
}

async fn compare_calls(count: usize) -> Vec<Value> {
    let mut recorded = Vec::new();
    for format in ToolFormat::ALL {
        for (kind, parts) in [("plain", PLAIN), ("marks", MARKS)] {
            let mut runner = TestRunner::deterministic();
            let segments = any_segments(parts);
            let mut agreement = Agreement::default();
            let mut left = RECORDED;
            for _ in 0..count {
                let segments = segments.new_tree(&mut runner).unwrap().current();
                let Answer {
                    text,
                    tools,
                    parsed,
                } = &Answer::new(format, &segments);
                let mut peers = Vec::new();
                agreement.add("quell", text, &of_quell(format, tools, text), parsed);
                if let Some(name) = smg(format) {
                    let found = of_smg(name, tools, text).await;
                    if agreement.add("SMG", text, &found, parsed) {
                        peers.push("SMG");
                    }
                }
                if let Some(name) = dynamo(format) {
                    let found = of_dynamo(name, tools, text).await;
                    if agreement.add("Dynamo", text, &found, parsed) {
                        peers.push("Dynamo");
                    }
                }
                if !peers.is_empty() && left > 0 {
                    left -= 1;
                    let tools = tools.iter().map(|tool| json!([tool.name, tool.parameters]));
                    recorded.push(json!({
                        "format": format.name(), "peers": peers, "answer": text,
                        "tools": tools.collect::<Vec<_>>(), "text": parsed.text,
                        "calls": parsed.calls,
                    }));
                }
            }
            agreement.print(format.name(), kind, count);
        }
    }
    recorded
}

/// Formats of reasoning, with the names of SMG's and Dynamo's parsers.
const REASONING: [(ReasoningFormat, Option<&str>, Option<&str>); 4] = [
    (ReasoningFormat::THINK, Some("qwen3"), Some("qwen3")),
    (ReasoningFormat::MISTRAL, None, Some("mistral")),
    (ReasoningFormat::COMMAND_R, Some("cohere_cmd"), None),
    (ReasoningFormat::GEMMA, Some("gemma4"), Some("gemma4")),
];

/// Returns reasoning and content without the white space around them.
fn split(reasoning: &str, content: &str) -> [String; 2] {
    [reasoning.trim().to_owned(), content.trim().to_owned()]
}

fn compare_reasoning(count: usize) -> Vec<Value> {
    let mut recorded = Vec::new();
    let words = || proptest::collection::vec(proptest::sample::select(PLAIN), 1..8);
    let space = || proptest::sample::select(&["", "\n", "\n\n"]);
    for (format, smg, dynamo) in REASONING {
        let mut runner = TestRunner::deterministic();
        let answers = (words(), words(), space(), space());
        let mut agreement = Agreement::default();
        for place in 0..count {
            let (reasoning, content, before, after) =
                answers.new_tree(&mut runner).unwrap().current();
            let (reasoning, content) = (reasoning.join(" "), content.join(" "));
            let text = &format!(
                "{}\n{reasoning}{before}{}{after}{content}",
                format.open, format.close
            );
            let written = &split(&reasoning, &content);
            let mut peers = Vec::new();

            let mut splitter = ReasoningSplitter::new(format);
            let (found, rest) = (splitter.push(text), splitter.finish());
            let reasoning = found.reasoning + &rest.reasoning;
            let content = found.content + &rest.content;
            agreement.add("quell", text, &split(&reasoning, &content), written);
            if let Some(name) = smg {
                let factory = reasoning_parser::ParserFactory::new();
                let mut parser = factory.registry().create_parser(name).unwrap();
                let found = parser.detect_and_parse_reasoning(text).unwrap();
                let found = split(&found.reasoning_text, &found.normal_text);
                if agreement.add("SMG", text, &found, written) {
                    peers.push("SMG");
                }
            }
            if let Some(name) = dynamo {
                let mut parser = ReasoningParserType::get_reasoning_parser_from_name(name);
                let found = parser.detect_and_parse_reasoning(text, &[]);
                let found = split(&found.reasoning_text, &found.normal_text);
                if agreement.add("Dynamo", text, &found, written) {
                    peers.push("Dynamo");
                }
            }
            if !peers.is_empty() && place < RECORDED {
                let [reasoning, content] = written;
                recorded.push(json!({
                    "open": format.open, "peers": peers, "answer": text,
                    "reasoning": reasoning, "content": content,
                }));
            }
        }
        agreement.print(format.open, "", count);
    }
    recorded
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut write = false;
    let mut count = 300;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--write" => write = true,
            number => count = number.parse().expect("COUNT is a number"),
        }
    }
    let calls = compare_calls(count).await;
    let reasoning = compare_reasoning(count);
    if write {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../fixtures/text/answers.jsonl"
        );
        let lines = calls.iter().chain(&reasoning);
        let lines: Vec<_> = lines.map(|line| format!("{line}\n")).collect();
        std::fs::write(path, lines.concat()).unwrap();
    }
}
